-- Put before the scripts that need it.

-- The last fencing token that was granted, if it is known.
local function fence_in(fence_key)
    local last = redis.pcall('GET', fence_key)
    if not last then
        return nil
    end
    local known = not last.err and tonumber(last)
    -- From 2^53 on, Lua's numbers are not exact.
    if not known or known >= 2 ^ 53 - 1 then
        local code = last.err and string.match(last.err, '^%u+') or 'ERR'
        error({err = code .. ' the fence key ' .. fence_key .. ' holds no fencing token'})
    end
    return known
end
