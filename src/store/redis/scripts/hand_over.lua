-- Releases a lock, and takes it for another token of the same process, with nobody in between, unless it is the turn of
-- another process: then the lock goes there.
--
-- KEYS  the lock key, its line, who of that is alive, its record of grants; its fence key, where the next one wants a
--       fencing token.
-- ARGV  token that holds it, value for the next (its token; with metadata: token, newline, metadata), ttl in ms, ttl of
--       the fence key in ms, the place of the next one, for how long in ms its process counts as alive, '1' where its
--       process may keep the lock from those in the line, '1' where it wants a fencing token; as in end_grant.lua the
--       id of the grant to end in the background, '' to end the lock, or '*' to end it with its record of grants; '1'
--       where the place may be in the line; 'PUBLISH' or 'SPUBLISH', channel.
-- Reply {the fencing token or 0, 1 where nobody is in the line}  done.  {-1}  the key was gone.
--       {-2}  it held something else.  {-3}  others rely on the lock, and nothing has been changed.
--       {-4}  it was given to another, and the place is in the line.
--
-- Idempotent: a repeat finds the next token, or a reservation, says so, and touches nothing. As in acquire_one.lua,
-- what may be wrong with the fence is looked at first; should it not take the number after all, nothing has been
-- changed.

local line_key, record_key, fence_key = KEYS[2], KEYS[4], KEYS[5]
local place, alive, may_keep, grant = ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1', ARGV[9]
local held = held_by(KEYS[1])
if held == nil then
    return {-1}
end
if not held or not is_owner(ARGV[1], held) then
    return {-2}
end
if grant ~= '' and grant ~= '*' and #without(grants_of(record_key, ARGV[1]), grant).ids > 0 then
    return {-3}
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
if ARGV[8] == '1' then
    local known = fence_in(fence_key)
    fence = known and known >= now and known + 1 or now
    redis.call('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[4])
end
if head then
    take_turn(line_key, head, place, alive, others)
elseif ARGV[10] == '1' then
    leave_line(line_key, place)
end
if grant ~= '' then
    -- Of the token that is gone.
    redis.pcall('DEL', record_key)
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {fence, not may_keep and not head and 1 or 0}
