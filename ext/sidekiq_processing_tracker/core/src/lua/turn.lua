-- turn: all that an instance does with jobs, numbered (docs/protocol.md, "Numbered turns").
-- KEYS: inflight info queues recoveries [queue key, counter key]...
-- ARGV: call
--       marks n, then n classes
--       acks n, then n tokens
--       counters n, then n times: counter key (index in KEYS) of a job that is done
--       requeues n, then n times: token ('' without a record), queue key (index in KEYS), queue, payload ('' with a token)
--       records n, then n times: queue, payload
--       claims n, then n times: threads t, queues m, then m times: queue key (index in KEYS). A job for each of the t
--       threads, from the first of the queues that has one
-- Answers: 'lost', 'stale', or 'ok' / 'again' (the repetition of a turn that was done), then
--       the positions of the requeues that could not be done, the tokens of the records, token and payload of each claim,
--       the queues that could not be taken from, and whether any job has a counter (1 or 0)
local inflight, info, queues, recoveries = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local position = 1
local function take()
  position = position + 1
  return ARGV[position]
end
local function take_count()
  return tonumber(take())
end

local done = redis.pcall('HGET', inflight, 'call')
-- A hash that somebody has overwritten (pcall: a table) holds no lease any more.
if not done or type(done) == 'table' then return {'lost'} end
local call = tonumber(ARGV[1])
done = tonumber(done)
if call < done then return {'stale'} end
local again = call == done

if not again then redis.call('HDEL', inflight, '-') end

for _ = 1, take_count() do
  local class = take()
  if not again and type(redis.pcall('HSET', info, 'marked:' .. class, 1)) == 'table' then
    -- Somebody has overwritten it. What it said for people is gone anyway; recovery needs the marks.
    redis.call('DEL', info)
    redis.call('HSET', info, 'marked:' .. class, 1)
  end
end

local acks = take_count()
if again then
  position = position + acks
else
  while acks > 0 do
    local some = {}
    for i = 1, math.min(acks, 1000) do some[i] = take() end
    redis.call('HDEL', inflight, unpack(some))
    acks = acks - #some
  end
end
for _ = 1, take_count() do
  local key = KEYS[take_count()]
  if not again then redis.call('DEL', key) end
end

local undone, unpushed = {}, {}
for i = 1, take_count() do
  local token, key, queue, payload = take(), KEYS[take_count()], take(), take()
  local ok
  if again then
    ok = token == '' or redis.call('HEXISTS', inflight, token) == 0
  elseif token == '' then
    ok = push(key, queues, queue, payload)
    if not ok then unpushed[#unpushed + 1] = {queue, payload} end
  else
    ok = give_back(inflight, token, key, queues, queue)
  end
  if not ok then undone[#undone + 1] = i end
end

local recorded, claimed, refused = {}, {}, {}
local counted = redis.call('EXISTS', recoveries)
local records = take_count()
if again then
  position = position + 2 * records
  local mine, last = ARGV[1] .. '-', records
  for _ = 1, take_count() do
    last = last + take_count()
    position = position + take_count()
  end
  for _, token in ipairs(redis.call('HKEYS', inflight)) do
    if string.sub(token, 1, #mine) == mine then
      local index = tonumber(string.match(token, '^%d+%-(%d+) '))
      if index and index <= records then
        recorded[#recorded + 1] = token
      elseif index and index <= last then
        claimed[#claimed + 1] = token
        claimed[#claimed + 1] = redis.call('HGET', inflight, token)
      end
    end
  end
  return {'again', undone, recorded, claimed, refused, counted}
end

local time = redis.call('TIME')
local taken_at = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local fields = {'call', ARGV[1]}
for i = 1, records do
  local queue, payload = take(), take()
  local token = ARGV[1] .. '-' .. i .. ' ' .. taken_at .. ' ' .. queue
  fields[#fields + 1] = token
  fields[#fields + 1] = payload
  recorded[i] = token
end

-- A queue that was found empty, or holds something else, is not tried again: the key's index stands for it.
local bytes, empty, index, jobs = 0, {}, records, 0
local function claim(first, last)
  for i = first, last do
    local at = ARGV[i]
    if not empty[at] then
      local key = KEYS[tonumber(at)]
      local payload = redis.pcall('RPOP', key)
      if type(payload) == 'string' then
        local token = ARGV[1] .. '-' .. index .. ' ' .. taken_at .. ' ' .. string.sub(key, 7)
        fields[#fields + 1] = token
        fields[#fields + 1] = payload
        jobs = jobs + 2
        claimed[jobs - 1] = token
        claimed[jobs] = payload
        bytes = bytes + #payload
        return true
      end
      empty[at] = true
      if payload then refused[#refused + 1] = string.sub(key, 7) end
    end
  end
end
for _ = 1, take_count() do
  local threads, first = take_count(), position + 2
  local last = first + take_count() - 1
  position = last
  local found = true
  for _ = 1, threads do
    index = index + 1
    -- A reply must fit the read timeout.
    found = found and bytes < 1048576 and claim(first, last)
  end
end
-- A job that was with this process alone and cannot go back gets a record, which the next sweep finds.
for i, job in ipairs(unpushed) do
  fields[#fields + 1] = ARGV[1] .. '-' .. index + i .. ' ' .. taken_at .. ' ' .. job[1]
  fields[#fields + 1] = job[2]
end
redis.call('HSET', inflight, unpack(fields))
return {'ok', undone, recorded, claimed, refused, counted}
