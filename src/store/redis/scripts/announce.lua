-- Notes that a writer waits for the readers of a key to leave, on a node of a quorum.
--
-- KEYS  the set of writers that wait for the key.
-- ARGV  place of the writer, for how long in ms it counts as waiting.
-- Reply 1.
--
-- Idempotent: a repeat notes it for as long from then on. Forgets some that no longer count.

local at = math.floor(now / 1000)
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', at), 'LIMIT', 0, 128)
if #over > 0 then
    redis.call('ZREM', KEYS[1], unpack(over))
end
redis.call('ZADD', KEYS[1], string.format('%.0f', at + tonumber(ARGV[2])), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
