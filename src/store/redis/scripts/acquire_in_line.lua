-- Takes one key if it is free and it is no other's turn; otherwise takes a place in the line for it.
--
-- KEYS  the lock key, its line, its hash of processes that are alive, its record of grants; if a fencing token is
--       wanted, its fence key.
-- ARGV  value (the token; with metadata: token, newline, metadata), ttl in ms, ttl of the fence key in ms, place or '',
--       how long in ms its process counts as alive from now on, id of the grant or '', ttl of the record in ms,
--       'PUBLISH' or 'SPUBLISH', channel.
-- Reply a number. Granted: the fencing token, or 0. Held by, or given to, another: -1 without a ttl, -2 - ttl in ms
--       with one.
--       'ALONE': the key holds this token already. Its place is no longer in the line, and acquire.lua has to decide.
--
-- A place `process:w7` belongs to one waiter. Waiters of one process are served in their own order, and the first tries
-- for all of them. So a waiter that finds the turn of another waiter of its process takes it, and that one gets its
-- place.
--
-- Idempotent: a place that is in the line stays where it is. Scripts do not roll back, so this script reads all keys
-- first, and sets the lock last.

local token = string.match(ARGV[1], '^[^\n]*')
local line_key, record_key, fence_key = KEYS[2], KEYS[4], KEYS[5]
local place, alive = ARGV[4], tonumber(ARGV[5])
local known = fence_key and fence_in(fence_key)
grants_of(record_key, token)
check_line(line_key)

-- The part of a place that must be the same for a turn to be this waiter's.
local kind = string.match(place, '^[^:]*:w') or place
local function is_ours(other)
    return other == place or kind ~= place and string.sub(other, 1, #kind) == kind
end

if place ~= '' and redis.call('ZSCORE', line_key, place) then
    sign_of_life(line_key, place, alive, alive_until_of(line_key, place))
end
local held = redis.call('GET', KEYS[1])
if held and is_owner(token, held) then
    leave_line(line_key, place)
    return 'ALONE'
end
local turn, others
if held then
    turn = place ~= '' and turn_of(held)
else
    turn, others = head_of(line_key)
    turn = turn or place
end
if not turn or not is_ours(turn) then
    if place ~= '' then
        enter_line(line_key, place, alive)
    end
    if not held then
        pass_on(KEYS[1], line_key, ARGV[8], ARGV[9])
    end
    local left = redis.call('PTTL', KEYS[1])
    return left < 0 and -1 or -2 - left
end

take_turn(line_key, turn, place, alive, others)
local fence = 0
if fence_key then
    fence = known and known >= now and known + 1 or now
    redis.call('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[3])
end
if ARGV[6] ~= '' then
    write_grants(record_key, token, with(NONE, ARGV[6], ARGV[2]), ARGV[7])
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return fence
