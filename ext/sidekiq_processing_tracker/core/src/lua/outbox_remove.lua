-- outbox_remove: takes out what has been delivered, entry by entry: another may have delivered it too.
-- KEYS: a queue in the outbox and the same for those that go to the other end, queues of the outbox; or dead of the outbox
-- ARGV: with queues: the queue, which of its two lists (1 or 2), then the payloads; with dead: the entries
if #KEYS == 1 then
  for _, entry in ipairs(ARGV) do redis.call('ZREM', KEYS[1], entry) end
  return 0
end
local list = KEYS[tonumber(ARGV[2])]
local from = ARGV[2] == '1' and 1 or -1
for i = 3, #ARGV do redis.call('LREM', list, from, ARGV[i]) end
if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then redis.call('SREM', KEYS[3], ARGV[1]) end
return 0
