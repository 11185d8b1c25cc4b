-- Notes that a writer waits for the readers of a key to leave, on a node of a quorum.
--
-- KEYS  the set of writers that wait for the key.
-- ARGV  place of the writer, for how long in ms it counts as waiting.
-- Reply 1.
--
-- Idempotent: a repeat notes it for as long from then on.

local at = math.floor(now / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', at))
redis.call('ZADD', KEYS[1], string.format('%.0f', at + tonumber(ARGV[2])), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
