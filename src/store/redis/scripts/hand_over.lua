-- Releases a lock and takes it for another token of the same process in one step, unless it is the turn of another
-- process: then the lock goes there.
--
-- KEYS  the lock key, its line, its hash of processes that are alive, its record of grants; if the next owner wants a
--       fencing token, its fence key.
-- ARGV  token that holds the lock, value of the next owner (its token; with metadata: token, newline, metadata), ttl in
--       ms, ttl of the fence key in ms, place of the next owner, how long in ms its process counts as alive, '1' if its
--       process may keep the lock from those in the line, how many fencing tokens to reserve (0: none; those after the
--       first are for the next owners in its process), the grant to end (as in end_grant.lua its id; '' to end the
--       lock, '*' to end the lock with its record of grants), '1' if the place may be in the line, 'PUBLISH' or
--       'SPUBLISH', channel.
-- Reply {fencing token or 0, 1 if the line is empty}  done.  {-1}  the key was gone.
--       {-2}  it held something else.  {-3}  others rely on the lock, or it has to stay taken for an earlier grant
--       (grants.lua), and nothing has changed.
--       {-4}  another got the lock, and the place is in the line.
--
-- Idempotent: a repeat finds the next token, or a reservation, returns that, and changes nothing. As in
-- acquire_one.lua, the fence is read first; if it can't be written, nothing has changed.

local line_key, record_key, fence_key = KEYS[2], KEYS[4], KEYS[5]
local place, alive, may_keep, grant = ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1', ARGV[9]
local held = held_by(KEYS[1])
if not held or not is_owner(ARGV[1], held) then
    if grant ~= '' then
        forget_grants(record_key, ARGV[1])
    end
    return {held == nil and -1 or -2}
end
if grant ~= '' and grant ~= '*' then
    local others = without(grants_of(record_key, ARGV[1]), grant)
    if #others.ids > 0 or kept_for(others) > 0 then
        return {-3}
    end
end

-- As in acquire_in_line.lua.
local kind = string.match(place, '^[^:]*:w') or place
local head, others
if not may_keep then
    head, others = on_line(head_of, line_key)
    if head and head ~= place and (kind == place or string.sub(head, 1, #kind) ~= kind) then
        enter_line(line_key, place, alive)
        pass_on(KEYS[1], line_key, ARGV[11], ARGV[12])
        if grant ~= '' then
            redis.pcall('DEL', record_key)
        end
        return {-4}
    end
end

local fence = 0
if ARGV[8] ~= '0' then
    local known = fence_in(fence_key)
    fence = known and known >= now and known + 1 or now
    redis.call('SET', fence_key, string.format('%.0f', fence + ARGV[8] - 1), 'PX', ARGV[4])
end
if head then
    take_turn(line_key, head, place, alive, others)
elseif ARGV[10] == '1' then
    leave_line(line_key, place)
end
if grant ~= '' then
    -- It belongs to the token that has released the lock.
    redis.pcall('DEL', record_key)
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {fence, not may_keep and not head and 1 or 0}
