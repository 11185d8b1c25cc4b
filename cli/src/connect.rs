//! The locker that the options describe.

use std::time::Duration;

use tenure::{Driver, Error, Locker};

use crate::args::ServerOptions;
use crate::exit::Exit;
use crate::output::Output;

/// Where servers are looked for unless a URL is given.
pub(crate) const DEFAULT_URL: &str = "redis://127.0.0.1:6379";

/// The ttl of a command that obtains no lock: that of the library.
const DEFAULT_TTL: Duration = Duration::from_secs(30);

/// Connects to the server, or to a quorum if there are several. The ttl limits the time for a connection. On a quorum,
/// it must not be longer than the restart window.
pub(crate) async fn connect(options: &ServerOptions, ttl: Option<Duration>, output: &Output) -> Result<Locker, Exit> {
    let urls: Vec<&str> = options.url.iter().map(String::as_str).collect();
    // In a workspace, another package may have enabled the other client as well.
    let mut builder = Locker::builder()
        .driver(Driver::Redis)
        .ttl(ttl.unwrap_or_else(|| without_lock(&urls, options.restart_window)))
        .prefix(&options.prefix)
        .command_timeout(options.command_timeout)
        .wait_for_server(options.wait_for_server)
        .min_replicas(options.min_replicas);
    if let Some(window) = options.restart_window {
        builder = builder.restart_window(window);
    }
    let connected = match &urls[..] {
        // Of several, an empty one is refused: without it, the others would be a quorum that this machine has alone.
        [] | [""] => builder.connect(DEFAULT_URL).await,
        [url] => builder.connect(url).await,
        urls => builder.quorum(urls).await,
    };
    connected.map_err(|error| output.fail(exit_of(&error), &error))
}

/// Returns a ttl for a command that obtains no lock. A quorum refuses one that is longer than its restart window.
fn without_lock(urls: &[&str], restart_window: Option<Duration>) -> Duration {
    match restart_window {
        Some(window) if urls.len() > 1 && !window.is_zero() => window.min(DEFAULT_TTL),
        _ => DEFAULT_TTL,
    }
}

/// Returns what to exit with after this error.
pub(crate) fn exit_of(error: &Error) -> Exit {
    match error {
        Error::NotObtained { .. } => Exit::NotObtained,
        Error::InvalidUrl(_)
        | Error::InvalidNodes(_)
        | Error::InvalidKey(_)
        | Error::InvalidTtl(_)
        | Error::InvalidRenewal(_)
        | Error::InvalidHold(_)
        | Error::InvalidLimit(_)
        | Error::Unsupported(_) => Exit::Usage,
        _ => Exit::Unavailable,
    }
}
