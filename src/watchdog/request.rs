//! A request to watch a lease: options, and `.await` at the end.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::inner::Owner;
use crate::hold::timing::Renewal;
use crate::{Error, Lease};

/// A request to watch a lease: set what you need, then `.await` it.
///
/// Made by [`WatchDog::watch_lease`](crate::WatchDog::watch_lease). Nothing happens before it is awaited. Then it
/// renews the lock at once, as [`Locker::adopt`](crate::Locker::adopt) does, and watches it once the renewal is
/// confirmed.
///
/// # Errors
///
/// - [`Error::NotHeld`]: the lease no longer holds the lock.
/// - [`Error::AlreadyWatched`]: the watchdog watches one of its keys; nothing was sent.
/// - [`Error::Redis`]: the server refused, or could not be reached.
/// - [`Error::NotReplicated`]: too few [replicas](crate::LockerBuilder::min_replicas) acknowledged the renewal in time.
/// - [`Error::ValidityExpired`]: the reply came so late that too little of the ttl was left.
/// - [`Error::InvalidKey`], [`Error::InvalidTtl`], [`Error::InvalidRenewal`]: the lease is invalid; nothing was sent.
/// - [`Error::Unsupported`]: it is the lease of a [permit](crate::Locker::permit), and is to be obtained when one is
///   free; nothing was sent.
/// - [`Error::CrossSlot`]: its keys are in different slots of a cluster.
/// - [`Error::ShutDown`]: the watchdog was shut down. [`Error::Closed`]: the locker was closed.
/// - [`Error::NoRuntime`]: the future was polled outside a tokio runtime.
///
/// # Cancel safety
///
/// Dropping the future leaves the lock as it is, and unwatched; it may have been renewed once.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
/// use tenure::{Lease, Locker, WatchDog};
///
/// let locker = Locker::in_memory();
/// let dog = WatchDog::builder(&locker).build();
/// let lease = Lease::new("shard:7", "worker-3".parse()?, Duration::from_secs(10));
/// dog.watch_lease(lease).renew_every(Duration::from_secs(2)).obtain_when_free(true).await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a request does nothing until it is awaited"]
#[derive(Clone, Debug)]
pub struct WatchRequest {
    dog: Arc<Owner>,
    lease: Lease,
    renewal: Renewal,
    obtain_when_free: bool,
}

impl WatchRequest {
    pub(super) fn new(dog: Arc<Owner>, lease: Lease, renewal: Renewal) -> Self {
        Self { dog, lease, renewal, obtain_when_free: false }
    }

    /// Sets the time between renewals: at least 1 ms, and shorter than the lease's ttl less drift. A time longer than
    /// half of the ttl counts as half of it. Default: the watchdog's, or else the locker's, or a third of the ttl.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// let lease = locker.lock("k").await?.into_lease();
    /// dog.watch_lease(lease).renew_every(Duration::from_secs(5)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn renew_every(self, interval: Duration) -> Self {
        Self { renewal: Renewal::Every(interval), ..self }
    }

    /// Watches the lease even if its token doesn't hold the lock, and obtains the lock with its token as soon as it is
    /// free. The wait is unlimited, and goes on through failures of the server.
    ///
    /// Awaiting the request waits for the first attempt only. [`WatchEvent::Obtained`](crate::WatchEvent::Obtained)
    /// reports that the lock is held, and [`status`](crate::WatchDog::status) shows it. The request returns an error
    /// that waiting can't resolve if the first attempt finds it; if a later one does, the watching ends with
    /// [`WatchEvent::Stopped`](crate::WatchEvent::Stopped), which has the reason. Default: false.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::{Lease, Locker, WatchDog};
    ///
    /// let locker = Locker::in_memory();
    /// let dog = WatchDog::builder(&locker).build();
    /// let other = locker.lock("k").await?;
    /// let lease = Lease::new("k", "worker-3".parse()?, Duration::from_secs(10));
    /// dog.watch_lease(lease).obtain_when_free(true).await?;
    /// assert!(dog.status("k").is_some_and(|status| !status.held));
    /// other.release().await?;
    /// while !dog.status("k").is_some_and(|status| status.held) {
    ///     tokio::time::sleep(Duration::from_millis(5)).await;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn obtain_when_free(self, obtain_when_free: bool) -> Self {
        Self { obtain_when_free, ..self }
    }
}

impl IntoFuture for WatchRequest {
    type Output = Result<(), Error>;
    type IntoFuture = Watching;

    fn into_future(self) -> Watching {
        let Self { dog, lease, renewal, obtain_when_free } = self;
        // The future owns the watchdog, which so lives until the request is answered.
        let watching = async move { dog.inner.watch_lease(lease, renewal, obtain_when_free).await };
        Watching(Box::pin(watching))
    }
}

/// The future of a [`WatchRequest`], made by awaiting it.
///
/// # Cancel safety
///
/// May be dropped at any time, see [`WatchRequest`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::future::IntoFuture;
///
/// let locker = tenure::Locker::in_memory();
/// let dog = tenure::WatchDog::builder(&locker).build();
/// let lease = locker.lock("k").await?.into_lease();
/// tokio::spawn(dog.watch_lease(lease).into_future()).await??;
/// # Ok(())
/// # }
/// ```
#[must_use = "futures do nothing unless polled"]
pub struct Watching(Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>);

impl Future for Watching {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Watching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watching").finish_non_exhaustive()
    }
}
