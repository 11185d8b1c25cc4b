//! The guard: a held lock as a value that releases it when dropped.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::hold::scheduler::Handle;
use crate::hold::{FinalStep, Hold, Owned};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::loss::{Lost, Protected};
use crate::metrics::Held;
use crate::mode::{Mode, NO_READERS};
use crate::report::debug;
use crate::store::{Downgraded, Ending, Verdict};
use crate::{Error, Key, Lease, Loss, Token};

/// A held lock: renewed in the background until it is released, dropped or lost.
///
/// Created by awaiting a [`LockRequest`](crate::LockRequest). A guard counts as held until its
/// [`deadline`](LockGuard::deadline). Only a confirmed renewal moves the deadline, and it always lies before the moment
/// at which the server frees the lock. [`is_held`](LockGuard::is_held), [`check`](LockGuard::check),
/// [`lost`](LockGuard::lost) and [`protect`](LockGuard::protect) read that one deadline themselves, on whatever runtime
/// they are used; [`cancellation_token`](LockGuard::cancellation_token) depends on a task that runs.
///
/// # Dropping
///
/// Dropping a guard releases the lock in the background, on the runtime that it was obtained on, whatever thread it is
/// dropped on. The release is not immediate: call [`release`](LockGuard::release) to wait for it and to get its result.
/// While the server can't be reached, the release is tried again until the ttl has freed the lock. If the runtime has
/// ended, the lock stays until its ttl ends.
///
/// # Sharing
///
/// The guard of a [reader](crate::Locker::read) or of a [permit](crate::Locker::permit) holds a share of the key, which
/// others hold at the same time. What is said of the lock is true of that share: it is renewed, lost and released by
/// itself. [`downgrade`](LockGuard::downgrade) turns a lock into a reader's share.
///
/// # What it does not do
///
/// A guard can't stop work that never checks it: code that runs on without an `.await`, or a request that was already
/// sent to another system. If a late write would do harm, send the [`fencing_token`](LockGuard::fencing_token) along
/// and let the receiver refuse lower ones
/// (<https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html>). A guard is not re-entrant either: a
/// task that requests a lock that it holds waits for itself.
///
/// # Examples
///
/// ```
/// # async fn rebuild_invoices() -> std::io::Result<()> { Ok(()) }
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tenure::Locker;
///
/// let locker = Locker::in_memory();
/// let guard = locker.lock("invoices:42").await?;
/// tokio::select! {
///     done = rebuild_invoices() => done?,
///     loss = guard.lost() => return Err(loss.into()),
/// }
/// guard.release().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "the lock is released as soon as its guard is dropped"]
pub struct LockGuard {
    hold: Arc<Hold>,
    shared: Arc<Shared>,
    /// Calls the renewer.
    renewer: Handle,
}

impl LockGuard {
    /// Creates the guard of a lock that was just obtained or adopted. The renewer starts with it.
    pub(crate) fn start(hold: Hold, shared: &Arc<Shared>, runtime: &Runtime) -> Self {
        hold.count(Held::begin(&shared.settings.metrics, &hold.owned.keys));
        let hold = Arc::new(hold);
        #[cfg(test)]
        crate::simulation::born(&hold, Arc::as_ptr(shared) as usize);
        let renewer = shared.keep(hold.clone(), runtime);
        Self { hold, shared: shared.clone(), renewer }
    }

    /// Returns the key that is locked. If there are several, the first of them.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// assert_eq!(guard.key().as_bytes(), b"k");
    /// # Ok(())
    /// # }
    /// ```
    pub fn key(&self) -> &Key {
        // A request without a key is refused, so there is a first key, but the type doesn't say so.
        static NONE: std::sync::LazyLock<Key> = std::sync::LazyLock::new(|| Key::from(""));
        self.keys().first().unwrap_or(&NONE)
    }

