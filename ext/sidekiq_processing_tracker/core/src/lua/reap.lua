-- reap: takes the lease of an instance whose lease has run out (fences it) and holds it for this reaper.
-- KEYS: clock instances [inflight info due hands queues]   ARGV: step ttl identity ('' asks for one that is due) hold lease_end ('' or, with
--       the proof of a death, the lease end read before the proof) by process_ended ('1' where that proof is that its
--       process has ended, else ''), what the keys of queues begin with
-- Answers: without an identity 'due' and identities, up to 16; else 'gone', 'runs', 'overwritten' (its hash is none), or
--       'reaped', now, when it was fenced, when the last suspect left ('' for never) (all on the lease clock), three lists
--       (its info, the fields of its in-flight hash, and what these hold, or none where that is more than 200 or 1 MB),
--       whether its scheduler has left anything (1 or 0), and the server's time in ms
local clock, instances, inflight, info, due, hands = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local identity = ARGV[3]

redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
if identity == '' then
  local now = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
  return {'due', unpack(redis.call('ZRANGEBYSCORE', instances, '-inf', now, 'LIMIT', 0, 16))}
end

local now, step, ttl, _, server = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
local lease_end = redis.call('ZSCORE', instances, identity)
if not lease_end then return {'gone'} end
local kind = redis.call('TYPE', inflight).ok
local proven = ARGV[5] ~= '' and tonumber(ARGV[5]) == tonumber(lease_end)
if tonumber(lease_end) > now and not proven then
  -- The reaper may ask again, when it got no answer: then the hold is its own.
  local held = kind == 'hash' and redis.call('HEXISTS', inflight, 'call') == 0
  if not (held and redis.pcall('HGET', info, 'reaper') == ARGV[6]) then return {'runs'} end
end
local held_until = now + math.min(2 * step, tonumber(ARGV[4]))
if kind ~= 'hash' and kind ~= 'none' then
  -- It must not be named before all others for ever.
  redis.call('ZADD', instances, held_until, identity)
  local open = answer_of('HGETALL', hands) or {}
  for i = 1, #open, 2 do
    local hand, queue = hands .. ':' .. open[i], open[i + 1]
    empty(hand, ARGV[8] .. queue, KEYS[7], queue)
    close(hand)
  end
  return {'overwritten'}
end
seize(inflight, hands, redis.call('HGET', inflight, 'call') or '0', {})
redis.call('HDEL', inflight, 'call')
local kind_of_info = redis.call('TYPE', info).ok
-- Somebody has overwritten it. What it said is gone anyway.
if kind_of_info ~= 'hash' and kind_of_info ~= 'none' then redis.call('DEL', info) end
local fields = redis.call('HKEYS', inflight)
-- What else is to go has names that only the caller can give: the ghost of the process in Sidekiq's own keys, the entries
-- in indexes, what the scheduler has left. Then recover removes the instance.
local named = redis.call('HMGET', info, 'sidekiq_identity', 'host', 'exclusive')
local scheduled = redis.call('EXISTS', due)
if #fields == 0 and scheduled == 0 and not (named[1] or named[2] or named[3]) then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info)
  return {'gone'}
end
redis.call('ZADD', instances, held_until, identity)
local fenced_at = tonumber(redis.call('HGET', info, 'fenced_at') or '')
if not (readable(fenced_at, 0) and fenced_at <= now) then fenced_at = now end
redis.call('HSET', info, 'reaper', ARGV[6], 'fenced_at', fenced_at)
-- For whoever recovers the last of it, who may be another reaper.
if proven and ARGV[7] == '1' then redis.call('HSET', info, 'process_ended', 1) end
local released_at = tonumber(redis.call('HGET', info, 'released_at') or '')
if not (readable(released_at, 0) and released_at <= now) then released_at = '' end
-- Where they cannot be read, peek says why.
local ok, payloads = pcall(payloads_of, inflight, #fields <= 200 and fields or {}, true)
if not ok or #payloads < #fields then payloads = {} end
return {'reaped', now, fenced_at, released_at, redis.call('HGETALL', info), fields, payloads, scheduled, server}
