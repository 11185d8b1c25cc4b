-- Takes a share of one key, as a reader or with a permit, if it is free for that and it is no other's turn; otherwise
-- takes a place in the line for it.
--
-- KEYS  the lock key, its line, its hash of processes that are alive, its set of holders, its records of shares; if a
--       fencing token is wanted, its fence key.
-- ARGV  token, metadata, ttl in ms, ttl of the fence key in ms, place or '', how long in ms its process counts as alive
--       from now on, '1' if the place stays in the line after a grant, id of the grant (`-` if it has none), the
--       marker, how many tokens may share the key (0: any number), 'PUBLISH' or 'SPUBLISH', channel.
-- Reply as in acquire_in_line.lua, without 'ALONE'. For a permit that is not free, the ttl is the time until the first
--       can be, unless one is released.
--
-- Nothing is taken that somebody else in the line waits for, also by a request without a place. A token that has a
-- share already passes the line, with another grant of that share, and counts once. Otherwise a holder might wait for
-- itself.
--
-- After a grant the next place in the line is notified, as it may share the key, too. A place that stays goes on being
-- the head of the line, for the next waiter of its process.
--
-- Idempotent: a repeat finds its grant, which lives for the ttl from now, or as long as it would have, whichever is
-- longer. Scripts do not roll back, so this script reads all keys first, then writes the fence, and then the others. If
-- one of these fails, it undoes the rest.

local line_key, holders_key, records_key, fence_key = KEYS[2], KEYS[4], KEYS[5], KEYS[6]
local token, ttl, place, alive, grant = ARGV[1], tonumber(ARGV[3]), ARGV[5], tonumber(ARGV[6]), ARGV[8]
local marker, limit = ARGV[9], tonumber(ARGV[10])
local known = fence_key and fence_in(fence_key)
local share = share_of(holders_key, records_key, token)

-- As in acquire_in_line.lua.
local kind = string.match(place, '^[^:]*:w') or place
local function is_ours(other)
    return other == place or kind ~= place and string.sub(other, 1, #kind) == kind
end

if place ~= '' then
    check_line(line_key)
    if redis.call('ZSCORE', line_key, place) then
        sign_of_life(line_key, place, alive, alive_until_of(line_key, place))
    end
end
local held = redis.call('GET', KEYS[1])
local is_shared = held == marker
share = is_shared and share or nil
local turn, others
if share then
    turn = place
elseif not held or is_shared then
    turn, others = on_line(head_of, line_key)
    turn = turn or place
else
    turn = place ~= '' and turn_of(held)
end
local first = nil
if is_shared and not share and limit > 0 then
    local after = '(' .. string.format('%.0f', now_ms)
    if look('ZCOUNT', holders_key, after, '+inf') >= limit then
        first = look('ZRANGEBYSCORE', holders_key, after, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    elseif last_end(holders_key) <= now_ms and redis.call('PTTL', KEYS[1]) > 0 then
        -- The set was deleted or evicted, so nobody knows who else holds a permit, until the ttl of the marker ends.
        first = now_ms + redis.call('PTTL', KEYS[1])
    end
end
if not turn or not is_ours(turn) or first then
    if place ~= '' then
        enter_line(line_key, place, alive)
    end
    if not held then
        pass_on(KEYS[1], line_key, ARGV[11], ARGV[12])
    end
    local left = redis.call('PTTL', KEYS[1])
    if first and is_ours(turn or '') then
        left = math.min(left < 0 and math.huge or left, tonumber(first) - now_ms)
    end
    return left < 0 and -1 or -2 - left
end

if share and not share.ends[grant] and #share.ids >= MOST_GRANTS then
    error({err = 'ERR the token has ' .. MOST_GRANTS .. ' grants of this key already, and may have no more'})
end
share = share or {fence = 0, ids = {}, ends = {}}
share.metadata = ARGV[2]
set_end(share, grant, math.max(share.ends[grant] or 0, now_ms + ttl))
if fence_key then
    if share.fence == 0 then
        share.fence = known and known >= now and known + 1 or now
    end
    local last = known and known > share.fence and known or share.fence
    redis.call('SET', fence_key, string.format('%.0f', last), 'PX', ARGV[4])
end

enter_share(KEYS[1], holders_key, records_key, marker, is_shared, token, share, ttl)
if place ~= '' and ARGV[7] == '1' then
    local behind = held and not is_shared and redis.call('ZRANGE', line_key, 0, 0, 'WITHSCORES')
    if behind and behind[1] then
        -- The reservation had taken the place out of the line.
        redis.call('ZADD', line_key, string.format('%.0f', behind[2] - 1), place)
        sign_of_life(line_key, place, alive, alive_until_of(line_key, place))
    end
elseif place ~= '' then
    take_turn(line_key, turn, place, alive, others)
    notify_head(line_key, ARGV[11], ARGV[12])
end
return fence_key and share.fence or 0
