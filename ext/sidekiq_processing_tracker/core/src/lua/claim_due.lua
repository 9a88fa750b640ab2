-- claim_due: takes jobs that are due out of one of Sidekiq's sets, for an instance to push them (docs/protocol.md, "Due jobs").
-- KEYS: inflight due set   ARGV: call (the number of this claim), until (a score), most, the set's name
-- Answers: 'lost', 'stale' (a later claim has been done), or 'ok', how many lay there of earlier claims, whether there may be
--       more (1 or 0), then token and payload for each. 'idle' instead of 'ok': nothing is due, and nothing was written, so that
--       the number is still to be had
local inflight, due, set = KEYS[1], KEYS[2], KEYS[3]
local call, most, name = tonumber(ARGV[1]), tonumber(ARGV[3]), ARGV[4]

if not lease_of(inflight) then return {'lost'} end
local last = redis.call('HGET', due, 'call')
local done = tonumber(last or '0')
if call <= done then return {'stale'} end
local before = last and redis.call('HLEN', due) - 1 or 0
-- Raises where that key holds something else, before anything is written.
local first = redis.call('ZRANGEBYSCORE', set, '-inf', ARGV[2], 'LIMIT', 0, 1)
-- Where numbers have been left out, a late copy of an earlier claim must find that a later one has been done.
if #first == 0 and call == done + 1 then return {'idle', before, 0} end

redis.call('HDEL', due, '-') -- allowed when memory is full, and then so is every write after it
redis.call('HSET', due, 'call', call)
local answer, got, bytes, size = {'ok', before, 0}, 0, 0, 16
while got < most and bytes < 1048576 do
  -- As many as may be hoped to fit: a reply must fit the read timeout.
  if got > 0 then size = math.max(1, math.floor((1048576 - bytes) / (bytes / got + 1))) end
  size = math.min(size, most - got)
  local found = redis.call('ZRANGEBYSCORE', set, '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, size)
  local fields, members = {}, {}
  for i = 1, #found, 2 do
    -- They may be larger than those before.
    if bytes >= 1048576 then break end
    got = got + 1
    bytes = bytes + #found[i]
    local token = call .. '-' .. got .. ' ' .. found[i + 1] .. ' ' .. name
    fields[i], fields[i + 1] = token, found[i]
    members[#members + 1] = found[i]
    answer[#answer + 1] = token
    answer[#answer + 1] = found[i]
  end
  if #members > 0 then
    redis.call('HSET', due, unpack(fields))
    redis.call('ZREM', set, unpack(members))
  end
  if #found < 2 * size and 2 * #members == #found then return answer end
end
answer[3] = 1
return answer
