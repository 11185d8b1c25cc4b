-- The grants that rely on a lock which several of them hold by one token. A part of several scripts, after owner.lua.
--
-- Most locks are held by a token that one request made for itself, and need no record. If a token is used again (one
-- that the user chose, or that of an adopted lease), each grant has an id, and a record beside the lock key lists the
-- grants that have not ended: the token, a newline, and for each grant `id=ttl`, with commas between them. The ttl in
-- ms is the longest that the grant has asked for. `-` is the grant of the request that made the token. It has no ttl
-- here, as its renewals don't use the record. No record, or one of another token, means that `-` is the only grant.
--
-- 1. A release in the background ends its own grant, and frees the key only if no other is left.
-- 2. A grant of a free key starts a new record. A grant of a key that its token holds already is added to the record.
-- 3. Each of the other grants renews the key for its own ttl, or has died. So when a grant ends, the key need not live
--    longer than the longest ttl of the others, and a holder that died keeps the key for no longer than its own ttl.
-- 4. Each renewal of a grant with an id adds the grant to the record, which may have been lost with the key.
-- 5. The end of a grant with an id that is missing from the record, and of one of a record that is full (`*`), leaves
--    the key to its ttl: too long is safe, too short is not. `-` can't tell; we assume that records are not evicted.

local MOST_GRANTS = 64
local NONE = {ids = {}, ttls = {}}

-- Returns the ids of the grants that rely on a key which `token` holds, in their order, and the ttl of each, or false
-- if that is not known.
local function grants_of(record_key, token)
    local record = redis.pcall('GET', record_key)
    if record and record.err then
        -- Not with the code WRONGTYPE, which would mean that another holds the lock.
        local is_other = string.find(record.err, '^WRONGTYPE')
        error(is_other and {err = 'ERR the key ' .. record_key .. ' holds no record of grants; delete it'} or record)
    end
    if not record or string.sub(record, 1, #token + 1) ~= token .. '\n' then
        return {ids = {'-'}, ttls = {['-'] = false}}
    end
    local ids, ttls = {}, {}
    for id, ttl in string.gmatch(string.sub(record, #token + 2), '([^,=]+)=?(%d*)') do
        ids[#ids + 1] = id
        ttls[id] = tonumber(ttl) or false
    end
    return {ids = ids, ttls = ttls}
end

-- Returns the grants without this one.
local function without(grants, id)
    local others = {ids = {}, ttls = {}}
    for _, other in ipairs(grants.ids) do
        if other ~= id then
            others.ids[#others.ids + 1] = other
            others.ttls[other] = grants.ttls[other]
        end
    end
    return others
end

-- Returns the grants with this one, which relies on the key for at least this ttl.
local function with(grants, id, ttl)
    local all = without(grants, id)
    if #all.ids >= MOST_GRANTS then
        id = '*'
        all = without(all, id)
    end
    all.ids[#all.ids + 1] = id
    all.ttls[id] = id ~= '-' and id ~= '*' and math.max(tonumber(ttl), grants.ttls[id] or 0)
    return all
end

-- Returns the longest time that any of them may rely on the key from now on, or false if that is not known.
local function longest_of(grants)
    local longest = 0
    for _, id in ipairs(grants.ids) do
        longest = longest and grants.ttls[id] and math.max(longest, grants.ttls[id])
    end
    return longest
end

-- Writes the record, which lives for at least this ttl in ms, or as long as it would have.
local function write_grants(record_key, token, grants, record_ttl)
    local all = {}
    for i, id in ipairs(grants.ids) do
        all[i] = grants.ttls[id] and id .. '=' .. string.format('%.0f', grants.ttls[id]) or id
    end
    local ttl = math.max(1, record_ttl, redis.call('PTTL', record_key))
    redis.call('SET', record_key, token .. '\n' .. table.concat(all, ','), 'PX', string.format('%.0f', ttl))
end
