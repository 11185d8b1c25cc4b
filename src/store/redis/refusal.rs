//! What a server says when it refuses, as Redis 7 says it: the code first; and nothing of what it was sent.
//!
//! Before Redis 7 the refusal of a command in a script comes with the place in the script before it, and with the script's hash
//! before that, where the script ended there. A server that doesn't know a command repeats its arguments, and so the token.

use std::borrow::Cow;

/// Finds the refusal in what was said.
pub(super) fn plain(said: &str) -> Cow<'_, str> {
    let said = said.split_once(", with args beginning with").map_or(said, |(refusal, _)| refusal);
    let mut refusal = said;
    while let Some(rest) = without_wrapper(refusal).or_else(|| without_place(refusal)) {
        refusal = rest;
    }
    let refusal = refusal.strip_prefix('-').unwrap_or(refusal);
    if refusal.starts_with("The user executing the script can't") {
        return format!("NOPERM {refusal}").into();
    }
    refusal.into()
}

fn without_wrapper(said: &str) -> Option<&str> {
    let (_, rest) = said.strip_prefix("ERR Error running script (call to ")?.split_once("): ")?;
    Some(rest)
}

fn without_place(said: &str) -> Option<&str> {
    let line = said.strip_prefix("@user_script:")?.trim_start_matches(' ');
    line.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_in_what_any_version_says() {
        let refusals = [
            ("WRONGTYPE Operation against a key", "WRONGTYPE Operation against a key"),
            ("@user_script: 20: -READONLY You can't write", "READONLY You can't write"),
            ("ERR Error running script (call to f_d6): @user_script:23: WRONGTYPE Operation", "WRONGTYPE Operation"),
            ("ERR Error running script (call to f_d6): @user_script:9: @user_script: 9: -OOM no", "OOM no"),
            (
                "@user_script: 3: The user executing the script can't run this command or subcommand",
                "NOPERM The user executing the script can't run this command or subcommand",
            ),
            (
                "ERR unknown command 'EVALSHA', with args beginning with: 'd6' '2' 'k' 'token'",
                "ERR unknown command 'EVALSHA'",
            ),
            ("", ""),
            ("@user_script:", "@user_script:"),
        ];
        for (said, refusal) in refusals {
            assert_eq!(plain(said), refusal);
        }
    }
}
