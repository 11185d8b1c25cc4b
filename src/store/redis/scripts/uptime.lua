-- A part of several scripts.

-- Returns for how many seconds this server has been up. It is the difference of two times in whole seconds, so it may
-- be almost one too many.
local function uptime()
    local up = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)'))
    if not up then
        error({err = 'ERR the server does not say how long it has been up'})
    end
    return up
end
