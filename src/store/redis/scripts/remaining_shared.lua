-- Returns the time until a grant of a share ends.
--
-- KEYS  the lock key, its set of holders, its records of shares.
-- ARGV  token, id of the grant (`-` if it has none; '' for the last of its token), the marker.
-- Reply the time in ms; -2: the key is not shared by that grant.
--
-- Idempotent: it only reads.

if held_by(KEYS[1]) ~= ARGV[3] then
    return -2
end
local share = share_of(KEYS[2], KEYS[3], ARGV[1])
local at = share and (ARGV[2] == '' and end_of(share) or share.ends[ARGV[2]])
return at and at - now_ms or -2
