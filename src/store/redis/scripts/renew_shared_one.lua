-- Does what renew_shared.lua does, for the most common case, in half the server time: the only grant of its token is to
-- end after at least the ttl, and no restart window counts. Comes before everything else of renew_shared.lua.
--
-- KEYS, ARGV  as in renew_shared.lua.
-- Reply 1: done. In any other case nothing has changed, and renew_shared.lua goes on.

local at = (ARGV[3] == 'least' or ARGV[3] == 'keep')
    and ARGV[7] == '0'
    and redis.pcall('GET', KEYS[1]) == ARGV[6]
    and redis.pcall('ZSCORE', KEYS[2], ARGV[1])
local record = at and not at.err and redis.pcall('HGET', KEYS[3], ARGV[1])
local left = record and not record.err and redis.pcall('PTTL', KEYS[1])
if type(left) == 'number' then
    local now_ms = math.floor(now / 1000)
    local grant = '\n' .. ARGV[4] .. '\n'
    local first = string.find(record, '\n', 1, true) or 0
    if tonumber(at) > now_ms and string.sub(record, first, first + #grant - 1) == grant then
        local ends = math.max(tonumber(at), now_ms + ARGV[2])
        -- The marker lives for as long as the share that ends last (shares.lua).
        left = math.max(left, ends - now_ms)
        local longer = string.format('%.0f', left + 1000)
        local done = redis.pcall('PEXPIRE', KEYS[1], string.format('%.0f', left))
        if type(done) == 'number' then
            done = redis.pcall('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[1])
        end
        if type(done) == 'number' then
            redis.pcall('PEXPIRE', KEYS[2], longer)
            done = redis.pcall('PEXPIRE', KEYS[3], longer)
        end
        if type(done) == 'table' then
            return {mark, now / 1000, false, done.err}
        end
        return mark * 4 + 1
    end
end

