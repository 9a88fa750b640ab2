-- legacy_reap: holds an instance of the 1.0 gem whose lease has run out, if it is still without a heartbeat.
-- KEYS: clock instances jobs heartbeat   ARGV: step ttl identity hold
-- Answers: 'gone' (not listed, or no jobs), 'runs' (its lease, or another's hold), 'alive' (its heartbeat is back),
--       'overwritten' (one of its keys is not of 1.0's type), or 'reaped', until when it is held, and the ids of its jobs
local clock, instances, jobs, heartbeat = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local identity = ARGV[3]

redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
local now, step = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
local lease_end = redis.call('ZSCORE', instances, identity)
if not lease_end then return {'gone'} end
if tonumber(lease_end) > now then return {'runs'} end
local standing = standing_of(jobs, heartbeat)
if standing ~= 'dead' then
  redis.call('ZREM', instances, identity)
  return {standing}
end
local held_until = string.format('%.0f', now + math.min(2 * step, tonumber(ARGV[4])))
redis.call('ZADD', instances, held_until, identity)
local answer = redis.call('SMEMBERS', jobs)
table.insert(answer, 1, held_until)
table.insert(answer, 1, 'reaped')
return answer
