//! `tenure break`: ends a lock, whoever holds it.

use std::io::{self, BufRead, IsTerminal, Write};

use serde_json::json;
use tenure::{Holder, Locker};

use crate::args::BreakOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;
use crate::status::Shown;

pub(crate) async fn break_lock(options: BreakOptions, output: &Output) -> Exit {
    if !options.yes && !io::stdin().is_terminal() {
        return output.fail(Exit::Usage, &"there is no terminal to ask on: use --yes");
    }
    let locker = match connect(&options.server, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    let ended = if options.yes { Ok(true) } else { ask(&locker, &options.key).await };
    let ended = match ended {
        Ok(true) => locker.force_release(options.key.as_str()).await,
        other => other,
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

/// Shows the holder, and asks whether to end its lock. False if the holder is another by then.
async fn ask(locker: &Locker, key: &str) -> Result<bool, tenure::Error> {
    let before = locker.inspect(key).await?;
    match &before {
        Some(_) => eprintln!("{}", Shown::new(key, before.as_ref()).text()),
        None => eprintln!("{key}  has no holder, but may stay taken for a time after its last one"),
    }
    eprint!("End it? The holder goes on until its next renewal. [y/N] ");
    drop(io::stderr().flush());
    let mut answer = String::new();
    // Nothing else has to go on meanwhile.
    if io::stdin().lock().read_line(&mut answer).is_err() || !matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(false);
    }
    let now = locker.inspect(key).await?;
    let token = |holder: &Option<Holder>| holder.as_ref().map(|holder| holder.token.clone());
    if token(&before) == token(&now) {
        return Ok(true);
    }
    eprintln!("another holds it now: look again");
    Ok(false)
}
