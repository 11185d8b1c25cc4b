-- Notes that a process which waits for a key is alive, and gives a lock that is free to the head of the line. A key
-- that several share may be open to the head of the line: so that has to look. A head whose process has died is
-- dropped.
--
-- KEYS  the lock key, its line, its hash of processes that are alive.
-- ARGV  place, how long in ms its process counts as alive, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1  the place is in the line.  0  it is not, or it may be its turn: the process has to acquire.
--
-- Never enters the line: a late heartbeat must not bring back a place that has got the lock meanwhile.
--
-- Idempotent.

check_line(KEYS[2])
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then
    return 0
end
sign_of_life(KEYS[2], ARGV[1], tonumber(ARGV[2]), alive_until_of(KEYS[2], ARGV[1]))
local held = redis.pcall('GET', KEYS[1])
if not held then
    return pass_on(KEYS[1], KEYS[2], ARGV[3], ARGV[4]) == ARGV[1] and 0 or 1
elseif held == READERS or held == PERMITS then
    local before = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
    local head = head_of(KEYS[2])
    if head == ARGV[1] then
        return 0
    elseif head and head ~= before then
        redis.pcall(ARGV[3], ARGV[4], head)
    end
end
return 1
