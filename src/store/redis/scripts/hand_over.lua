-- Releases a lock, and takes it for another token: as release.lua and then acquire.lua, with nobody in between.
--
-- KEYS  the lock key, its record of grants; the queue and its signs of life, where the next one has queued up; its
-- fence key,
--       where it wants a fencing token.
-- ARGV  token that holds it, value for the next (its token; with metadata: token, newline, metadata), ttl in ms, ttl of
-- the
--       fence key in ms, '1' where it has queued up, '1' where it wants a fencing token, and as in release.lua the id
--       of the grant to end in the background, '' to end the lock, or '*' to end it with its record of grants.
-- Reply a number. Done: the fencing token, or 0.  -1  the key was gone.  -2  it held something else.  -3  it is the
-- turn of
--       another, or others rely on the lock, and nothing has been changed.
--
-- Idempotent: a repeat finds the next token, says so, and touches nothing. As in acquire_one.lua, what may be wrong
-- with the fence is looked at first; should it not take the number after all, nothing has been changed.

local held = held_by(KEYS[1])
if held == nil then
    return -1
end
if not held or not is_owner(ARGV[1], held) then
    return -2
end
if ARGV[7] ~= '' and ARGV[7] ~= '*' and #without(grants_of(KEYS[2], ARGV[1]), ARGV[7]).ids > 0 then
    return -3
end

local queued = ARGV[5] == '1'
local token = string.match(ARGV[2], '^[^\n]*')
if queued then
    local head = redis.call('ZRANGE', KEYS[3], 0, 0)[1]
    if head and head ~= token then
        return -3
    end
end

local fence = 0
local fence_key = ARGV[6] == '1' and KEYS[#KEYS]
if fence_key then
    local known = fence_in(fence_key)
    fence = known and known >= now and known + 1 or now
    redis.call('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[4])
end
if queued then
    redis.call('ZREM', KEYS[3], token)
    redis.pcall('HDEL', KEYS[4], token)
end
if ARGV[7] ~= '' then
    -- Of the token that is gone.
    redis.pcall('DEL', KEYS[2])
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return fence
