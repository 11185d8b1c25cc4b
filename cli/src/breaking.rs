//! `tenure break`: ends a lock, whoever holds it.

use std::io::{self, BufRead, IsTerminal, Write};

use serde_json::json;
use tenure::{Error, Locker};

use crate::args::BreakOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;
use crate::status::{Shown, holders};

pub(crate) async fn break_lock(options: BreakOptions, output: &Output) -> Exit {
    if !options.yes && !io::stdin().is_terminal() {
        return output.fail(Exit::Usage, &"there is no terminal to ask on: use --yes");
    }
    let locker = match connect(&options.server, None, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    let ended = match options.yes {
        true => locker.force_release(options.key.as_str()).await,
        false => ask(&locker, &options.key).await,
    };
    match ended {
        Ok(ended) => {
            let text = if ended { "ended" } else { "nothing was ended" };
            output.result(format_args!("{}  {text}", options.key), json!({ "key": options.key, "ended": ended }));
            if ended { Exit::Success } else { Exit::Minor }
        }
        Err(error) => output.fail(exit_of(&error), &error),
    }
}

/// Shows the holders, asks whether to end their lock, and ends it unless there are others by then. Returns whether it
/// has ended.
async fn ask(locker: &Locker, key: &str) -> Result<bool, Error> {
    let shown = holders(locker, key).await?;
    let text = match &shown[..] {
        [] => format!("{key}  has no holder, but may stay taken for a time after its last one"),
        holders => Shown::new(key, holders).text(),
    };
    let question = "End it? The holder goes on until its next renewal. [y/N] ";
    if write!(io::stderr(), "{text}\n{question}").and_then(|()| io::stderr().flush()).is_err() {
        // Nobody has read what would be ended.
        return Ok(false);
    }
    let mut answer = String::new();
    // Nothing else has to go on meanwhile.
    if io::stdin().lock().read_line(&mut answer).is_err() || !matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(false);
    }
    let tokens: Vec<_> = shown.into_iter().map(|holder| holder.token).collect();
    let ended = locker.force_release_of(key, &tokens).await?;
    if !ended && !holders(locker, key).await?.is_empty() {
        drop(writeln!(io::stderr(), "another holds it now: look again"));
    }
    Ok(ended)
}
