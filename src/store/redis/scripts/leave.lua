-- Leaves the line for a key.
--
-- KEYS  the lock key, its line, its hash of processes that are alive.
-- ARGV  place, 'PUBLISH' or 'SPUBLISH', channel.
-- Reply 1.
--
-- Idempotent: a repeat finds nothing to remove. If the lock was reserved for this place, or is free, it goes to the
-- next place, whose process is notified. So is that of the head if several share the key, which may be open to it now.

check_line(KEYS[2])
leave_line(KEYS[2], ARGV[1])
local held = redis.call('GET', KEYS[1])
if not held and redis.call('EXISTS', KEYS[2]) == 1 or held and turn_of(held) == ARGV[1] then
    pass_on(KEYS[1], KEYS[2], ARGV[2], ARGV[3])
elseif held == READERS or held == PERMITS then
    notify_head(KEYS[2], ARGV[2], ARGV[3])
end
return 1
