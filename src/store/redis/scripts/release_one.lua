-- Releases one key that holds a token which one request made for itself: what release.lua and end_grant.lua do, for the
-- case that is by far the most common, at half the price.
--
-- KEYS  the lock key; then, for a release in the background, its record of grants.
-- ARGV  token, 'PUBLISH' or 'SPUBLISH': how waiters are notified, by an empty message; the channel for that, where
--       it is not called as the lock key.
-- Reply 1  it was ours and is free.  0  it was gone.  2  it holds something else.  3  others may rely on the lock.
--       Nothing was done: end_grant.lua knows how.
--
-- Idempotent: a repeat finds nothing of ours, says so, and touches nothing.

local token = ARGV[1]
local held = redis.pcall('GET', KEYS[1])
if not held then
    return mark * 4
elseif held.err then
    return {mark, now / 1000, false, held.err}
elseif held ~= token and string.sub(held, 1, #token + 1) ~= token .. '\n' then
    return mark * 4 + 2
end
if KEYS[2] then
    local record = redis.pcall('GET', KEYS[2])
    if record and (record.err or string.sub(record, 1, #token + 1) == token .. '\n') then
        return mark * 4 + 3
    end
end
local done = redis.pcall('DEL', KEYS[1])
if type(done) == 'table' then
    return {mark, now / 1000, false, done.err}
end
-- A release is a release, also where messages are not allowed. The last argument is the stamp.
redis.pcall(ARGV[2], ARGV[4] and ARGV[3] or KEYS[1], '')
return mark * 4 + 1
