-- recover: settles orphans of a fenced instance, each as decided, and journals what was done.
-- KEYS: clock instances inflight info stats journal queues [queue key]...
-- ARGV: identity by step ttl hold, then for each orphan: token, decision, queue key (index in KEYS), queue, jid, class
-- Answers: 'runs' when the instance is not fenced, else 'done' and for each orphan its outcome: 'requeued', 'gone'
--       (settled before), 'stuck' (its queue's key holds something else; it stays in flight)
local clock, instances, inflight, info = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local stats, journal, queues = KEYS[5], KEYS[6], KEYS[7]
local identity, by = ARGV[1], ARGV[2]

if redis.call('HEXISTS', inflight, 'call') == 1 then return {'runs'} end
redis.call('HDEL', inflight, '-')
local now, step = tick(clock, instances, tonumber(ARGV[3]), tonumber(ARGV[4]))

local outcomes, totals = {'done'}, {}
local entry = {'from', identity, 'by', by}
for i = 6, #ARGV, 6 do
  local token, decision, key, queue, jid, class = ARGV[i], ARGV[i + 1], KEYS[tonumber(ARGV[i + 2])], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5]
  local outcome = 'gone'
  if redis.call('HEXISTS', inflight, token) == 1 then
    if decision == 'requeue' and give_back(inflight, token, key, queues, queue) then
      outcome = 'requeued'
    else
      outcome = 'stuck'
    end
  end
  outcomes[#outcomes + 1] = outcome
  if outcome ~= 'gone' and outcome ~= 'stuck' then
    totals[outcome] = (totals[outcome] or 0) + 1
    for _, text in ipairs({'jid', jid, 'class', class, 'queue', queue, 'outcome', outcome}) do
      entry[#entry + 1] = text
    end
  end
end

-- A key of ours that somebody overwrote costs the totals or the journal, not the jobs.
for outcome, count in pairs(totals) do
  redis.pcall('HINCRBY', stats, outcome, count)
end
if #entry > 4 then
  redis.pcall('XADD', journal, 'MAXLEN', '~', 10000, '*', unpack(entry))
end
if redis.call('HLEN', inflight) == 0 then
  redis.call('ZREM', instances, identity)
  redis.call('DEL', info)
else
  redis.call('ZADD', instances, now + math.min(2 * step, tonumber(ARGV[5])), identity)
end
return outcomes
