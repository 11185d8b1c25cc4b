-- Releases those of the keys that hold the token, even if other grants rely on them.
--
-- KEYS  n lock keys, their n lines, then other keys to delete with them: the records of grants, if the token may be
--       used again.
-- ARGV  token, n, 'PUBLISH' or 'SPUBLISH' to notify waiters, then the n channels for that, if their names are not those
--       of the lock keys.
-- Reply 1  all were ours and are free.  0  a key was gone.  -1  a key holds something else.
--
-- Idempotent: a repeat finds nothing of ours, returns that, and changes nothing. A key of another type is not ours.
-- Neither such a key nor one that can't be read keeps the others from being released.

local token, n = ARGV[1], tonumber(ARGV[2])
local reply, failure = 1, nil

for i = 1, n do
    local held = redis.pcall('GET', KEYS[i])
    if not held then
        reply = math.min(reply, 0)
        forget_grants(KEYS[2 * n + i], token)
    elseif held.err and not string.find(held.err, '^WRONGTYPE') then
        failure = held
    elseif held.err or not is_owner(token, held) then
        reply = -1
        forget_grants(KEYS[2 * n + i], token)
    else
        local done, why = pcall(pass_on, KEYS[i], KEYS[n + i], ARGV[3], ARGV[3 + i] or KEYS[i])
        if not done then
            failure = why
        elseif KEYS[2 * n + i] then
            redis.pcall('DEL', KEYS[2 * n + i])
        end
    end
end
if failure then
    error(failure, 0)
end
return reply
