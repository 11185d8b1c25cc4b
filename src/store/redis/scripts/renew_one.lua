-- Extends the ttl of one key, if it holds the token: does what renew.lua does, for the most common case.
--
-- KEYS  the lock key.
-- ARGV  token, ttl in ms: it lives for at least this.
-- Reply 1  extended. Or as in ours_one.lua, which comes before.
--
-- Idempotent: a repeat extends again. One that comes after a release changes nothing. It uses PEXPIRE and never SET, so
-- it works on a server that is out of memory, and can't bring back a key.

-- As in extend.lua.
local done = redis.pcall('PTTL', KEYS[1])
if type(done) == 'number' then
    done = redis.pcall('PEXPIRE', KEYS[1], string.format('%.0f', math.max(done, tonumber(ARGV[2]))))
end
if type(done) == 'table' then
    return {mark, now / 1000, false, done.err}
end
return mark * 4 + 1
