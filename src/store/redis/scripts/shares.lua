-- Those who share a key: readers, or holders of permits. A part of several scripts, after held.lua.
--
-- While a key is shared, it holds a marker: no token has a newline and no place in the line begins with one, so a
-- marker is neither a token nor a reservation, and every other script and library takes it for the lock of another.
-- Beside it lie
--   - a sorted set with the time in ms at which the share of each token ends. A share that nobody owns any longer, and
--     that still counts (end_share.lua), has a name that begins with a newline.
--   - a hash with a record for each token: fencing token (0: none), newline, grants, newline, metadata. The grants are
--     `id=time`, with commas between them; or one id alone, whose time is that of the token. `-` is the grant of the
--     request that made the token.
--
-- 1. The marker lives for exactly as long as the share that ends last. The set and the hash live a little longer.
-- 2. What the set and the hash hold counts only while the key holds the marker, and they are emptied before it is set.
-- 3. A share whose time is over counts for nothing, whether it has been removed or not.
-- 4. Each grant has a time of its own, which only its own renewals move.
-- 5. Each command is for one key. While a slot of a cluster moves, its new node refuses those for several keys of which
--    one doesn't exist.
-- 6. A server that is out of memory refuses a script's first write if that may need memory, and none after it. So what
--    renews or ends a share first sets the ttl of the keys.

local MOST_GRANTS = 64
-- How many shares whose time is over one call removes: the server has other clients.
local MOST_SWEPT = 128
-- By how much the set and the hash outlive the marker, in ms.
local LONGER = 1000

local now_ms = math.floor(now / 1000)

-- Runs a command that reads the set or the hash. Its error names a key that holds something else, but without the code
-- WRONGTYPE, which would mean that another holds the lock.
local function look(command, key, ...)
    local found = redis.pcall(command, key, ...)
    if type(found) == 'table' and found.err then
        local is_other = string.find(found.err, '^WRONGTYPE')
        error(is_other and {err = 'ERR the key ' .. key .. ' does not hold who shares a lock; delete it'} or found)
    end
    return found
end

-- Returns what is known of a token's share, or nil if it has none: its fencing token, its metadata, the ids of its
-- grants in their order, and the time at which each ends.
local function share_of(holders_key, records_key, token)
    local last = tonumber(look('ZSCORE', holders_key, token) or 0)
    local record = look('HGET', records_key, token)
    local first = last > now_ms and record and string.find(record, '\n', 1, true)
    local second = first and string.find(record, '\n', first + 1, true)
    if not second then
        return nil
    end
    local share = {ids = {}, ends = {}, record = record}
    share.fence, share.metadata = tonumber(string.sub(record, 1, first - 1)), string.sub(record, second + 1)
    for id, at in string.gmatch(string.sub(record, first + 1, second - 1), '([^,=]+)=?(%d*)') do
        at = tonumber(at) or last
        if at > now_ms then
            share.ids[#share.ids + 1], share.ends[id] = id, at
        end
    end
    return #share.ids > 0 and share or nil
end

-- Sets when a grant ends; removes it if that is nil.
local function set_end(share, id, at)
    for i, other in ipairs(share.ids) do
        if other == id then
            table.remove(share.ids, i)
            break
        end
    end
    share.ends[id] = at
    if at then
        share.ids[#share.ids + 1] = id
    end
end

-- Returns when the last of its grants ends.
local function end_of(share)
    local last = 0
    for _, at in pairs(share.ends) do
        last = math.max(last, at)
    end
    return last
end

-- Writes the share of a token, or removes it if no grant is left.
local function write_share(holders_key, records_key, token, share)
    if #share.ids == 0 then
        redis.call('ZREM', holders_key, token)
        redis.call('HDEL', records_key, token)
        return
    end
    redis.call('ZADD', holders_key, string.format('%.0f', end_of(share)), token)
    local grants = {}
    for i, id in ipairs(share.ids) do
        grants[i] = #share.ids == 1 and id or id .. '=' .. string.format('%.0f', share.ends[id])
    end
    local head = string.format('%.0f', share.fence) .. '\n' .. table.concat(grants, ',')
    local record = head .. '\n' .. share.metadata
    if record ~= share.record then
        redis.call('HSET', records_key, token, record)
    end
end

-- Returns when the last share ends.
local function last_end(holders_key)
    return tonumber(look('ZRANGE', holders_key, -1, -1, 'WITHSCORES')[2] or 0)
end

-- Returns when the last share of other tokens ends.
local function last_end_of_others(holders_key, token)
    local last = look('ZRANGE', holders_key, -2, -1, 'WITHSCORES')
    local at = #last
    if last[at - 1] == token then
        at = at - 2
    end
    return tonumber(last[at] or 0)
end

-- Empties the set and the hash.
local function forget(holders_key, records_key)
    redis.call('DEL', holders_key)
    redis.call('DEL', records_key)
end

-- Sets the ttl of the set and the hash, by when the last share ends.
local function keep_beside(at, holders_key, records_key)
    local px = string.format('%.0f', math.max(1, at - now_ms) + LONGER)
    redis.call('PEXPIRE', holders_key, px)
    redis.call('PEXPIRE', records_key, px)
end

-- Sets the ttl of all three keys, by when the last share ends.
local function keep_until(at, lock_key, holders_key, records_key)
    redis.call('PEXPIRE', lock_key, string.format('%.0f', math.max(1, at - now_ms)))
    keep_beside(at, holders_key, records_key)
end

-- Writes the share of a token that has one more grant, for this ttl in ms, and removes some whose time is over. If one
-- of the writes fails, undoes the others. `is_shared`: the key holds the marker already.
local function enter_share(lock_key, holders_key, records_key, marker, is_shared, token, share, ttl)
    local before = share.record
    local function write()
        if is_shared then
            write_share(holders_key, records_key, token, share)
            local now_text = string.format('%.0f', now_ms)
            local over = look('ZRANGEBYSCORE', holders_key, '-inf', now_text, 'LIMIT', 0, MOST_SWEPT)
            if #over > 0 then
                redis.call('ZREM', holders_key, unpack(over))
                redis.call('HDEL', records_key, unpack(over))
            end
            return keep_until(last_end(holders_key), lock_key, holders_key, records_key)
        end
        -- First, as a server that is out of memory refuses this, but nothing after a deletion.
        redis.call('SET', lock_key, marker, 'PX', string.format('%.0f', ttl))
        forget(holders_key, records_key)
        write_share(holders_key, records_key, token, share)
        keep_beside(end_of(share), holders_key, records_key)
    end
    local done, why = pcall(write)
    if done then
        return
    elseif not is_shared then
        redis.pcall('DEL', lock_key)
        pcall(forget, holders_key, records_key)
    elseif not before then
        redis.pcall('ZREM', holders_key, token)
        redis.pcall('HDEL', records_key, token)
    end
    error(why, 0)
end
