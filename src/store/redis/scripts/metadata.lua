-- Returns what a grant that shares a key has stored beside its token.
--
-- KEYS  the lock key, its set of holders, its records of shares.
-- ARGV  token, id of the grant (`-` if it has none), the marker.
-- Reply the metadata, or nil if the grant has no share of the key.
--
-- Idempotent: it only reads.

if redis.call('GET', KEYS[1]) ~= ARGV[3] then
    return false
end
local share = share_of(KEYS[2], KEYS[3], ARGV[1])
return share and share.ends[ARGV[2]] and share.metadata or false
