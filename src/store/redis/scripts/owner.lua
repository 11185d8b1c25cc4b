-- Put before the scripts that need it.

-- Whether what a key holds is this token, alone or with metadata. Compared whole: `job-1` does not own what `job-10`
-- holds.
local function is_owner(token, held)
    return held == token or string.sub(held, 1, #token + 1) == token .. '\n'
end
