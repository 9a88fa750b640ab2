-- peek: reads what tokens hold, up to 1 MB but not less than one, so that the reply fits the read timeout.
-- KEYS: inflight   ARGV: tokens   Answers: the server's time in ms, then payload or nil for each token, for as many as fit
local time = redis.call('TIME')
local answer, bytes = {time[1] * 1000 + math.floor(time[2] / 1000)}, 0
for i, token in ipairs(ARGV) do
  local list, payload = list_of(KEYS[1], token), false
  if list then payload = payload_of(KEYS[1], token) end
  if payload == nil then payload = redis.call('LINDEX', list, 0) end -- raises what Redis says
  local size = payload and #payload or redis.call('HSTRLEN', KEYS[1], token)
  if i > 1 and bytes + size > 1048576 then break end
  bytes = bytes + size
  answer[i + 1] = payload or payload_of(KEYS[1], token)
end
return answer
