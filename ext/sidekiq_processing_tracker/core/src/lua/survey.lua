-- survey: what there is to see of instances. Changes nothing.
-- KEYS: clock instances, then of each instance: inflight info hands   ARGV: info fields n, then n fields, then identities
-- Answers: the server's time, the clock's now, seen, step and ttl, then for each instance a list: its lease end, 'leased' or
--       'fenced', how many jobs it has in flight (-1 where its hash is none), the info fields. Empty for one that is gone
local clock, instances = KEYS[1], KEYS[2]
local fields = {}
for i = 1, tonumber(ARGV[1]) do fields[i] = ARGV[1 + i] end

local time = redis.call('TIME')
local held = redis.pcall('HMGET', clock, 'now', 'seen', 'step', 'ttl')
if held.err then held = {} end
local answer = {string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), held}

for i = 2 + #fields, #ARGV do
  local position = 3 * (i - 1 - #fields)
  local inflight, info, hands = KEYS[position], KEYS[position + 1], KEYS[position + 2]
  local lease_end = redis.call('ZSCORE', instances, ARGV[i])
  local seen = {}
  if lease_end then
    local count = redis.pcall('HLEN', inflight)
    local leased = redis.pcall('HEXISTS', inflight, 'call')
    local open = redis.pcall('HKEYS', hands)
    for _, number in ipairs(open.err and {} or open) do
      local held = redis.pcall('LLEN', hands .. ':' .. number)
      if type(held) == 'number' and type(count) == 'number' then count = count + held end
    end
    if type(count) == 'table' then
      seen = {lease_end, 'fenced', -1}
    else
      seen = {lease_end, leased == 1 and 'leased' or 'fenced', count - leased}
    end
    local told = redis.pcall('HMGET', info, unpack(fields))
    if told.err then told = {} end
    for j = 1, #fields do seen[3 + j] = told[j] or false end
  end
  answer[#answer + 1] = seen
end
return answer
