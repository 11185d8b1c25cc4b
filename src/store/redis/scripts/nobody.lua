-- A part of several scripts.

-- What a lock key holds that stays taken for a while although nobody holds the lock. No token has a newline, and no
-- place in the line begins with one, so this belongs to no token and is no reservation. Every other library takes it
-- for a lock.
local NOBODY = '\n\nh'

-- Leaves a key that was ours to nobody, for this long in ms. All subscribers are notified, so that they learn the time.
local function leave_to_nobody(key, ms, publish, channel)
    local px = string.format('%.0f', ms)
    local done = redis.pcall('SET', key, NOBODY, 'PX', px)
    if done.err then
        -- A server that is out of memory refuses this, but not to change a ttl. The key stays taken by a token that its
        -- owner no longer uses.
        done = redis.pcall('PEXPIRE', key, px)
        if type(done) == 'table' then
            error(done)
        end
    end
    redis.pcall(publish, channel, '')
end
