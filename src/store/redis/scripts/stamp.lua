-- What every script begins with when it is loaded.
--
-- ARGV  the script's own, then a stamp of the request: the time by this server's clock before which it may run, in
--       units of 1/2048 ms, so fine that it tells requests apart. The mark is its last 32 bits.
-- Reply {mark, server time in ms, what the script returns}    it ran.
--       {mark, server time in ms, nil, why}                   it failed, or was refused before it began.
--       Scripts for one key, and what comes before others, `*_one.lua`, may also reply mark * 4 + n, where each says
--       what n from 0 to 3 means; or, for a grant whose token is the server time in us, {mark, fencing token}, if it
--       was not less than 2.1 s early, else -(us * 2^32 + mark), where the token is so many us before the end of the ms
--       that the request may run in. They run far more often than all others, so they define no function, call nothing
--       that may raise an error, and reply with as little as they can: on Redis 7.0, TIME costs 1.1 us, a reply of
--       three instead of a number 0.7 us, and what prologue.lua does 0.5 us, of 4.1 us for a release.
--
-- 1. The mark proves that a reply belongs to its request. A client library that hands replies to the wrong caller is
--    found out.
-- 2. A request that arrives after its time changes nothing (LATE), however late it is: a connection that broke
--    may deliver it long after its sender has stopped waiting and cleaned up.
-- 3. A failure is data: servers before Redis 7 wrap an error that ends a script, so that its code can't be read.
--
-- `now`, the server time in us, is for the script to use. TIME stands still while a script runs.

local stamp = ARGV[#ARGV] + 0
-- All of it exact, as the stamp is below 2^53.
local mark = stamp % 2 ^ 32
local time = redis.pcall('TIME')
if time.err then
    return {mark, 0, false, time.err}
end
local now = time[1] * 1000000 + time[2]
-- Numbers in a reply lose what is behind their point.
if now >= stamp / 2048 * 1000 then
    return {mark, now / 1000, false, 'LATE the request arrived after its time; the server did not run it'}
end
