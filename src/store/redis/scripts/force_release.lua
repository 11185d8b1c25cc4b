-- Ends a lock, whoever holds it.
--
-- KEYS  the lock key, its line, then other keys that end with the lock: its record of grants, and what is
--       kept of those who share it.
-- ARGV  'PUBLISH' or 'SPUBLISH', and the channel, to notify waiters.
-- Reply 1  the lock has ended, or the time for which it was left to nobody. It goes to the head of the line, or is
--          free.
--       0  there was no lock. If the key is reserved for a waiter, that one keeps its turn.
--
-- Not idempotent: a repeat ends the lock of the next holder. So it is sent once, and nothing repeats it by itself. A
-- key of another type is no lock, and stays.

local held = redis.call('GET', KEYS[1])
-- A reservation is a newline and a place, which begins with no newline.
if not held or string.find(held, '^\n[^\n]') then
    return 0
end
pass_on(KEYS[1], KEYS[2], ARGV[1], ARGV[2])
for i = 3, #KEYS do
    redis.pcall('DEL', KEYS[i])
end
return 1
