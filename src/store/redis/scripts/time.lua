-- Comes after stamp.lua. A request that arrives after its time changes nothing (LATE), however late it is: a connection
-- that broke may deliver it long after its sender has stopped waiting and cleaned up.
--
-- `now`, the server time in us, is for the script to use. TIME stands still while a script runs.

local time = redis.pcall('TIME')
if time.err then
    return {mark, 0, false, time.err}
end
local now = time[1] * 1000000 + time[2]
-- In a reply, the server truncates numbers to integers.
if now >= stamp / 2048 * 1000 then
    return {mark, now / 1000, false, 'LATE the request arrived after its time; the server did not run it'}
end
