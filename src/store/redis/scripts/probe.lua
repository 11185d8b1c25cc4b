-- Tries the commands that locks need, on keys of its own, to find out which of them the user may run.
--
-- KEYS  a lock key that nobody uses, its line, its hash of processes that are alive, its record of grants, its fence
--       key.
-- ARGV  'PUBLISH' or 'SPUBLISH', the channel.
-- Reply for each command that fails its name, then the error. For a command that only the line and notifications need,
--       `-` precedes the name.
--
-- Idempotent: it deletes all that it writes. Should that fail, the keys expire within a second.

local lock_key, line_key, alive_key, record_key, fence_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local failed = {}

local function try(name, ...)
    local done = redis.pcall(...)
    if type(done) == 'table' and done.err then
        failed[#failed + 1] = name
        failed[#failed + 1] = done.err
    end
end

try('SET', 'SET', lock_key, 'probe', 'PX', 1000)
try('SET', 'SET', record_key, 'probe', 'PX', 1000)
try('SET', 'SET', fence_key, '1', 'PX', 1000)
try('GET', 'GET', lock_key)
try('PTTL', 'PTTL', lock_key)
try('PEXPIRE', 'PEXPIRE', lock_key, 1000)
try('-ZADD', 'ZADD', line_key, 'NX', 1, 'probe')
try('-ZSCORE', 'ZSCORE', line_key, 'probe')
try('-ZRANGE', 'ZRANGE', line_key, 0, 1)
try('-ZCARD', 'ZCARD', line_key)
try('-HSET', 'HSET', alive_key, 'probe', 1)
try('-HGET', 'HGET', alive_key, 'probe')
try('-HLEN', 'HLEN', alive_key)
try('-HGETALL', 'HGETALL', alive_key)
try('-HDEL', 'HDEL', alive_key, 'probe')
try('-EXISTS', 'EXISTS', line_key)
try('-ZREM', 'ZREM', line_key, 'probe')
try('-PUBSUB', 'PUBSUB', ARGV[1] == 'PUBLISH' and 'NUMSUB' or 'SHARDNUMSUB', ARGV[2])
try('-' .. ARGV[1], ARGV[1], ARGV[2], '')
for _, key in ipairs({line_key, alive_key}) do
    redis.pcall('PEXPIRE', key, 1000)
end
for _, key in ipairs(KEYS) do
    try('DEL', 'DEL', key)
end
return failed
