-- The line for a lock: who waits for it in which process. Put before the scripts that need it.
--
-- The line is a sorted set of places, `process:place`, by their arrival in us. Beside it lies a hash that says until
-- when each process counts as alive, in ms. Its key is made of that of the line. Scripts that write it declare it as
-- well: on a cluster, no node may create it while another has it.
--
-- While the lock is given to the head of the line, and its process hasn't confirmed that yet, the lock key holds a
-- reservation: a newline and the place. No token is empty, so a reservation belongs to no token, and to every other
-- library it is a lock.
--
-- 1. Whoever frees a lock gives it to the head of the line in the same step (`pass_on`), and tells that process alone.
-- 2. A place is in the line or has a reservation, never both, and leaves the line in the step that gives it the lock.
-- 3. A reservation ends after CONFIRM by itself. The next sign of life, or look, of any process in the line passes the
--    lock on then.
-- 4. A place whose process gave no sign of life for as long as it announced is dropped when it comes to the head.

local CONFIRM = 1000
-- So many dead places are dropped in one call; others want the server, too.
local MOST_DROPPED = 1000

local function alive_key_of(line_key)
    return (string.gsub(line_key, ':queue(~?)$', ':alive%1'))
end

local function process_of(place)
    return string.match(place, '^[^:]*')
end

-- Takes a place out of the line. With the last one, nothing is left of it; `others` says that there are some, if that
-- is known.
local function leave_line(line_key, place, others)
    if redis.call('ZREM', line_key, place) == 1 and not others and redis.call('EXISTS', line_key) == 0 then
        -- It may be on another node, while their slot moves; and ends by its ttl.
        redis.pcall('DEL', alive_key_of(line_key))
    end
end

-- The head of the line, if anybody is in it, and whether others are behind it. Reads both keys before it writes.
local function head_of(line_key)
    for _ = 1, MOST_DROPPED do
        local first = redis.call('ZRANGE', line_key, 0, 1)
        local head, others = first[1], first[2] ~= nil
        if not head then
            return nil
        end
        local alive_until = redis.call('HGET', alive_key_of(line_key), process_of(head))
        if alive_until and tonumber(alive_until) > now / 1000 then
            return head, others
        end
        leave_line(line_key, head, others)
    end
end

-- Until when its process counts as alive; false where nothing is known of it.
local function alive_until_of(line_key, place)
    return redis.call('HGET', alive_key_of(line_key), process_of(place))
end

-- The process of this place is alive for so many ms, where it was so until then.
local function sign_of_life(line_key, place, alive, alive_until)
    local alive_key, process = alive_key_of(line_key), process_of(place)
    if alive_until and tonumber(alive_until) - now / 1000 > alive * 0.9 then
        -- Said a moment ago. Where there are signs of life, there is a line.
        return
    end
    if not alive_until and redis.call('HLEN', alive_key) > 2 * redis.call('ZCARD', line_key) + 8 then
        -- Those that have left, while others waited. Rare enough: there are as many of them as were left.
        local all = redis.call('HGETALL', alive_key)
        for i = 1, #all, 2 do
            if tonumber(all[i + 1]) <= now / 1000 then
                redis.call('HDEL', alive_key, all[i])
            end
        end
    end
    local kept = string.format('%.0f', 10 * alive)
    redis.call('HSET', alive_key, process, string.format('%.0f', math.floor(now / 1000) + alive))
    redis.call('PEXPIRE', alive_key, kept)
    redis.call('PEXPIRE', line_key, kept)
end

-- Takes the last place, or keeps the one that it has. Keys that hold something else are found before it writes.
local function enter_line(line_key, place, alive)
    local alive_until = alive_until_of(line_key, place)
    redis.call('ZADD', line_key, 'NX', string.format('%.0f', now), place)
    sign_of_life(line_key, place, alive, alive_until)
end

-- A waiter takes the turn of another of its process, which gets its place in the line, or the last one. That one must
-- not keep its own, in front: if it is nobody's, the process would have the lock for as long as new waiters come there.
-- `others` says that there are some behind the turn.
local function take_turn(line_key, turn, place, alive, others)
    if turn ~= place then
        local score = redis.call('ZSCORE', line_key, place) or string.format('%.0f', now)
        redis.call('ZADD', line_key, score, turn)
        sign_of_life(line_key, turn, alive, alive_until_of(line_key, turn))
    end
    leave_line(line_key, place, others or turn ~= place)
end

-- Frees the lock, which is free already or was ours: it goes to the head of the line, or, where nobody is in line, to
-- whoever comes; then those who listen are told to look.
local function pass_on(lock_key, line_key, publish, channel)
    local looked, head, others = pcall(head_of, line_key)
    if looked and head then
        local done = redis.pcall('SET', lock_key, '\n' .. head, 'PX', CONFIRM)
        if not done.err then
            leave_line(line_key, head, others)
            redis.pcall(publish, channel, head)
            return head
        end
    end
    local done = redis.pcall('DEL', lock_key)
    if type(done) == 'table' then
        error(done)
    end
    redis.pcall(publish, channel, '')
end

-- Refuses keys of a line that hold something else, by name.
local function check_line(line_key)
    local alive_key = alive_key_of(line_key)
    for key, command in pairs({[line_key] = {'ZRANGE', line_key, 0, 0}, [alive_key] = {'HGET', alive_key, ''}}) do
        local found = redis.pcall(unpack(command))
        if type(found) == 'table' and found.err then
            local is_other = string.find(found.err, '^WRONGTYPE')
            error(is_other and {err = 'WRONGTYPE the key ' .. key .. ' holds no line of a lock'} or found)
        end
    end
end

-- Calls what finds such keys before it writes, and names them.
local function on_line(call, line_key, ...)
    local results = {pcall(call, line_key, ...)}
    if not results[1] then
        check_line(line_key)
        error(results[2])
    end
    return unpack(results, 2)
end
