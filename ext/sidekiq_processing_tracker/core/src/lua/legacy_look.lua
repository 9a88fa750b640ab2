-- legacy_look: takes the turn to look for keys of the 1.0 gem, which one process at a time has.
-- KEYS: clock
-- ARGV: least (ms that must have passed since somebody had the turn, at most those that he set), next (ms until the next turn)
-- Answers: 0 when the turn is the caller's, else the ms to wait
local clock = KEYS[1]
local time = redis.call('TIME')
local server = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HMGET', clock, 'scanned', 'scan_after')
local scanned, after = tonumber(held[1]), tonumber(held[2])
if scanned and after then
  local passed, least = server - scanned, math.min(after, tonumber(ARGV[1]))
  -- A server clock that was set back must not put it off.
  if passed >= 0 and passed < least then return least - passed end
end
redis.call('HDEL', clock, '-') -- allowed when memory is full, and then so is every write after it
redis.call('HSET', clock, 'scanned', server, 'scan_after', ARGV[2])
return 0
