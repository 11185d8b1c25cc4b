-- A part of several scripts, after owner.lua.

-- Deletes the record of grants of a key that no longer holds the token, if it is of this token: nobody relies on it.
local function forget_grants(record_key, token)
    local record = record_key and redis.pcall('GET', record_key)
    if record and not record.err and is_owner(token, record) then
        redis.pcall('DEL', record_key)
    end
end
