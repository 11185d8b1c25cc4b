//! A request for a lock: a chain of options that ends in `.await`.

#[cfg(test)]
mod tests;

#[cfg(doc)]
use crate::Locker;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tracing::{Instrument, Span, info_span};

use crate::acquire::{Options, WhenRefused};
use crate::hold::timing::Renewal;
use crate::locker::shared::Shared;
use crate::mode::Mode;
use crate::{Error, Key, LockGuard, Retry, Token};

/// A request for a lock: set what you need, then `.await` it for the [`LockGuard`].
///
/// Created by [`Locker::lock`], [`Locker::try_lock`] and [`Locker::obtain`], which differ only in how long they wait,
/// and by [`Locker::lock_all`], [`Locker::try_lock_all`] and [`Locker::obtain_all`] for several keys. A request of
/// [`Locker::read`] or [`Locker::permit`], or of their `try_` forms, is for a share of a key: what is said of a lock is
/// true of a share, too. Nothing happens before it is awaited. Options that are not set here are those of the
/// [`Locker`].
///
/// # Cancel safety
///
/// The future may be dropped at any time. What an attempt may have left at the server is then released in the
/// background, on the runtime that polled it; nothing else is left behind.
///
/// A future that is neither polled nor dropped loses its turn. If the first waiter for a key in this process isn't
/// polled within about 700 ms after it was due, it goes to the end of the queue. A lock that was handed over to it is
/// taken back after 500 ms.
///
/// # Errors
///
/// - [`Error::NotObtained`]: another holds the lock, as the server last reported, and the request doesn't wait longer.
/// - [`Error::Redis`]: the server refused for good, or the last attempt failed, or the server did not reply at all
///   within the time that the request may wait. A request that waits behind others in this process returns the errors
///   of those that asked before it. [`Error::Quorum`] if so many nodes failed that no majority was left.
/// - [`Error::NotReplicated`]: too few [replicas](crate::LockerBuilder::min_replicas) acknowledged the lock in time,
///   and it was released again.
/// - [`Error::ValidityExpired`]: the reply came so late that too little of the ttl was left; for a request that waits,
///   several times in a row.
/// - [`Error::InvalidKey`], [`Error::InvalidTtl`], [`Error::InvalidRenewal`], [`Error::InvalidHold`]: no such lock can
///   work; nothing was sent.
/// - [`Error::InvalidLimit`]: nobody could ever hold such a [permit](Locker::permit); nothing was sent.
/// - [`Error::Unsupported`]: the locker requires replicas on a server that can't have any, or the store counts no
///   permits; nothing was sent.
/// - [`Error::CrossSlot`]: the keys lie in different slots of a cluster; nothing was sent.
/// - [`Error::Closed`]: the locker was closed before or meanwhile.
/// - [`Error::NoRuntime`]: the future was polled outside a tokio runtime.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
/// use tenure::Locker;
///
/// let locker = Locker::in_memory();
/// let guard = locker
///     .lock("index:products")
///     .ttl(Duration::from_secs(10))
///     .wait_at_most(Duration::from_secs(60))
///     .metadata("host-3, pid 4711")
///     .await?;
/// # guard.release().await
/// # }
/// ```
#[must_use = "a request does nothing until it is awaited"]
#[derive(Clone)]
pub struct LockRequest {
    options: Box<Options>,
}

impl LockRequest {
    pub(crate) fn new(shared: Arc<Shared>, keys: Vec<Key>, when_refused: WhenRefused) -> Self {
        Self { options: Box::new(Options::new(shared, keys, when_refused)) }
    }

    /// Requests a share of the key instead of a lock: with a permit, as one of so many.
    pub(crate) fn sharing(mut self, mode: Mode, limit: usize) -> Self {
        (self.options.mode, self.options.limit) = (mode, limit);
        self
    }

