-- Returns the time until the first of the keys expires, if all of them hold the token.
--
-- KEYS  the lock keys.
-- ARGV  token.
-- Reply the shortest ttl in ms; -1: none has one; -2: not all hold the token.
--
-- Idempotent: it only reads.

local token = ARGV[1]
local shortest = -1

for i = 1, #KEYS do
    local held = held_by(KEYS[i])
    if not held or not is_owner(token, held) then
        return -2
    end
    local ttl = redis.call('PTTL', KEYS[i])
    if ttl >= 0 and (shortest < 0 or ttl < shortest) then
        shortest = ttl
    end
end
return shortest
