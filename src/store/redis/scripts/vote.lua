-- Votes as a node of a quorum: takes all keys for one token by a ballot, or none.
--
-- KEYS  n lock keys; if a fencing token is wanted, their n fence keys; if the grant has an id, or is brought back,
--       their n records of grants.
-- ARGV  token, value (the token; with metadata: token, newline, metadata), ttl in ms, n, ttl of the fence keys in ms,
--       restart window in s (0: none), how far in us a number may be ahead, the number (0: no fencing token wanted),
--       '1' to have this number and no earlier one, id of the grant or '' (`-` if it has none and is brought back,
--       where the keys may be held for other grants of the token), ttl of the records in ms.
-- Reply {1, now, last, number}   granted, with this number or, if the keys hold the token already, an earlier one.
--       {0, now, last, ttl, i, by}   another holds the ith key, for this long in ms; -1: without a ttl. by is 1 if
--                                readers hold it, and 0 if not.
--       {2, now, last}           the number is behind: it must be greater than last.
--       {3, now, last}           the number is ahead: it must not exceed now by more than is allowed.
--       {4, now, 0, seconds}     restarted lately: it doesn't vote for this long, as it may have forgotten grants.
--
-- now is this server's clock in us; last is the highest number that it remembers for the keys.
--
-- Idempotent: keys that all hold the token already are taken again, with the same number, or a greater one if this
-- server may have found that number on its disk. They live for the ttl from now, or as long as they would have,
-- whichever is longer.
--
-- With the number 0 it also brings back a lock that is held (heal.rs). Then it reads and writes no fence.
--
-- quorum.rs argues why numbers grow. Scripts do not roll back. So this script reads first, then writes the fences and
-- records, and the locks last. If one of these fails, it undoes the others.

local token, value, ttl, n = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local window, ahead, number, grant = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[10]

-- What this server granted before it was last started was at most this: as far ahead of its clock as is allowed. A
-- number that it still knows from then, from an old dump or a truncated file, need not be the last one.
local before = 0
if window > 0 then
    local up = uptime()
    if up <= window then
        return {4, now, 0, window - up + 1}
    end
    before = now - (up - 1) * 1000000 + ahead
end

local last, lowest, bar = 0, nil, 0
if number > 0 then
    for i = n + 1, 2 * n do
        local fence = fence_in(KEYS[i])
        if fence then
            last = math.max(last, fence)
            lowest = math.min(lowest or fence, fence)
        else
            lowest = 0
        end
        if not fence or fence <= before then
            -- It was never known, or is forgotten, or others that followed it are. The clock has passed all of them.
            bar = now
        end
    end
    bar = math.max(bar, last)
end

-- How long each key will live that holds the token already.
local ours = {}
local missing = 0
for i = 1, n do
    local held = redis.call('GET', KEYS[i])
    if not held then
        missing = missing + 1
    elseif is_owner(token, held) then
        ours[i] = math.max(ttl, redis.call('PTTL', KEYS[i]))
    else
        return {0, now, last, redis.call('PTTL', KEYS[i]), i, held == READERS and 1 or 0}
    end
end

local records = grant ~= '' and #KEYS - n
local grants = {}
for i = 1, records and n or 0 do
    local before = grants_of(KEYS[records + i], token)
    grants[i] = with(ours[i] and before or NONE, grant, ARGV[3])
end

if number > 0 then
    -- The token holds the keys already, by one number. That is returned again, unless the ballot wants another; or
    -- unless it may be from before the restart, so that the numbers which followed it may be forgotten. (Renewals keep
    -- alive what was found on disk.)
    local again = missing == 0 and last > before and lowest == last and (ARGV[9] == '0' or last == number)
    if again then
        number = last
    elseif number <= bar then
        return {2, now, bar}
    elseif number > now + ahead then
        return {3, now, last}
    end
    local text = string.format('%.0f', number)
    for i = n + 1, 2 * n do
        redis.call('SET', KEYS[i], text, 'PX', ARGV[5])
    end
end

for i = 1, #grants do
    -- `-` needs no record where it is alone.
    if grant ~= '-' or redis.call('EXISTS', KEYS[records + i]) == 1 then
        write_grants(KEYS[records + i], token, grants[i], ARGV[11])
    end
end
for i = 1, n do
    local done = redis.pcall('SET', KEYS[i], value, 'PX', string.format('%.0f', ours[i] or ttl))
    if done.err then
        for j = 1, n do
            if not ours[j] and j < i then
                redis.call('DEL', KEYS[j])
            end
            if not ours[j] and records then
                redis.call('DEL', KEYS[records + j])
            end
        end
        return done
    end
end
return {1, now, math.max(last, number), number}
