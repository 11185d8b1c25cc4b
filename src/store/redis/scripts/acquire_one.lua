-- Takes one key if it is free: does what acquire.lua does, for the most common case, in half the server time.
--
-- KEYS  the lock key; if a fencing token is wanted, its fence key.
-- ARGV  value (the token; with metadata: token, newline, metadata), ttl in ms, and with a fence key its ttl in ms,
--       unless that is a day.
-- Reply granted: 1 if no fencing token is wanted, otherwise the token. Held by another: -1 without a ttl, -2 - ttl in
--       ms with one. 3: the key holds this token already, or the fence key holds no fencing token. Nothing has changed,
--       and acquire.lua has to decide.
--
-- Idempotent: a repeat finds its own token, returns that, and changes nothing. Scripts do not roll back. So this script
-- reads the fence first, and deletes the lock again if the fence can't be written.

local fence_key, fence = KEYS[2], now
if fence_key then
    local last = redis.pcall('GET', fence_key)
    if last then
        -- As in acquire.lua: greater than the last, and no smaller than the clock. From 2^53 on, Lua's numbers are not
        -- exact.
        local known = not last.err and tonumber(last)
        if not known or known >= 2 ^ 53 - 1 then
            return mark * 4 + 3
        elseif known >= now then
            fence = known + 1
        end
    end
end

local taken = redis.pcall('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
if not taken or taken.err then
    -- The holder of the lock matters more than the error that would have kept this request from taking it.
    local holder = redis.pcall('GET', KEYS[1])
    if not holder or holder.err then
        return {mark, now / 1000, false, holder and holder.err or taken and taken.err}
    end
    local token = string.match(ARGV[1], '^[^\n]*')
    if holder == token or string.sub(holder, 1, #token + 1) == token .. '\n' then
        return mark * 4 + 3
    end
    local left = redis.pcall('PTTL', KEYS[1])
    if type(left) == 'table' then
        return {mark, now / 1000, false, left.err}
    end
    return {mark, now / 1000, left < 0 and -1 or -2 - left}
end
if not fence_key then
    return mark * 4 + 1
end
-- The last argument is the stamp.
local fence_ttl = ARGV[4] and ARGV[3] or '86400000'
local done = redis.pcall('SET', fence_key, string.format('%.0f', fence), 'PX', fence_ttl)
if done.err then
    redis.pcall('DEL', KEYS[1])
    return {mark, now / 1000, false, done.err}
elseif fence == now then
    -- As stamp.lua says.
    local early = (stamp - stamp % 2048) / 2048 * 1000 + 1000 - now
    return early < 2 ^ 21 and -early * 2 ^ 32 - mark or {mark, fence}
end
return {mark, now / 1000, fence}
