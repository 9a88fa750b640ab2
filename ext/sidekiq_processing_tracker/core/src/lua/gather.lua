-- gather: what has been laid aside and not taken goes back to its queue.
-- KEYS: inflight queues, then for each queue: aside, queue key   ARGV: the queues
-- Answers: how many jobs did
local back = 0
for i, queue in ipairs(ARGV) do
  local aside, key = KEYS[1 + 2 * i], KEYS[2 + 2 * i]
  local most = redis.pcall('LLEN', aside)
  for _ = 1, type(most) == 'number' and most or 0 do
    if not lay_back(KEYS[1], aside, key, KEYS[2], queue) then break end
    back = back + 1
  end
end
return back