    /// Sets how long the server keeps the lock after each renewal, in whole milliseconds: from 4 ms (with the default
    /// drift) to 365 days. Default: the locker's, 30 s.
    ///
    /// If this process dies, others wait for this long. If the process is cut off from the server for this long, it
    /// loses the lock.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").ttl(Duration::from_secs(5)).await?;
    /// assert_eq!(guard.ttl(), Duration::from_secs(5));
    /// # Ok(())
    /// # }
    /// ```
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = ttl;
        self
    }

    /// Limits how long the request waits. It gives up within 50 ms of the limit, whatever the server does.
    ///
    /// Makes [`obtain`](Locker::obtain) and [`try_lock`](Locker::try_lock) wait, too.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").await?;
    /// let refused = locker.lock("k").wait_at_most(Duration::from_millis(100)).await;
    /// assert!(matches!(refused, Err(tenure::Error::NotObtained { .. })));
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_at_most(mut self, limit: Duration) -> Self {
        self.options.wait_at_most = Some(limit);
        if let WhenRefused::GiveUp = self.options.when_refused {
            self.options.when_refused = WhenRefused::Wait;
        }
        self
    }

    /// Makes the request try again after each of these pauses, and give up when they end. An attempt that fails at the
    /// server counts, too.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let four_attempts = tenure::Retry::linear(Duration::from_millis(50)).max_retries(3);
    /// let guard = locker.obtain("k").retry(four_attempts).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn retry(mut self, retry: Retry) -> Self {
        self.options.when_refused = WhenRefused::Retry(retry);
        self
    }

    /// Stores these bytes beside the token, for [`Locker::inspect`] to return: for example, who holds the lock, and
    /// why.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").metadata("host-3").await?;
    /// let holder = locker.inspect("k").await?;
    /// assert_eq!(holder.map(|holder| holder.metadata), Some(b"host-3".to_vec()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn metadata(mut self, metadata: impl Into<Vec<u8>>) -> Self {
        self.options.metadata = metadata.into();
        self
    }

    /// Obtains the lock for this token. If the token holds the lock already, the request succeeds at once and renews
    /// it. Default: a new [random](Token::random) token.
    ///
    /// Several guards may hold the lock by one token. A guard that is dropped or expires is released in the background,
    /// without ending the others. An explicit [`release`](LockGuard::release) of any of them ends the lock for all,
    /// unless the outcome of its first call is unknown ([details](LockGuard::release)). A holder that died counts until
    /// its own ttl has passed: if its token is used again before that, the key stays for that long after a drop.
    ///
    /// To use the token of a guard once more, ask the guard for it ([`LockGuard::token`]). A guard whose token nobody has
    /// asked it for takes the key for its own while that holds the token. If its lock is ended, and obtained again by a
    /// token that was read from the server ([`Locker::inspect`]), it learns of that when the other guard has gone, and
    /// may be late by the time between two renewals.
    ///
    /// The guards of a [reader](Locker::read), or of a [permit](Locker::permit), have a share of the key each. If the
    /// server no longer has the share of a guard that is released explicitly, the release ends the other shares of the
    /// token all the same, and returns [`Error::NotHeld`] with
    /// [`Loss::Missing`](crate::Loss::Missing).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let first = locker.obtain("k").token("worker-7".parse()?).await?;
    /// let again = locker.obtain("k").token("worker-7".parse()?).await?;
    /// assert_eq!(first.fencing_token(), again.fencing_token());
    /// # Ok(())
    /// # }
    /// ```
    pub fn token(mut self, token: Token) -> Self {
        self.options.token = Some(token);
        self
    }

    /// Sets the time between renewals: at least 1 ms, and shorter than the ttl less drift. A time longer than half of
    /// the ttl counts as half of it. Default: the locker's, or a third of the ttl.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let request = locker.lock("k").ttl(Duration::from_secs(60));
    /// let guard = request.renew_every(Duration::from_secs(5)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn renew_every(mut self, interval: Duration) -> Self {
        self.options.renewal = Renewal::Every(interval);
        self
    }

    /// Turns renewals off: the lock expires when its ttl ends, and the guard reports [`Loss::Expired`](crate::Loss).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").ttl(Duration::from_secs(1)).no_renewal().await?;
    /// assert_eq!(guard.lost().await, tenure::Loss::Expired);
    /// # Ok(())
    /// # }
    /// ```
    pub fn no_renewal(mut self) -> Self {
        self.options.renewal = Renewal::Never;
        self
    }

    /// Sets whether the guard has a [fencing token](LockGuard::fencing_token). Default: the locker's, true.
    ///
    /// If a random [token](LockGuard::token) first obtained the lock unfenced and then obtains it fenced, the guard
    /// gets the previous holder's fencing token. A lock whose token was [chosen](LockRequest::token) always gets a
    /// fencing token of its own.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// assert_eq!(locker.lock("k").fenced(false).await?.fencing_token(), None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fenced(mut self, fenced: bool) -> Self {
        self.options.fenced = fenced;
        self
    }

    /// Sets whether the request has its own place in the line for the lock. Default: false.
    ///
    /// The plain requests of one process share a place in the line, and a process that has the lock may serve several
    /// of them in a row ([turns](crate::Locker::lock)). Fair requests have one place and one turn each, in order of
    /// arrival across all processes. Each takes about one call more. A fair request that doesn't wait
    /// ([`try_lock`](crate::Locker::try_lock)) is refused while others are in the line.
    ///
    /// Plain and fair requests for one key wait in the same line. For several keys, in a quorum, and on the embedded
    /// store this setting has no effect.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// # let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("printer").fair(true).await?;
    /// # guard.release().await
    /// # }
    /// ```
    pub fn fair(mut self, fair: bool) -> Self {
        self.options.fair = fair;
        self
    }

    /// Keeps the key taken until this time has passed since the lock was obtained, even if the guard is released or
    /// dropped before. Default: no time; at most 365 days.
    ///
    /// Use it for a job that runs once per period in a fleet: the machines' clocks disagree, and a late machine must
    /// not find the lock free because the job took only a moment. Choose a minimum longer than the difference between
    /// the clocks, and shorter than the period.
    ///
    /// A release returns at once, and the key stays taken without a holder for exactly the rest of the minimum: no
    /// token can obtain it, not even the guard's, and [`inspect`](Locker::inspect) finds no holder. Waiters are
    /// notified, so that they ask again when it ends. The lock isn't handed over within the process before that either.
    ///
    /// The rest may be longer than the ttl. Before the release, only the ttl protects the key: if this process dies, or
    /// is cut off until the lock has [expired](crate::Loss::Expired), the key is free when its last confirmed ttl ends.
    /// It is not freed before that, unless the minimum has passed. To cover the whole minimum, use a
    /// [ttl](LockRequest::ttl) that is as long.
    ///
    /// - With [`hold_at_most`](LockRequest::hold_at_most), the key stays taken after the end at the limit, too.
    /// - A [reader](Locker::read)'s share is left to nobody, too: others may read meanwhile, and nobody writes. A
    ///   [permit](Locker::permit) still counts as taken.
    /// - If several guards hold the lock by one [token](LockRequest::token), the key is left to nobody when the last of
    ///   them is dropped. An explicit [`release`](LockGuard::release) of one without a minimum ends the lock for all,
    ///   at once.
    /// - If one of several keys is lost, the others stay taken for the rest of the time.
    /// - A [lease](LockGuard::into_lease) has no minimum: who adopts it may release it at once.
    /// - In a [quorum](Locker::quorum), a node that is restarted forgets the time, as it forgets locks.
    /// - A server that is out of memory can't replace the token: the key stays taken by it for the rest of the time. So
    ///   [`inspect`](Locker::inspect) returns a holder, and a [chosen token](LockRequest::token) can get the lock
    ///   again.
    ///
    /// ```
    /// # async fn send_report() {}
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// // On every machine, on the hour, by its own clock.
    /// let hourly = || locker.try_lock("hourly-report").hold_at_least(Duration::from_secs(600));
    /// match hourly().await {
    ///     Ok(guard) => {
    ///         guard.protect(send_report()).await?;
    ///         guard.release().await?;
    ///     }
    ///     Err(Error::NotObtained { .. }) => {} // another machine has sent it, or is about to
    ///     Err(error) => return Err(error),
    /// }
    /// // The clock of another machine is a minute behind.
    /// tokio::time::sleep(Duration::from_secs(60)).await;
    /// assert!(matches!(hourly().await, Err(Error::NotObtained { .. })));
    /// # Ok(())
    /// # }
    /// ```
    pub fn hold_at_least(mut self, time: Duration) -> Self {
        self.options.bounds.at_least = time;
        self
    }

    /// Limits how long the lock is held: it isn't renewed beyond this time, counted from the request that obtained it.
    /// The guard then reports [`Loss::LimitReached`](crate::Loss::LimitReached), and the lock is released in the
    /// background. Any time from 4 ms (with the default drift) on; default: no limit.
    ///
    /// Use it for work that may hang: nobody waits for the lock for longer than this, even while the process that holds
    /// it goes on renewing it. As ever, the guard can't stop work that never checks it.
    ///
    /// The key's ttl is cut so that it ends at the limit. The guard's [deadline](LockGuard::deadline) lies before that
    /// by the allowance for clock drift, so it is a little earlier than the limit: by 2 ms, and by 1 % of what was left
    /// at the last renewal. [`renew_for`](LockGuard::renew_for) and [`ensure`](LockGuard::ensure) can't move it
    /// further. With a longer [`hold_at_least`](LockRequest::hold_at_least), the ttl may go on until that is over, and
    /// the deadline is the limit itself.
    ///
    /// The limit is the guard's. It does not go along with a [lease](LockGuard::into_lease), which has no more of the
    /// lock than what is left of the ttl: who adopts the lease renews it without a limit.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::{Locker, Loss};
    ///
    /// let locker = Locker::in_memory();
    /// let guard = locker.lock("import").hold_at_most(Duration::from_secs(600)).await?;
    /// let hangs = guard.protect(std::future::pending::<()>());
    /// assert_eq!(hangs.await, Err(Loss::LimitReached));
    /// let next = locker.lock("import").await?;
    /// # next.release().await
    /// # }
    /// ```
    pub fn hold_at_most(mut self, limit: Duration) -> Self {
        self.options.bounds.at_most = Some(limit);
        self
    }

    /// Runs `body` under the lock: obtains it as requested, runs the body for as long as it is held, and releases it.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the lock is lost while the body runs; the body is then dropped, wherever it was. Also if the
    /// release finds that the lock was lost; then the body has finished, and its output is discarded. Any error of the
    /// request. If the body is done and only the release could not be confirmed, `scope` returns its output: the
    /// release goes on in the background.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body and releases the lock in the background.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let nightly = || locker.try_lock("nightly").ttl(Duration::from_secs(10)).metadata("host-3");
    /// let sum = nightly().scope(async |guard| {
    ///     assert!(guard.is_held());
    ///     // Not held twice.
    ///     assert!(matches!(nightly().scope(async |_| ()).await, Err(Error::NotObtained { .. })));
    ///     40 + 2
    /// });
    /// assert_eq!(sum.await?, 42);
    /// assert_eq!(locker.inspect("nightly").await?, None);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn scope<T>(self, body: impl AsyncFnOnce(&LockGuard) -> T) -> Result<T, Error> {
        let guard = self.await?;
        let output = guard.protect(body(&guard)).await?;
        match guard.release().await {
            Err(Error::NotHeld { loss, .. }) => Err(Error::Lost(loss)),
            Ok(()) | Err(_) => Ok(output),
        }
    }

    pub(crate) fn renewal(mut self, renewal: Renewal) -> Self {
        self.options.renewal = renewal;
        self
    }
}

