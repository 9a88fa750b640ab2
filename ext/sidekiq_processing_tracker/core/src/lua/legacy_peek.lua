-- legacy_peek: reads jobs of the 1.0 gem, up to 1 MB but not less than one, so that the reply fits the read timeout.
-- KEYS: their keys
-- Answers: the server's time in ms, then payload, nil (there is none) or 0 (something else is there) for each, for as many
--       as fit
local time = redis.call('TIME')
local answer, bytes = {time[1] * 1000 + math.floor(time[2] / 1000)}, 0
for i, key in ipairs(KEYS) do
  local size = redis.pcall('STRLEN', key)
  if type(size) == 'table' then
    answer[i + 1] = 0
  else
    if i > 1 and bytes + size > 1048576 then break end
    bytes = bytes + size
    answer[i + 1] = redis.call('GET', key)
  end
end
return answer
