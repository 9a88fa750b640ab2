-- outbox_remove: takes out what has been delivered, entry by entry: another may have delivered it too. What was found to be
-- superseded is counted and journalled, by the one who takes it out.
-- KEYS: a queue in the outbox and the same for those that go to the other end, queues of the outbox, stats, journal; or dead
--       of the outbox
-- ARGV: with queues: by, the queue, which of its two lists (1 or 2), then for each payload: itself, 'superseded' or '', jid,
--       class; with dead: the entries
-- Answers: with queues: 'noted' or 'unnoted' (as recover), the server's time in ms, then for each payload whether it was there
if #KEYS == 1 then
  for _, entry in ipairs(ARGV) do redis.call('ZREM', KEYS[1], entry) end
  return {}
end
local stats, journal = KEYS[4], KEYS[5]
local by, queue = ARGV[1], ARGV[2]
local list = KEYS[tonumber(ARGV[3])]
local from = ARGV[3] == '1' and 1 or -1
local time = redis.call('TIME')
local answer, superseded, lines = {'noted', time[1] * 1000 + math.floor(time[2] / 1000)}, 0, {}
for i = 4, #ARGV, 4 do
  local was_there = redis.call('LREM', list, from, ARGV[i])
  answer[#answer + 1] = was_there
  if was_there == 1 and ARGV[i + 1] == 'superseded' then
    superseded = superseded + 1
    for _, part in ipairs({'jid', ARGV[i + 2], 'class', ARGV[i + 3], 'queue', queue, 'outcome', 'superseded', 'reason', '',
      'recoveries', '0', 'lock', ''}) do lines[#lines + 1] = part end
  end
end
if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then redis.call('SREM', KEYS[3], queue) end
if superseded > 0 then
  local counted = redis.pcall('HINCRBY', stats, 'superseded', superseded)
  local journalled = redis.pcall('XADD', journal, 'MAXLEN', '~', 10000, '*', 'from', 'outbox', 'by', by, 'piece', '', 'outcomes',
    string.rep('s', superseded), unpack(lines))
  if type(counted) == 'table' or type(journalled) == 'table' then answer[1] = 'unnoted' end
end
return answer
