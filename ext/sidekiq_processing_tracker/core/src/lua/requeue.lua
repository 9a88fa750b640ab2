-- Puts payloads back at the end of their queue that Sidekiq takes from, or with `last` at the other one. False where the
-- queue's key holds something else.
local function push(queue_key, queues, queue, payloads, last)
  local pushed = redis.pcall(last and 'LPUSH' or 'RPUSH', queue_key, unpack(payloads))
  if type(pushed) == 'table' and pushed.err then return false end
  redis.pcall('SADD', queues, queue)
  return true
end

-- Moves what the token holds back to its queue. False where it could not be read or pushed, so that it stays in flight.
local function give_back(inflight, token, queue_key, queues, queue, last)
  local list = list_of(inflight, token)
  if list and type(redis.pcall('LMOVE', list, queue_key, 'LEFT', last and 'LEFT' or 'RIGHT')) == 'string' then
    redis.pcall('SADD', queues, queue)
    drop(inflight, {token})
    return true
  end
  local payload = payload_of(inflight, token)
  if payload == nil or payload and not push(queue_key, queues, queue, {payload}, last) then return false end
  drop(inflight, {token})
  return true
end

