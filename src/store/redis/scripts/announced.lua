-- Writers that wait for the readers of a key to leave, on a node of a quorum. A part of several scripts, after
-- shares.lua.
--
-- They are a sorted set beside the lock key: the place of each, and the time in ms until which it counts.

-- Returns for how many ms more a writer at another place waits, unless it is heard of again; 0 if none does.
local function announced_for(intent_key, own_place)
    return math.max(0, last_end_of_others(intent_key, own_place) - now_ms)
end
