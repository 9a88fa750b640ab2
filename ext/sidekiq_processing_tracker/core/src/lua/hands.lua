-- The hands of an instance: lists into which its blocking claims move jobs (docs/protocol.md, "Blocking claims").

-- Nothing comes into this hand any more, however late: a move finds that there is no list, and leaves the job in its queue.
-- Whatever a claim may still do, it does within this time.
local function close(hand)
  redis.call('SET', hand, 'closed', 'EX', 3600)
end

-- Puts all back to the end of its queue that Sidekiq takes from, the newest first. Answers whether nothing is left.
local function empty(hand, queue_key, queues, queue)
  local moved = redis.pcall('LMOVE', hand, queue_key, 'LEFT', 'RIGHT')
  while type(moved) == 'string' do
    redis.pcall('SADD', queues, queue)
    moved = redis.pcall('LMOVE', hand, queue_key, 'LEFT', 'RIGHT')
  end
  return redis.call('TYPE', hand).ok ~= 'list'
end

-- The oldest of a hand is in flight under this number from here on. Answers its token, false where there is none.
local function record(hand, inflight, call, index, queue)
  local payload = redis.pcall('RPOP', hand)
  if type(payload) ~= 'string' then return false end
  local time = redis.call('TIME')
  local token = call .. '-' .. index .. ' ' .. time[1] .. string.sub('00000' .. time[2], -6, -4) .. ' ' .. queue
  redis.call('HSET', inflight, token, payload)
  return token
end

-- The same for a job that the instance knows to be the oldest of this hand, or to have been: it may have a token already, of which
-- nobody has heard.
local function record_known(hand, inflight, call, index, queue)
  for _, token in ipairs(redis.call('HKEYS', inflight)) do
    if string.match(token, '^%d+%-(%d+) ') == index then return token end
  end
  return record(hand, inflight, call, index, queue)
end

-- All that an instance has in its hands is in flight like all else from here on. (Numbers from 2^33 on are no others'.)
local function seize(inflight, hands, call, closes)
  local open = redis.pcall('HGETALL', hands)
  local index = 8589934592
  for i = 1, open.err and 0 or #open, 2 do
    local hand = hands .. ':' .. open[i]
    while record(hand, inflight, call, string.format('%.0f', index), open[i + 1]) do index = index + 1 end
    if closes then close(hand) end
  end
  redis.call('DEL', hands)
end

