-- The entry of an instance in an index (docs/protocol.md, "Death"): when it was registered, its pid, when its process was
-- started, and the host; only the first where its info tells no process.
local function index_entry(info)
  local told = redis.pcall('HMGET', info, 'started_at', 'process', 'host')
  if told.err or not told[1] then return '' end
  if not told[2] or not told[3] then return told[1] end
  return table.concat(told, ' ')
end

