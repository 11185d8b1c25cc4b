-- Takes a vote back: deletes those of the keys that the named attempt has set, and that no other attempt in the same
-- token's name has been told to hold since.
--
-- KEYS  n lock keys, their n vote keys.
-- ARGV  token, name of the attempt.
-- Reply 1.
--
-- Idempotent: a repeat finds nothing of this attempt's.

local token, n = ARGV[1], #KEYS / 2

for i = 1, n do
    if redis.call('GET', KEYS[n + i]) == ARGV[2] then
        redis.call('DEL', KEYS[n + i])
        local held = redis.call('GET', KEYS[i])
        if held and (held == token or string.sub(held, 1, #token + 1) == token .. '\n') then
            redis.call('DEL', KEYS[i])
        end
    end
end
return 1
