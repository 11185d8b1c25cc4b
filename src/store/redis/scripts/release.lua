-- Deletes those of the keys that hold the token.
--
-- KEYS  the lock keys.
-- ARGV  token, 'PUBLISH' or 'SPUBLISH': how those who wait are told, by an empty message on the channel of the key's name.
-- Reply 1  all were ours and are free.  0  a key was gone.  -1  a key holds something else.
--
-- Idempotent: a repeat finds nothing of ours, says so, and touches nothing.

local token = ARGV[1]
local reply = 1

for i = 1, #KEYS do
    local held = redis.call('GET', KEYS[i])
    if not held then
        reply = math.min(reply, 0)
    elseif held == token or string.sub(held, 1, #token + 1) == token .. '\n' then
        redis.call('DEL', KEYS[i])
        -- A release is a release, also where messages are not allowed.
        redis.pcall(ARGV[2], KEYS[i], '')
    else
        reply = -1
    end
end
return reply
