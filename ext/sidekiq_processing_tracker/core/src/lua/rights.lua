-- rights: what the user that asks may not do.
-- ARGV: for each thing that it should be allowed: command, key (one like those it is for), a number
-- Answers: for each that it may not do: command, its number. Nothing before Redis 7.0, which does not tell
local missing = {}
if not redis.acl_check_cmd then return missing end

-- Redis 8 wants as many arguments as the command takes, and raises an error else; a command that it does not know is one too.
local function allowed(command, key)
  local arguments = {key, key, key, key, key}
  for _, count in ipairs({3, 1, 2, 0, 4, 5}) do
    local known, answer = pcall(redis.acl_check_cmd, command, unpack(arguments, 1, count))
    if known then return answer end
  end
  return true
end

for i = 1, #ARGV, 3 do
  if not allowed(ARGV[i], ARGV[i + 1]) then
    missing[#missing + 1] = ARGV[i]
    missing[#missing + 1] = ARGV[i + 2]
  end
end
return missing
