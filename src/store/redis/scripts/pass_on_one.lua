
-- The last lines of release_one.lua, after line.lua.

local done, why = pcall(pass_on, KEYS[1], ARGV[3], publish, channel)
if not done then
    return {mark, now / 1000, false, type(why) == 'table' and why.err or why}
end
return mark * 4 + 1
