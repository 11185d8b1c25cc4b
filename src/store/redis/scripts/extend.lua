-- Put before the scripts that need it.

-- GT, of Redis 7, says in one command what PTTL and PEXPIRE do in two, but for a key without a ttl. Older servers refuse it.
local knows_gt = true

-- Makes a key live for at least so long. A key without a ttl gets one.
local function extend(key, ttl)
    if knows_gt then
        local done = redis.pcall('PEXPIRE', key, ttl, 'GT')
        if done == 1 then
            return
        end
        knows_gt = type(done) == 'number'
    end
    if redis.call('PTTL', key) < tonumber(ttl) then
        redis.call('PEXPIRE', key, ttl)
    end
end
