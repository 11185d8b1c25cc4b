-- Leaves the queue of a key.
--
-- KEYS  the lock key, its queue, its signs of life.
-- ARGV  token, 'PUBLISH' or 'SPUBLISH', channel, as release.lua.
-- Reply 1.
--
-- Idempotent: a repeat finds nothing to remove. If it was this one's turn, it is the next one's now, who is told.

local turn = redis.call('ZRANGE', KEYS[2], 0, 0)[1] == ARGV[1]
redis.call('ZREM', KEYS[2], ARGV[1])
redis.pcall('HDEL', KEYS[3], ARGV[1])
if turn and redis.call('EXISTS', KEYS[1]) == 0 then
    redis.pcall(ARGV[2], ARGV[3] or KEYS[1], '')
end
return 1
