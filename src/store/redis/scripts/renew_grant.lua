-- Makes the keys live on for one grant of several, if all of them hold the token.
--
-- KEYS  n lock keys, then their n records of grants.
-- ARGV  token, ttl in ms, n, how, id of the grant (`-`: it has none), ttl of the records in ms, id of an earlier
--       grant, restart window in s, where this server is a node of a quorum and its word shall count only if it has
--       been up for longer.
-- How:
--       'exactly'  the keys live for the ttl, or for at least the ttl while other grants rely on them.
--       'claim'    they live for at least the ttl, and the grant takes the place of the earlier one.
--       'keep'     they live for at least the ttl, and the records live on, too, and know of that ttl.
--       'least'    they live for at least the ttl.
--       'return'   nothing of theirs changes; the grant ends, and the earlier one takes its place where there is no
--       other.
-- Reply as renew.lua; below -1 where the server was restarted lately: nothing was done, and for as many seconds as it
-- is below that its word does not count. What it holds may be from an old dump, and forgotten be what followed.
--
-- Idempotent, as renew.lua is.

local token, ttl, n, how, grant = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local record_ttl, earlier = ARGV[6], ARGV[7]
local window = tonumber(ARGV[8] or 0)
local missing = false
local grants = {}

if window > 0 then
    local up = uptime()
    if up <= window then
        return -1 - (window - up + 1)
    end
end

for i = 1, n do
    local held = held_by(KEYS[i])
    if held == nil then
        missing = true
    elseif not held or not is_owner(token, held) then
        return -1
    end
    grants[i] = grants_of(KEYS[n + i], token)
end
if missing then
    return 0
end

local function rewrite(record_key, record)
    if how == 'claim' then
        return write_grants(record_key, token, with(without(record, earlier), grant, ttl), record_ttl)
    elseif how == 'keep' or how == 'exactly' then
        -- `-` is in no record of its own making.
        return grant ~= '-' and write_grants(record_key, token, with(record, grant, ttl), record_ttl)
    end
    local others = without(record, grant)
    if how == 'return' and #others.ids < #record.ids then
        others = #others.ids > 0 and others or with(others, earlier, ttl)
        write_grants(record_key, token, others, record_ttl)
    end
end

for i = 1, n do
    local record = grants[i]
    rewrite(KEYS[n + i], record)
    if how == 'exactly' and #without(record, grant).ids == 0 then
        redis.call('PEXPIRE', KEYS[i], ttl)
    elseif how ~= 'return' then
        extend(KEYS[i], ttl)
    end
end
return 1
