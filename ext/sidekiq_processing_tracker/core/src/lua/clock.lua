-- The lease clock (docs/protocol.md, "The lease clock"). Put before every script that needs the time.
--
-- tick moves the clock on by the server time that passed since it was last looked at: never back, never by more than
-- a step at once, and not at all under a twentieth of a step. Returns now, step, ttl, whether it moved, and the server's
-- own time; all in ms. A clock that is missing or unreadable begins at the server's time, with every lease anew.
local function tick(clock, instances, default_step, default_ttl)
  local time = redis.call('TIME')
  local server = time[1] * 1000 + math.floor(time[2] / 1000)
  local held = redis.call('HMGET', clock, 'now', 'seen', 'step', 'ttl')
  local now, seen, step, ttl = tonumber(held[1]), tonumber(held[2]), tonumber(held[3]), tonumber(held[4])
  if not (now and seen and step and ttl) then
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
  if passed * 20 < step then
    return now, step, ttl, false, server
  end
  now = now + math.min(passed, step)
  redis.call('HSET', clock, 'now', now, 'seen', server)
  return now, step, ttl, true, server
end

