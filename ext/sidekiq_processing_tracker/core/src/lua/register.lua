-- register: an instance begins. Sent once for each nonce.
-- KEYS: clock instances inflight info, then the indexes in which it stands   ARGV: identity step ttl [info field, value]...
-- Answers: step ttl (those that hold from now on)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity, new_step, new_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

redis.call('ZCARD', instances) -- raises where that key holds something else, before anything is written
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
local now, step, ttl, _, server = tick(clock, instances, new_step, new_ttl)
if step ~= new_step or ttl ~= new_ttl then
  -- The others learn it with their next beat only. Until then their leases must bear the clock's steps, so it goes on in
  -- the old ones until the last of these leases ends. No lease is touched: a dead instance must not live longer by it.
  local clamp = redis.call('HMGET', clock, 'clamp', 'clamp_until')
  local most = step
  if readable(tonumber(clamp[1]), 1) and readable(tonumber(clamp[2]), 0) and now < tonumber(clamp[2]) then
    most = math.min(most, tonumber(clamp[1]))
  end
  if new_step > most then
    local last = redis.call('ZRANGE', instances, -1, -1, 'WITHSCORES')[2] or now
    redis.call('HSET', clock, 'clamp', most, 'clamp_until', last)
  else
    redis.call('HDEL', clock, 'clamp', 'clamp_until')
  end
  redis.call('HSET', clock, 'step', new_step, 'ttl', new_ttl)
end
redis.call('HSET', inflight, 'call', 0)
redis.call('ZADD', instances, now + new_ttl, identity)
redis.call('HSET', info, 'started_at', server)
for i = 4, #ARGV, 2 do
  redis.call('HSET', info, ARGV[i], ARGV[i + 1])
end
-- For a look at once, not for a promise: a key that somebody has overwritten does not keep anybody from working.
for i = 5, #KEYS do redis.pcall('HSET', KEYS[i], identity, index_entry(info)) end
return {new_step, new_ttl}
