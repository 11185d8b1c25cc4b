-- What the scripts for one key begin with when they are loaded. They run far more often than all others, so they do
-- without what prologue.lua costs: they define no function, call nothing that may raise an error, and reply with as
-- little as they can. Server time on Redis 7.0: 2.7 us for each of TIME, a reply of three and a protected call.
--
-- ARGV  the script's own, then the stamp of the request, as in prologue.lua.
-- Reply one of:
--       mark * 4 + n                          n is 0 to 3; each script says what it means.
--       {mark, fencing token}                 granted; the token is the server time in us.
--       {mark, server time in ms, ...}        as in prologue.lua.
--
-- What prologue.lua says of marks, of late requests and of failures holds here, too.

local stamp = ARGV[#ARGV] + 0
local mark = stamp % 2 ^ 32
local time = redis.pcall('TIME')
if time.err then
    return {mark, 0, false, time.err}
end
local now = time[1] * 1000000 + time[2]
if now >= stamp / 2048 * 1000 then
    return {mark, now / 1000, false, 'LATE the request arrived after its time; the server did not run it'}
end
