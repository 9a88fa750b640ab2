-- recover: settles orphans of a fenced instance, each as decided, and journals what was done.
-- KEYS: clock instances inflight info stats journal queues [queue key]...
-- ARGV: identity by step ttl hold piece (a name that this call and its repetitions share), then for each orphan: token,
--       decision, queue key (index in KEYS), queue, jid, class
-- Answers: 'runs' when the instance is not fenced, else 'done', 'noted' or 'unnoted' (the journal or the totals are no
--       longer what they should be), and for each orphan its outcome: 'requeued',
--       'requeued_before' (by an earlier copy of this call), 'gone' (settled by others), 'stuck' (its queue's key
--       holds something else; it stays in flight)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local stats, journal, queues = KEYS[5], KEYS[6], KEYS[7]
local identity, by = ARGV[1], ARGV[2]

if redis.call('HEXISTS', inflight, 'call') == 1 then return {'runs'} end
redis.call('HDEL', inflight, '-')
local now, step = tick(clock, instances, tonumber(ARGV[3]), tonumber(ARGV[4]))

-- The answer may have been lost, and the jobs are to be reported by the one who has moved them: a repetition of the call
-- reads in the journal what it did.
local function outcomes_before(piece)
  local entries = redis.pcall('XREVRANGE', journal, '+', '-', 'COUNT', 100)
  if entries.err then return '' end
  for _, entry in ipairs(entries) do
    local fields = entry[2]
    if fields[5] == 'piece' and fields[6] == piece then return fields[8] end
  end
  return ''
end

local piece = ARGV[6]
local outcomes, moved, letters, before = {'done', 'noted'}, {}, {}, nil
for i = 7, #ARGV, 6 do
  local token, decision, key = ARGV[i], ARGV[i + 1], KEYS[tonumber(ARGV[i + 2])]
  local queue, jid, class = ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
  local outcome = 'gone'
  if redis.call('HEXISTS', inflight, token) == 1 then
    if decision == 'requeue' and give_back(inflight, token, key, queues, queue) then
      outcome = 'requeued'
    else
      outcome = 'stuck'
    end
  end
  if outcome == 'gone' then
    before = before or outcomes_before(piece)
    if string.sub(before, #letters + 1, #letters + 1) == 'r' then outcome = 'requeued_before' end
  elseif outcome == 'requeued' then
    for _, text in ipairs({'jid', jid, 'class', class, 'queue', queue, 'outcome', outcome}) do
      moved[#moved + 1] = text
    end
  end
  letters[#letters + 1] = outcome == 'requeued' and 'r' or '-'
  outcomes[#outcomes + 1] = outcome
end

-- A key of ours that somebody overwrote costs the totals or the journal, not the jobs.
if #moved > 0 then
  local counted = redis.pcall('HINCRBY', stats, 'requeued', #moved / 8)
  local journalled = redis.pcall('XADD', journal, 'MAXLEN', '~', 10000, '*', 'from', identity, 'by', by, 'piece', piece, 'outcomes',
    table.concat(letters), unpack(moved))
  if type(counted) == 'table' or type(journalled) == 'table' then outcomes[2] = 'unnoted' end
end
if redis.call('HLEN', inflight) == 0 then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info)
else
  redis.call('ZADD', instances, now + math.min(2 * step, tonumber(ARGV[5])), identity)
end
return outcomes
