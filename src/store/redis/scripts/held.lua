-- Put before the scripts that need it.

-- What a lock key holds; nil where it is gone, false where it is of another type, which is surely no lock of ours. Any
-- other refusal tells nothing of the lock, and ends the script.
local function held_by(key)
    local held = redis.pcall('GET', key)
    if not held then
        return nil
    elseif not held.err then
        return held
    elseif string.find(held.err, '^WRONGTYPE') then
        return false
    end
    error(held)
end
