-- turn: all that an instance does with jobs, numbered (docs/protocol.md, "Numbered turns").
-- KEYS: inflight info queues recoveries [queue key, counter key]...
-- ARGV: call
--       marks n, then n classes
--       acks n, then n tokens
--       counters n, then n times: counter key (index in KEYS) of a job that is done
--       requeues n, then n times: token ('' without a record), queue key (index in KEYS), queue, payload ('' with a token)
--       records n, then n times: queue, payload
--       bulk ('1': payloads are known to be small, so that many may be popped at once)
--       claims n, then n times: threads t, orders o, then o orders: the queue keys (indexes in KEYS), with a space between.
--       A job for each of the t threads, from the first queue in its order that has one. All orders begin with the same
--       queue; there is one for all threads, or one for each
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
local function take_many(most)
  local first = position + 1
  position = position + most
  return unpack(ARGV, first, position)
end

done = tonumber(done)
if call < done then return {'stale'} end
local again = call == done

-- The acks first: HDEL is allowed when memory is full, and then so is every write after it.
local marks = position + 1
position = marks + tonumber(ARGV[marks])
local acks = take_count()
if again then
  position = position + acks
elseif acks == 0 then
  redis.call('HDEL', inflight, '-')
else
  while acks > 0 do
    local some = math.min(acks, 1000)
    redis.call('HDEL', inflight, take_many(some))
    acks = acks - some
  end
end
for _ = 1, take_count() do
  local key = KEYS[take_count()]
  if not again then redis.call('DEL', key) end
end
for i = marks + 1, marks + tonumber(ARGV[marks]) do
  if not again and type(redis.pcall('HSET', info, 'marked:' .. ARGV[i], 1)) == 'table' then
    -- Somebody has overwritten it. What it said for people is gone anyway; recovery needs the marks.
    redis.call('DEL', info)
    redis.call('HSET', info, 'marked:' .. ARGV[i], 1)
  end
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
  take()
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
local taken_at = string.format(' %.0f ', time[1] * 1000 + math.floor(time[2] / 1000))
local fields = {'call', ARGV[1]}
local prefix = ARGV[1] .. '-'
for i = 1, records do
  local queue, payload = take(), take()
  local token = prefix .. i .. taken_at .. queue
  fields[#fields + 1] = token
  fields[#fields + 1] = payload
  recorded[i] = token
end

local index, bytes, filled, jobs = records, 0, #fields, 0
local function claim(payload, suffix)
  index = index + 1
  local token = prefix .. index .. suffix
  fields[filled + 1] = token
  fields[filled + 2] = payload
  filled = filled + 2
  claimed[jobs + 1] = token
  claimed[jobs + 2] = payload
  jobs = jobs + 2
  bytes = bytes + #payload
end

-- Claims so many jobs of a queue, if it has them. A queue that was found empty, or is none, is not tried again. Answers
-- how many it got.
local bulk, empty = take() == '1', {}
local function pop(at, most)
  if empty[at] then return 0 end
  local key = KEYS[at]
  local suffix = taken_at .. string.sub(key, 7)
  local got = 0
  -- A reply must fit the read timeout.
  while got < most and bytes < 1048576 do
    local found
    if bulk and most - got > 1 then
      found = redis.pcall('RPOP', key, most - got)
    else
      found = redis.pcall('RPOP', key)
      if type(found) == 'string' then found = {found} end
    end
    if not found or found.err then
      empty[at] = true
      if found then refused[#refused + 1] = string.sub(key, 7) end
      return got
    end
    for _, payload in ipairs(found) do claim(payload, suffix) end
    got = got + #found
  end
  return got
end

for _ = 1, take_count() do
  local threads, orders = take_count(), take_count()
  local first, base = position + 1, index
  position = position + orders
  if orders == 1 then
    local got = 0
    for at in string.gmatch(ARGV[first], '%d+') do
      if got < threads then got = got + pop(tonumber(at), threads - got) end
    end
  elseif orders > 0 then
    local got = pop(tonumber(string.match(ARGV[first], '^%d+')), threads)
    for i = first + got, position do
      local found = 0
      for at in string.gmatch(ARGV[i], '%d+') do
        if found == 0 then found = pop(tonumber(at), 1) end
      end
    end
  end
  index = base + threads
end
-- A job that was with this process alone and cannot go back gets a record, which the next sweep finds.
for i, job in ipairs(unpushed) do
  fields[#fields + 1] = prefix .. index + i .. taken_at .. job[1]
  fields[#fields + 1] = job[2]
end
redis.call('HSET', inflight, unpack(fields))
return {'ok', undone, recorded, claimed, refused, counted}
