-- Releases one key that holds a token which one request made for itself: does what release.lua and end_grant.lua do,
-- for the most common case, in half the server time.
--
-- KEYS  the lock key; for a release in the background, its record of grants.
-- ARGV  token; 'PUBLISH' or 'SPUBLISH' to notify waiters, and the line's key, unless these are 'PUBLISH' and the usual
--       name; and the channel on which waiters are notified, if its name is not that of the lock key.
-- Reply 1  it was ours and is free.  3  others may rely on the lock: nothing has changed, and end_grant.lua has to
--       decide. Or as in ours_one.lua, which comes before.
--
-- Idempotent: a repeat finds nothing of ours, returns that, and changes nothing.
--
-- A lock without subscribers has no waiters, so its line is not read. The line's key is not among KEYS: it lies in the
-- slot of the lock key, and while that slot moves, a call with one key can still be decided.

local publish, channel = 'PUBLISH', KEYS[1]
-- The last argument is the stamp. Without the two others, a pair of acquire and release takes fred about 2 % fewer
-- instructions.
if ARGV[3] then
    publish, channel = ARGV[2], ARGV[5] and ARGV[4] or channel
end
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
-- There are subscribers, or the server doesn't tell. What follows is line.lua, and pass_on_one.lua.

