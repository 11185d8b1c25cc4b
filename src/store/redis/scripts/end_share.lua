-- Ends one grant of a share, or the share. The last to leave frees the key; the key lives no longer than those who stay.
--
-- KEYS  the lock key, its line, its set of holders, its records of shares.
-- ARGV  token, id of the grant to end (`-` if it has none; '' to end the share), the marker, how long in ms it still
--       counts, by nobody's name, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1  done.  0  the key is gone, or the grant.  -1  the key holds something else.
--
-- Idempotent: a repeat finds nothing of ours, returns that, and changes and prolongs nothing.

local line_key, holders_key, records_key = KEYS[2], KEYS[3], KEYS[4]
local token, grant, marker, rest, publish, channel = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local held = held_by(KEYS[1])
if held == nil then
    return 0
elseif held ~= marker then
    return -1
end
local share = share_of(holders_key, records_key, token)
if not share or grant ~= '' and not share.ends[grant] then
    return 0
end
if grant == '' then
    share.ids, share.ends = {}, {}
else
    set_end(share, grant, nil)
end
if rest > 0 or #share.ids > 0 then
    -- For a server that is out of memory (shares.lua).
    keep_until(last_end(holders_key), KEYS[1], holders_key, records_key)
end
write_share(holders_key, records_key, token, share)
if rest > 0 then
    -- No token owns this: the stamp distinguishes requests.
    redis.call('ZADD', holders_key, string.format('%.0f', now_ms + rest), '\n' .. string.format('%.0f', stamp))
end
local last = last_end(holders_key)
if last <= now_ms then
    redis.call('DEL', holders_key, records_key)
    pass_on(KEYS[1], line_key, publish, channel)
    return 1
end
keep_until(last, KEYS[1], holders_key, records_key)
if #share.ids == 0 and rest == 0 then
    -- It may have made room for the head of the line.
    local looked, head = pcall(head_of, line_key)
    if looked and head then
        redis.pcall(publish, channel, head)
    end
end
return 1
