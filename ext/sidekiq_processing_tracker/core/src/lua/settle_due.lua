-- settle_due: what an instance has made of due jobs that it has claimed.
-- KEYS: inflight due queues, then as ARGV says
-- ARGV: for each job: token, how it ends ('queue': pushed, 'set': scheduled anew, '': nothing more of it), the key it goes
--       to (index in KEYS; 0 for none), the queue's name or the score, the payload
-- Answers: 'lost', or 'ok' and for each 1 (done, by this call), 0 (it was not there any more) or -1 (the key holds something
--       else: it stays)
local inflight, due, queues = KEYS[1], KEYS[2], KEYS[3]

if not lease_of(inflight) then return {'lost'} end
redis.call('HDEL', due, '-')
local answer, known = {'ok'}, {}
for i = 1, #ARGV, 5 do
  local token, ends, key, name, payload = ARGV[i], ARGV[i + 1], KEYS[tonumber(ARGV[i + 2])], ARGV[i + 3], ARGV[i + 4]
  local outcome = 0
  if redis.call('HEXISTS', due, token) == 1 then
    local done
    if ends == 'queue' then
      done = redis.pcall('LPUSH', key, payload)
      if type(done) == 'number' and not known[name] then
        redis.pcall('SADD', queues, name)
        known[name] = true
      end
    elseif ends == 'set' then
      done = redis.pcall('ZADD', key, name, payload)
    end
    outcome = type(done) == 'table' and -1 or 1
    if outcome == 1 then redis.call('HDEL', due, token) end
  end
  answer[#answer + 1] = outcome
end
return answer
