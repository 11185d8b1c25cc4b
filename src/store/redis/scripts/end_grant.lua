-- Ends one grant: releases those of the keys that hold the token, unless other grants rely on them.
--
-- KEYS  n lock keys, then their n records of grants.
-- ARGV  token, n, 'PUBLISH' or 'SPUBLISH' as in release.lua, id of the grant (`-`: it has none), channels as in
--       release.lua.
-- Reply as release.lua. A key that is left to others counts as released.
--
-- Idempotent: a repeat finds this grant ended.

local token, n, grant = ARGV[1], tonumber(ARGV[2]), ARGV[4]
local reply = 1

for i = 1, n do
    local held = redis.pcall('GET', KEYS[i])
    if not held then
        reply = math.min(reply, 0)
    elseif held.err or not is_owner(token, held) then
        reply = -1
    else
        local others, was_there = without(grants_of(KEYS[n + i], token), grant)
        if #others == 0 then
            redis.call('DEL', KEYS[i])
            redis.pcall('DEL', KEYS[n + i])
            redis.pcall(ARGV[3], ARGV[4 + i] or KEYS[i], '')
        elseif was_there then
            write_grants(KEYS[n + i], token, others, redis.call('PTTL', KEYS[n + i]))
        end
    end
end
return reply
