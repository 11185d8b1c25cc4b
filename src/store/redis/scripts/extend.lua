-- A part of several scripts.

-- Extends the ttl of a key to at least this. A key without a ttl gets one.
--
-- A ttl that is longer already is written as it is, for WAIT. From Redis 7.2 on, it counts the replicas that have the
-- last write of its own connection: it may have been another connection that made the ttl longer, and no replica may
-- have that yet.
local function extend(key, ttl)
    redis.call('PEXPIRE', key, string.format('%.0f', math.max(redis.call('PTTL', key), tonumber(ttl))))
end
