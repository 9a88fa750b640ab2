-- Where the payload of a job in flight is: in the in-flight hash, under its token; or, where the token's number has a plus,
-- in a list of its own and nothing else in that (docs/protocol.md, "Large payloads").
local function list_of(inflight, token)
  local number = string.match(token, '^(%d+%-%d+)%+ ')
  return number and inflight .. ':' .. number
end

-- False for a token that is not there, or whose list somebody has removed or overwritten; nil where Redis does not tell (a right
-- is missing).
local function payload_of(inflight, token)
  local payload = redis.call('HGET', inflight, token)
  local list = payload and list_of(inflight, token)
  if not list then return payload end
  payload = redis.pcall('LINDEX', list, 0)
  if type(payload) ~= 'table' then return payload end
  if string.find(payload.err, '^WRONGTYPE') then return false end
  return nil
end

-- They are not in flight any more.
local function drop(inflight, tokens)
  redis.call('HDEL', inflight, unpack(tokens))
  for _, token in ipairs(tokens) do
    local list = list_of(inflight, token)
    if list then redis.call('DEL', list) end
  end
end

