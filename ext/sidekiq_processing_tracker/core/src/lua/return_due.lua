-- return_due: puts due jobs that nobody will push back to where they were taken from.
-- KEYS: inflight due, then the sets   ARGV: own ('1': the instance does it itself; '': it is fenced), then for each job:
--       token, its set (index in KEYS), its score
-- Answers: 'runs' when the instance is not fenced ('lost' when it should not be), or 'ok', how many are back, how many
--       could not go back (the set's key holds something else)
local inflight, due, own = KEYS[1], KEYS[2], ARGV[1] == '1'
local leased = lease_of(inflight)

if own and not leased then return {'lost'} end
if leased and not own then return {'runs'} end
redis.call('HDEL', due, '-') -- allowed when memory is full, and then so is every write after it
local back, stuck = 0, 0
for i = 2, #ARGV, 3 do
  local payload = redis.call('HGET', due, ARGV[i])
  if payload then
    -- One that is there already has been scheduled anew, to another time perhaps.
    if type(redis.pcall('ZADD', KEYS[tonumber(ARGV[i + 1])], 'NX', ARGV[i + 2], payload)) == 'number' then
      redis.call('HDEL', due, ARGV[i])
      back = back + 1
    else
      stuck = stuck + 1
    end
  end
end
-- The number of the last claim is of no use any more where none will come.
if not own and redis.call('HLEN', due) == redis.call('HEXISTS', due, 'call') then redis.call('DEL', due) end
return {'ok', back, stuck}
