-- Returns those who hold a key.
--
-- KEYS  the lock key, its fence key, its set of holders, its records of shares.
-- ARGV  where to go on: '0' at first, then what the last reply said; or '' for the one that stays longest.
-- Reply nil if no one holds the key, or the lock is reserved for the head of the line, or stays taken for a while;
--       {what the key holds, its ttl in ms or -1, what the fence key holds, or nil if that is no text}, as inspect.lua;
--       or {where to go on, or '0' at the end, for each holder {token, time in ms until its share ends, fencing token
--       or 0, metadata}}.
--
-- A reply holds a part of those who share a key, if they are many: the server has other clients. Who shares the key
-- from the first reply to the last is in one of them, or in several.
--
-- Idempotent: it only reads.

local holders_key, records_key = KEYS[3], KEYS[4]
local held = redis.call('GET', KEYS[1])
if not held then
    return false
elseif string.sub(held, 1, 1) ~= '\n' then
    local fence = redis.pcall('GET', KEYS[2])
    return {held, redis.call('PTTL', KEYS[1]), fence and not fence.err and fence}
elseif held ~= READERS and held ~= PERMITS then
    return false
end

-- Adds a holder, unless its time is over.
local function add(all, token, record)
    local at = tonumber(look('ZSCORE', holders_key, token) or 0)
    local first = at > now_ms and record and string.find(record, '\n', 1, true)
    local second = first and string.find(record, '\n', first + 1, true)
    if second then
        all[#all + 1] = {token, at - now_ms, tonumber(string.sub(record, 1, first - 1)), string.sub(record, second + 1)}
    end
end

local all = {}
if ARGV[1] == '' then
    for from = -1, -1024, -128 do
        local some = look('ZRANGE', holders_key, from - 127, from)
        for i = #some, 1, -1 do
            add(all, some[i], look('HGET', records_key, some[i]))
            if #all == 1 then
                return {'0', all}
            end
        end
        if #some < 128 then
            break
        end
    end
    return {'0', all}
end
local page = look('HSCAN', records_key, ARGV[1], 'COUNT', 128)
for i = 1, #page[2], 2 do
    add(all, page[2][i], page[2][i + 1])
end
return {page[1], all}
