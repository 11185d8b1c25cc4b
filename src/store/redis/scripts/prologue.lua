-- What all scripts but those for one key and many.lua go on with after stamp.lua; epilogue.lua is what they end with. Both run around
-- the script's own lines, whose arguments are without the stamp, and which may raise errors.

ARGV[#ARGV] = nil

local function script()
