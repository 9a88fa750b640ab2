-- leave: a clean exit. Acks, puts back what the instance still holds, gives up the lease and deregisters.
-- KEYS: instances inflight info queues [queue key]...
-- ARGV: identity, acks n, then n tokens, requeues n, then n times: token, queue key (index in KEYS), queue
-- Answers: 'lost', or 'left' and how many jobs stay for the next reaper
local instances, inflight, info, queues = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity = ARGV[1]
local position = 1
local function take()
  position = position + 1
  return ARGV[position]
end

if redis.pcall('HEXISTS', inflight, 'call') ~= 1 then return {'lost'} end
for _ = 1, tonumber(take()) do
  redis.call('HDEL', inflight, take())
end
redis.call('HDEL', inflight, '-')
for _ = 1, tonumber(take()) do
  local token, key, queue = take(), KEYS[tonumber(take())], take()
  give_back(inflight, token, key, queues, queue)
end
redis.call('HDEL', inflight, 'call')
local left = redis.call('HLEN', inflight)
if left == 0 then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info)
else
  redis.call('ZADD', instances, 0, identity)
end
return {'left', left}
