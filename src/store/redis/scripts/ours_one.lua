-- The first lines of scripts for one key that only its owner may use. They end here unless the key holds the token,
-- which is the first argument.
--
-- Reply 0  it is gone.  2  it holds something else.

local token = ARGV[1]
local held = redis.pcall('GET', KEYS[1])
if not held then
    return mark * 4
elseif held.err then
    return {mark, now / 1000, false, held.err}
elseif held ~= token and string.sub(held, 1, #token + 1) ~= token .. '\n' then
    return mark * 4 + 2
end
