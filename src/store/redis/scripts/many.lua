-- Many operations in one call, each on a key of its own choice: what release.lua, renew.lua and acquire.lua do for one.
--
-- KEYS  the lock keys: of the releases, the renewals, the acquires with a fencing token, the acquires without; then the
--       fence keys of the acquires with one.
-- ARGV  how many of each kind, in this order; the ttl of fence keys in ms; 'PUBLISH' or 'SPUBLISH', as release.lua; then for
--       each
--       release: token.  renewal: token, ttl in ms, '1' for exactly this ttl or '0' for at least.
--       acquire: value (the token; with metadata: token, newline, metadata), ttl in ms.
-- Reply for each, in this order: a number, or a string that says why it could not be done.
--       release, renewal: 1 done, 0 the key is gone, -1 it holds something else.
--       acquire: granted: the fencing token, or 0. Held by another: -1 for ever, -2 - ttl for so many ms.
--       'ALONE': an acquire that meets its own token, or what is no lock. Nothing was done: acquire.lua knows how.
--
-- Idempotent, as each operation is. One that fails fails alone: whatever may be refused is called by pcall. Releases come
-- first, so that who waits in the same call finds the key free.

local n_release, n_renew, n_fenced, n_plain = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local fence_ttl = ARGV[5]
local publish = ARGV[6]
local at = 7
local reply = {}

-- What the keys hold. Kept up to date below, as a key may be in here twice. Nil also for what is no string.
local held = {}
for i, value in ipairs(redis.call('MGET', unpack(KEYS))) do
    held[KEYS[i]] = value
end

local function refused(answer)
    return type(answer) == 'table' and answer.err
end

local function is_owner(token, value)
    return value == token or string.sub(value, 1, #token + 1) == token .. '\n'
end

-- Why a key holds no token: it is gone, or the server says that it is no string.
local function absent(key)
    return refused(redis.pcall('GET', key)) or 0
end

local freed, freed_at = {}, {}
for i = 1, n_release do
    local key, token = KEYS[i], ARGV[at]
    at = at + 1
    local value = held[key]
    if not value then
        reply[i] = absent(key)
    elseif is_owner(token, value) then
        held[key] = false
        freed[#freed + 1] = key
        freed_at[#freed] = i
        reply[i] = 1
    else
        reply[i] = -1
    end
end
if #freed > 0 then
    local err = refused(redis.pcall('DEL', unpack(freed)))
    for n, i in ipairs(freed_at) do
        if err then
            reply[i] = err
        else
            redis.pcall(publish, freed[n], '')
        end
    end
end

for i = n_release + 1, n_release + n_renew do
    local key, token, ttl, exact = KEYS[i], ARGV[at], ARGV[at + 1], ARGV[at + 2]
    at = at + 3
    local value = held[key]
    if not value then
        reply[i] = absent(key)
    elseif not is_owner(token, value) then
        reply[i] = -1
    else
        reply[i] = 1
        if exact == '1' or redis.call('PTTL', key) < tonumber(ttl) then
            reply[i] = refused(redis.pcall('PEXPIRE', key, ttl)) or 1
        end
    end
end

local n_others = n_release + n_renew
local n_locks = n_others + n_fenced + n_plain
local now, now_text
if n_fenced > 0 then
    local time = redis.call('TIME')
    now = time[1] * 1000000 + time[2]
    now_text = string.format('%.0f', now)
end

local function take(key, value, ttl)
    local done = redis.pcall('SET', key, value, 'PX', ttl, 'NX')
    if done and not done.err then
        held[key] = value
        return
    end
    return done and done.err or 'ALONE'
end

for i = n_others + 1, n_locks do
    local key, value, ttl = KEYS[i], ARGV[at], ARGV[at + 1]
    at = at + 2
    local holder = held[key]
    if holder then
        if is_owner(string.match(value, '^[^\n]*'), holder) then
            reply[i] = 'ALONE'
        else
            local left = redis.call('PTTL', key)
            reply[i] = left < 0 and -1 or -2 - left
        end
    elseif i > n_others + n_fenced then
        reply[i] = take(key, value, ttl) or 0
    else
        -- As in acquire.lua: greater than the last, and no smaller than the clock.
        local fence_key = KEYS[n_locks + i - n_others]
        local last = held[fence_key]
        local fence, text = now, now_text
        local known = not last or tonumber(last)
        if last and known and known >= now then
            fence = known + 1
            text = string.format('%.0f', fence)
        end
        if not known or fence >= 2 ^ 53 then
            reply[i] = 'ALONE'
        else
            local done
            if last then
                done = redis.pcall('SET', fence_key, text, 'PX', fence_ttl)
            else
                -- NX: what is no string only looks as if it weren't there.
                done = redis.pcall('SET', fence_key, text, 'PX', fence_ttl, 'NX')
            end
            if not done or done.err then
                reply[i] = done and done.err or 'ALONE'
            else
                local err = take(key, value, ttl)
                if not err then
                    held[fence_key] = text
                elseif not last then
                    redis.pcall('DEL', fence_key)
                end
                reply[i] = err or fence
            end
        end
    end
end
return reply
