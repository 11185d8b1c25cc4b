-- Takes the last place in the line for a key, unless the place is in the line already.
--
-- KEYS  the line, its hash of processes that are alive.
-- ARGV  place, how long in ms its process counts as alive.
-- Reply 1.
--
-- Idempotent: a place that is in the line stays where it is.

on_line(enter_line, KEYS[1], ARGV[1], tonumber(ARGV[2]))
return 1
