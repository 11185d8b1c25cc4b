-- A part of several scripts.

-- What a lock key holds while several share it (shares.lua).
local READERS, PERMITS = '\n\nr', '\n\np'
