//! The state of one watched lock, as a snapshot.

use std::sync::Arc;

use tokio::time::Instant;

use crate::Error;

/// The state of a lock that is watched; returned by [`WatchDog::status`](crate::WatchDog::status).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
///
/// let locker = tenure::Locker::in_memory();
/// let dog = tenure::WatchDog::builder(&locker).build();
/// dog.watch(locker.lock("k").await?)?;
/// tokio::time::sleep(Duration::from_secs(25)).await;
/// assert_eq!(dog.status("k").map(|status| status.renewals), Some(2));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WatchStatus {
    /// Whether the lock is held now.
    pub held: bool,
    /// Until when it is held if no further renewal succeeds. `None` while it is waited for or released.
    pub deadline: Option<Instant>,
    /// How many renewals have succeeded since the watchdog began to watch the lock.
    pub renewals: u64,
    /// Why the latest renewal failed; `None` if it succeeded.
    pub last_error: Option<Arc<Error>>,
}
