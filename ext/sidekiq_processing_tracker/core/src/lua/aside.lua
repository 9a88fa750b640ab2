-- lay_back: the newest job that lies aside goes back to its queue, at the end that Sidekiq takes from. Answers whether one did.
local function lay_back(inflight, aside, queue_key, queues, queue)
  redis.pcall('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
  local moved = redis.pcall('LMOVE', aside, queue_key, 'LEFT', 'RIGHT')
  if type(moved) ~= 'string' then return false end
  redis.pcall('SADD', queues, queue)
  return true
end

