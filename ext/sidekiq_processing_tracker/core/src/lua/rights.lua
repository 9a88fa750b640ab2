-- rights: what the user that asks may not do.
-- ARGV: for each thing that it should be allowed: command, key (one like those it is for), a number
-- Answers: for each that it may not do: command, its number. Nothing before Redis 7.0, which does not tell
local missing = {}
if not redis.acl_check_cmd then return missing end
for i = 1, #ARGV, 3 do
  local known, allowed = pcall(redis.acl_check_cmd, ARGV[i], ARGV[i + 1], ARGV[i + 1], ARGV[i + 1])
  if known and not allowed then
    missing[#missing + 1] = ARGV[i]
    missing[#missing + 1] = ARGV[i + 2]
  end
end
return missing
