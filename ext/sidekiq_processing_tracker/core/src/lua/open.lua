-- open: a slot has a new connection, and a new hand with it. What its old hands hold is recorded where the instance knows of it,
-- else it goes back; and nothing comes into those any more.
-- KEYS: inflight hands queues queue, then the old hands   ARGV: queue, number of the new hand, then of each old one: its number,
--       and the index of the job that the instance knows of ('' where there is none)
-- Answers: 'lost'; or 'open', then of each old hand the token of that job ('' where there is none)
local inflight, hands, queues, queue_key, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]

local call = lease_of(inflight)
if not call then return {'lost'} end
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
redis.call('HSET', hands, ARGV[2], queue)
local answer = {'open'}
for i = 5, #KEYS do
  local hand, number, index = KEYS[i], ARGV[2 * i - 7], ARGV[2 * i - 6]
  local token = index ~= '' and record_known(hand, inflight, call, index, queue)
  if empty(hand, queue_key, queues, queue) then
    close(hand)
    redis.call('HDEL', hands, number)
  end
  answer[#answer + 1] = token or ''
end
return answer