impl fmt::Debug for LockRequest {
    /// Shows the length of the metadata, and hides the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockRequest")
            .field("store", &self.options.shared.store)
            .field("keys", &self.options.keys)
            .field("when_refused", &self.options.when_refused)
            .field("wait_at_most", &self.options.wait_at_most)
            .field("ttl", &self.options.ttl)
            .field("renewal", &self.options.renewal)
            .field("bounds", &self.options.bounds)
            .field("metadata", &format_args!("{} bytes", self.options.metadata.len()))
            .field("token", &self.options.token)
            .field("fenced", &self.options.fenced)
            .field("fair", &self.options.fair)
            .field("mode", &self.options.mode)
            .field("limit", &self.options.limit)
            .finish()
    }
}

impl IntoFuture for LockRequest {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Obtaining;

    fn into_future(mut self) -> Obtaining {
        self.options.caller = Span::current();
        let keys = Keys(&self.options.keys);
        let span = info_span!("tenure.obtain", key = %keys, ttl = ?self.options.ttl);
        Obtaining(Box::pin(self.options.obtain().instrument(span)))
    }
}

/// The keys of a request, as its span shows them.
struct Keys<'a>(&'a [Key]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        self.0.iter().try_for_each(|key| write!(f, "{}{key}", std::mem::replace(&mut separator, ", ")))
    }
}

/// The future of a [`LockRequest`], which obtains the lock.
///
/// # Cancel safety
///
/// It may be dropped at any time; see [`LockRequest`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::future::IntoFuture;
///
/// let locker = tenure::Locker::in_memory();
/// let waiting = tokio::spawn(locker.lock("k").into_future());
/// let guard = waiting.await??;
/// # Ok(())
/// # }
/// ```
#[must_use = "futures do nothing unless polled"]
pub struct Obtaining(Pin<Box<dyn Future<Output = Result<LockGuard, Error>> + Send>>);

impl Future for Obtaining {
    type Output = Result<LockGuard, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Obtaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Obtaining").finish_non_exhaustive()
    }
}
