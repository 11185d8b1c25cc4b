-- Votes as a node of a quorum: lets one token share a key with other readers by a ballot, or not.
--
-- KEYS  the lock key, its set of holders, its records of shares, its set of writers that wait; if a fencing token is
--       wanted, its fence key.
-- ARGV  token, metadata, ttl in ms, ttl of the fence key in ms, restart window in s (0: none), how far in us a number
--       may be ahead, the number (0: no fencing token wanted), '1' to have this number and no earlier one, id of the
--       grant (`-` if it has none), the marker, the place of the request or '', '1' if the token holds the key on a
--       majority of the nodes and is only brought back here.
-- Reply as in vote.lua. If a writer that waits is in the way, the ttl is the time until the last of them is forgotten.
--
-- A token that shares the key already passes the writers that wait, as does one that is brought back.
--
-- Idempotent, as vote.lua is. It doesn't lower the fence: a token that comes back gets its number again, and other
-- readers may have greater ones.

local token, ttl, window, ahead = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local number, grant, marker = tonumber(ARGV[7]), ARGV[9], ARGV[10]
local fence_key = KEYS[5]

-- As in vote.lua: numbers up to this may be from before the last start of this server.
local doubtful = 0
if window > 0 then
    local up = uptime()
    if up <= window then
        return {4, now, 0, window - up + 1}
    end
    doubtful = now - (up - 1) * 1000000 + ahead
end
local fence = fence_key and fence_in(fence_key)
local last = fence or 0
local bar = (not fence or fence <= doubtful) and math.max(now, last) or last

local held = redis.call('GET', KEYS[1])
local is_shared = held == marker
if held and not is_shared then
    return {0, now, last, redis.call('PTTL', KEYS[1]), 1, 0}
end
local share = share_of(KEYS[2], KEYS[3], token)
share = is_shared and share or nil
if not share and ARGV[12] ~= '1' then
    local left = announced_for(KEYS[4], ARGV[11])
    if left > 0 then
        return {0, now, last, left, 1, 0}
    end
end
if fence_key then
    local again = share and share.fence > doubtful and (ARGV[8] == '0' or share.fence == number)
    if again then
        number = share.fence
    elseif number <= bar then
        return {2, now, bar}
    elseif number > now + ahead then
        return {3, now, last}
    end
end
if share and not share.ends[grant] and #share.ids >= MOST_GRANTS then
    error({err = 'ERR the token has ' .. MOST_GRANTS .. ' grants of this key already, and may have no more'})
end
if fence_key then
    redis.call('SET', fence_key, string.format('%.0f', math.max(last, number)), 'PX', ARGV[4])
end

share = share or {fence = 0, ids = {}, ends = {}}
share.metadata, share.fence = ARGV[2], number > 0 and number or share.fence
set_end(share, grant, math.max(share.ends[grant] or 0, now_ms + ttl))
enter_share(KEYS[1], KEYS[2], KEYS[3], marker, is_shared, token, share, ttl)
return {1, now, math.max(last, number), number}
