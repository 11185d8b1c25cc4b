-- Ends a grant, or a lock, whose keys stay taken for some more time: those of the keys that hold the token are left to
-- nobody for that time.
--
-- KEYS  n lock keys, then their n records of grants, if there may be any.
-- ARGV  token, n, 'PUBLISH' or 'SPUBLISH' to notify waiters, id of the grant to end (`-` if it has none; '' to end the
--       lock), how long in ms the keys stay taken, then the n channels as in release.lua.
-- Reply as in release.lua. A key that other grants rely on stays with its token, and counts as released. Its record
--       holds the time until which it stays taken, also when the last of them ends (grants.lua).
--
-- The keys don't go to the head of the line, which finds them held by another, as any waiter does.
--
-- Idempotent: a repeat finds nothing of ours, returns that, and prolongs nothing; but where the record is full, it
-- prolongs the time by as much as it is late. As in release.lua, no key keeps the others from being released.

local token, n, publish, grant, rest = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local reply, failure = 1, nil

local function linger(i)
    local record_key = KEYS[n + i]
    local held = held_by(KEYS[i])
    if held == nil then
        reply = math.min(reply, 0)
        return forget_grants(record_key, token)
    elseif not held or not is_owner(token, held) then
        reply = -1
        return forget_grants(record_key, token)
    end
    local record = record_key and grants_of(record_key, token) or NONE
    local others = grant == '' and NONE or without(record, grant)
    if #others.ids == 0 then
        leave_to_nobody(KEYS[i], math.max(rest, kept_for(record)), publish, ARGV[5 + i] or KEYS[i])
        if record_key then
            redis.pcall('DEL', record_key)
        end
    elseif #others.ids < #record.ids or record.ttls['*'] ~= nil then
        -- A record that is full doesn't list this grant, and keeps the time for it all the same.
        others.kept = math.max(math.ceil(now / 1000) + rest, record.kept or 0)
        write_grants(record_key, token, others, rest, true)
        -- As in end_grant.lua, and no shorter than this grant wanted.
        local left, longest = redis.call('PTTL', KEYS[i]), longest_of(others)
        local ttl = math.max(kept_for(others), longest and math.min(left, longest) or left)
        if left >= 0 and ttl ~= left then
            redis.call('PEXPIRE', KEYS[i], string.format('%.0f', ttl))
        end
    end
end

for i = 1, n do
    local done, why = pcall(linger, i)
    failure = failure or not done and why
end
if failure then
    error(failure, 0)
end
return reply
