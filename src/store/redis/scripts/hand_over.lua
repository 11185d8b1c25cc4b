-- Releases a lock, and takes it for another token: as release.lua and then acquire.lua, with nobody in between.
--
-- KEYS  the lock key, then, where a fencing token is wanted, its fence key.
-- ARGV  token that holds it, value for the next (its token; with metadata: token, newline, metadata), ttl in ms, ttl of the
--       fence key in ms.
-- Reply a number. Done: the fencing token, or 0.  -1  the key was gone.  -2  it held something else.
--
-- Idempotent: a repeat finds the next token, says so, and touches nothing. As in acquire_one.lua, what may be wrong with
-- the fence is looked at first; should it not take the number after all, nothing has been changed.

local held = redis.call('GET', KEYS[1])
if not held then
    return -1
end
if held ~= ARGV[1] and string.sub(held, 1, #ARGV[1] + 1) ~= ARGV[1] .. '\n' then
    return -2
end

local fence = 0
if KEYS[2] then
    local last = redis.call('GET', KEYS[2])
    local known = last and tonumber(last)
    if last and (not known or known >= 2 ^ 53 - 1) then
        return redis.error_reply('ERR the fence key ' .. KEYS[2] .. ' holds no fencing token')
    end
    local time = redis.call('TIME')
    fence = time[1] * 1000000 + time[2]
    if known and known >= fence then
        fence = known + 1
    end
    redis.call('SET', KEYS[2], string.format('%.0f', fence), 'PX', ARGV[4])
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return fence
