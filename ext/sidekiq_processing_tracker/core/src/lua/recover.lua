-- recover: settles orphans, each as decided, and journals what was done. The orphans of a fenced instance; or, with
-- `own`, jobs that an instance with its lease holds itself and no thread of it runs any more.
-- KEYS: clock instances inflight info stats journal counted, Sidekiq's queues dead processes, the indexes of
--       sidekiq-unique-jobs digests and expiring_digests, then as ARGV says
-- ARGV: identity by step ttl hold piece (a name that this call and its repetitions share), own ('1' or ''),
--       rest ('' or, when only orphans are left that wait, for how long), window, dead_timeout (ms), dead_max_jobs,
--       process (index in KEYS of what Sidekiq keeps of the process: its hash and :work; 0 for none), its name there,
--       due (index in KEYS of what its scheduler holds), indexes n, the first of them (index in KEYS),
--       then for each orphan: token, decision ('requeue', 'requeue_last', 'dead', 'discarded'), count (how often it was
--       orphaned before, as far as the decision knows; '' where that does not count), its counter (index in KEYS),
--       queue key (index in KEYS), queue, jid, class, reason, entry (for the dead set), lock ('' for none, 'held' where
--       it goes on with what it holds, 'checked' where others may hold it, 'taken' where it must be taken again),
--       its ten keys (index in KEYS of the first), limit, lock_ttl (ms, 0 for none)
-- Answers: 'runs' when the instance is not fenced ('lost' when it should not be), else 'done', 'noted' or 'unnoted' (the
--       journal or the totals are no longer what they should be), the server's time in ms, how many entries the dead set
--       lost, how many locks could not be settled, and for each orphan two: its outcome, which is how it ended
--       ('requeued', 'dead', 'discarded', 'superseded'), the same with '_before' (by an earlier copy of this call),
--       'again' (it was orphaned another number of times), 'gone' (settled by others), 'stuck' (its queue's key holds
--       something else; it stays in flight); and how often it was orphaned before
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local stats, journal, counted, queues, dead, processes = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local identity, by, piece, own, rest = ARGV[1], ARGV[2], ARGV[6], ARGV[7] == '1', tonumber(ARGV[8])
local window, dead_timeout, dead_max_jobs = ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11])
local process, process_name = tonumber(ARGV[12]), ARGV[13]
local due, indexes, first_index = KEYS[tonumber(ARGV[14])], tonumber(ARGV[15]), tonumber(ARGV[16])

if own then
  if not lease_of(inflight) then return {'lost'} end
elseif redis.call('HEXISTS', inflight, 'call') == 1 then
  return {'runs'}
end
redis.call('HDEL', inflight, '-')
local now, step, ttl, _, server = tick(clock, instances, tonumber(ARGV[3]), tonumber(ARGV[4]))
local seconds = string.format('%.3f', server / 1000)

-- The answer may have been lost, and the jobs are to be reported by the one who has moved them: a repetition of the call
-- reads in the journal what it did.
local ends = {requeued = 'r', dead = 'd', discarded = 'x', superseded = 's'}
local letters_of = {r = 'requeued', d = 'dead', x = 'discarded', s = 'superseded'}
local function outcomes_before()
  local entries = redis.pcall('XREVRANGE', journal, '+', '-', 'COUNT', 100)
  if entries.err then return '' end
  for _, entry in ipairs(entries) do
    local fields = entry[2]
    if fields[5] == 'piece' and fields[6] == piece then return fields[8] end
  end
  return ''
end

local counts = {}
local function orphaned_before(counter)
  local count = tonumber(counts[counter] or '')
  return readable(count, 0) and math.floor(count) or 0
end

-- What ends elsewhere than in its queue gives up what it holds; what goes back holds on to it. Answers what was done.
local no_lock = {kind = ''}
local function settle_lock(lock, ended)
  local ok, did = pcall(function()
    if ended ~= 'requeued' then
      return give_up(lock.queueing, lock.jid) + give_up(lock.runtime, lock.jid) > 0 and 'given up' or ''
    end
    if lock.kind ~= 'taken' then return '' end
    return take_again(lock.queueing, lock.runtime, lock.jid, lock.ttl, seconds) and 'taken' or ''
  end)
  return ok and did or 'unsettled'
end

