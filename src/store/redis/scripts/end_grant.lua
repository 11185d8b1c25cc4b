-- Ends one grant: releases those of the keys that hold the token, unless other grants rely on them.
--
-- KEYS  n lock keys, their n lines, and their n records of grants.
-- ARGV  token, n, 'PUBLISH' or 'SPUBLISH' as in release.lua, id of the grant (`-` if it has none), channels as in
--       release.lua.
-- Reply as in release.lua. A key that other grants rely on counts as released; it lives no longer than they may need
--       it. One that an earlier grant wants to stay taken is left to nobody (grants.lua).
--
-- Idempotent: a repeat finds this grant ended.

local token, n, grant = ARGV[1], tonumber(ARGV[2]), ARGV[4]
local reply, failure = 1, nil

local function end_grant(i)
    local record_key = KEYS[2 * n + i]
    local held = held_by(KEYS[i])
    if held == nil then
        reply = math.min(reply, 0)
        return forget_grants(record_key, token)
    elseif not held or not is_owner(token, held) then
        reply = -1
        return forget_grants(record_key, token)
    end
    local record = grants_of(record_key, token)
    local others = without(record, grant)
    if #others.ids == 0 then
        local kept = kept_for(record)
        if kept > 0 then
            leave_to_nobody(KEYS[i], kept, ARGV[3], ARGV[4 + i] or KEYS[i])
        else
            pass_on(KEYS[i], KEYS[n + i], ARGV[3], ARGV[4 + i] or KEYS[i])
        end
        redis.pcall('DEL', record_key)
    elseif #others.ids < #record.ids then
        write_grants(record_key, token, others, 0, true)
        local longest = longest_of(others)
        if longest and redis.call('PTTL', KEYS[i]) > longest then
            redis.call('PEXPIRE', KEYS[i], string.format('%.0f', longest))
        end
    end
end

for i = 1, n do
    local done, why = pcall(end_grant, i)
    failure = failure or not done and why
end
if failure then
    error(failure, 0)
end
return reply
