-- Releases one key that holds a token which one request made for itself: what release.lua and end_grant.lua do, for the
-- case that is by far the most common, at half the price.
--
-- KEYS  the lock key; then, for a release in the background, its record of grants.
-- ARGV  token, 'PUBLISH' or 'SPUBLISH': how waiters are notified; the line's key; the channel on which they are
--       notified, where it is not called as the lock key.
-- Reply 1  it was ours and is free.  3  others may rely on the lock. Nothing was done: end_grant.lua knows how. Or as
--       ours_one.lua, which comes before.
--
-- Idempotent: a repeat finds nothing of ours, says so, and touches nothing.
--
-- A lock that nobody listens for has no waiters: the line is not looked at. Its key is no argument of KEYS: it lies in
-- the slot of the lock key, and while that slot moves, a call with one key can be decided.

local publish = ARGV[2]
-- The last argument is the stamp.
local channel = ARGV[5] and ARGV[4] or KEYS[1]
if KEYS[2] then
    local record = redis.pcall('GET', KEYS[2])
    if record and (record.err or string.sub(record, 1, #token + 1) == token .. '\n') then
        return mark * 4 + 3
    end
end
local listeners = redis.pcall('PUBSUB', publish == 'PUBLISH' and 'NUMSUB' or 'SHARDNUMSUB', channel)
if listeners[2] == 0 then
    local done = redis.pcall('DEL', KEYS[1])
    if type(done) == 'table' then
        return {mark, now / 1000, false, done.err}
    end
    return mark * 4 + 1
end
-- Somebody listens, or that can't be asked. What follows is the line, and pass_on_one.lua.

