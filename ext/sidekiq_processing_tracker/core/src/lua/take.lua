-- take: records what a blocking claim has brought, and goes before the next one: without a lease, or where this hand is a closed
-- one, it closes the hand, so that the claim behind it takes nothing.
-- KEYS: inflight hands hand queue queues counted   ARGV: the hand's number, queue, index (of the token; '' where nothing was brought)
-- Answers: 'lost'; 'closed'; 'none' (nothing was there to record); or 'taken', the token, how many more jobs the queue has, and
--       whether any job has a counter (1 or 0)
local inflight, hands, hand, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local number, name, index = ARGV[1], ARGV[2], ARGV[3]

local call = lease_of(inflight)
if not call then
  redis.pcall('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
  -- Who takes a lease has closed the hands with it. But somebody may just have removed the instance's keys.
  empty(hand, queue, KEYS[5], name)
  close(hand)
  return {'lost'}
end
local token = index ~= '' and record(hand, inflight, call, index, name)
if answer_of('HEXISTS', hands, number) ~= 1 then
  if not token then
    redis.call('HDEL', inflight, '-')
    close(hand)
    return {'closed'}
  end
  -- Somebody has removed the list of hands, since a closed one holds nothing.
  if not answer_of('HSET', hands, number, name) then
    redis.call('DEL', hands)
    redis.call('HSET', hands, number, name)
  end
end
if not token then return {'none'} end
local more = redis.pcall('LLEN', queue)
return {'taken', token, type(more) == 'number' and more or 0, redis.call('EXISTS', KEYS[6])}
