-- legacy_peek: reads jobs of the 1.0 gem, up to 1 MB but not less than one, so that the reply fits the read timeout.
-- KEYS: their keys   Answers: payload, nil (there is none) or 0 (something else is there) for each, for as many as fit
local payloads, bytes = {}, 0
for i, key in ipairs(KEYS) do
  local size = redis.pcall('STRLEN', key)
  if type(size) == 'table' then
    payloads[i] = 0
  else
    if i > 1 and bytes + size > 1048576 then break end
    bytes = bytes + size
    payloads[i] = redis.call('GET', key)
  end
end
return payloads
