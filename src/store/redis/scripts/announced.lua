-- Writers that wait for the readers of a key to leave, on a node of a quorum. A part of several scripts, after shares.lua.
--
-- They are a sorted set beside the lock key: the place of each, and the time in ms until which it counts.

-- Returns for how many ms more a writer at another place waits, unless it is heard of again; 0 if none does.
local function announced_for(intent_key, own_place)
    local found = look('ZREVRANGEBYSCORE', intent_key, '+inf', '(' .. string.format('%.0f', now_ms), 'WITHSCORES',
        'LIMIT', 0, 2)
    local at = found[1] == own_place and found[4] or found[1] ~= own_place and found[2]
    return at and tonumber(at) - now_ms or 0
end
