-- Who relies on a lock that several grants hold by one token. Put before the scripts that need it, after owner.lua.
--
-- Most locks are held by a token that one request made for itself, and need no record. Where a token is used again (one that the
-- user chose, a lease that is adopted), each grant has an id, and a record beside the lock key lists those that have not ended:
-- the token, a newline, and the ids with commas between them. `-` is the grant of the request that made the token. No record,
-- or one of another token, means that `-` is the only one.
--
-- 1. A release in the background ends its own grant, and frees the key only if no other is left.
-- 2. A grant of a free key begins the record anew; a grant of a key that its token holds already is added.
-- 3. A record that was lost, or that is full (`*`), keeps the key until its ttl ends: too long is safe, too short is not.

local MOST_GRANTS = 64

-- The ids of those that rely on a key which `token` holds.
local function grants_of(record_key, token)
    local record = redis.pcall('GET', record_key)
    if record and record.err then
        error({err = 'WRONGTYPE the key ' .. record_key .. ' holds no record of grants'})
    end
    if not record or string.sub(record, 1, #token + 1) ~= token .. '\n' then
        return {'-'}
    end
    local ids = {}
    for id in string.gmatch(string.sub(record, #token + 2), '[^,]+') do
        ids[#ids + 1] = id
    end
    return ids
end

-- The ids without this one, and whether it was among them.
local function without(ids, id)
    local others, found = {}, false
    for _, other in ipairs(ids) do
        if other == id then
            found = true
        else
            others[#others + 1] = other
        end
    end
    return others, found
end

local function with(ids, id)
    local all = without(ids, id)
    all[#all + 1] = #all < MOST_GRANTS and id or all[#all] ~= '*' and '*' or nil
    return all
end

local function write_grants(record_key, token, ids, record_ttl)
    redis.call('SET', record_key, token .. '\n' .. table.concat(ids, ','), 'PX', math.max(1, record_ttl))
end
