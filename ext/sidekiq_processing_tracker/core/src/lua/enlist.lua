-- enlist: keeps an instance in the indexes in which others look for it, and lists who is there.
-- KEYS: inflight info, then the indexes   ARGV: identity, lives (ms), most
-- Answers: 'lost', or 'ok' and for each index two: how many it has (-1 where its key holds something else), and a list of the identities and entries of some of
--       them, at random where there are more than `most`, and in any case its own
local inflight, info, identity = KEYS[1], KEYS[2], ARGV[1]

if not lease_of(inflight) then return {'lost'} end
redis.call('HDEL', inflight, '-') -- allowed when memory is full, and then so is every write after it
local answer = {'ok'}
for i = 3, #KEYS do
  -- Somebody has removed it, or overwritten it: others are then found by their leases.
  local here = redis.pcall('HEXISTS', KEYS[i], identity)
  if here == 0 then redis.pcall('HSET', KEYS[i], identity, index_entry(info)) end
  redis.pcall('PEXPIRE', KEYS[i], ARGV[2])
  local count, some = redis.pcall('HLEN', KEYS[i]), redis.pcall('HRANDFIELD', KEYS[i], ARGV[3], 'WITHVALUES')
  if type(count) == 'table' or some.err then
    count, some = -1, {}
  else
    local listed, own = false, redis.pcall('HGET', KEYS[i], identity)
    for j = 1, #some, 2 do listed = listed or some[j] == identity end
    if not listed and type(own) == 'string' then
      some[#some + 1] = identity
      some[#some + 1] = own
    end
  end
  answer[#answer + 1] = count
  answer[#answer + 1] = some
end
return answer
