-- Takes the last place in the line for a key, or keeps the one that it has.
--
-- KEYS  the line, who of it is alive.
-- ARGV  place, for how long in ms its process counts as alive.
-- Reply 1.
--
-- Idempotent: who is in the line keeps its place.

on_line(enter_line, KEYS[1], ARGV[1], tonumber(ARGV[2]))
return 1
