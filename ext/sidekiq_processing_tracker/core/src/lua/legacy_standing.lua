local function kind_of(key)
  return redis.call('TYPE', key).ok
end

-- How an instance of the 1.0 gem stands: 'alive' (it has a heartbeat), 'dead' (it has jobs and none), 'gone' (it has no
-- jobs), 'overwritten' (one of its keys is not of 1.0's type).
local function standing_of(jobs, heartbeat)
  local jobs_kind, heartbeat_kind = kind_of(jobs), kind_of(heartbeat)
  if jobs_kind == 'none' then return 'gone' end
  if jobs_kind ~= 'set' or (heartbeat_kind ~= 'none' and heartbeat_kind ~= 'string') then return 'overwritten' end
  return heartbeat_kind == 'string' and 'alive' or 'dead'
end

