-- The line of waiters for a lock. A part of several scripts.
--
-- The line is a sorted set of places, `process:place`, by the time of their arrival in us. Beside it lies a hash with
-- the time in ms until which each process counts as alive. The name of its key is derived from that of the line.
-- Scripts that write it declare it as well: on a cluster, no node may create it while another has it.
--
-- When the lock goes to the head of the line, the lock key holds a reservation until the process confirms: a newline
-- and the place. No token is empty, so a reservation belongs to no token, and every other library takes it for a lock.
-- A place that has lost its turn has a score below zero, and its next reservation ends with `!`.
--
-- 1. The script that frees a lock gives it to the head of the line in the same step (`pass_on`), and notifies that
--    process alone.
-- 2. A place is in the line or has a reservation, never both, and leaves the line in the step that gives it the lock.
-- 3. A reservation expires after CONFIRM. The next heartbeat or acquire of any process in the line passes the lock on
--    then.
-- 4. A place at the head is dropped if its process has sent no heartbeat for as long as it said it would be alive.
-- 5. A request for several keys whose turn it is at one of them takes the others from reservations, too. Their places
--    go back to the head of their lines (acquire.lua). That happens to a place once.

local CONFIRM = 1000
-- How many places of dead processes one call drops: the server has other clients.
local MOST_DROPPED = 1000

local function alive_key_of(line_key)
    return (string.gsub(line_key, ':queue(~?)$', ':alive%1'))
end

local function process_of(place)
    return string.match(place, '^[^:]*')
end

-- Returns the place for which a lock key that holds this is reserved, if it is; then '!' if it had lost its turn
-- before.
local function turn_of(held)
    return string.match(held, '^\n([^\n:]+:[sw]%d+)(!?)$')
end

-- Removes a place from the line, and with the last place the line. `others` is true if the line is known to have other
-- places.
local function leave_line(line_key, place, others)
    -- While its slot moves, to ask for a key that has become empty is an error, and the other key may be on another
    -- node. That must not look as if nothing had been done; the ttl ends the other key.
    if redis.call('ZREM', line_key, place) == 1 and not others and redis.pcall('EXISTS', line_key) == 0 then
        redis.pcall('DEL', alive_key_of(line_key))
    end
end

-- Returns the head of the line, if there is one, whether others are behind it, and '!' if it has lost its turn before,
-- otherwise ''. Reads both keys before it writes.
local function head_of(line_key)
    for _ = 1, MOST_DROPPED do
        local first = redis.call('ZRANGE', line_key, 0, 1, 'WITHSCORES')
        local head, others = first[1], first[3] ~= nil
        if not head then
            return nil
        end
        local alive_until = redis.call('HGET', alive_key_of(line_key), process_of(head))
        if alive_until and tonumber(alive_until) > now / 1000 then
            return head, others, tonumber(first[2]) < 0 and '!' or ''
        end
        leave_line(line_key, head, others)
        if not others then
            return nil
        end
    end
end

-- Notifies the process of the head of the line, and returns whether there is one. What the script has done until now
-- stands, so a line that can't be read is no error: the next heartbeat reports it.
local function notify_head(line_key, publish, channel)
    local looked, head = pcall(head_of, line_key)
    if looked and head then
        redis.pcall(publish, channel, head)
        return true
    end
end

-- Returns the time until which its process counts as alive, or false if the process is unknown.
local function alive_until_of(line_key, place)
    return redis.call('HGET', alive_key_of(line_key), process_of(place))
end

-- Notes that the process of this place is alive for this many ms. `alive_until` is what is known of it until now.
local function sign_of_life(line_key, place, alive, alive_until)
    local alive_key, process = alive_key_of(line_key), process_of(place)
    if alive_until and tonumber(alive_until) - now / 1000 > alive * 0.9 then
        -- It sent a heartbeat a moment ago, so the keys have their ttls.
        return
    end
    if not alive_until and redis.call('HLEN', alive_key) > 2 * redis.call('ZCARD', line_key) + 8 then
        -- Removes processes that left while others waited. It is rare: as many must have left as there are places.
        local all = redis.call('HGETALL', alive_key)
        for i = 1, #all, 2 do
            if tonumber(all[i + 1]) <= now / 1000 then
                redis.call('HDEL', alive_key, all[i])
            end
        end
    end
    local kept = string.format('%.0f', 10 * math.max(alive, CONFIRM))
    redis.call('HSET', alive_key, process, string.format('%.0f', math.floor(now / 1000) + alive))
    redis.call('PEXPIRE', alive_key, kept)
    redis.call('PEXPIRE', line_key, kept)
end

-- Takes the last place, unless the place is in the line already. Finds keys of other types before it writes.
local function enter_line(line_key, place, alive)
    local alive_until = alive_until_of(line_key, place)
    redis.call('ZADD', line_key, 'NX', string.format('%.0f', now), place)
    sign_of_life(line_key, place, alive, alive_until)
end

-- Gives the turn of a place to another place of the same process, whose own place, or the last one, the first gets. It
-- must not stay at the head: if no waiter has it any longer, the process would keep the lock for as long as it gets new
-- waiters. `others` is true if there are places behind the turn.
local function take_turn(line_key, turn, place, alive, others)
    if turn ~= place then
        local score = redis.call('ZSCORE', line_key, place) or string.format('%.0f', now)
        redis.call('ZADD', line_key, score, turn)
        sign_of_life(line_key, turn, alive, alive_until_of(line_key, turn))
    end
    leave_line(line_key, place, others or turn ~= place)
end

-- Puts a place whose turn it was back at the head of the line, as another has taken the lock meanwhile. Its process
-- counts as alive for no longer than the turn would have lasted (in ms), unless it is known to be. Finds keys of other
-- types before it writes.
local function return_turn(line_key, place, lasts)
    local alive_until = alive_until_of(line_key, place)
    local first = redis.call('ZRANGE', line_key, 0, 0, 'WITHSCORES')
    redis.call('ZADD', line_key, 'NX', string.format('%.0f', math.min(first[2] or 0, 0) - 1), place)
    sign_of_life(line_key, place, math.max(lasts, 1), alive_until)
end

-- Frees a lock that is free already or was ours. It goes to the head of the line. If the line is empty, it is free for
-- all, and all subscribers are notified.
local function pass_on(lock_key, line_key, publish, channel)
    local looked, head, others, again = pcall(head_of, line_key)
    if looked and head then
        local done = redis.pcall('SET', lock_key, '\n' .. head .. again, 'PX', CONFIRM)
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

-- Raises an error that names a key of the line which holds something else.
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

-- Calls a function of the line. If it fails, raises the error of check_line for keys that hold something else.
local function on_line(call, line_key, ...)
    local results = {pcall(call, line_key, ...)}
    if not results[1] then
        check_line(line_key)
        error(results[2])
    end
    return unpack(results, 2)
end
