-- legacy_move: settles jobs of a dead instance of the 1.0 gem, each as decided, removes what 1.0 has of them, and journals
-- what was done.
-- KEYS: clock instances jobs heartbeat stats journal queues dead [job key]... [queue key]...
-- ARGV: identity by step ttl hold piece (a name that this call and its repetitions share) held_until (as the call before
--       answered it) last ('1': then the instance leaves the list), then for each job: id, job key (index in KEYS),
--       decision, queue key (index in KEYS), queue, jid, class
-- Answers: 'held' or 'over' (the hold is not, or no longer, the caller's: nothing was done by this call), 'noted' or
--       'unnoted' (the journal or the totals are no longer what they should be), until when it is held, and for each job
--       its outcome, by this call or an earlier copy of it: 'requeued', 'dead', 'expired' (there was no payload any more),
--       'gone' (settled by others), 'stuck' (the key it should go to holds something else), 'overwritten' (its own key
--       does). The last two stay where they are
local clock, instances, jobs, heartbeat = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local stats, journal, queues, dead = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local identity, by, piece = ARGV[1], ARGV[2], ARGV[6]
local first, width = 9, 7
local letters_of = {requeued = 'r', dead = 'd', expired = 'e'}

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
  local letters, answer = '', {'over', 'noted', ''}
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

-- Goes where it was decided to go. Answers the outcome.
local function settle(decision, payload, queue_key, queue)
  if decision == 'requeue' then
    return push(queue_key, queues, queue, payload) and 'requeued' or 'stuck'
  elseif decision == 'bury' then
    local buried = redis.pcall('ZADD', dead, string.format('%.3f', server / 1000), payload)
    return type(buried) == 'number' and 'dead' or 'stuck'
  end
  return 'stuck'
end

local outcomes, moved, letters, totals = {}, {}, {}, {}
for i = first, #ARGV, width do
  local id, job, decision, queue_key, queue = ARGV[i], KEYS[tonumber(ARGV[i + 1])], ARGV[i + 2], KEYS[tonumber(ARGV[i + 3])], ARGV[i + 4]
  local outcome = 'gone'
  if redis.call('SISMEMBER', jobs, id) == 1 then
    local payload = redis.pcall('GET', job)
    if type(payload) == 'table' then
      outcome = 'overwritten'
    elseif not payload then
      outcome = 'expired'
    else
      outcome = settle(decision, payload, queue_key, queue)
    end
    if letters_of[outcome] then
      redis.call('DEL', job)
      redis.call('SREM', jobs, id)
      totals[outcome] = (totals[outcome] or 0) + 1
      for _, text in ipairs({'jid', ARGV[i + 5], 'class', ARGV[i + 6], 'queue', queue, 'outcome', outcome}) do
        moved[#moved + 1] = text
      end
    end
  end
  letters[#letters + 1] = letters_of[outcome] or '-'
  outcomes[#outcomes + 1] = outcome
end

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
table.insert(outcomes, 1, held_until)
table.insert(outcomes, 1, noted)
table.insert(outcomes, 1, 'held')
return outcomes
