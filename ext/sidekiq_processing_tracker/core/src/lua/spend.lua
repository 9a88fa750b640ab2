-- spend: a slot makes no claim any more whose number is not greater than this, however late one comes.
-- KEYS: inflight info   ARGV: slot, index
-- Answers: 1, or 0 where there is no lease
if not lease_of(KEYS[1]) then return 0 end
redis.call('HDEL', KEYS[1], '-') -- allowed when memory is full, and then so is every write after it
local slot = 'claim:' .. ARGV[1]
local last = redis.pcall('HGET', KEYS[2], slot)
if type(last) ~= 'string' or tonumber(last) < tonumber(ARGV[2]) then redis.pcall('HSET', KEYS[2], slot, ARGV[2]) end
return 1
