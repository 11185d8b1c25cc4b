-- Does what enter.lua does, where the process has sent a heartbeat a moment ago, in half the server time. Comes before
-- everything else of enter.lua.
--
-- KEYS, ARGV  as in enter.lua.
-- Reply 1. In any other case nothing has changed, and enter.lua goes on.

local alive_until = redis.pcall('HGET', KEYS[2], string.match(ARGV[1], '^[^:]*'))
if alive_until and not alive_until.err and (tonumber(alive_until) or 0) - now / 1000 > ARGV[2] * 0.9 then
    local done = redis.pcall('ZADD', KEYS[1], 'NX', string.format('%.0f', now), ARGV[1])
    if type(done) == 'number' then
        return mark * 4 + 1
    end
end

