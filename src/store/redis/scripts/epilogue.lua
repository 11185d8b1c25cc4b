end

local done, reply = pcall(script)
local failure = not done and reply or type(reply) == 'table' and reply.err
if not failure then
    -- A nil would be missing from the reply.
    return {mark, now / 1000, reply or false}
end
-- An error that ended the script is a table since Redis 7, and text before.
return {mark, now / 1000, false, tostring(type(failure) == 'table' and failure.err or failure)}
