-- A part of several scripts.

-- Returns what a lock key holds; nil if it is gone, false if it is of another type, which is surely no lock of ours.
-- Any other refusal leaves the holder unknown, and ends the script.
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