-- Answers how the orphan ended, or nil where it is stuck.
local function move(job)
  local token, decision, lock = job.token, job.decision, job.lock
  if decision == 'dead' then
    local added = redis.pcall('ZADD', dead, seconds, ARGV[12 + 14 * job.number])
    if type(added) == 'table' then return nil end
    drop(inflight, {token})
    return 'dead'
  elseif decision == 'discarded' then
    drop(inflight, {token})
    return 'discarded'
  end
  if lock.kind == 'checked' or lock.kind == 'taken' then
    local ok, held = pcall(is_held_by_others, lock.queueing, lock.jid, lock.limit)
    if ok and held then
      drop(inflight, {token})
      return 'superseded'
    end
  end
  return give_back(inflight, token, job.key, queues, job.queue, decision == 'requeue_last') and 'requeued' or nil
end

-- Made for hundreds of orphans a call: what each costs counts.
local answer, letters, totals, before = {'done', '', server, 0, 0}, {}, {}, nil
local moved, moved_count = {}, 0
local unsettled, suspects_left, is_counted = 0, false, false
local function count_up(job)
  if not is_counted then redis.call('SET', counted, 1, 'PX', window) end
  is_counted = true
  counts[job.counter] = job.times
  redis.call('SET', job.counter, counts[job.counter], 'PX', window)
end

local function note(job, outcome, ended)
  letters[job.number] = ended and ends[ended] or '-'
  answer[4 + 2 * job.number], answer[5 + 2 * job.number] = outcome, job.count
end

-- What follows from the end of an orphan, nil for one that is stuck.
local function finish(job, ended)
  note(job, ended or 'stuck', ended)
  if not ended then return end
  local did = job.lock == no_lock and '' or settle_lock(job.lock, ended)
  if did == 'unsettled' then unsettled = unsettled + 1 end
  if ended ~= 'requeued' then
    redis.call('DEL', job.counter)
    counts[job.counter] = nil
  elseif job.expected then
    count_up(job)
  end
  if ended == 'requeued' and job.decision == 'requeue_last' then suspects_left = true end
  totals[ended] = (totals[ended] or 0) + 1
  local at = moved_count
  moved_count = at + 14
  moved[at + 1], moved[at + 2], moved[at + 3], moved[at + 4] = 'jid', job.jid, 'class', job.class
  moved[at + 5], moved[at + 6], moved[at + 7], moved[at + 8] = 'queue', job.queue, 'outcome', ended
  moved[at + 9], moved[at + 10] = 'reason', ended == 'superseded' and '' or job.reason
  moved[at + 11], moved[at + 12] = 'recoveries', job.times
  moved[at + 13], moved[at + 14] = 'lock', did
end

-- A small hash is searched from its oldest field on, and of tokens the newest comes first.
local function turned(tokens)
  local result, count = {}, #tokens
  for i = 1, count do result[i] = tokens[count + 1 - i] end
  return result
end

