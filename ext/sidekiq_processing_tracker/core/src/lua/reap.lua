-- reap: takes the lease of an instance whose lease has run out (fences it) and holds it for this reaper.
-- KEYS: clock instances [inflight info]   ARGV: step ttl identity ('' asks for one that is due) hold lease_end ('' or, with
--       the proof of a death, the lease end read before the proof)
-- Answers: without an identity 'due' and the identity ('' for none); else 'gone', 'runs', 'overwritten' (its hash is
--       none), or 'reaped' and the fields of its in-flight hash
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity = ARGV[3]

redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
if identity == '' then
  local now = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
  return {'due', redis.call('ZRANGEBYSCORE', instances, '-inf', now, 'LIMIT', 0, 1)[1] or ''}
end

local now, step, ttl = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
local lease_end = redis.call('ZSCORE', instances, identity)
if not lease_end then return {'gone'} end
if tonumber(lease_end) > now and not (ARGV[5] ~= '' and tonumber(ARGV[5]) == tonumber(lease_end)) then
  return {'runs'}
end
local held_until = now + math.min(2 * step, tonumber(ARGV[4]))
local kind = redis.call('TYPE', inflight).ok
if kind ~= 'hash' and kind ~= 'none' then
  -- It must not be named before all others for ever.
  redis.call('ZADD', instances, held_until, identity)
  return {'overwritten'}
end
redis.call('HDEL', inflight, 'call')
local fields = redis.call('HKEYS', inflight)
if #fields == 0 then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info)
  return {'gone'}
end
redis.call('ZADD', instances, held_until, identity)
table.insert(fields, 1, 'reaped')
return fields
