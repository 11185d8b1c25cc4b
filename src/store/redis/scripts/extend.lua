-- Put before the scripts that need it.

-- GT and NX, of Redis 7, do what takes PTTL on older servers, which refuse them: the ttl becomes this if it was less,
-- or if there was none. So a renewal that has nothing to do needs no other permission than one that has.
local knows_gt = true

-- Makes a key live for at least so long. A key without a ttl gets one.
local function extend(key, ttl)
    if knows_gt then
        local done = redis.pcall('PEXPIRE', key, ttl, 'GT')
        if done == 0 then
            done = redis.pcall('PEXPIRE', key, ttl, 'NX')
        end
        knows_gt = type(done) == 'number'
        if knows_gt then
            return
        end
    end
    if redis.call('PTTL', key) < tonumber(ttl) then
        redis.call('PEXPIRE', key, ttl)
    end
end
