-- Returns the holder of a key.
--
-- KEYS  the lock key, its fence key.
-- Reply nil if no one holds it, or the lock is reserved for the head of the line; 'SHARED' if several may hold it, whom
--       holders.lua knows; or {what the key holds, its ttl in ms or -1, what the fence key holds, or nil if that is no
--       text}.
--
-- Idempotent: it only reads.

local held = redis.call('GET', KEYS[1])
if held == READERS or held == PERMITS then
    return 'SHARED'
elseif not held or string.sub(held, 1, 1) == '\n' then
    return false
end
local fence = redis.pcall('GET', KEYS[2])
return {held, redis.call('PTTL', KEYS[1]), fence and not fence.err and fence}
