-- Releases a lock, and takes it for another token: as release.lua and then acquire.lua, with nobody in between.
--
-- KEYS  the lock key; the queue and its signs of life, where the next one has queued up; its fence key, where it wants a
--       fencing token.
-- ARGV  token that holds it, value for the next (its token; with metadata: token, newline, metadata), ttl in ms, ttl of the
--       fence key in ms, '1' where it has queued up, '1' where it wants a fencing token.
-- Reply a number. Done: the fencing token, or 0.  -1  the key was gone.  -2  it held something else.  -3  it is the turn of
--       another, and nothing has been changed.
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

local queued = ARGV[5] == '1'
local token = string.match(ARGV[2], '^[^\n]*')
if queued then
    local head = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
    if head and head ~= token then
        return -3
    end
end

local fence = 0
local fence_key = ARGV[6] == '1' and KEYS[#KEYS]
if fence_key then
    local last = redis.call('GET', fence_key)
    local known = last and tonumber(last)
    if last and (not known or known >= 2 ^ 53 - 1) then
        return redis.error_reply('ERR the fence key ' .. fence_key .. ' holds no fencing token')
    end
    local time = redis.call('TIME')
    fence = time[1] * 1000000 + time[2]
    if known and known >= fence then
        fence = known + 1
    end
    redis.call('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[4])
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if queued then
    redis.call('ZREM', KEYS[2], token)
    redis.call('HDEL', KEYS[3], token)
end
return fence
