-- outbox_look: what waits in the outbox, for the one who delivers it.
-- KEYS: courier (who delivers), queues and dead of the outbox
-- ARGV: by, hold (ms; 0 to let it go)
-- Answers: nothing where there is nothing; 2 where another delivers; else whether there are entries for the dead set (1 or 0),
--       then the queues for which there may be jobs
local courier, queues, dead = KEYS[1], KEYS[2], KEYS[3]
local holder = redis.call('GET', courier)
if ARGV[2] == '0' then
  if holder == ARGV[1] then redis.call('DEL', courier) end
  return {}
end
if redis.call('EXISTS', queues, dead) == 0 then return {} end
if holder and holder ~= ARGV[1] then return {2} end
redis.call('SET', courier, ARGV[1], 'PX', ARGV[2])
return {redis.call('EXISTS', dead), unpack(redis.call('SMEMBERS', queues))}
