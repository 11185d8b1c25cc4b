-- A part of several scripts.

-- Returns the last fencing token that was granted, or nil if it is not known.
local function fence_in(fence_key)
    local last = redis.pcall('GET', fence_key)
    if not last then
        return nil
    end
    local known = not last.err and tonumber(last)
    -- From 2^53 on, Lua's numbers are not exact.
    if not known or known >= 2 ^ 53 - 1 then
        if last.err and not string.find(last.err, '^WRONGTYPE') then
            error(last)
        end
        local code = last.err and 'WRONGTYPE' or 'ERR'
        error({err = code .. ' the fence key ' .. fence_key .. ' holds no fencing token'})
    end
    return known
end
