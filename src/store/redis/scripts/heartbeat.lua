-- Notes that a process which waits for a key is alive, and gives a lock that is free to the head of the line.
--
-- KEYS  the lock key, its line, its hash of processes that are alive.
-- ARGV  place, how long in ms its process counts as alive, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1  the place is in the line.  0  it is not, or it is its turn: the process has to acquire.
--
-- Never enters the line: a late heartbeat must not bring back a place that has got the lock meanwhile.
--
-- Idempotent.

check_line(KEYS[2])
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then
    return 0
end
sign_of_life(KEYS[2], ARGV[1], tonumber(ARGV[2]), alive_until_of(KEYS[2], ARGV[1]))
if redis.call('EXISTS', KEYS[1]) == 0 and pass_on(KEYS[1], KEYS[2], ARGV[3], ARGV[4]) == ARGV[1] then
    return 0
end
return 1
