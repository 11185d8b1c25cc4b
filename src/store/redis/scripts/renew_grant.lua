-- Makes the keys live on for one grant of several, if all of them hold the token.
--
-- KEYS  n lock keys, then their n records of grants.
-- ARGV  token, ttl in ms, n, how, id of the grant (`-`: it has none), ttl of the records in ms, id of an earlier grant. How:
--       'exactly'  the keys live for the ttl, or for at least the ttl while other grants rely on them.
--       'claim'    they live for at least the ttl, and the grant takes the place of the earlier one.
--       'keep'     they live for at least the ttl, and the records live on, too.
-- Reply as renew.lua.
--
-- Idempotent, as renew.lua is.

local token, ttl, n, how, grant = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local record_ttl, earlier = ARGV[6], ARGV[7]
local missing = false
local ids = {}

for i = 1, n do
    local held = redis.pcall('GET', KEYS[i])
    if not held then
        missing = true
    elseif held.err or not is_owner(token, held) then
        return -1
    end
    ids[i] = grants_of(KEYS[n + i], token)
end
if missing then
    return 0
end

for i = 1, n do
    if how == 'claim' then
        write_grants(KEYS[n + i], token, with(without(ids[i], earlier), grant), record_ttl)
    elseif how == 'keep' then
        redis.call('PEXPIRE', KEYS[n + i], record_ttl)
    end
    if how == 'exactly' and #without(ids[i], grant) == 0 then
        redis.call('PEXPIRE', KEYS[i], ttl)
    else
        extend(KEYS[i], ttl)
    end
end
return 1
