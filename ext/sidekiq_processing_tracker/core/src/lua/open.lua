-- open: a slot has a new connection, and a new hand with it. What its old hands hold is recorded where the instance knows of it,
-- else it goes back; and nothing comes into those any more.
-- KEYS: inflight hands queues queue, then the old hands   ARGV: queue, number of the new hand, then of each old one: its number, and
--       of the job that the instance knows of: index ('' where there is none), SHA1 of the payload
-- Answers: 'lost'; or 'open', then of each old hand the token of that job ('' where there is none), and whether it is closed (1 or 0)
local inflight, hands, queues, queue_key, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]

local call = lease_of(inflight)
if not call then return {'lost'} end
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
if not answer_of('HSET', hands, ARGV[2], queue) then
  -- Somebody has overwritten it. What it said is gone anyway.
  redis.call('DEL', hands)
  redis.call('HSET', hands, ARGV[2], queue)
end
local answer = {'open'}
for i = 5, #KEYS do
  local hand, at = KEYS[i], 3 * (i - 4)
  local number, index, sha1 = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local token = index ~= '' and record_known(hand, inflight, call, index, sha1, queue)
  local is_empty = empty(hand, queue_key, queues, queue)
  if is_empty then
    close(hand)
    redis.call('HDEL', hands, number)
  end
  answer[#answer + 1] = token or ''
  answer[#answer + 1] = is_empty and 1 or 0
end
return answer
