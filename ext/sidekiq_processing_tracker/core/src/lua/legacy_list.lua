-- legacy_list: gives each instance of the 1.0 gem that is dead by its keys a lease, if it has none yet.
-- KEYS: clock instances, then for each instance: jobs heartbeat   ARGV: step ttl, then its identity here for each
-- Answers: for each how it stands: 'alive', 'dead', 'gone' (no jobs), 'overwritten' (one of its keys is not of 1.0's type)
local clock, instances = KEYS[1], KEYS[2]

redis.call('ZCARD', instances) -- raises where that key holds something else, before anything is written
redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
local now, _, ttl = tick(clock, instances, tonumber(ARGV[1]), tonumber(ARGV[2]))
local standings = {}
for i = 3, #ARGV do
  local standing = standing_of(KEYS[2 * i - 3], KEYS[2 * i - 2])
  if standing == 'dead' then
    redis.call('ZADD', instances, 'NX', now + math.max(ttl, tonumber(ARGV[2])), ARGV[i])
  end
  standings[#standings + 1] = standing
end
return standings
