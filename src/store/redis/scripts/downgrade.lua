-- Turns a lock into a reader's share, by the same token and grant, for as long as the key would have lived.
--
-- KEYS  the lock key, its line, its record of grants, its set of holders, its records of shares, its fence key.
-- ARGV  token, id of the grant (`-` if it has none), the marker of readers, ttl in ms of a share of a key that has
--       none, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1  the token is a reader.  0  the key is gone.  -1  the key holds something else.  -3  others rely
--       on the lock, or it has to stay taken for an earlier grant (grants.lua), and nothing has changed.
--
-- The head of the line is notified, as it may be a reader. Where there is no line, all who wait are.
--
-- Idempotent: a repeat finds its share. It works on a server that is out of memory (shares.lua).

local line_key, record_key, holders_key, records_key, fence_key = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local token, grant, marker = ARGV[1], ARGV[2], ARGV[3]
local held = held_by(KEYS[1])
local share = share_of(holders_key, records_key, token)
if held == nil then
    return 0
elseif held == marker then
    return share and share.ends[grant] and 1 or -1
elseif not held or not is_owner(token, held) then
    return -1
end
local others = without(grants_of(record_key, token), grant)
if #others.ids > 0 or kept_for(others) > 0 then
    return -3
end
local left = redis.call('PTTL', KEYS[1])
left = left > 0 and left or left < 0 and tonumber(ARGV[4]) or 1
-- What inspect.lua shows. It was written with the lock.
local fence = redis.pcall('GET', fence_key)
fence = fence and not fence.err and tonumber(fence) or 0
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', left))
forget(holders_key, records_key)
share = {
    fence = fence > 0 and fence < 2 ^ 53 and fence or 0,
    ids = {},
    ends = {},
    metadata = string.sub(held, #token + 2),
}
set_end(share, grant, now_ms + left)
write_share(holders_key, records_key, token, share)
redis.call('SET', KEYS[1], marker, 'PX', string.format('%.0f', left))
keep_until(now_ms + left, KEYS[1], holders_key, records_key)
redis.pcall('DEL', record_key)
if not notify_head(line_key, ARGV[5], ARGV[6]) then
    redis.pcall(ARGV[5], ARGV[6], '')
end
return 1
