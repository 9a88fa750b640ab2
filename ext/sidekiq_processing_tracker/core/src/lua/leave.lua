-- leave: a clean exit. Acks, puts back what the instance still holds, gives up the lease and deregisters.
-- KEYS: instances inflight info queues due hands, the indexes in which it stands, [queue key]...
-- ARGV: identity, what the keys of queues begin with, indexes n, quiet hands n, then n numbers, acks n, then n tokens,
--       acks n of jobs whose tokens are not known, then n times: number of the hand, index, SHA1 of the payload, queue,
--       requeues n, then n times: token, queue key (index in KEYS), queue
-- Answers: 'lost', or 'left' and how many jobs stay for the next reaper
local instances, inflight, info, queues, due, hands = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local identity, queue_prefix, indexes = ARGV[1], ARGV[2], tonumber(ARGV[3])
local position = 3
local function take()
  position = position + 1
  return ARGV[position]
end

local call = lease_of(inflight)
if not call then return {'lost'} end
local quiet = {}
for _ = 1, tonumber(take()) do
  quiet[take()] = true
end
for _ = 1, tonumber(take()) do
  drop(inflight, {take()})
end
redis.call('HDEL', inflight, '-')
for _ = 1, tonumber(take()) do
  local token = record_known(hands .. ':' .. take(), inflight, call, take(), take(), take())
  if token then drop(inflight, {token}) end
end
for _ = 1, tonumber(take()) do
  local token, key, queue = take(), KEYS[tonumber(take())], take()
  give_back(inflight, token, key, queues, queue)
end
seize(inflight, hands, call, quiet)
-- Jobs that a blocking claim has brought (their numbers begin at 2^32), and of which the instance has not heard.
for _, token in ipairs(redis.call('HKEYS', inflight)) do
  local index, queue = string.match(token, '^%d+%-(%d+) %d+ (.*)$')
  if index and tonumber(index) >= 4294967296 then give_back(inflight, token, queue_prefix .. queue, queues, queue) end
end
redis.call('HDEL', inflight, 'call')
local left = redis.call('HLEN', inflight)
-- What its scheduler has not put back, if anything: the number of its last claim is nothing.
local scheduled = redis.pcall('HLEN', due)
if type(scheduled) == 'number' then left = left + scheduled - redis.call('HEXISTS', due, 'call') end
if left == 0 then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info, due)
  for i = 7, 6 + indexes do redis.pcall('HDEL', KEYS[i], identity) end
else
  redis.call('ZADD', instances, 0, identity)
end
return {'left', left}
