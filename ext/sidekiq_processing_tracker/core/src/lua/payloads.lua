-- Where the payload of a job in flight is: in the in-flight hash, under its token; or, where the token's number has a plus,
-- in a list of its own and nothing else in that (docs/protocol.md, "Large payloads").
local function list_of(inflight, token)
  local number = string.match(token, '^(%d+%-%d+)%+ ')
  return number and inflight .. ':' .. number
end

-- What such a list holds. False where somebody has removed or overwritten it; nil where Redis does not tell (a right is missing).
local function payload_in(list)
  local payload = redis.pcall('LINDEX', list, 0)
  if type(payload) ~= 'table' then return payload end
  if string.find(payload.err, '^WRONGTYPE') then return false end
  return nil
end

-- False for a token that is not there; else the same.
local function payload_of(inflight, token)
  local payload = redis.call('HGET', inflight, token)
  local list = payload and list_of(inflight, token)
  if not list then return payload end
  return payload_in(list)
end

-- What tokens hold, false for one that holds nothing: of so many of them, from the first on, as do not exceed 1 MB, but not
-- less than one, so that the reply fits the read timeout. Read a few at a time: what exceeds it was read in vain. With `there`
-- the hash is known to have them all: then those whose payloads are in lists are not looked up in it.
local function payloads_of(inflight, tokens, there)
  local payloads, bytes, first, most = {}, 0, 1, 1
  while first <= #tokens do
    local last = math.min(first + most - 1, #tokens)
    local lists, asked = {}, {}
    for i = first, last do
      lists[i] = list_of(inflight, tokens[i]) or false
      if not (there and lists[i]) then asked[#asked + 1] = tokens[i] end
    end
    local held, at = #asked > 0 and redis.call('HMGET', inflight, unpack(asked)), 0
    for i = first, last do
      local list, payload = lists[i], ''
      if not (there and list) then
        at = at + 1
        payload = held[at]
      end
      if list and payload then payload = payload_in(list) end
      if payload == nil then payload = redis.call('LINDEX', list, 0) end -- raises what Redis says
      bytes = bytes + (payload and #payload or 0)
      if i > 1 and bytes > 1048576 then return payloads end
      payloads[i] = payload
    end
    first, most = last + 1, math.min(2 * most, 16)
  end
  return payloads
end

-- They are not in flight any more.
local function drop(inflight, tokens)
  redis.call('HDEL', inflight, unpack(tokens))
  for _, token in ipairs(tokens) do
    local list = list_of(inflight, token)
    if list then redis.call('DEL', list) end
  end
end

