-- Who relies on a lock that several grants hold by one token. Put before the scripts that need it, after owner.lua.
--
-- Most locks are held by a token that one request made for itself, and need no record. Where a token is used again (one
-- that the user chose, a lease that is adopted), each grant has an id, and a record beside the lock key lists those
-- that have not ended: the token, a newline, and for each `id=ttl`, with commas between them. The ttl in ms is the
-- longest that the grant has asked for. `-` is the grant of the request that made the token; it has no ttl here, as its
-- renewals don't know of the record. No record, or one of another token, means that `-` is the only one.
--
-- 1. A release in the background ends its own grant, and frees the key only if no other is left.
-- 2. A grant of a free key begins the record anew; a grant of a key that its token holds already is added.
-- 3. Of those that are left, each renews the key for its own ttl, or has died. So when one ends, the key need not live
--    longer than the longest ttl of the others: a holder that died costs what its own ttl costs.
-- 4. A grant with an id that doesn't find itself in the record, as that was lost, and one of a record that is full
--    (`*`), leave the key to its ttl: too long is safe, too short is not. `-` can't know: that records are not evicted
--    is assumed.

local MOST_GRANTS = 64
local NONE = {ids = {}, ttls = {}}

-- The ids of those that rely on a key which `token` holds, in their order, and the ttl of each; false where it is not
-- known.
local function grants_of(record_key, token)
    local record = redis.pcall('GET', record_key)
    if record and record.err then
        -- Not under the code of the lock key's own type, which would mean that the lock is another's.
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

-- The grants without this one.
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

-- The grants with this one, which relies on the key for at least so long.
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

-- The longest that any of them may rely on the key from now on; false where that is not known.
local function longest_of(grants)
    local longest = 0
    for _, id in ipairs(grants.ids) do
        longest = longest and grants.ttls[id] and math.max(longest, grants.ttls[id])
    end
    return longest
end

-- The record lives for at least so long in ms, and no shorter than it would have.
local function write_grants(record_key, token, grants, record_ttl)
    local all = {}
    for i, id in ipairs(grants.ids) do
        all[i] = grants.ttls[id] and id .. '=' .. string.format('%.0f', grants.ttls[id]) or id
    end
    local ttl = math.max(1, record_ttl, redis.call('PTTL', record_key))
    redis.call('SET', record_key, token .. '\n' .. table.concat(all, ','), 'PX', string.format('%.0f', ttl))
end
