-- Takes all keys for one token, or none.
--
-- KEYS  n lock keys; if the grant has an id, their n records of grants; if a fencing token is wanted, their n fence
--       keys.
-- ARGV  token, value (the token; with metadata: token, newline, metadata), ttl in ms, n, ttl of the fence keys in ms,
--       id of the grant or '', ttl of the records in ms, the place whose turn it may be at one of the keys, or ''.
-- Reply {1, fencing token or 0}  granted.
--       {0, ttl in ms, i}        another holds the ith key, for this long; -1: without a ttl.
--
-- Idempotent: keys that all hold the token already are taken again, with the same fencing token. They live for the ttl
-- from now, or as long as they would have, whichever is longer.
--
-- Scripts do not roll back. So this script reads first, then writes the fences and records, and the locks last. If one
-- of these fails, it undoes the others.

local token, value, ttl, n = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local fence_ttl, grant, record_ttl = ARGV[5], ARGV[6], ARGV[7]
local records = grant ~= '' and n or 0
local fences = n + records
-- How long each key will live that holds the token already.
local ours = {}
local missing = 0

for i = 1, n do
    local held = redis.call('GET', KEYS[i])
    if not held or ARGV[8] ~= '' and held == '\n' .. ARGV[8] then
        missing = missing + 1
    elseif is_owner(token, held) then
        ours[i] = math.max(ttl, redis.call('PTTL', KEYS[i]))
    else
        return {0, redis.call('PTTL', KEYS[i]), i}
    end
end

local grants = {}
for i = 1, records do
    local before = grants_of(KEYS[n + i], token)
    grants[i] = with(ours[i] and before or NONE, grant, ARGV[3])
end

-- The fencing token is a counter and a clock at once: max(last + 1, TIME in us). So it grows even if the counter was
-- lost in a restart, a failover or a flush. Lua's numbers are exact below 2^53.
local fence = 0
if #KEYS > fences then
    for i = fences + 1, #KEYS do
        local last = fence_in(KEYS[i])
        if last then
            fence = math.max(fence, missing == 0 and last or last + 1)
        end
    end
    if missing > 0 or fence == 0 then
        fence = math.max(fence, now)
    end
    local text = string.format('%.0f', fence)
    for i = fences + 1, #KEYS do
        redis.call('SET', KEYS[i], text, 'PX', fence_ttl)
    end
end

for i = 1, records do
    write_grants(KEYS[n + i], token, grants[i], record_ttl)
end
for i = 1, n do
    local done = redis.pcall('SET', KEYS[i], value, 'PX', string.format('%.0f', ours[i] or ttl))
    if done.err then
        for j = 1, n do
            if not ours[j] and j < i then
                redis.call('DEL', KEYS[j])
            end
            if not ours[j] and records > 0 then
                redis.call('DEL', KEYS[n + j])
            end
        end
        return done
    end
end
return {1, fence}
