-- clear_lock: frees a lock of sidekiq-unique-jobs, and its runtime lock.
-- KEYS: the indexes of that gem, digests and expiring_digests, then the lock and the runtime lock, five keys each
-- ARGV: jid (only what it holds; '' for all)
-- Answers: how much was freed, 0 for nothing
local freed = 0
for _, first in ipairs({3, 8}) do
  local lock = lock_at(first)
  freed = freed + (ARGV[1] == '' and remove(lock) or give_up(lock, ARGV[1]))
end
return freed
