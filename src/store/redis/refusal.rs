//! Normalizes error replies: the code comes first, as in Redis 7, and none of the arguments are left in.
//!
//! - Redis 6 puts the position in the script before an error inside a script, and the script's hash before that if the
//!   error ended the script.
//! - Errors about missing permissions inside a script have no code of their own in any version.
//! - A server that doesn't know a command repeats its arguments, and the lock's token is one of them.

use std::borrow::Cow;

/// Returns the error reply with its code first and without arguments.
pub(super) fn normalize(details: &str) -> Cow<'_, str> {
    let mut refusal = details.split_once(", with args beginning with").map_or(details, |(refusal, _)| refusal);
    while let Some(rest) = without_wrapper(refusal).or_else(|| without_position(refusal)) {
        refusal = rest;
    }
    let refusal = refusal.strip_prefix('-').unwrap_or(refusal).trim_end();
    let without_code = refusal.strip_prefix("ERR ").unwrap_or(refusal);
    // The key has left the node while the script was on its way there.
    if without_code.contains(NOT_HERE) {
        return format!("TRYAGAIN {without_code}").into();
    }
    if NOT_PERMITTED.iter().any(|start| without_code.starts_with(start)) {
        return format!("NOPERM {without_code}").into();
    }
    refusal.into()
}

/// How an error about missing permissions inside a script starts: up to Redis 7.0, and since.
const NOT_PERMITTED: [&str; 2] = ["The user executing the script can't", "ACL failure in script"];

/// Part of the error about a key on another node of the cluster inside a script. Scripts look before they write.
const NOT_HERE: &str = "attempted to access a non local key";

fn without_wrapper(said: &str) -> Option<&str> {
    let (_, rest) = said.strip_prefix("ERR Error running script (call to ")?.split_once("): ")?;
    Some(rest)
}

fn without_position(said: &str) -> Option<&str> {
    let line = said.strip_prefix('@').unwrap_or(said).strip_prefix("user_script:")?.trim_start_matches(' ');
    line.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_replies_of_all_versions_have_their_code_first_and_no_arguments() {
        let on = "run this command or subcommand script: d6, on @user_script:23.";
        let no_get = "has no permissions to run the 'get' command script: on @user_script:23.";
        let replies = [
            ("WRONGTYPE Operation against a key", "WRONGTYPE Operation against a key"),
            ("@user_script: 20: -READONLY You can't write", "READONLY You can't write"),
            ("ERR Error running script (call to f_d6): @user_script:23: WRONGTYPE Operation", "WRONGTYPE Operation"),
            ("ERR Error running script (call to f_d6): @user_script:9: @user_script: 9: -OOM no\r\n", "OOM no"),
            (
                "ERR Script attempted to access a non local key in a cluster node script: d6, on @user_script:4.",
                "TRYAGAIN Script attempted to access a non local key in a cluster node script: d6, on @user_script:4.",
            ),
            (
                "@user_script: 4: Lua script attempted to access a non local key in a cluster node",
                "TRYAGAIN Lua script attempted to access a non local key in a cluster node",
            ),
            (
                "@user_script: 3: The user executing the script can't run this command or subcommand",
                "NOPERM The user executing the script can't run this command or subcommand",
            ),
            (
                &format!("ERR The user executing the script can't {on}"),
                &format!("NOPERM The user executing the script can't {on}"),
            ),
            (
                &format!("ERR ACL failure in script: User app {no_get}"),
                &format!("NOPERM ACL failure in script: User app {no_get}"),
            ),
            (
                "ERR unknown command 'EVALSHA', with args beginning with: 'd6' '2' 'k' 'token'",
                "ERR unknown command 'EVALSHA'",
            ),
            ("", ""),
            ("@user_script:", "@user_script:"),
        ];
        for (details, expected) in replies {
            assert_eq!(normalize(details), expected);
        }
    }
}
