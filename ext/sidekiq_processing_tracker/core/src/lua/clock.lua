-- The lease clock (docs/protocol.md, "The lease clock"). Put before every script that needs the time.
--
-- tick moves the clock on by the server time that passed since it was last looked at: never back, never by more than
-- a step at once, and not at all under a twentieth of a step. Returns now, step, ttl, whether it moved, and the server's
-- own time; all in ms. A clock that is missing or unreadable begins at the server's time, with every lease anew.
--
-- clamp: after the namespace's step has grown, the clock goes on in the old, shorter steps until clamp_until, when no
-- lease is left that ran at that moment and was not renewed.
local function readable(number, least)
  return number and number >= least and number < 1e15
end

local function tick(clock, instances, default_step, default_ttl)
  local time = redis.call('TIME')
  local server = time[1] * 1000 + math.floor(time[2] / 1000)
  local held = redis.call('HMGET', clock, 'now', 'seen', 'step', 'ttl', 'clamp', 'clamp_until')
  local now, seen, step, ttl = tonumber(held[1]), tonumber(held[2]), tonumber(held[3]), tonumber(held[4])
  local clamp, clamp_until = tonumber(held[5]), tonumber(held[6])
  if not (readable(now, 0) and readable(seen, 0) and readable(step, 1) and readable(ttl, 1)) then
    redis.call('HDEL', clock, 'clamp', 'clamp_until')
    redis.call('HSET', clock, 'now', server, 'seen', server, 'step', default_step, 'ttl', default_ttl)
    for _, identity in ipairs(redis.call('ZRANGE', instances, 0, -1)) do
      redis.call('ZADD', instances, server + default_ttl, identity)
    end
    return server, default_step, default_ttl, true, server
  end
  local passed = server - seen
  if passed < 0 then
    redis.call('HSET', clock, 'seen', server)
    return now, step, ttl, false, server
  end
  local most = step
  if readable(clamp, 1) and readable(clamp_until, 0) and now < clamp_until then most = math.min(clamp, step) end
  if passed * 20 < most then
    return now, step, ttl, false, server
  end
  now = now + math.min(passed, most)
  redis.call('HSET', clock, 'now', now, 'seen', server)
  return now, step, ttl, true, server
end

