-- The hands of an instance: lists into which its blocking claims move jobs (docs/protocol.md, "Blocking claims").

-- The answer; nil where a key holds something else. What else Redis may refuse is raised, as by a call.
local function answer_of(...)
  local answer = redis.pcall(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if string.find(answer.err, '^WRONGTYPE') then return nil end
  return redis.call(...)
end

-- Nothing comes into this hand any more, however late, unless something is in it: a move finds that there is no list, and leaves the
-- job in its queue. What was sent before is executed within this time.
local function close(hand)
  if redis.call('TYPE', hand).ok ~= 'list' then redis.call('SET', hand, 'closed', 'EX', 3600) end
end

-- Puts all back to the end of its queue that Sidekiq takes from, the newest first. Answers whether nothing is left.
local function empty(hand, queue_key, queues, queue)
  while answer_of('LMOVE', hand, queue_key, 'LEFT', 'RIGHT') do redis.pcall('SADD', queues, queue) end
  return redis.call('TYPE', hand).ok ~= 'list'
end

-- The oldest of a hand is in flight under this number from here on. Answers its token, false where there is none.
local function record(hand, inflight, call, index, queue)
  local payload = answer_of('RPOP', hand)
  if not payload then return false end
  local time = redis.call('TIME')
  local token = call .. '-' .. index .. ' ' .. time[1] .. string.sub('00000' .. time[2], -6, -4) .. ' ' .. queue
  redis.call('HSET', inflight, token, payload)
  return token
end

-- The same for a job that the instance has been given out of this hand, known by the SHA1 of its payload. It may have a token already,
-- of which nobody has heard. (Where Redis has lost its last moment, something else may lie there.)
local function record_known(hand, inflight, call, index, sha1, queue)
  for _, token in ipairs(redis.call('HKEYS', inflight)) do
    if string.match(token, '^%d+%-(%d+) ') == index then return token end
  end
  local payload = answer_of('LINDEX', hand, -1)
  return payload and redis.sha1hex(payload) == sha1 and record(hand, inflight, call, index, queue)
end

-- All that an instance has in its hands is in flight like all else from here on, and the hands are closed, but for those that are
-- `quiet`: no claim for them is on its way. (Numbers from 2^33 on are no others'.)
local function seize(inflight, hands, call, quiet)
  local open = answer_of('HGETALL', hands) or {}
  local index = 8589934592
  for i = 1, #open, 2 do
    local hand = hands .. ':' .. open[i]
    while record(hand, inflight, call, string.format('%.0f', index), open[i + 1]) do index = index + 1 end
    if not quiet[open[i]] then close(hand) end
  end
  redis.call('DEL', hands)
end

