-- Takes all keys for one token, or none.
--
-- KEYS  n lock keys; if a place is given, their n lines, and the n hashes of processes that are alive; if the grant has
--       an id, their n records of grants; if a fencing token is wanted, their n fence keys.
-- ARGV  token, value (the token; with metadata: token, newline, metadata), ttl in ms, n, ttl of the fence keys in ms,
--       id of the grant or '', ttl of the records in ms, the place that the request has in one of the lines, or '';
--       and in which.
-- Reply {1, fencing token or 0}  granted.
--       {0, ttl in ms, i}        another holds the ith key, for this long; -1: without a ttl. The key in whose line the
--                                place is comes first: a waiter that goes to another line loses its place.
--
-- A request whose turn it is at one of its keys takes the others also from those whose turn it is there, who haven't
-- taken them yet and go back to the head of the line. Otherwise those who have their turns at one key each, and want
-- the other's as well, would refuse each other, and all who come after them, for as long as there are enough in both
-- lines. A place loses its turn once: those who are near the server would always be there before one that is far from
-- it.
--
-- Idempotent: keys that all hold the token already are taken again, with the same fencing token. They live for the ttl
-- from now, or as long as they would have, whichever is longer.
--
-- Scripts do not roll back. So this script reads first, then writes the fences and records, and the locks last. If one
-- of these fails, it undoes the others.

local token, value, ttl, n = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local fence_ttl, grant, record_ttl = ARGV[5], ARGV[6], ARGV[7]
local place, stands = ARGV[8], tonumber(ARGV[9])
local before_records = place ~= '' and 3 * n or n
local records = grant ~= '' and n or 0
local fences = before_records + records
-- How long each key will live that holds the token already.
local ours = {}
-- The places whose turn it is at the other keys, and how long that would last.
local turns, last = {}, {}
local missing, is_its_turn = 0, false
local taken, reserved

for i = 1, n do
    local held = redis.call('GET', KEYS[i])
    local turn, again
    if held and place ~= '' then
        turn, again = turn_of(held)
    end
    local left = turn and redis.call('PTTL', KEYS[i])
    if not held or turn and turn == place then
        missing = missing + 1
        is_its_turn = is_its_turn or held
    elseif is_owner(token, held) then
        ours[i] = math.max(ttl, redis.call('PTTL', KEYS[i]))
    elseif turn and again == '' and left > 0 and left <= CONFIRM then
        missing = missing + 1
        turns[i], last[i] = turn, left
        reserved = (i == stands or not reserved) and i or reserved
    elseif not taken or i == stands then
        taken = i
    end
end
if not is_its_turn and reserved and (not taken or reserved == stands) then
    taken = reserved
end
if taken then
    return {0, redis.call('PTTL', KEYS[taken]), taken}
end

local grants = {}
for i = 1, records do
    local before = grants_of(KEYS[before_records + i], token)
    grants[i] = with(ours[i] and before or NONE, grant, ARGV[3])
end

-- The fencing token is a counter and a clock at once: max(last + 1, TIME in us). So it grows even if the counter was
-- lost in a restart, a failover or a flush. Lua's numbers are exact below 2^53.
local fence = 0
if #KEYS > fences then
    for i = fences + 1, #KEYS do
        local known = fence_in(KEYS[i])
        if known then
            fence = math.max(fence, missing == 0 and known or known + 1)
        end
    end
    if missing > 0 or fence == 0 then
        fence = math.max(fence, now)
    end
    local text = string.format('%.0f', fence)
    for i = fences + 1, #KEYS do
        redis.call('SET', KEYS[i], text, 'PX', fence_ttl)
    end
end

for i = 1, records do
    write_grants(KEYS[before_records + i], token, grants[i], record_ttl)
end
-- If that fails, its waiter is in no line, which its next heartbeat finds out.
local function give_back(i)
    return turns[i] and pcall(return_turn, KEYS[n + i], turns[i], last[i])
end
for i = 1, n do
    local done = redis.pcall('SET', KEYS[i], value, 'PX', string.format('%.0f', ours[i] or ttl))
    if done.err then
        for j = 1, n do
            if not ours[j] and j < i then
                redis.call('DEL', KEYS[j])
                give_back(j)
            end
            if not ours[j] and records > 0 then
                redis.call('DEL', KEYS[before_records + j])
            end
        end
        return done
    end
end
for i = 1, n do
    give_back(i)
end
return {1, fence}
