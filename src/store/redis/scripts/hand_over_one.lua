-- Does what hand_over.lua does, for the two most common cases, in about two thirds of the server time: the process may
-- keep the lock from those in the line, and the next owner isn't in the line; or the next owner is the head of the
-- line, and not its last. Comes before everything else of hand_over.lua.
--
-- KEYS, ARGV  as in hand_over.lua.
-- Reply 1, or the fencing token if one is wanted: done, and there may be others in the line. In any other case nothing
--       has changed, and hand_over.lua goes on.

local token, grant = ARGV[1], ARGV[9]
local held = redis.pcall('GET', KEYS[1])
local is_simple = held
    and (held == token or not held.err and string.sub(held, 1, #token + 1) == token .. '\n')
local is_turn
if is_simple and ARGV[7] ~= '1' then
    local first = redis.pcall('ZRANGE', KEYS[2], 0, 1)
    is_turn = first[1] == ARGV[5] and first[2]
    local alive_until = is_turn and redis.pcall('HGET', KEYS[3], string.match(ARGV[5], '^[^:]*'))
    is_simple = alive_until and not alive_until.err and (tonumber(alive_until) or 0) > now / 1000
elseif ARGV[10] == '1' then
    is_simple = false
end
if is_simple and grant ~= '' then
    is_simple = grant == '-' and not redis.pcall('GET', KEYS[4])
end
local fence_key, fence = ARGV[8] ~= '0' and KEYS[5], now
if is_simple and fence_key then
    local last = redis.pcall('GET', fence_key)
    if last then
        local known = not last.err and tonumber(last)
        is_simple = known and known < 2 ^ 53 - 1
        if is_simple and known >= now then
            fence = known + 1
        end
    end
end
if is_simple then
    local done = fence_key and redis.pcall('SET', fence_key, string.format('%.0f', fence + ARGV[8] - 1), 'PX', ARGV[4])
    if not done or not done.err then
        if is_turn then
            redis.pcall('ZREM', KEYS[2], ARGV[5])
        end
        done = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    end
    if done.err then
        return {mark, now / 1000, false, done.err}
    elseif not fence_key then
        return mark * 4 + 1
    elseif fence == now then
        -- As stamp.lua says.
        local early = (stamp - stamp % 2048) / 2048 * 1000 + 1000 - now
        return early < 2 ^ 21 and -early * 2 ^ 32 - mark or {mark, fence}
    end
    return {mark, now / 1000, {fence, 0}}
end

