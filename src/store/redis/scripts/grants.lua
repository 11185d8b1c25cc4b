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
--    A renewal of `-` on a node of a quorum can: a node that never had it may have got the key by another grant.
-- 6. A grant may end and want its key to stay taken for some more time (linger.lua). While other grants rely on the
--    key, the record has an entry `h=time` for that, with the server time in ms. It is no id, as those are hexadecimal.
--    The key lives at least until then, and if the last grant ends before, the key is left to nobody until then.

local MOST_GRANTS = 64
local NONE = {ids = {}, ttls = {}}

-- Returns the ids of the grants that rely on a key which `token` holds, in their order, and the ttl of each, or false
-- if that is not known. `kept` is the time until which the key must stay taken, if there is one.
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
    local ids, ttls, kept = {}, {}, nil
    for id, ttl in string.gmatch(string.sub(record, #token + 2), '([^,=]+)=?(%d*)') do
        if id == 'h' then
            kept = tonumber(ttl)
        else
            ids[#ids + 1] = id
            ttls[id] = tonumber(ttl) or false
        end
    end
    return {ids = ids, ttls = ttls, kept = kept}
end

-- Returns the grants without this one.
local function without(grants, id)
    local others = {ids = {}, ttls = {}, kept = grants.kept}
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

-- Returns for how many ms more the key must stay taken for a grant that has ended.
local function kept_for(grants)
    return math.max(0, (grants.kept or 0) - math.floor(now / 1000))
end

-- Returns the longest time that any of them may rely on the key from now on, or false if that is not known.
local function longest_of(grants)
    local longest = kept_for(grants)
    for _, id in ipairs(grants.ids) do
        longest = longest and grants.ttls[id] and math.max(longest, grants.ttls[id])
    end
    return longest
end

-- Writes the record, which lives for at least this ttl in ms, or as long as it would have. `is_held`: a grant of a lock
-- that is held is renewed or ends, which a server that is out of memory must not refuse. It refuses a script's first
-- write if that needs memory, and none that comes after one which doesn't.
local function write_grants(record_key, token, grants, record_ttl, is_held)
    local all = {}
    for i, id in ipairs(grants.ids) do
        all[i] = grants.ttls[id] and id .. '=' .. string.format('%.0f', grants.ttls[id]) or id
    end
    if kept_for(grants) > 0 then
        all[#all + 1] = 'h=' .. string.format('%.0f', grants.kept)
    end
    local ttl = string.format('%.0f', math.max(1, record_ttl, redis.call('PTTL', record_key)))
    if is_held then
        redis.call('PEXPIRE', record_key, ttl)
    end
    redis.call('SET', record_key, token .. '\n' .. table.concat(all, ','), 'PX', ttl)
end
