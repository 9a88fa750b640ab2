-- take: the second half of a blocking claim (docs/protocol.md, "Blocking claims"). What BLMOVE has laid aside is in flight from
-- here on, or lies in its queue again.
-- KEYS: inflight info aside queue queues counted   ARGV: slot, index (of the token, greater than that of the claim before in this
--       slot), queue
-- Answers: 'lost'; 'none' (nothing is there, or a later claim of this slot has been made); or 'taken', the token, the payload, how many more jobs the queue has, and whether any job has a
--       counter (1 or 0)
local inflight, info, aside, queue = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local slot, index, name = 'claim:' .. ARGV[1], ARGV[2], ARGV[3]

local call = lease_of(inflight)
local last = call and redis.pcall('HGET', info, slot)
if not call or type(last) == 'string' and tonumber(last) >= tonumber(index) then
  -- What has been laid aside for this call, if anything.
  lay_back(inflight, aside, queue, KEYS[5], name)
  return {call and 'none' or 'lost'}
end
-- The oldest that lies there; or that one has been laid back meanwhile.
local payload = redis.pcall('RPOP', aside)
if type(payload) ~= 'string' then payload = redis.pcall('RPOP', queue) end
if type(payload) ~= 'string' then return {'none'} end
local time = redis.call('TIME')
local token = call .. '-' .. index .. ' ' .. time[1] .. string.sub('00000' .. time[2], -6, -4) .. ' ' .. name
redis.call('HSET', inflight, token, payload)
redis.pcall('HSET', info, slot, index)
local more = redis.pcall('LLEN', queue)
return {'taken', token, payload, type(more) == 'number' and more or 0, redis.call('EXISTS', KEYS[6])}
