-- Those who queue give a sign of life.
--
-- KEYS  the queue, its signs of life.
-- ARGV  for how long in ms they count as alive, then their tokens. Who is not in the queue takes the last place.
-- Reply 1.
--
-- Idempotent: who is in the queue keeps its place.

check_queue(KEYS[1], KEYS[2])
local alive = string.format('%.0f', math.floor(now / 1000) + ARGV[1])
for i = 2, #ARGV do
    -- In the order in which they are told.
    redis.call('ZADD', KEYS[1], 'NX', string.format('%.0f', now + i), ARGV[i])
    redis.call('HSET', KEYS[2], ARGV[i], alive)
end
redis.call('PEXPIRE', KEYS[1], 10 * ARGV[1])
redis.call('PEXPIRE', KEYS[2], 10 * ARGV[1])
return 1
