-- Extends the ttl of the keys, if all of them hold the token.
--
-- KEYS  the lock keys.
-- ARGV  token, ttl in ms: they live for at least this.
-- Reply 1  extended.  0  a key is gone.  -1  a key holds something else.
--
-- Idempotent: a repeat extends again. One that comes after a release changes nothing. It uses PEXPIRE and never SET, so
-- it works on a server that is out of memory, and can't bring back a key.

local missing = false

for i = 1, #KEYS do
    local held = redis.pcall('GET', KEYS[i])
    if not held then
        missing = true
    elseif held.err and not string.find(held.err, '^WRONGTYPE') then
        return held
    elseif held.err or not is_owner(ARGV[1], held) then
        return -1
    end
end
if missing then
    return 0
end
for i = 1, #KEYS do
    extend(KEYS[i], ARGV[2])
end
return 1
