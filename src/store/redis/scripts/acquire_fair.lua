-- Takes one key if it is free and nobody else's turn; otherwise queues up for it.
--
-- KEYS  the lock key, its queue (a sorted set: token, arrival), its signs of life (a hash: token, until when), its
-- record of
--       grants, then, where a fencing token is wanted, its fence key.
-- ARGV  value (the token; with metadata: token, newline, metadata), ttl in ms, ttl of the fence key in ms, for how long
-- in ms
--       a waiter counts as alive after a sign of life, '1' to queue up or '0' not to, id of the grant or '', ttl of the
--       record in ms.
-- Reply a number. Granted: the fencing token, or 0. Held by another: -1 for ever, -2 - ttl for so many ms.
--       {token, ms}: it is free, and the turn of this one, who has so long to take it.
--       'ALONE': the key holds this token already. It is in the queue no more: acquire.lua knows the rest.
--
-- Idempotent: who is in the queue keeps its place. Scripts do not roll back: so all keys are looked at first, and the
-- lock is set last.

local token = string.match(ARGV[1], '^[^\n]*')
local now_ms = math.floor(now / 1000)
local fence_key, record_key = KEYS[5], KEYS[4]
local known = fence_key and fence_in(fence_key)
grants_of(record_key, token)

check_queue(KEYS[2], KEYS[3])

local function leave(who)
    redis.call('ZREM', KEYS[2], who)
    redis.call('HDEL', KEYS[3], who)
end

-- Those at the head who give no sign of life any more are skipped. Few at a time: others want the server, too.
local head, head_until
for _ = 1, 64 do
    head = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
    if not head then
        break
    end
    head_until = tonumber(redis.call('HGET', KEYS[3], head) or 0)
    if head == token or head_until > now_ms then
        break
    end
    leave(head)
end

local held = redis.call('GET', KEYS[1])
if held and is_owner(token, held) then
    leave(token)
    return 'ALONE'
end
if held or head and head ~= token then
    if ARGV[5] == '1' then
        redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', now), token)
        redis.call('HSET', KEYS[3], token, string.format('%.0f', now_ms + ARGV[4]))
        redis.call('PEXPIRE', KEYS[2], 10 * ARGV[4])
        redis.call('PEXPIRE', KEYS[3], 10 * ARGV[4])
    end
    if not held then
        return {head, math.max(0, head_until - now_ms)}
    end
    local left = redis.call('PTTL', KEYS[1])
    return left < 0 and -1 or -2 - left
end

leave(token)
local fence = 0
if fence_key then
    fence = known and known >= now and known + 1 or now
    redis.call('SET', fence_key, string.format('%.0f', fence), 'PX', ARGV[3])
end
if ARGV[6] ~= '' then
    write_grants(record_key, token, with(NONE, ARGV[6], ARGV[2]), ARGV[7])
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return fence
