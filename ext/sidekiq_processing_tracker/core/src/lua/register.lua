-- register: an instance begins. Sent once for each nonce.
-- KEYS: clock instances inflight info   ARGV: identity step ttl [info field, value]...
-- Answers: step ttl (those that hold from now on)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity, new_step, new_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

redis.call('ZCARD', instances) -- raises where that key holds something else, before anything is written
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
local now, step, ttl, _, server = tick(clock, instances, new_step, new_ttl)
if step ~= new_step or ttl ~= new_ttl then
  redis.call('HSET', clock, 'step', new_step, 'ttl', new_ttl)
  -- The clock may take longer steps now, and the others learn of it with their next beat only: a running lease must
  -- last until then. It is never made shorter, so theirs covers what they still work by.
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', instances, '(' .. string.format('%.0f', now), '+inf')) do
    redis.call('ZADD', instances, 'GT', now + new_ttl, other)
  end
end
redis.call('HSET', inflight, 'call', 0)
redis.call('ZADD', instances, now + new_ttl, identity)
redis.call('HSET', info, 'started_at', server)
for i = 4, #ARGV, 2 do
  redis.call('HSET', info, ARGV[i], ARGV[i + 1])
end
return {new_step, new_ttl}
