-- What every script begins with when it is loaded; epilogue.lua is what it ends with. Both run around the script's own
-- lines.
--
-- ARGV  the script's own, then: a mark of the request, and the latest time in ms, by this server's clock, at which it
-- may run. Reply {mark, server time in ms, what the script returns}          it ran.
--       {mark, server time in ms, nil, why}                         it failed, or was refused before it began.
--
-- 1. The mark proves that a reply belongs to its request. A client library that hands replies to the wrong caller is
--    found out.
-- 2. A request that arrives after its latest time changes nothing (LATE), however late it is: a connection that broke
--    may deliver it long after its sender has stopped waiting and cleaned up.
-- 3. A failure is data: servers before Redis 7 wrap an error that ends a script, so that its code can't be read.
--
-- `now`, the server time in us, is for the script to use. TIME stands still while a script runs.

local last = #ARGV
local latest, mark = tonumber(ARGV[last]), tonumber(ARGV[last - 1])
ARGV[last], ARGV[last - 1] = nil, nil
local time = redis.pcall('TIME')
if time.err then
    return {mark, 0, false, time.err}
end
local now = time[1] * 1000000 + time[2]
-- Numbers in a reply lose what is behind their point.
if now >= (latest + 1) * 1000 then
    return {mark, now / 1000, false, 'LATE the request arrived after its time; the server did not run it'}
end

local function script()
