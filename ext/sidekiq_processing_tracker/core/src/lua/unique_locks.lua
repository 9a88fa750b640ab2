-- The locks of sidekiq-unique-jobs (docs/protocol.md, "Unique locks"). Put before the scripts that settle them.
--
-- Each lock is five keys beside each other in KEYS: D, D:QUEUED, D:PRIMED, D:LOCKED and D:INFO, where D is its digest, or
-- the digest and :RUN for the runtime lock. Versions 7 and 8 use them all, 9 only D:LOCKED: the holders, a field each.
-- Whatever lies under these keys is another program's: every call in here may raise.
local digests, expiring_digests = 'uniquejobs:digests', 'uniquejobs:expiring_digests'

local function lock_at(first)
  return {
    name = KEYS[first], queued = KEYS[first + 1], primed = KEYS[first + 2], locked = KEYS[first + 3], info = KEYS[first + 4]
  }
end

local function is_held_by_others(lock, jid, limit)
  return redis.call('HEXISTS', lock.locked, jid) == 0 and redis.call('HLEN', lock.locked) >= limit
end

-- As that gem takes it. The string D belongs to versions 7 and 8, which have one for the runtime lock too; 9 would leave
-- it behind.
local function take_again(lock, runtime, jid, ttl, seconds)
  if redis.call('HEXISTS', lock.locked, jid) == 1 then return false end
  redis.call('HSET', lock.locked, jid, seconds)
  redis.call('ZADD', digests, seconds, lock.name)
  if redis.call('EXISTS', runtime.name) == 1 then redis.call('SET', lock.name, jid) end
  if ttl > 0 then
    for _, key in ipairs({lock.name, lock.locked, lock.info}) do redis.call('PEXPIRE', key, ttl) end
  end
  return true
end

-- Takes back all that a job holds of a lock, and the lock itself where nobody else holds it or is about to. Answers how
-- much that was.
local function give_up(lock, jid)
  local freed = redis.call('HDEL', lock.locked, jid) + redis.call('LREM', lock.queued, 0, jid) +
    redis.call('LREM', lock.primed, 0, jid)
  if redis.call('GET', lock.name) == jid then freed = freed + redis.call('DEL', lock.name) end
  if redis.call('EXISTS', lock.locked, lock.name) == 0 then
    freed = freed + redis.call('DEL', lock.info) + redis.call('ZREM', digests, lock.name) +
      redis.call('ZREM', expiring_digests, lock.name)
  end
  return freed
end

-- Removes a lock, whoever holds it. Answers how much that was.
local function remove(lock)
  return redis.call('DEL', lock.name, lock.queued, lock.primed, lock.locked, lock.info) +
    redis.call('ZREM', digests, lock.name) + redis.call('ZREM', expiring_digests, lock.name)
end

