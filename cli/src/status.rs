//! `tenure status`: who holds a lock.

use std::time::Duration;

use serde::Serialize;
use tenure::Holder;

use crate::args::StatusOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;

/// A lock, as it is shown. Never the token: who knows it can release the lock.
#[derive(Debug, Serialize)]
pub(crate) struct Shown<'a> {
    key: &'a str,
    held: bool,
    metadata: Option<String>,
    /// How long the lock lasts unless it is renewed. `None` for a key without a ttl.
    remaining_ms: Option<u64>,
    fencing_token: Option<u64>,
}

impl<'a> Shown<'a> {
    pub(crate) fn new(key: &'a str, holder: Option<&Holder>) -> Self {
        let metadata = holder.map(|holder| String::from_utf8_lossy(&holder.metadata).into_owned());
        let remaining = holder.and_then(|holder| holder.remaining);
        Self {
            key,
            held: holder.is_some(),
            metadata: metadata.filter(|metadata| !metadata.is_empty()),
            remaining_ms: remaining.map(|remaining| u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX)),
            fencing_token: holder.and_then(|holder| holder.fencing_token),
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut text = self.key.to_owned();
        let mut add = |part: std::fmt::Arguments<'_>| text.push_str(&part.to_string());
        if !self.held {
            add(format_args!("  free"));
            return text;
        }
        add(format_args!("  held"));
        if let Some(metadata) = &self.metadata {
            // What others have stored must not control the terminal.
            add(format_args!(" by {}", metadata.escape_debug()));
        }
        match self.remaining_ms {
            Some(ms) => add(format_args!(
                "  for {} unless renewed",
                humantime::format_duration(Duration::from_millis(ms / 100 * 100))
            )),
            None => add(format_args!("  without a ttl, so by no lock of tenure")),
        }
        if let Some(fencing_token) = self.fencing_token {
            add(format_args!("  fencing token {fencing_token}"));
        }
        text
    }
}

pub(crate) async fn status(options: StatusOptions, output: &Output) -> Exit {
    let locker = match connect(&options.server, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    let mut any_is_held = false;
    for key in &options.keys {
        let holder = match locker.inspect(key.as_str()).await {
            Ok(holder) => holder,
            Err(error) => return output.fail(exit_of(&error), &error),
        };
        any_is_held |= holder.is_some();
        let shown = Shown::new(key, holder.as_ref());
        output.result(shown.text(), &shown);
    }
    if options.exit_code && any_is_held { Exit::NotObtained } else { Exit::Success }
}
