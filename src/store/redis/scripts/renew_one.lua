-- Extends the ttl of one key, if it holds the token: does what renew.lua does, for the most common case.
--
-- KEYS  the lock key; on a node of a quorum, its record of grants.
-- ARGV  token, ttl in ms: it lives for at least this.
-- Reply 1  extended.  3  others rely on the lock, and maybe not this grant: nothing has changed, and renew_grant.lua
-- has
--       to decide. Or as in ours_one.lua, which comes before.
--
-- Idempotent: a repeat extends again. One that comes after a release changes nothing. It uses PEXPIRE and never SET, so
-- it works on a server that is out of memory, and can't bring back a key.

if KEYS[2] then
    local record = redis.pcall('GET', KEYS[2])
    if record and (record.err or string.sub(record, 1, #token + 1) == token .. '\n') then
        return mark * 4 + 3
    end
end
-- As in extend.lua.
local done = redis.pcall('PTTL', KEYS[1])
if type(done) == 'number' then
    done = redis.pcall('PEXPIRE', KEYS[1], string.format('%.0f', math.max(done, tonumber(ARGV[2]))))
end
if type(done) == 'table' then
    return {mark, now / 1000, false, done.err}
end
return mark * 4 + 1
