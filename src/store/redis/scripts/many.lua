-- Runs a batch of operations, each on a key of its own: does what release.lua, renew.lua and acquire.lua do for one.
--
-- KEYS  the lock keys: of the releases, the releases in the background, the renewals, the acquires with a fencing
--       token, the acquires without; then the records of grants of the releases in the background, and the fence keys
--       of the acquires with a fencing token. On a node of a quorum, the records of the renewals come before the fence
--       keys.
-- ARGV  how many of each kind, in this order; the ttl of fence keys in ms; 'PUBLISH' or 'SPUBLISH', as in release.lua;
--       the ttl of all renewals in ms, or '' if each has its own; then for each
--       release: token.  renewal: token, and the ttl if each has its own; the key lives for at least this.
--       acquire: value (the token; with metadata: token, newline, metadata), ttl in ms.
--       At the end the channels of all releases, as in release.lua.
-- Reply {mark, server time in ms, {server time in us, how many operations went as usual, and for each of the others its
--       place from 1 on and a number, or a string with its error}}. A client takes longer to read a number than the
--       server to write it, and most are the same: by leaving them out, a pair of 64 tasks takes it 7 % less.
--       Nothing here raises an error, so it needs no prologue.lua, and the stamp is still the last argument.
--       release, renewal: done (as usual); 0 the key is gone, -1 it holds something else.
--       acquire: granted, with the server time in us as its fencing token, or without one (as usual); granted with
--       another fencing token: that. Held by another: -1 without a ttl, -2 - ttl in ms with one.
--       'ALONE': an acquire that finds something that is no lock, or no fencing token; a release of a lock that others
--       wait for, or in the background one that other grants may rely on; on a node of a quorum, also a renewal of such
--       a lock. Nothing has changed, and the script for one key has to decide.
--
-- Idempotent, as each operation is. An operation that fails affects no other: commands that may be refused are called
-- by pcall, so the script never ends in an error after it has begun to write. Releases come first, so that an acquire
-- in the same batch finds the key free.

local n_end, n_renew, n_fenced, n_plain = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local n_explicit = tonumber(ARGV[1])
local n_release = n_explicit + n_end
local n_locks = n_release + n_renew + n_fenced + n_plain
-- Of the releases in the background, and on a node of a quorum of the renewals.
local n_records = #KEYS - n_locks - n_fenced
local fence_ttl = ARGV[6]
local publish = ARGV[7]
local renewed_ttl = ARGV[8]
local at = 9
-- By place, without those that went as usual.
local reply = {}

local function refused(answer)
    return type(answer) == 'table' and answer.err
end

-- What the keys hold; false also for what is no string. MGET costs less than a GET for each key, but a user with the
-- permissions for the other scripts may not be allowed to call it.
local values = redis.pcall('MGET', unpack(KEYS))
if values.err then
    values = {}
    for i, key in ipairs(KEYS) do
        local value = redis.pcall('GET', key)
        values[i] = not refused(value) and value
    end
end

-- The same by key, kept up to date below, as a key may be in the batch twice. Renewals only need it for a key that was
-- released before.
local held = {}
for i = 1, n_release do
    held[KEYS[i]] = values[i]
end
for i = n_release + n_renew + 1, #KEYS do
    held[KEYS[i]] = values[i]
end

-- Returns why a key holds no token: 0 if it is gone, or the server's error.
local function absent(key)
    return refused(redis.pcall('GET', key)) or 0
end

-- Waiters subscribe to their lock, so a lock without subscribers has no waiters. The others are left to
-- release_one.lua, and all of them if the server doesn't tell.
local heard
if n_release > 0 then
    local before = 8 + n_release + n_renew * (renewed_ttl == '' and 2 or 1) + 2 * (n_fenced + n_plain)
    local count = publish == 'PUBLISH' and 'NUMSUB' or 'SHARDNUMSUB'
    -- The last argument is the stamp.
    if ARGV[before + 2] then
        heard = redis.pcall('PUBSUB', count, unpack(ARGV, before + 1, before + n_release))
    else
        heard = redis.pcall('PUBSUB', count, unpack(KEYS, 1, n_release))
    end
end

-- Returns whether other grants may rely on the lock that a release in the background is for.
local function may_have_others(i, token)
    local record = i > n_explicit and held[KEYS[n_locks + i - n_explicit]]
    return record and is_owner(token, record)
end

