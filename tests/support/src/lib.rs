//! Real servers for tests, and a proxy that misbehaves.
//!
//! The servers are redis-server, or what `TENURE_SERVER` names; see [`Version`].
//! Every test starts the servers that it needs, on ports of their own; they are killed when they are dropped, also by
//! a test that panics.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that can't have its server has failed")]

mod certificates;
mod cluster;
mod proxy;
mod sentinel;
mod server;
mod version;

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

pub use self::certificates::{Authority, Certificate};
pub use self::cluster::Cluster;
pub use self::proxy::{Mode, Proxy};
pub use self::sentinel::{Sentinel, Sentinels};
pub use self::server::Server;
pub use self::version::Version;

/// Waits until `look` finds something, looking every few milliseconds. Generous: only a test that fails waits so long.
///
/// # Panics
///
/// When nothing was found within 20 seconds.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Ends a future that hangs, so that its test fails instead of hanging too.
///
/// # Panics
///
/// When the future takes longer than 20 seconds.
pub async fn soon<T: Debug>(future: impl IntoFuture<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future.into_future()).await.expect("not within 20 seconds")
}
