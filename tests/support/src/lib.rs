//! Real servers for tests, and a proxy that misbehaves.
//!
//! The servers are redis-server, or what `TENURE_SERVER` names; see [`Version`].
//! Every test starts the servers that it needs, on ports of their own; they are killed when they are dropped, also by
//! a test that panics.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that can't have its server has failed")]

mod certificates;
mod clock;
mod cluster;
mod log;
mod port;
mod proxy;
mod sentinel;
mod server;
mod stalls;
mod stands_still;
mod version;

use std::fmt::Debug;
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

pub use self::certificates::{Authority, Certificate};
pub use self::clock::Clock;
pub use self::cluster::{Cluster, Migration};
pub use self::proxy::{Mode, Proxy};
pub use self::sentinel::{Sentinel, Sentinels};
pub use self::server::Server;
pub use self::stalls::Stalls;
pub use self::stands_still::StandsStill;
pub use self::version::Version;

/// How long servers may take to start, to find each other and to elect one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something, calling it every few milliseconds. The limit is generous: only a test that fails
/// waits that long.
///
/// # Panics
///
/// When nothing was found within 20 seconds.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, look: impl FnMut() -> F) -> T {
    look_until(Duration::from_secs(20), what, look).await
}

/// Waits until `look` finds what servers agree on among themselves.
///
/// # Panics
///
/// When nothing was found within 60 seconds.
pub async fn elected<T, F: Future<Output = Option<T>>>(what: &str, look: impl FnMut() -> F) -> T {
    look_until(PATIENCE, what, look).await
}

async fn look_until<T, F: Future<Output = Option<T>>>(limit: Duration, what: &str, mut look: impl FnMut() -> F) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(limit, found).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Waits for a future that must be done within this limit, as its runtime sees it: where the machine is so busy that
/// the runtime runs only after the limit, the future may still do what was due by then. What [`Stalls`] measures doesn't
/// count either: a future that waits several times, or computes, is late by it. So a limit to the millisecond holds on
/// any machine.
///
/// # Panics
///
/// When the future takes longer.
pub async fn within<T>(limit: Duration, future: impl IntoFuture<Output = T>) -> T {
    let (began, stalls) = (Instant::now(), Stalls::watch());
    let mut future = pin!(future.into_future());
    let mut left = limit;
    while !left.is_zero() {
        // The future comes first where both are due.
        if let Ok(done) = tokio::time::timeout(left, &mut future).await {
            return done;
        }
        left = stalls.added_to(limit).saturating_sub(began.elapsed());
    }
    // What it waits for may need a few turns of other tasks.
    for _ in 0..1_000 {
        tokio::select! {
            biased;
            done = &mut future => return done,
            () = tokio::task::yield_now() => {}
        }
    }
    panic!("not within {limit:?}")
}

/// Ends a future that hangs, so that its test fails instead of hanging too.
///
/// # Panics
///
/// When the future takes longer than 20 seconds.
pub async fn soon<T: Debug>(future: impl IntoFuture<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future.into_future()).await.expect("not within 20 seconds")
}
