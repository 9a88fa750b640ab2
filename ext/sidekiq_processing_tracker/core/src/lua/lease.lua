-- lease_of: the number of an instance's last turn, which stands there as long as it has its lease; false when it has none.
local function lease_of(inflight)
  local call = redis.pcall('HGET', inflight, 'call')
  if type(call) ~= 'table' then return call end
  -- A hash that somebody has overwritten holds no lease any more. What else Redis may say (a right that is missing) is no
  -- answer to that: it is raised.
  if string.find(call.err, '^WRONGTYPE') then return false end
  return redis.call('HGET', inflight, 'call')
end

