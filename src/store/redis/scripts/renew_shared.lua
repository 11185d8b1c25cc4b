-- Sets when one grant of a share ends.
--
-- KEYS  the lock key, its set of holders, its records of shares.
-- ARGV  token, ttl in ms, how, id of the grant (`-` if it has none), id of an earlier grant, the marker, restart window
--       in s as in renew_grant.lua.
-- How:
--       'exactly'  after the ttl.
--       'claim'    after at least the ttl. The grant replaces the earlier one.
--       'keep', 'least'  after at least the ttl.
--       'return'   when it would have. The earlier grant replaces it.
-- Reply 1  done.  0  the key is gone, or the grant.  -1  the key holds something else; or as in renew_grant.lua, if the
--       server was restarted lately.
--
-- Idempotent: a repeat does the same again. One that comes after a release changes nothing. It works on a server that
-- is out of memory (shares.lua).

local holders_key, records_key = KEYS[2], KEYS[3]
local token, how, grant, earlier = ARGV[1], ARGV[3], ARGV[4], ARGV[5]
local window = tonumber(ARGV[7] or 0)
if window > 0 then
    local up = uptime()
    if up <= window then
        return -1 - (window - up + 1)
    end
end
local held = held_by(KEYS[1])
if held == nil then
    return 0
elseif held ~= ARGV[6] then
    return -1
end
local share = share_of(holders_key, records_key, token)
if not share then
    return 0
end
local from, to = grant, grant
if how == 'claim' and share.ends[earlier] then
    from = earlier
elseif how == 'return' then
    from, to = share.ends[grant] and grant or earlier, earlier
end
local at = share.ends[from]
if not at then
    return 0
end
if how == 'exactly' then
    at = now_ms + ARGV[2]
elseif how ~= 'return' then
    at = math.max(at, share.ends[to] or 0, now_ms + ARGV[2])
end
set_end(share, from, nil)
set_end(share, to, math.max(at, from ~= to and share.ends[to] or 0))
local last = math.max(last_end(holders_key), end_of(share))
keep_until(last, KEYS[1], holders_key, records_key)
write_share(holders_key, records_key, token, share)
if how == 'exactly' and last_end(holders_key) < last then
    keep_until(last_end(holders_key), KEYS[1], holders_key, records_key)
end
return 1
