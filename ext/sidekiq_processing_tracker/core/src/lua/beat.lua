-- beat: renews the lease, moves the clock, and names an instance whose lease has run out.
-- KEYS: clock instances inflight info [the index of its host]
-- ARGV: identity step ttl (those its sender works by) progress ('1': Ruby has made progress since the last stamp)
-- Answers: 'lost', or 'ok' step ttl hosted (how many instances are on its host, -1 where nobody knows) instances [due] (the
--       last only when the clock moved; '' for none)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

if not lease_of(inflight) then return {'lost'} end
local function renew()
  local now, step, ttl, moved, server = tick(clock, instances, tonumber(ARGV[2]), tonumber(ARGV[3]))
  -- The sender works by its own ttl until it has read this answer, which may be lost.
  redis.call('ZADD', instances, now + math.max(ttl, tonumber(ARGV[3])), ARGV[1])
  return now, step, ttl, moved, server
end
local renewed, now, step, ttl, moved, server = pcall(renew)
if not renewed then
  -- A write that Redis allows when its memory is full: after that it allows the script all others. Else a command too many for so
  -- frequent a script. Whatever else it was is raised again.
  redis.call('HDEL', inflight, '-')
  now, step, ttl, moved, server = renew()
end
-- A note for people: without it the lease is renewed all the same.
if ARGV[4] == '1' then redis.pcall('HSET', info, 'progress', server) end
local hosted = KEYS[5] and redis.pcall('HLEN', KEYS[5])
if type(hosted) ~= 'number' then hosted = -1 end
local count = redis.call('ZCARD', instances)
if not moved then return {'ok', step, ttl, hosted, count} end
local due = redis.call('ZRANGEBYSCORE', instances, '-inf', now, 'LIMIT', 0, 1)
return {'ok', step, ttl, hosted, count, due[1] or ''}
