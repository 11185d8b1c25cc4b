-- A part of several scripts.

-- Returns whether a key holds this token, alone or with metadata. Compares whole tokens: `job-1` does not own what
-- `job-10` holds.
local function is_owner(token, held)
    return held == token or string.sub(held, 1, #token + 1) == token .. '\n'
end