-- Most orphans just go back. Those of one queue that follow each other do so together, and are no longer in flight before
-- anything else is done.
local batch, counters = {}, {}
local function flush()
  local first = batch[1]
  if not first then return end
  local tokens, payloads, lists, results, pushed = {}, {}, {}, {}, not first.list
  for i, job in ipairs(batch) do
    if first.list then
      -- From list to list. What that cannot do goes the long way below.
      results[i] = redis.pcall('LMOVE', job.list, first.key, 'LEFT', 'RIGHT')
      if type(results[i]) == 'string' then tokens[#tokens + 1], lists[#lists + 1] = job.token, job.list end
    else
      tokens[i], payloads[i] = job.token, job.payload
    end
  end
  if pushed then
    pushed = push(first.key, queues, first.queue, payloads)
  elseif #tokens > 0 then
    redis.pcall('SADD', queues, first.queue)
  end
  if #tokens > 0 and (pushed or first.list) then redis.call('HDEL', inflight, unpack(turned(tokens))) end
  -- Mostly they have gone with their jobs.
  if #lists > 0 then redis.call('DEL', unpack(lists)) end
  for i, job in ipairs(batch) do
    if not job.list then
      finish(job, pushed and 'requeued' or nil)
    elseif type(results[i]) == 'string' then
      finish(job, 'requeued')
    elseif redis.call('TYPE', job.list).ok ~= 'list' then
      -- Somebody has removed its list, and the job with it.
      drop(inflight, {job.token})
      note(job, 'gone')
    else
      finish(job, move(job))
    end
  end
  batch, counters = {}, {}
end

local jobs, asked, expected_counters = {}, {}, {}
-- Of a payload in a list the hash tells only that it is in flight: of a small one its fields tell that of all at once.
local fields = redis.call('HLEN', inflight) <= 256 and {}
for i = 17, #ARGV, 14 do
  -- (Sixteen fields in all: with one more the table would be twice as large.)
  local job = {
    number = (i - 17) / 14 + 1, token = ARGV[i], decision = ARGV[i + 1], expected = tonumber(ARGV[i + 2]),
    counter = KEYS[tonumber(ARGV[i + 3])], key = KEYS[tonumber(ARGV[i + 4])], queue = ARGV[i + 5], jid = ARGV[i + 6],
    class = ARGV[i + 7], reason = ARGV[i + 8], lock = no_lock, times = '0'
  }
  local lock = job.lock
  if ARGV[i + 10] ~= '' then
    local first = tonumber(ARGV[i + 11])
    lock = {
      kind = ARGV[i + 10], queueing = lock_at(first), runtime = lock_at(first + 5), jid = job.jid,
      limit = tonumber(ARGV[i + 12]), ttl = tonumber(ARGV[i + 13])
    }
    job.lock = lock
  end
  -- With this time.
  if job.expected then job.times = job.expected == 0 and '1' or string.format('%.0f', job.expected + 1) end
  job.list = list_of(inflight, job.token)
  job.plain = job.decision == 'requeue' and (lock.kind == '' or lock.kind == 'held')
  if job.plain and not (fields and job.list) then asked[#asked + 1] = job.token end
  if job.expected then expected_counters[#expected_counters + 1] = job.counter end
  jobs[job.number] = job
end
-- Of each what was there before anything was done.
local payloads = {}
local held = #asked > 0 and redis.call('HMGET', inflight, unpack(asked)) or {}
for i, payload in ipairs(held) do payloads[asked[i]] = payload end
if fields and #asked < #jobs then
  for _, field in ipairs(redis.call('HKEYS', inflight)) do fields[field] = '' end
end
local known = #expected_counters > 0 and redis.call('MGET', unpack(expected_counters)) or {}
for i, count in ipairs(known) do counts[expected_counters[i]] = count end

for _, job in ipairs(jobs) do
  local list, plain = job.list, job.plain
  -- Another orphan of the same job changes its count.
  local first = batch[1]
  if not plain or counters[job.counter] or (first and (first.key ~= job.key or not first.list ~= not list)) then flush() end

  job.count = job.expected or 0
  if plain then
    local known = fields and list and fields or payloads
    job.payload, known[job.token] = known[job.token], nil
  end
  -- Somebody has removed its list, and the job with it.
  if list and not plain and redis.call('TYPE', list).ok ~= 'list' then drop(inflight, {job.token}) end
  if job.payload or (not plain and redis.call('HEXISTS', inflight, job.token) == 1) then
    if job.expected then job.count = orphaned_before(job.counter) end
    if job.expected and job.count ~= job.expected then
      note(job, 'again')
    elseif plain then
      batch[#batch + 1] = job
      counters[job.counter] = true
    else
      finish(job, move(job))
    end
  else
    before = before or outcomes_before()
    local letter = letters_of[string.sub(before, job.number, job.number)]
    note(job, letter and letter .. '_before' or 'gone')
  end
end
flush()

local trimmed = totals.dead and trim_dead_set(dead, server, dead_timeout, dead_max_jobs) or 0

-- A key of ours that somebody overwrote costs the totals or the journal, not the jobs.
local noted = 'noted'
if moved_count > 0 then
  for ended, count in pairs(totals) do
    if type(redis.pcall('HINCRBY', stats, ended, count)) == 'table' then noted = 'unnoted' end
  end
  local journalled = redis.pcall('XADD', journal, 'MAXLEN', '~', 10000, '*', 'from', identity, 'by', by, 'piece', piece, 'outcomes',
    table.concat(letters), unpack(moved))
  if type(journalled) == 'table' then noted = 'unnoted' end
end

-- Sidekiq lets its hash of a process live for 60 s after each of its own beats. One that has beaten while the lease ran
-- out may live, unless it is known to have ended.
local function forget_process(has_ended)
  local left = redis.pcall('PTTL', KEYS[process])
  if not has_ended and left ~= -2 and not (left >= 0 and 60000 - left >= ttl - step) then return end
  redis.pcall('SREM', processes, process_name)
  redis.pcall('DEL', KEYS[process], KEYS[process + 1])
end

if not own then
  if redis.call('HLEN', inflight) == 0 and redis.call('EXISTS', due) == 0 then
    local has_ended = redis.pcall('HGET', info, 'process_ended') == '1'
    redis.call('ZREM', instances, identity)
    redis.call('DEL', info)
    for i = first_index, first_index + indexes - 1 do redis.pcall('HDEL', KEYS[i], identity) end
    if process > 0 then forget_process(has_ended) end
  else
    redis.call('ZADD', instances, now + (rest or math.min(2 * step, tonumber(ARGV[5]))), identity)
    if suspects_left then redis.pcall('HSET', info, 'released_at', now) end
  end
end

answer[2], answer[4], answer[5] = noted, trimmed, unsettled
return answer
