
-- The last lines of release_one.lua, after line.lua.

local line = ARGV[3] or '{' .. KEYS[1] .. '}:queue'
local done, why = pcall(pass_on, KEYS[1], line, publish, channel)
if not done then
    return {mark, now / 1000, false, type(why) == 'table' and why.err or why}
end
return mark * 4 + 1
