-- The first lines of every script.
--
-- ARGV  the script's own, then the stamp of the request: the time by this server's clock before which it may run, in
--       units of 1/2048 ms, so fine that it distinguishes requests. The mark is its last 32 bits.
-- Reply {mark, server time in ms, what the script returns}    it ran.
--       {mark, server time in ms, nil, why}                   it failed, or was refused before it began.
--       Scripts for one key, and lines that come before others (`*_one.lua`), may also reply mark * 4 + n, with n from
--       0 to 3, whose meaning their headers give. If they grant a lock whose fencing token is the server time in us,
--       and the request was less than 2.1 s early, they may reply -(us * 2^32 + mark): the token is that many us before
--       the end of the ms until which the request may run. If it was earlier, they reply {mark, fencing token}.
--
-- Scripts for one key run far more often than all others. So they define no function, call nothing that may raise an
-- error, and reply with as little as possible. On Redis 7.0, of the 4.1 us that a release takes, TIME takes 1.1 us; a
-- reply of three values instead of a number would take 0.7 us more, and what prologue.lua does 0.5 us.
-- `benches/watch` prints the server time of a renewal.
--
-- 1. The mark proves that a reply belongs to its request. It reveals a client library that hands replies to the wrong
--    caller.
-- 2. A request that arrives after its time changes nothing (LATE), however late it is: a connection that broke may
--    deliver it long after its sender has stopped waiting and cleaned up.
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
-- In a reply, the server truncates numbers to integers.
if now >= stamp / 2048 * 1000 then
    return {mark, now / 1000, false, 'LATE the request arrived after its time; the server did not run it'}
end
