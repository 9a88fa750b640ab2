-- turn: all that an instance does with jobs, numbered (docs/protocol.md, "Numbered turns").
-- KEYS: inflight info queues recoveries [queue key, counter key]...
-- ARGV: call
--       marks n, then n classes
--       acks n, then n tokens
--       acks n of jobs with a list of their own, then n tokens
--       counters n, then n times: counter key (index in KEYS) of a job that is done
--       requeues n, then n times: token ('' without a record), queue key (index in KEYS), queue, payload ('' with a token)
--       records n, then n times: queue, payload
--       large (0: payloads are small, so that many may be popped at once; else how many bytes one may have)
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
-- Most of them are 0, and to compare is cheaper than to compute.
local function take_count()
  position = position + 1
  local count = ARGV[position]
  return count == '0' and 0 or tonumber(count)
end

local done = lease_of(inflight)
if not done then return {'lost'} end
local call = tonumber(ARGV[1])
local function take_many(most)
  local first = position + 1
  position = position + most
  return unpack(ARGV, first, position)
end

done = tonumber(done)
if call < done then return {'stale'} end
local again = call == done

-- The acks first: what takes away is allowed when memory is full, and then so is every write after it.
local marks = position + 1
position = marks + tonumber(ARGV[marks])
local acks = take_count()
local allowed = acks > 0
local function allow()
  if not allowed then redis.call('HDEL', inflight, '-') end
  allowed = true
end
if again then
  position = position + acks
else
  while acks > 0 do
    local some = math.min(acks, 1000)
    redis.call('HDEL', inflight, take_many(some))
    acks = acks - some
  end
  if ARGV[marks] ~= '0' then allow() end
end
for _ = 1, take_count() do
  local token = take()
  if not again then
    drop(inflight, {token})
    allowed = true
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
local requeues = take_count()
if requeues > 0 and not again then allow() end
for i = 1, requeues do
  local token, key, queue, payload = take(), KEYS[take_count()], take(), take()
  local ok
  if again then
    ok = token == '' or redis.call('HEXISTS', inflight, token) == 0
  elseif token == '' then
    ok = push(key, queues, queue, {payload})
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
      local index = tonumber(string.match(token, '^%d+%-(%d+)%+? '))
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

local taken_at
-- What follows the number in the token of a job of this queue. The time is put together, since to compute it takes longer than to pop.
local function suffix_of(queue)
  if not taken_at then
    local time = redis.call('TIME')
    taken_at = ' ' .. time[1] .. string.sub('00000' .. time[2], -6, -4) .. ' '
  end
  return taken_at .. queue
end
-- Lua writes a number as any that has a fraction, which takes as long as a command.
local function numeral(number)
  return number < 10 and string.char(48 + number) or number
end
local fields = {'call', ARGV[1]}
local prefix = ARGV[1] .. '-'
for i = 1, records do
  local queue, payload = take(), take()
  local token = prefix .. numeral(i) .. suffix_of(queue)
  fields[#fields + 1] = token
  fields[#fields + 1] = payload
  recorded[i] = token
end

local index, bytes, filled, jobs = records, 0, #fields, 0
local function claim(key, payloads)
  local suffix = suffix_of(string.sub(key, 7))
  for i = 1, #payloads do
    local payload = payloads[i]
    local token = prefix .. numeral(index + i) .. suffix
    fields[filled + 1], fields[filled + 2] = token, payload
    claimed[jobs + 1], claimed[jobs + 2] = token, payload
    filled, jobs = filled + 2, jobs + 2
    bytes = bytes + #payload
  end
  index = index + #payloads
end

-- A string of Lua's costs Redis more than all else that it does with a large payload. So it goes from list to list, and the
-- caller reads it there. Answers as RPOP does, but with the token. Before Redis 7.0, SORT takes a list from its other end, and
-- reads all of it. Where this user may not do that, it is RPOP too.
local size = take_count()
local large, bulk, may_read = size > 0 and redis.REDIS_VERSION_NUM, size == 0, false
local pop_large = large and function(key)
  local token = prefix .. index + 1 .. '+' .. suffix_of(string.sub(key, 7))
  local list = list_of(inflight, token)
  -- What may not be read must not be moved.
  local read = not may_read and redis.pcall('LINDEX', list, 0)
  may_read = type(read) ~= 'table'
  local moved = may_read and redis.pcall('SORT', key, 'BY', 'nosort', 'DESC', 'LIMIT', 0, 1, 'STORE', list) or read
  if moved == 0 then return false end
  local failed = type(moved) == 'table' and moved or redis.pcall('LTRIM', key, 0, -2)
  if failed.err then
    -- Of a set, say, which SORT takes too.
    redis.call('DEL', list)
    if not string.find(failed.err, '^WRONGTYPE') then large = nil end
    return failed
  end
  fields[filled + 1], fields[filled + 2] = token, ''
  claimed[jobs + 1], claimed[jobs + 2] = token, ''
  filled, jobs, index, bytes = filled + 2, jobs + 2, index + 1, bytes + size
  return {token}
end

-- Claims so many jobs of a queue, if it has them. A queue that was found empty, or is none, is not tried again. Answers
-- how many it got.
local empty, most_bytes = {}, 1048576
local function pop(at, most)
  if empty[at] then return 0 end
  local key = KEYS[at]
  local got = 0
  -- A reply must fit the read timeout.
  while got < most and bytes < most_bytes do
    local found
    if large then found = pop_large(key) end
    local in_list = large
    if in_list then
      -- It is claimed, if there was one.
    elseif bulk and most - got > 1 then
      found = redis.pcall('RPOP', key, numeral(most - got))
    else
      found = redis.pcall('RPOP', key)
      if type(found) == 'string' then found = {found} end
    end
    if not found or found.err then
      empty[at] = true
      if found then refused[#refused + 1] = string.sub(key, 7) end
      return got
    end
    if not in_list then claim(key, found) end
    got = got + #found
  end
  return got
end

-- The same for several queues in this order, which is read no further than it is needed. Where the first is empty, Redis 7
-- and later finds the next that is not in one call.
local function pop_all(indexes, most)
  local first = string.match(indexes, '^%d+')
  local got = first and pop(tonumber(first), most) or most
  if got >= most then return end
  local order = {}
  for at in string.gmatch(indexes, '%d+') do order[#order + 1] = tonumber(at) end
  if #order > 2 and redis.REDIS_VERSION_NUM and not large then
    local keys, count = {}, #order - 1
    for i = 1, count do keys[i] = KEYS[order[i + 1]] end
    while got < most and bytes < most_bytes do
      keys[count + 1], keys[count + 2], keys[count + 3] = 'RIGHT', 'COUNT', bulk and most - got or 1
      local found = redis.pcall('LMPOP', count, unpack(keys))
      if not found then
        for _, at in ipairs(order) do empty[at] = true end
        return
      end
      -- One of the keys holds something else: which, is found below.
      if found.err then break end
      claim(found[1], found[2])
      got = got + #found[2]
    end
  end
  for i = 2, #order do
    if got < most then got = got + pop(order[i], most - got) end
  end
end

local claims = take_count()
-- A pop takes away, too, but SORT does not.
if claims == 0 or large then allow() end
for _ = 1, claims do
  local threads, orders = take_count(), take_count()
  local first, base = position + 1, index
  position = position + orders
  if orders == 1 then
    pop_all(ARGV[first], threads)
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
  fields[#fields + 1] = prefix .. index + i .. suffix_of(job[1])
  fields[#fields + 1] = job[2]
end
redis.call('HSET', inflight, unpack(fields))
return {'ok', undone, recorded, claimed, refused, counted}
