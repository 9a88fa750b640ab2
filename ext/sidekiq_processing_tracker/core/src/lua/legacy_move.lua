-- legacy_move: settles jobs of a dead instance of the 1.0 gem, each as decided, removes what 1.0 has of them, and journals
-- what was done.
-- KEYS: clock instances jobs heartbeat stats journal, Sidekiq's queues and dead, the indexes of sidekiq-unique-jobs digests
--       and expiring_digests, then as ARGV says
-- ARGV: identity by step ttl hold piece (a name that this call and its repetitions share) held_until (as the call before
--       answered it) last ('1': then the instance leaves the list) dead_timeout (ms) dead_max_jobs, then for each job: id,
--       job key (index in KEYS), decision ('requeue', 'dead', 'discarded', or 'leave' where there was no payload), queue key (index in KEYS), queue, jid, class,
--       reason, entry (for the dead set), lock, its ten keys (index in KEYS of the first), limit, lock_ttl (these four as
--       for recover)
-- Answers: 'held' or 'over' (the hold is not, or no longer, the caller's: nothing was done by this call), 'noted' or
--       'unnoted' (the journal or the totals are no longer what they should be), until when it is held, the server's time
--       in ms, how many locks could not be settled, how many entries the dead set lost, and for each job its outcome, by this
--       call or an earlier copy of it: 'requeued', 'dead', 'discarded', 'superseded', 'expired' (there was no payload any more), 'gone' (settled by others), 'stuck'
--       (the key it should go to holds something else), 'overwritten' (its own key does). The last two stay where they are
local clock, instances, jobs, heartbeat = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local stats, journal, queues, dead = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local identity, by, piece = ARGV[1], ARGV[2], ARGV[6]
local dead_timeout, dead_max_jobs = tonumber(ARGV[9]), tonumber(ARGV[10])
local first, width = 11, 13
local letters_of = {requeued = 'r', dead = 'd', discarded = 'x', superseded = 's', expired = 'e'}

redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
local now, step, _, _, server = tick(clock, instances, tonumber(ARGV[3]), tonumber(ARGV[4]))

-- A late copy finds another lease end, or none: the instance may have come back to life since.
local lease_end = redis.call('ZSCORE', instances, identity)
local is_held = lease_end and tonumber(lease_end) == tonumber(ARGV[7])
if is_held and standing_of(jobs, heartbeat) ~= 'dead' then
  redis.call('ZREM', instances, identity)
  is_held = false
end
if not is_held then
  -- The answer may have been lost: what the first copy of this call did, the journal tells.
  local letters, answer = '', {'over', 'noted', '', server, 0, 0}
  local entries = redis.pcall('XREVRANGE', journal, '+', '-', 'COUNT', 100)
  for _, entry in ipairs(entries.err and {} or entries) do
    local fields = entry[2]
    if fields[5] == 'piece' and fields[6] == piece then letters = fields[8] end
  end
  for i = 1, (#ARGV - first + 1) / width do
    local outcome = 'gone'
    for name, letter in pairs(letters_of) do
      if string.sub(letters, i, i) == letter then outcome = name end
    end
    answer[#answer + 1] = outcome
  end
  return answer
end

local seconds = string.format('%.3f', server / 1000)

-- Puts a payload where it was decided to go. Answers the outcome.
local function move(decision, payload, queue_key, queue, entry, lock)
  if decision == 'requeue' then
    if lock.kind == 'checked' or lock.kind == 'taken' then
      local ok, held = pcall(is_held_by_others, lock.queueing, lock.jid, lock.limit)
      if ok and held then return 'superseded' end
    end
    return push(queue_key, queues, queue, {payload}) and 'requeued' or 'stuck'
  elseif decision == 'dead' then
    return type(redis.pcall('ZADD', dead, seconds, entry)) == 'number' and 'dead' or 'stuck'
  end
  return decision == 'discarded' and 'discarded' or 'gone'
end

-- What ends elsewhere than in its queue gives up what it holds; what goes back holds on to it. Answers what was done.
local function settle_lock(lock, outcome)
  if lock.kind == '' then return '' end
  local ok, did = pcall(function()
    if outcome ~= 'requeued' then
      return give_up(lock.queueing, lock.jid) + give_up(lock.runtime, lock.jid) > 0 and 'given up' or ''
    end
    if lock.kind ~= 'taken' then return '' end
    return take_again(lock.queueing, lock.runtime, lock.jid, lock.ttl, seconds) and 'taken' or ''
  end)
  return ok and did or 'unsettled'
end

local outcomes, moved, letters, totals, unsettled = {}, {}, {}, {}, 0
for i = first, #ARGV, width do
  local id, job, decision, queue_key, queue = ARGV[i], KEYS[tonumber(ARGV[i + 1])], ARGV[i + 2], KEYS[tonumber(ARGV[i + 3])], ARGV[i + 4]
  local jid, class, reason, entry, lock = ARGV[i + 5], ARGV[i + 6], ARGV[i + 7], ARGV[i + 8], {kind = ARGV[i + 9]}
  if lock.kind ~= '' then
    local at = tonumber(ARGV[i + 10])
    lock.queueing, lock.runtime, lock.jid = lock_at(at), lock_at(at + 5), jid
    lock.limit, lock.ttl = tonumber(ARGV[i + 11]), tonumber(ARGV[i + 12])
  end
  local outcome = 'gone'
  if redis.call('SISMEMBER', jobs, id) == 1 then
    local payload = redis.pcall('GET', job)
    if type(payload) == 'table' then
      outcome = 'overwritten'
    elseif not payload then
      outcome, reason = 'expired', ''
    else
      outcome = move(decision, payload, queue_key, queue, entry, lock)
    end
    if letters_of[outcome] then
      redis.call('DEL', job)
      redis.call('SREM', jobs, id)
      local did = settle_lock(lock, outcome)
      if did == 'unsettled' then unsettled = unsettled + 1 end
      totals[outcome] = (totals[outcome] or 0) + 1
      for _, text in ipairs({'jid', jid, 'class', class, 'queue', queue, 'outcome', outcome, 'reason', reason, 'recoveries', '0',
        'lock', did}) do
        moved[#moved + 1] = text
      end
    end
  end
  letters[#letters + 1] = letters_of[outcome] or '-'
  outcomes[#outcomes + 1] = outcome
end

local trimmed = totals.dead and trim_dead_set(dead, server, dead_timeout, dead_max_jobs) or 0

-- A key of ours that somebody overwrote costs the totals or the journal, not the jobs.
local noted = 'noted'
if #moved > 0 then
  for outcome, count in pairs(totals) do
    if type(redis.pcall('HINCRBY', stats, outcome, count)) == 'table' then noted = 'unnoted' end
  end
  local journalled = redis.pcall('XADD', journal, 'MAXLEN', '~', 10000, '*', 'from', identity, 'by', by, 'piece', piece, 'outcomes',
    table.concat(letters), unpack(moved))
  if type(journalled) == 'table' then noted = 'unnoted' end
end
local held_until = ''
if ARGV[8] == '1' then
  redis.call('ZREM', instances, identity)
else
  -- Another one in any case, so that a copy of this call is known.
  local longest = now + math.min(2 * step, tonumber(ARGV[5]))
  held_until = string.format('%.0f', math.max(longest, tonumber(lease_end) + 1))
  redis.call('ZADD', instances, held_until, identity)
end
local answer = {'held', noted, held_until, server, unsettled, trimmed}
for _, outcome in ipairs(outcomes) do answer[#answer + 1] = outcome end
return answer
