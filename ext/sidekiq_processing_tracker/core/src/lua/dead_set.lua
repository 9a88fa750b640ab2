-- Trims Sidekiq's dead set after entries were added. Sidekiq keeps one entry less than its dead_max_jobs says; here an entry
-- that has just been made must not go for that. Answers how many were lost.
local function trim_dead_set(dead, server, dead_timeout, dead_max_jobs)
  local old = redis.pcall('ZREMRANGEBYSCORE', dead, '-inf', '(' .. string.format('%.3f', (server - dead_timeout) / 1000))
  local many = redis.pcall('ZREMRANGEBYRANK', dead, 0, -dead_max_jobs - 1)
  return type(old) == 'number' and type(many) == 'number' and old + many or 0
end

