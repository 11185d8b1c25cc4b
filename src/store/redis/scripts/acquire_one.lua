-- Takes one key, if it is free: what acquire.lua does, for the case that is by far the most common, at half the price.
--
-- KEYS  the lock key, then, where a fencing token is wanted, its fence key.
-- ARGV  value (the token; with metadata: token, newline, metadata), ttl in ms, ttl of the fence key in ms.
-- Reply a number. Granted: the fencing token, or 0. Held by another: -1 for ever, -2 - ttl for so many ms.
--       'ALONE': the key holds this token already. Nothing was done: acquire.lua knows how.
--
-- Idempotent: a repeat finds its own token, says so, and touches nothing. Scripts do not roll back: so the fence is
-- looked at first, and should it not take the number after all, the lock is given back.

local known, refusal
if KEYS[2] then
    local looked, found = pcall(fence_in, KEYS[2])
    known, refusal = looked and found, not looked and found
end

local taken = not refusal and redis.pcall('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
if not taken or taken.err then
    -- Who holds the lock matters more than what would have kept it from being taken.
    local holder = redis.call('GET', KEYS[1])
    if not holder then
        return refusal or taken
    end
    local token = string.match(ARGV[1], '^[^\n]*')
    if holder == token or string.sub(holder, 1, #token + 1) == token .. '\n' then
        return 'ALONE'
    end
    local left = redis.call('PTTL', KEYS[1])
    return left < 0 and -1 or -2 - left
end
if not KEYS[2] then
    return 0
end

-- As in acquire.lua: greater than the last, and no smaller than the clock.
local fence = known and known >= now and known + 1 or now
local done = redis.pcall('SET', KEYS[2], string.format('%.0f', fence), 'PX', ARGV[3])
if done.err then
    redis.call('DEL', KEYS[1])
    return done
end
return fence
