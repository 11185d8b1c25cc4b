-- A process that waits for a key gives a sign of life, and sees to it that a lock that is free goes to the head of the
-- line.
--
-- KEYS  the lock key, its line, who of that is alive.
-- ARGV  place, for how long in ms its process counts as alive, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1  it is in the line.  0  it is not, or it is its turn: it has to ask.
--
-- Enters nobody: a sign of life that is late must not bring back a place that was given the lock meanwhile.
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