    /// Returns all keys that are locked.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// assert_eq!(guard.keys(), [tenure::Key::from("k")]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn keys(&self) -> &[Key] {
        &self.hold.owned.keys
    }

    /// Returns the token that the server stores at the key: the secret of this holder.
    ///
    /// A guard whose token was read is not [handed over](crate::LockerBuilder::local_hand_over) within the process, as
    /// its token could be used elsewhere. Its release and its renewals are calls of their own.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").token("worker-7".parse()?).await?;
    /// assert_eq!(guard.token().as_str(), "worker-7");
    /// # Ok(())
    /// # }
    /// ```
    pub fn token(&self) -> &Token {
        self.hold.token()
    }

    /// Returns the metadata that was stored beside the token. Empty if there is none.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").metadata("host-3").await?;
    /// assert_eq!(guard.metadata(), b"host-3");
    /// # Ok(())
    /// # }
    /// ```
    pub fn metadata(&self) -> &[u8] {
        &self.hold.metadata
    }

    /// Returns the fencing token: a number that is greater than those of all earlier holders of the lock, with [one
    /// exception](crate::LockRequest::fenced) where some requests are not fenced. `None` if the request was not
    /// [`fenced`](crate::LockRequest::fenced).
    ///
    /// Send it along with every write to a store that can refuse lower ones. Then even a holder that was stopped in the
    /// middle of a write, and goes on after another has obtained the lock, does no harm. On one server, the number is
    /// the larger of the last one plus one and the server's time in microseconds. So it also grows when the server has
    /// lost its data, as long as its clock goes on. On a quorum, the nodes [agree on it by
    /// ballot](crate::Locker::quorum). It never changes during the life of a guard.
    ///
    /// The numbers are not consecutive: a process may [get some to spare](crate::Holder::fencing_token).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let first = locker.lock("k").await?.fencing_token();
    /// let second = locker.lock("k").await?.fencing_token();
    /// assert!(second > first);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fencing_token(&self) -> Option<u64> {
        self.hold.fencing_token
    }

    /// Returns how long the server keeps the lock after each renewal, in whole milliseconds.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let guard = tenure::Locker::in_memory().lock("k").ttl(Duration::from_secs(9)).await?;
    /// assert_eq!(guard.ttl(), Duration::from_secs(9));
    /// # Ok(())
    /// # }
    /// ```
    pub fn ttl(&self) -> Duration {
        self.hold.ttl()
    }

    /// Returns the instant until which the lock counts as held if no further renewal succeeds.
    ///
    /// `instant just before the last confirmed request was sent + ttl - drift`, on the monotonic clock. That clock
    /// stands still while the whole machine is suspended. On Linux and Android, this deadline is that much earlier once
    /// the machine is awake again; Windows' clock counts the time by itself. On other systems, as on macOS, the time of
    /// a suspension isn't counted.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let sent = tokio::time::Instant::now();
    /// let guard = tenure::Locker::in_memory().lock("k").ttl(Duration::from_secs(10)).await?;
    /// // Drift: 1 % of the ttl and 2 ms.
    /// assert_eq!(guard.deadline() - sent, Duration::from_millis(10_000 - 100 - 2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(&self) -> Instant {
        self.hold.deadline()
    }

    /// Returns the time left until the [`deadline`](LockGuard::deadline). Zero if the lock is no longer held.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// assert!(guard.remaining() > guard.ttl() / 2);
    /// # Ok(())
    /// # }
    /// ```
    pub fn remaining(&self) -> Duration {
        match self.check() {
            Ok(()) => self.deadline().saturating_duration_since(Instant::now()),
            Err(_) => Duration::ZERO,
        }
    }

    /// Returns whether the lock is held now.
    ///
    /// Reads the clock, so the result is right even if the runtime was blocked, the process stopped, or the machine
    /// suspended (see [`deadline`](LockGuard::deadline)). Once false, it stays false.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// assert!(guard.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_held(&self) -> bool {
        self.check().is_ok()
    }

    /// Like [`is_held`](LockGuard::is_held), but returns a result: for `?` between the steps of work that can't be
    /// dropped.
    ///
    /// # Errors
    ///
    /// The [`Loss`], if the lock is no longer held.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// for _step in 0..3 {
    ///     guard.check()?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn check(&self) -> Result<(), Loss> {
        self.hold.check()
    }

    /// Returns why the latest renewal failed, in the background or by a call of this guard, if none has succeeded
    /// since. If the lock [expired](Loss::Expired), this error led to it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// if let (Err(loss), Some(error)) = (guard.check(), guard.last_error()) {
    ///     eprintln!("{loss}, as renewals failed: {error}");
    /// }
    /// # assert!(guard.last_error().is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn last_error(&self) -> Option<Arc<Error>> {
        self.hold.last_error()
    }

    /// Waits until the lock is no longer held, and returns the reason. The future may outlast the guard; it then
    /// returns [`Loss::Released`].
    ///
    /// It watches the deadline itself, on the runtime that polls it. So it is on time even if the runtime that the lock
    /// was obtained on is blocked or not driven.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped and created again at any time; no loss is missed.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::Loss;
    ///
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// let lost = guard.lost();
    /// drop(guard);
    /// assert_eq!(lost.await, Loss::Released);
    /// # Ok(())
    /// # }
    /// ```
    pub fn lost(&self) -> Lost {
        Lost::new(self.hold.clone())
    }

    /// Returns a token that fires when the lock is no longer held: lost, released or dropped. For code that already
    /// takes such a token.
    ///
    /// A task on the runtime that the lock was obtained on fires it at the deadline. While that runtime is blocked or
    /// not driven, the token is late: its `is_cancelled` doesn't read the clock, and returns false after the deadline.
    /// [`is_held`](LockGuard::is_held), [`check`](LockGuard::check), [`lost`](LockGuard::lost) and
    /// [`protect`](LockGuard::protect) read the clock themselves; any of them that finds the deadline passed fires the
    /// token, too.
    ///
    /// Cancelling the token, or a child of it, does nothing to the lock.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// let over = guard.cancellation_token();
    /// assert!(!over.is_cancelled());
    /// drop(guard);
    /// assert!(over.is_cancelled());
    /// # Ok(())
    /// # }
    /// ```
    pub fn cancellation_token(&self) -> CancellationToken {
        self.hold.over().child_token()
    }

    /// Runs `work` for as long as the lock is held. On a loss, drops the work at once and returns the loss, even if the
    /// work has become ready at the same time. Like [`lost`](LockGuard::lost), the future watches the deadline on the
    /// runtime that polls it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops the work and leaves the lock held.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// let answer = guard.protect(async { 6 * 7 }).await?;
    /// assert_eq!(answer, 42);
    /// # Ok(())
    /// # }
    /// ```
    pub fn protect<F: Future>(&self, work: F) -> Protected<F> {
        Protected::new(self.hold.clone(), work)
    }

    /// Renews the lock now, for its ttl. Seldom needed, as locks are renewed in the background.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if the lock was lost before, or the server says so now. [`Error::Redis`] if the server could
    /// not be asked; the lock may still be held, until its deadline. [`Error::NotReplicated`] if too few
    /// [replicas](crate::LockerBuilder::min_replicas) confirmed the renewal. [`Error::NoRuntime`] outside a tokio
    /// runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the lock held. The renewal may have taken effect at the server.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let guard = tenure::Locker::in_memory().lock("k").no_renewal().await?;
    /// tokio::time::advance(Duration::from_secs(20)).await;
    /// guard.renew().await?;
    /// assert!(guard.remaining() > Duration::from_secs(29));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn renew(&self) -> Result<(), Error> {
        self.send_renewal(None, false).await
    }

    /// Sets the ttl for now and for all later renewals, shorter or longer than before. The deadline follows.
    ///
    /// A shorter ttl counts from the moment of the call, even if the server can't be asked.
    ///
    /// A lock with a [limit](crate::LockRequest::hold_at_most) is held until then at most, whatever its ttl.
    ///
    /// While the outcome of such a call is unknown, the server may still set this ttl: until then, for up to twice the
    /// [command timeout](crate::LockerBuilder::command_timeout), later renewals move the deadline by this ttl at most.
    ///
    /// # Errors
    ///
    /// Those of [`renew`](LockGuard::renew), and [`Error::InvalidTtl`] for a ttl that can't work; then nothing is
    /// changed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the lock held. The new ttl may have taken effect at the server.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// guard.renew_for(Duration::from_secs(2)).await?;
    /// assert!(guard.remaining() < Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn renew_for(&self, ttl: Duration) -> Result<(), Error> {
        let ttl = self.hold.drift().validate(ttl)?;
        self.send_renewal(Some(ttl), true).await
    }

    /// The former name of [`renew`](LockGuard::renew); to be removed before the first release.
    #[doc(hidden)]
    pub async fn refresh(&self) -> Result<(), Error> {
        self.renew().await
    }

    /// The former name of [`renew_for`](LockGuard::renew_for); to be removed before the first release.
    #[doc(hidden)]
    pub async fn refresh_for(&self, ttl: Duration) -> Result<(), Error> {
        self.renew_for(ttl).await
    }

    /// Makes sure that the server will keep the lock for at least this long from now; never makes it shorter. A lock
    /// with a [limit](crate::LockRequest::hold_at_most) is kept until then at most.
    ///
    /// # Errors
    ///
    /// Those of [`renew_for`](LockGuard::renew_for).
    ///
    /// # Cancel safety
    ///
    /// As [`renew`](LockGuard::renew).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// guard.ensure(Duration::from_secs(1)).await?;
    /// assert!(guard.remaining() > Duration::from_secs(28));
    /// guard.ensure(Duration::from_secs(300)).await?;
    /// assert!(guard.remaining() > Duration::from_secs(290));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn ensure(&self, at_least: Duration) -> Result<(), Error> {
        let at_least = self.hold.drift().validate(at_least)?;
        self.send_renewal(Some(at_least), false).await
    }

    /// Asks the server how long it will keep the lock unless it is renewed. Returns `None` if the server no longer has
    /// it, and [`Duration::MAX`] if somebody has removed the ttl of the key.
    ///
    /// This only observes: the guard does not change.
    ///
    /// # Errors
    ///
    /// [`Error::Redis`] if the server could not be asked. [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time: it only reads.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let guard = tenure::Locker::in_memory().lock("k").await?;
    /// assert!(guard.server_ttl().await?.is_some_and(|ttl| ttl <= guard.ttl()));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn server_ttl(&self) -> Result<Option<Duration>, Error> {
        Shared::check_runtime()?;
        self.shared.store.remaining(&self.hold.owned, self.shared.command_timeout).await
    }

    /// Releases the lock and waits for the server to confirm it. Futures and tokens of this guard fire first. With
    /// [`hold_at_least`](crate::LockRequest::hold_at_least), the key stays taken for the rest of that time.
    ///
    /// If several guards hold the lock by one [token](crate::LockRequest::token), the release ends the lock for all of
    /// them. If the outcome of its first call is unknown, because the reply was lost or late, the release is tried
    /// again, and these tries end only this guard's own hold. Then whatever the server replies counts as success, since
    /// the first call may have freed the lock. So after a lost reply, `Ok(())` doesn't prove that the lock was still
    /// held, nor that other guards of the token no longer hold it.
    ///
    /// A release of a token that others may use (a chosen one, one that was [read](Self::token), or that of an adopted
    /// lease) ends nothing that is obtained after it has returned. So if the outcome of its first call is unknown,
    /// which has a third of the [command timeout](crate::LockerBuilder::command_timeout), the release goes on when the
    /// server can no longer run that. On a [quorum](crate::Locker::quorum), it returns when every node has replied, or
    /// can no longer run it; if a node is silent, that takes about 1.8 s with the default command timeout. Other
    /// releases return as soon as a majority has replied.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if the lock was lost before, or the server says so now: another may have held it in the
    /// meantime. [`Error::Redis`] if the server could not be asked within the command timeout; then the release is
    /// tried again in the background until the ttl has freed the lock. [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// The server is not asked if the lock is [handed over in this
    /// process](crate::LockerBuilder::local_hand_over). A loss that only the server knows of is then found by the next
    /// renewal, or the next release that asks.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the lock is released in the background. What it has sent may be run for up to the
    /// [command timeout](crate::LockerBuilder::command_timeout). Of a token that others may use, that would end what
    /// the token obtains meanwhile. So this locker sends requests for the keys by that token only after that,
    /// `try_lock` and [`adopt`](crate::Locker::adopt) too.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").await?;
    /// guard.release().await?;
    /// assert_eq!(locker.inspect("k").await?, None);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn release(self) -> Result<(), Error> {
        if self.shared.hand_over_here(&self.hold) {
            return Ok(());
        }
        // From here on, dropping `self` makes the renewer release the lock, unless another final step is set below.
        match self.hold.end(Loss::Released) {
            Loss::Released => {}
            loss => return Err(self.not_held(loss)),
        }
        // A renewal that is on its way is given up.
        self.renewer.interrupt();
        let until = Instant::now() + self.shared.command_timeout;
        let owned = self.hold.owned_by_all();
        self.hold.begin_release();
        let released = self.shared.release(&owned, Ending::Lock, self.hold.stays_until(), until).await?;
        self.hold.set_final_step(self.after_release());
        match released.verdict {
            Verdict::Done => {
                debug!(name: "tenure.released", key = %self.key(), "released");
                Ok(())
            }
            Verdict::NotOurs(loss) => {
                if released.at_once {
                    self.hold.report_lost_before_release(loss);
                }
                Err(self.not_held(loss))
            }
        }
    }

    /// Turns the lock into a [reader](crate::Locker::read)'s share, in one step: no other writer gets in between.
    ///
    /// The returned guard has the token, the fencing token, the metadata and the bounds of this one, and is held for as
    /// long as this one would have been. Readers that wait are admitted, unless a writer waits before them. Futures and
    /// tokens of this guard fire when the server is asked, with [`Loss::Released`]: from then on, readers may share
    /// the key. A reader's guard is returned as it is.
    ///
    /// There is no way back: two readers that both waited to become the writer would wait for each other. Release the
    /// guard and [`lock`](crate::Locker::lock) the key; another writer may come first, so read again what you have
    /// read.
    ///
    /// # Errors
    ///
    /// In each case the guard is gone, and what it held is released in the background.
    ///
    /// - [`Error::NotHeld`]: the lock was lost before, or the server says so now.
    /// - [`Error::Unsupported`]: the lock has several keys, or is a permit; others hold it by the same
    ///   [token](crate::LockRequest::token), or it has to stay taken for one of them; or the store has no readers.
    /// - [`Error::Redis`]: the server could not be asked within the command timeout.
    /// - [`Error::NoRuntime`]: the caller is outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the lock is released in the background, whatever it is by then.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let writer = locker.lock("prices").await?;
    /// // ... write, and then go on reading what was written ...
    /// let reader = writer.downgrade().await?;
    /// let another = locker.try_read("prices").await?;
    /// assert!(reader.is_held() && another.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn downgrade(self) -> Result<Self, Error> {
        let Owned { keys, mode, .. } = &self.hold.owned;
        match mode {
            Mode::Read => return Ok(self),
            Mode::Permit => return Err(Error::Unsupported("a permit can't be turned into a reader's share")),
            Mode::Exclusive if keys.len() > 1 => {
                return Err(Error::Unsupported("a lock of several keys can't be turned into a reader's share"));
            }
            Mode::Exclusive => {}
        }
        if !self.shared.store.capabilities().has_readers {
            return Err(Error::Unsupported(NO_READERS));
        }
        Shared::check_runtime()?;
        let runtime = self.shared.runtime()?;
        // From here on, dropping `self` makes the renewer release the lock, whatever it is at the server.
        self.hold.begin_downgrade().map_err(|loss| self.not_held(loss))?;
        // A renewal that is on its way is given up.
        self.renewer.interrupt();
        match self.shared.downgrade(&self.hold).await? {
            Downgraded::Done => {}
            Downgraded::NotOurs(loss) => return Err(self.not_held(loss)),
            Downgraded::NotNow => {
                return Err(Error::Unsupported("others hold the lock by the same token, or it has to stay taken"));
            }
        }
        let hold = self.hold.downgraded().map_err(|loss| self.not_held(loss))?;
        let reader = Self::start(hold, &self.shared, &runtime);
        // What requests of unknown outcome may still leave is the lock's.
        self.hold.set_final_step(self.after_release());
        self.shared.queues.ask_again(self.key());
        debug!(name: "tenure.downgraded", key = %self.key(), "downgraded");
        Ok(reader)
    }

    /// Returns what is left to do when the lock is released.
    fn after_release(&self) -> FinalStep {
        match self.hold.has_late_requests() {
            true => FinalStep::Undo(self.shared.cleanups.register(Cleanup::UndoAttempt(self.hold.clone()))),
            false => FinalStep::Nothing,
        }
    }

    /// Stops the renewal and keeps the lock. The lease can be stored or passed on, and
    /// [`Locker::adopt`](crate::Locker::adopt) takes the lock up again, here or in another process, before its ttl
    /// ends.
    ///
    /// Futures of this guard return [`Loss::Released`], as it no longer holds the lock. A guard that has lost its lock
    /// returns a lease too; adopting it fails. The bounds of the request
    /// ([`hold_at_least`](crate::LockRequest::hold_at_least), [`hold_at_most`](crate::LockRequest::hold_at_most)) end
    /// with the guard: a lease has none.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let text = locker.lock("k").await?.into_lease().to_string();
    /// // ... through an environment variable, say ...
    /// let guard = locker.adopt(text.parse()?).await?;
    /// assert!(guard.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_lease(self) -> Lease {
        // Before the end, so that nobody finds a lock that has ended and is to be released.
        self.hold.set_final_step(FinalStep::Nothing);
        self.hold.end(Loss::Released);
        Lease::from_parts(self.hold.owned.clone(), self.ttl(), self.fencing_token())
    }

    /// Like [`into_lease`](LockGuard::into_lease), but fails if the lock is no longer held; what is left of it is
    /// cleaned up.
    pub(crate) fn into_held_lease(self) -> Result<Lease, Loss> {
        self.check()?;
        // In this order, as in `into_lease`.
        self.hold.set_final_step(FinalStep::Nothing);
        match self.hold.end(Loss::Released) {
            Loss::Released => Ok(Lease::from_parts(self.hold.owned.clone(), self.ttl(), self.fencing_token())),
            loss => Err(loss),
        }
    }

    pub(crate) fn hold(&self) -> Arc<Hold> {
        self.hold.clone()
    }

    async fn send_renewal(&self, ttl: Option<Duration>, exact: bool) -> Result<(), Error> {
        self.check().map_err(|loss| self.not_held(loss))?;
        // Before anything is changed.
        Shared::check_runtime()?;
        let renewing = match ttl {
            Some(ttl) if exact => {
                let renewing = self.hold.setting_ttl(ttl, self.shared.may_run_for());
                // With a shorter ttl, the next renewal may be due sooner.
                self.renewer.call();
                renewing
            }
            ttl => self.hold.renewing(ttl, self.shared.may_run_for()),
        };
        let renewed = self.shared.renew(&self.hold, renewing).await;
        match renewed.inspect_err(|error| self.hold.failed(&Arc::new(error.clone())))? {
            Verdict::Done => {
                if exact {
                    // A renewal that is on its way, or is to be tried again, is for the ttl before.
                    self.renewer.interrupt();
                }
                Ok(())
            }
            Verdict::NotOurs(loss) => {
                // The renewer does what is left to do.
                self.renewer.call();
                Err(self.not_held(loss))
            }
        }
    }

    fn not_held(&self, loss: Loss) -> Error {
        Error::NotHeld { key: self.key().clone(), loss }
    }
}

impl Drop for LockGuard {
    /// Hands the lock over to a waiter of this process, or calls the renewer: nothing here blocks or panics. The only
    /// task that this may start is the supervisor of the waiters.
    fn drop(&mut self) {
        if self.shared.hand_over_here(&self.hold) {
            return self.renewer.remove();
        }
        self.hold.end(Loss::Released);
        if self.hold.nothing_left() {
            return self.renewer.remove();
        }
        let pending = self.shared.cleanups.register(Cleanup::Release(self.hold.clone()));
        match self.hold.set_final_step(FinalStep::Release(Some(pending))) {
            true => self.renewer.call(),
            false => self.renewer.remove(),
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("keys", &self.keys())
            .field("fencing_token", &self.fencing_token())
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}
