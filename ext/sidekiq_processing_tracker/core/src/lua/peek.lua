-- peek: reads what tokens hold.
-- KEYS: inflight   ARGV: tokens   Answers: the server's time in ms, then payload or nil for each token, for as many as fit 1 MB
local time = redis.call('TIME')
local answer = {time[1] * 1000 + math.floor(time[2] / 1000)}
for i, payload in ipairs(payloads_of(KEYS[1], ARGV)) do answer[i + 1] = payload end
return answer
