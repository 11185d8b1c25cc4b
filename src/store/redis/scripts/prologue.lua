-- Comes after stamp.lua in all scripts but many.lua and those for one key; epilogue.lua ends them. Between the two, the
-- script's own lines see no stamp among their arguments, and may raise errors.

ARGV[#ARGV] = nil

local function script()
