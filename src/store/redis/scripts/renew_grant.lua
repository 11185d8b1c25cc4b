-- Extends the ttl of the keys for one grant of several, if all of them hold the token.
--
-- KEYS  n lock keys, then their n records of grants.
-- ARGV  token, ttl in ms, n, how, id of the grant (`-` if it has none), ttl of the records in ms, id of an earlier
--       grant, restart window in s if this server is a node of a quorum: its reply only counts if it has been up for
--       longer.
-- How:
--       'exactly'  the keys live for the ttl, or for at least the ttl while other grants rely on them, or an earlier
--                  grant wants them to stay taken.
--       'claim'    they live for at least the ttl, and the grant replaces the earlier one.
--       'keep'     they live for at least the ttl. The records are extended too, and note that ttl.
--       'least'    they live for at least the ttl. Only for `-`, where others may use the token.
--       'ensure'   the same for any grant of the token.
--       'return'   the keys do not change. The grant ends, and the earlier one replaces it if there is no other.
-- Reply as in renew.lua, where a key counts as gone if others rely on it and not this grant.
--       -1 - s  the server was restarted lately: nothing has changed, and its replies don't count for s more seconds.
--       What it holds may be from an old dump, and it may have forgotten what came later.
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
    local record = grants_of(KEYS[n + i], token)
    grants[i] = record
    -- `-` doesn't add itself to a record. Where it is missing from one, the key ends with the other grants.
    local has_own = record.ttls['-'] ~= nil or record.ttls['*'] ~= nil
    if grant == '-' and (how == 'least' or how == 'exactly') and not has_own then
        missing = true
    end
end
if missing then
    return 0
end

local function rewrite(record_key, record)
    if how == 'claim' then
        return write_grants(record_key, token, with(without(record, earlier), grant, ttl), record_ttl, true)
    elseif how == 'keep' or how == 'exactly' then
        -- `-` never adds itself to a record.
        return grant ~= '-' and write_grants(record_key, token, with(record, grant, ttl), record_ttl, true)
    end
    local others = without(record, grant)
    if how == 'return' and #others.ids < #record.ids then
        others = #others.ids > 0 and others or with(others, earlier, ttl)
        write_grants(record_key, token, others, record_ttl, true)
    end
end

for i = 1, n do
    local record = grants[i]
    rewrite(KEYS[n + i], record)
    if how == 'exactly' and #without(record, grant).ids == 0 then
        redis.call('PEXPIRE', KEYS[i], string.format('%.0f', math.max(tonumber(ttl), kept_for(record))))
    elseif how ~= 'return' then
        extend(KEYS[i], ttl)
    end
end
return 1
