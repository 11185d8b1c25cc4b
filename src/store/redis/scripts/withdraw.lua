-- Forgets a writer that waited for the readers of a key to leave, on a node of a quorum. If it was the last, notifies
-- those who wait to be readers, unless it has the key by now.
--
-- KEYS  the lock key, the set of writers that wait for it.
-- ARGV  place of the writer, the marker of readers, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1.
--
-- Idempotent: a repeat finds nothing, and notifies nobody.

local at = string.format('%.0f', math.floor(now / 1000))
if redis.call('ZREM', KEYS[2], ARGV[1]) == 1 and redis.call('ZCOUNT', KEYS[2], '(' .. at, '+inf') == 0 then
    local held = redis.call('GET', KEYS[1])
    if not held or held == ARGV[2] then
        redis.pcall(ARGV[3], ARGV[4], '')
    end
end
return 1
