-- Ends one grant of a share, or all of them. The last to leave frees the key; the key lives no longer than those who
-- stay.
--
-- KEYS  the lock key, its set of holders, its records of shares.
-- ARGV  token, id of the grant (`-` if it has none), '1' to end all grants of the token, the marker, how long in ms the
--       share still counts, by nobody's name, 'PUBLISH' or 'SPUBLISH', channel, the line's key. That is not among
--       KEYS: most often there is none, and while its slot moves, only keys that are there can be declared.
-- Reply 1  done.  0  the key is gone, or the grant; other grants have ended if all had to.  -1  the key holds something
--       else.
--
-- Idempotent: a repeat finds nothing of ours, returns that, and changes and prolongs nothing.

local holders_key, records_key, line_key = KEYS[2], KEYS[3], ARGV[8]
local token, grant, all, marker, publish, channel = ARGV[1], ARGV[2], ARGV[3] == '1', ARGV[4], ARGV[6], ARGV[7]
local held = held_by(KEYS[1])
if held == nil then
    return 0
elseif held ~= marker then
    return -1
end
local share = share_of(holders_key, records_key, token)
local is_in = share and share.ends[grant]
if not share or not is_in and not all then
    return 0
end
local rest = is_in and tonumber(ARGV[5]) or 0
if all then
    share.ids, share.ends = {}, {}
else
    set_end(share, grant, nil)
end
-- Known before the first write. While its slot moves, to ask for a key that has become empty is an error, which must
-- not look as if nothing had been done.
local last = math.max(last_end_of_others(holders_key, token), end_of(share), rest > 0 and now_ms + rest or 0)
if last <= now_ms then
    forget(holders_key, records_key)
    pass_on(KEYS[1], line_key, publish, channel)
    return is_in and 1 or 0
end
keep_until(last, KEYS[1], holders_key, records_key)
if rest > 0 then
    -- No token owns this. The stamps of two clients may be the same.
    local nobodys = '\n' .. string.format('%.0f', stamp) .. token
    redis.call('ZADD', holders_key, string.format('%.0f', now_ms + rest), nobodys)
end
write_share(holders_key, records_key, token, share)
if rest > 0 then
    -- As where a lock is left to nobody: so that all who wait learn the time.
    redis.pcall(publish, channel, '')
end
if marker == PERMITS and #share.ids == 0 and rest == 0 then
    -- There is room for the head of the line.
    notify_head(line_key, publish, channel)
end
return is_in and 1 or 0
