-- register: an instance begins. Sent once for each nonce.
-- KEYS: clock instances inflight info   ARGV: identity step ttl [info field, value]...
-- Answers: step ttl (those that hold from now on)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity, new_step, new_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

redis.call('ZCARD', instances) -- raises where that key holds something else, before anything is written
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
local now, step, ttl, _, server = tick(clock, instances, new_step, new_ttl)
if step ~= new_step or ttl ~= new_ttl then
  -- The others learn the new step with their next beat, so each running lease must last until then.
  redis.call('HSET', clock, 'step', new_step, 'ttl', new_ttl)
  local until_beat = now + math.max(ttl, new_ttl)
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', instances, '(' .. string.format('%.0f', now), '+inf')) do
    redis.call('ZADD', instances, until_beat, other)
  end
end
redis.call('HSET', inflight, 'call', 0)
redis.call('ZADD', instances, now + new_ttl, identity)
redis.call('HSET', info, 'started_at', server)
for i = 4, #ARGV, 2 do
  redis.call('HSET', info, ARGV[i], ARGV[i + 1])
end
return {new_step, new_ttl}