local freed, was = {}, {}
for i = 1, n_release do
    local key, token = KEYS[i], ARGV[at]
    at = at + 1
    local value = held[key]
    if not value then
        reply[i] = was[key] and 0 or absent(key)
    elseif may_have_others(i, token) then
        reply[i] = 'ALONE'
    elseif value ~= token and not is_owner(token, value) then
        reply[i] = -1
    elseif heard.err or heard[2 * i] ~= 0 then
        reply[i] = 'ALONE'
    else
        held[key] = false
        was[key] = value
        freed[#freed + 1] = key
    end
end
if #freed > 0 then
    local err = refused(redis.pcall('DEL', unpack(freed)))
    if err then
        for i = 1, n_release do
            local value, token = was[KEYS[i]], ARGV[8 + i]
            if value then
                held[KEYS[i]] = value
                if reply[i] ~= 'ALONE' then
                    reply[i] = may_have_others(i, token) and 'ALONE' or is_owner(token, value) and err or -1
                end
            end
        end
    end
end

-- Returns the ttl of a key in ms, or -1 if it has none; and the error if it could not be read.
local function left_of(key)
    local left = redis.pcall('PTTL', key)
    local err = refused(left)
    return not err and left, err
end

if n_renew > 0 then
    -- As in extend.lua. Returns the error, if there is one.
    local function extend(key, px)
        local left, err = left_of(key)
        return err or refused(redis.pcall('PEXPIRE', key, string.format('%.0f', math.max(left, px))))
    end

    local renewed_px = tonumber(renewed_ttl)
    for i = n_release + 1, n_release + n_renew do
        local key, token, px = KEYS[i], ARGV[at], renewed_px
        at = at + 1
        if not px then
            px = tonumber(ARGV[at])
            at = at + 1
        end
        local value = values[i]
        if was[key] then
            value = held[key]
        end
        local record = n_records > n_end and values[n_locks + n_end + i - n_release]
        if not value then
            reply[i] = absent(key)
        elseif not is_owner(token, value) then
            reply[i] = -1
        elseif record and is_owner(token, record) then
            reply[i] = 'ALONE'
        else
            reply[i] = extend(key, px) or nil
        end
    end
end

local n_others = n_release + n_renew
local now_text = n_fenced > 0 and string.format('%.0f', now)

if n_locks > n_others then
    -- Takes a key that is free. Returns the error, if there is one.
    local function take(key, value, ttl)
        local done = redis.pcall('SET', key, value, 'PX', ttl, 'NX')
        if done and not done.err then
            held[key] = value
            return
        end
        return done and done.err or 'ALONE'
    end

    -- Returns the error, if there is one.
    local function write_fence(fence_key, fence)
        local done
        local text = fence == now and now_text or string.format('%.0f', fence)
        if held[fence_key] then
            done = redis.pcall('SET', fence_key, text, 'PX', fence_ttl)
        else
            -- NX, because MGET returns nothing for a key that holds no string.
            done = redis.pcall('SET', fence_key, text, 'PX', fence_ttl, 'NX')
        end
        if done and not done.err then
            held[fence_key] = text
            return
        end
        return done and done.err or 'ALONE'
    end

    -- As in acquire.lua: greater than the last, and at least the clock; for the holder of the lock, the last.
    local function next_fence(fence_key, is_ours)
        local last = held[fence_key]
        local known = last and tonumber(last)
        if last and (not known or known >= 2 ^ 53 - 1) then
            return nil
        elseif is_ours then
            return known and known > 0 and known or now
        end
        return known and known >= now and known + 1 or now
    end

    for i = n_others + 1, n_locks do
        local key, value, ttl = KEYS[i], ARGV[at], ARGV[at + 1]
        at = at + 2
        local holder = held[key]
        local is_ours = holder and is_owner(string.match(value, '^[^\n]*'), holder)
        local fence_key = i <= n_others + n_fenced and KEYS[n_locks + n_records + i - n_others]
        local fence = fence_key and next_fence(fence_key, is_ours) or 0
        local err
        local usual = fence_key and now or 0
        if holder and not is_ours then
            local left
            left, err = left_of(key)
            reply[i] = err or (left < 0 and -1 or -2 - left)
        elseif fence_key and fence == 0 then
            reply[i] = 'ALONE'
        elseif is_ours then
            -- As in acquire.lua: it lives for the ttl from now, or as long as it would have, whichever is longer.
            local left
            left, err = left_of(key)
            err = err or fence_key and write_fence(fence_key, fence)
            if not err then
                local px = string.format('%.0f', math.max(tonumber(ttl), left))
                err = refused(redis.pcall('SET', key, value, 'PX', px))
            end
            reply[i] = err or fence ~= usual and fence or nil
        else
            err = take(key, value, ttl)
            if not err and fence_key then
                err = write_fence(fence_key, fence)
                if err then
                    redis.pcall('DEL', key)
                    held[key] = false
                end
            end
            reply[i] = err or fence ~= usual and fence or nil
        end
    end
end

local others, count = {now, 0}, 0
for i, result in pairs(reply) do
    others[2 * count + 3], others[2 * count + 4] = i, result
    count = count + 1
end
others[2] = n_locks - count
return {mark, now / 1000, others}
