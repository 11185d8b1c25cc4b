end

local done, reply = pcall(script)
local failure = not done and reply or type(reply) == 'table' and reply.err
if not failure then
    return {mark, now_ms, reply}
end
-- An error is a table since Redis 7, and text with its place in the script before.
failure = tostring(type(failure) == 'table' and failure.err or failure)
return {mark, now_ms, false, (string.gsub(string.gsub(failure, '^@?user_script: ?%d+: ?', ''), '^-', ''))}
