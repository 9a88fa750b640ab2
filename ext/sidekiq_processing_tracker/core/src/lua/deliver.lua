-- deliver: puts jobs into Sidekiq's queue or dead set where that is another Redis than the tracker's. Sent there.
-- KEYS: queue key queues dead, the indexes of sidekiq-unique-jobs digests and expiring_digests, then as ARGV says
-- ARGV: where to ('requeue', 'requeue_last', 'dead'), queue, dead_timeout (ms), dead_max_jobs, then for each job: payload, jid,
--       score ('' but for the dead set), lock, its ten keys (index in KEYS of the first), limit, lock_ttl (these four as for
--       recover)
-- Answers: how many entries the dead set lost, then an outcome for each: 'done', 'superseded' (others hold its lock), 'stuck' (something else lies there)
local key, queues, dead = KEYS[1], KEYS[2], KEYS[3]
local where, queue, dead_timeout, dead_max_jobs = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local server = time[1] * 1000 + math.floor(time[2] / 1000)
local seconds = string.format('%.3f', server / 1000)

local function deliver(payload, score, lock)
  if where == 'dead' then
    if type(redis.pcall('ZADD', dead, score, payload)) == 'table' then return 'stuck' end
    if lock.kind ~= '' then pcall(function() return give_up(lock.queueing, lock.jid) + give_up(lock.runtime, lock.jid) end) end
    return 'done'
  end
  if lock.kind == 'checked' or lock.kind == 'taken' then
    local ok, held = pcall(is_held_by_others, lock.queueing, lock.jid, lock.limit)
    if ok and held then
      pcall(function() return give_up(lock.queueing, lock.jid) + give_up(lock.runtime, lock.jid) end)
      return 'superseded'
    end
  end
  if not push(key, queues, queue, {payload}, where == 'requeue_last') then return 'stuck' end
  if lock.kind == 'taken' then pcall(take_again, lock.queueing, lock.runtime, lock.jid, lock.ttl, seconds) end
  return 'done'
end

local outcomes, trimmed = {}, 0
for i = 5, #ARGV, 7 do
  local lock = {kind = ARGV[i + 3], jid = ARGV[i + 1]}
  if lock.kind ~= '' then
    local first = tonumber(ARGV[i + 4])
    lock.queueing, lock.runtime = lock_at(first), lock_at(first + 5)
    lock.limit, lock.ttl = tonumber(ARGV[i + 5]), tonumber(ARGV[i + 6])
  end
  outcomes[#outcomes + 1] = deliver(ARGV[i], ARGV[i + 2], lock)
end
if where == 'dead' then trimmed = trim_dead_set(dead, server, dead_timeout, dead_max_jobs) end
return {trimmed, unpack(outcomes)}
