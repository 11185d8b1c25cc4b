-- Makes the keys live on, if all of them hold the token.
--
-- KEYS  the lock keys.
-- ARGV  token, ttl in ms, '1' to make the ttl exactly this, '0' to make it at least this.
-- Reply 1  extended.  0  a key is gone.  -1  a key holds something else.
--
-- Idempotent: a repeat extends again. One that comes late, after a release, changes nothing. PEXPIRE and never SET: it
-- works on a server that is out of memory, and can't bring back a key. A key without a ttl gets one.

local token, ttl = ARGV[1], tonumber(ARGV[2])
local missing = false

for i = 1, #KEYS do
    local held = redis.call('GET', KEYS[i])
    if not held then
        missing = true
    elseif held ~= token and string.sub(held, 1, #token + 1) ~= token .. '\n' then
        return -1
    end
end
if missing then
    return 0
end
-- GT and NX, of Redis 7, do what takes PTTL on older servers, which refuse them: the ttl becomes this if it was less, or if
-- there was none. So a renewal that has nothing to do needs no other permission than one that has.
local knows_gt = ARGV[3] ~= '1'

local function is_extended(key)
    if not knows_gt then
        return false
    end
    local done = redis.pcall('PEXPIRE', key, ARGV[2], 'GT')
    if done == 0 then
        done = redis.pcall('PEXPIRE', key, ARGV[2], 'NX')
    end
    knows_gt = type(done) == 'number'
    return knows_gt
end

for i = 1, #KEYS do
    if not is_extended(KEYS[i]) and (ARGV[3] == '1' or redis.call('PTTL', KEYS[i]) < ttl) then
        redis.call('PEXPIRE', KEYS[i], ARGV[2])
    end
end
return 1
