-- gather: what has been laid aside and not taken goes back to its queue.
-- KEYS: inflight queues   ARGV: what the keys begin with where jobs are laid aside, the same of queues, then queues to look at beside
--       those that Redis lists
-- Answers: how many jobs did
local back = 0
local names = redis.pcall('SMEMBERS', KEYS[2])
if names.err then names = {} end
for i = 3, #ARGV do names[#names + 1] = ARGV[i] end
for _, queue in ipairs(names) do
  local aside, key = ARGV[1] .. queue, ARGV[2] .. queue
  local most = redis.pcall('LLEN', aside)
  -- Where this is no right of the caller's, it is none for all others either.
  if type(most) == 'table' and not string.find(most.err, 'WRONGTYPE') then return back end
  for _ = 1, type(most) == 'number' and most or 0 do
    if not lay_back(KEYS[1], aside, key, KEYS[2], queue) then break end
    back = back + 1
  end
end
return back
