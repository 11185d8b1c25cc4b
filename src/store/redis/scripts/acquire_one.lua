-- Takes one key, if it is free: what acquire.lua does, for the case that is by far the most common, at half the price.
--
-- KEYS  the lock key, then, where a fencing token is wanted, its fence key.
-- ARGV  value (the token; with metadata: token, newline, metadata), ttl in ms, and with a fence key its ttl in ms.
-- Reply granted: 1 where no fencing token is wanted, else the token. Held by another: a number, -1 for ever, -2 - ttl
--       for so many ms. 3: the key holds this token already, or the fence key holds no fencing token. Nothing was done:
--       acquire.lua knows how.
--
-- Idempotent: a repeat finds its own token, says so, and touches nothing. Scripts do not roll back: so the fence is
-- looked at first, and should it not take the number after all, the lock is given back.

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
    -- Who holds the lock matters more than what would have kept it from being taken.
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
local done = redis.pcall('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[3])
if done.err then
    redis.pcall('DEL', KEYS[1])
    return {mark, now / 1000, false, done.err}
elseif fence == now then
    -- As stamp.lua says.
    local early = (stamp - stamp % 2048) / 2048 * 1000 + 1000 - now
    return early < 2 ^ 21 and -early * 2 ^ 32 - mark or {mark, fence}
end
return {mark, now / 1000, fence}
