-- Takes all keys for one token, or none.
--
-- KEYS  n lock keys, then, where a fencing token is wanted, their n fence keys.
-- ARGV  token, value (the token; with metadata: token, newline, metadata), ttl in ms, n, ttl of the fence keys in ms.
-- Reply {1, fencing token or 0}  granted.
--       {0, ttl in ms, i}        the ith key is held by another, for so long; -1: for ever.
--
-- Idempotent: where all keys hold the token already, they are taken again, with the same fencing token, and live for
-- the ttl from now, or as long as they would have, whichever is longer.
--
-- Scripts do not roll back. So: look first, write the fences next, the locks last, and undo those where one fails.

local token, value, ttl, n = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local ours = {}
local missing = 0

for i = 1, n do
    local held = redis.call('GET', KEYS[i])
    if not held then
        missing = missing + 1
    elseif held == token or string.sub(held, 1, #token + 1) == token .. '\n' then
        ours[i] = true
        ttl = math.max(ttl, redis.call('PTTL', KEYS[i]))
    else
        return {0, redis.call('PTTL', KEYS[i]), i}
    end
end

-- The number is at once a counter and a clock (max(last + 1, TIME in microseconds)), so it grows also where the counter
-- was lost, in a restart, a failover or a flush. 2^53 is where Lua's numbers stop being exact.
local fence = 0
if #KEYS > n then
    for i = n + 1, #KEYS do
        local last = redis.call('GET', KEYS[i])
        if last then
            last = tonumber(last)
            if not last or last >= 2 ^ 53 - 1 then
                return redis.error_reply('ERR the fence key ' .. KEYS[i] .. ' holds no fencing token')
            end
            fence = math.max(fence, missing == 0 and last or last + 1)
        end
    end
    if missing > 0 or fence == 0 then
        local now = redis.call('TIME')
        fence = math.max(fence, now[1] * 1000000 + now[2])
    end
    local text = string.format('%.0f', fence)
    for i = n + 1, #KEYS do
        redis.call('SET', KEYS[i], text, 'PX', ARGV[5])
    end
end

local px = string.format('%.0f', ttl)
for i = 1, n do
    local done = redis.pcall('SET', KEYS[i], value, 'PX', px)
    if done.err then
        for j = 1, i - 1 do
            if not ours[j] then
                redis.call('DEL', KEYS[j])
            end
        end
        return done
    end
end
return {1, fence}
