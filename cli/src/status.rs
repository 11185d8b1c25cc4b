//! `tenure status`: who holds a lock.

use std::time::Duration;

use serde::Serialize;
use tenure::{Error, Holder, Locker};

use crate::args::StatusOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;

/// A lock, as it is shown.
#[derive(Debug, Serialize)]
pub(crate) struct Shown<'a> {
    key: &'a str,
    held: bool,
    holders: Vec<ShownHolder>,
}

/// A holder, as it is shown. Never its token: who knows that can release the lock.
#[derive(Debug, Serialize)]
struct ShownHolder {
    metadata: Option<String>,
    /// How long it holds the lock unless it renews it. `None` for a key without a ttl.
    remaining_ms: Option<u64>,
    fencing_token: Option<u64>,
}

impl<'a> Shown<'a> {
    pub(crate) fn new(key: &'a str, holders: &[Holder]) -> Self {
        let holders: Vec<_> = holders.iter().map(ShownHolder::new).collect();
        Self { key, held: !holders.is_empty(), holders }
    }

    /// Returns a line for each holder, or one that says that there is none.
    pub(crate) fn text(&self) -> String {
        if !self.held {
            // Not "free": `--at-least` may keep it taken.
            return format!("{}  no holder", self.key);
        }
        let lines: Vec<_> = self.holders.iter().map(|holder| format!("{}  {}", self.key, holder.text())).collect();
        lines.join("\n")
    }
}

impl ShownHolder {
    fn new(holder: &Holder) -> Self {
        let metadata = String::from_utf8_lossy(&holder.metadata).into_owned();
        let millis = |remaining: Duration| u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX);
        Self {
            metadata: Some(metadata).filter(|metadata| !metadata.is_empty()),
            remaining_ms: holder.remaining.map(millis),
            fencing_token: holder.fencing_token,
        }
    }

    fn text(&self) -> String {
        // What others have stored must not control the terminal.
        let by = self.metadata.as_ref().map(|metadata| format!(" by {}", metadata.escape_debug())).unwrap_or_default();
        let remaining = match self.remaining_ms {
            Some(ms) => {
                let rounded = Duration::from_millis(ms / 100 * 100);
                format!("for {} unless renewed", humantime::format_duration(rounded))
            }
            None => "without a ttl, so by no lock of tenure".to_owned(),
        };
        let fencing_token = self.fencing_token.map(|token| format!("  fencing token {token}")).unwrap_or_default();
        format!("held{by}  {remaining}{fencing_token}")
    }
}

pub(crate) async fn status(options: StatusOptions, output: &Output) -> Exit {
    let locker = match connect(&options.server, None, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    let mut any_is_held = false;
    for key in &options.keys {
        let holders = match holders(&locker, key).await {
            Ok(holders) => holders,
            Err(error) => return output.fail(exit_of(&error), &error),
        };
        any_is_held |= !holders.is_empty();
        let shown = Shown::new(key, &holders);
        output.result(shown.text(), &shown);
    }
    if options.exit_code && any_is_held { Exit::NotObtained } else { Exit::Success }
}

/// Returns all who hold the key, as far as the store can tell.
pub(crate) async fn holders(locker: &Locker, key: &str) -> Result<Vec<Holder>, Error> {
    match locker.holders(key).await {
        Err(Error::Unsupported(_)) => Ok(locker.inspect(key).await?.into_iter().collect()),
        holders => holders,
    }
}
