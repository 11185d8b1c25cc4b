-- Ends a lock, whoever holds it, or only if it is held by nobody but these tokens.
--
-- KEYS  the lock key, its line, then other keys that end with the lock: its record of grants, and what is
--       kept of those who share it.
-- ARGV  'PUBLISH' or 'SPUBLISH', and the channel, to notify waiters; then nothing, or '1' and the tokens.
-- Reply 1  the lock has ended, or the time for which it was left to nobody. It goes to the head of the line, or is
--          free.
--       0  there was no lock. If the key is reserved for a waiter, that one keeps its turn.
--       -1  another holds it, or shares it.
--
-- Not idempotent: a repeat ends the lock of the next holder. So it is sent once, and nothing repeats it by itself. A
-- key of another type is no lock, and stays.

local held = redis.call('GET', KEYS[1])
-- A reservation is a newline and a place, which begins with no newline.
if not held or string.find(held, '^\n[^\n]') then
    return 0
end

-- Returns all who hold the key, as holders.lua does. What begins with a newline is nobody's.
local function holders()
    if held ~= READERS and held ~= PERMITS then
        return string.sub(held, 1, 1) == '\n' and {} or {string.match(held, '^[^\n]*')}
    end
    local all = {}
    for _, token in ipairs(look('ZRANGEBYSCORE', KEYS[4], string.format('(%.0f', now_ms), '+inf')) do
        if string.sub(token, 1, 1) ~= '\n' and look('HGET', KEYS[5], token) then
            all[#all + 1] = token
        end
    end
    return all
end

if ARGV[3] then
    local known = {}
    for i = 4, #ARGV do
        known[ARGV[i]] = true
    end
    for _, token in ipairs(holders()) do
        if not known[token] then
            return -1
        end
    end
end
pass_on(KEYS[1], KEYS[2], ARGV[1], ARGV[2])
for i = 3, #KEYS do
    redis.pcall('DEL', KEYS[i])
end
return 1
