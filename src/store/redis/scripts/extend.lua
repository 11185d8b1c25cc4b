-- A part of several scripts.

-- GT and NX set the ttl if it is shorter, or if there is none. Servers before Redis 7 refuse them, and need PTTL. With
-- them, a renewal that has nothing to do needs no other permission than one that has.
local knows_gt = true

-- Extends the ttl of a key to at least this. A key without a ttl gets one.
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
