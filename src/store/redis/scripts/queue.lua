-- Put before the scripts that need it.

-- Refuses keys of a queue that hold something else, before anything is written.
local function check_queue(queue_key, alive_key)
    for key, command in pairs({[queue_key] = {'ZRANGE', queue_key, 0, 0}, [alive_key] = {'HGET', alive_key, ''}}) do
        local found = redis.pcall(unpack(command))
        if type(found) == 'table' and found.err then
            local is_other = string.find(found.err, '^WRONGTYPE')
            error(is_other and {err = 'WRONGTYPE the key ' .. key .. ' holds no queue of a lock'} or found)
        end
    end
end
