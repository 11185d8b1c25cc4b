//! What a user holds: a lock, as a value that releases it when dropped.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::hold::renewer::Renewer;
use crate::hold::scheduler::ScheduleHandle;
use crate::hold::{FinalStep, Hold};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::loss::{Lost, Protected};
use crate::store::{Ending, Verdict};
use crate::{Error, Key, Lease, Loss, Token};

/// A held lock: renewed in the background until it is released, dropped or lost.
///
/// Made by awaiting a [`LockRequest`](crate::LockRequest). A guard never believes longer than the server: it counts as
/// held until its [`deadline`](LockGuard::deadline), which only a confirmed renewal moves, and which lies before the
/// moment at which the server lets go. [`is_held`](LockGuard::is_held), [`check`](LockGuard::check),
/// [`lost`](LockGuard::lost) and [`protect`](LockGuard::protect) read that one deadline themselves, on whatever runtime
/// they are used; [`cancellation_token`](LockGuard::cancellation_token) depends on a task that runs.
///
/// # Dropping
///
/// Dropping a guard releases the lock in the background, on the runtime that it was obtained on, whatever thread it is
/// dropped on. The release is not immediate: [`release`](LockGuard::release) waits for it and tells how it went. Where
/// the server can't be asked, it is tried until the ttl has freed the lock; with the runtime gone, the ttl alone does.
///
/// # What it does not do
///
/// It can't stop work that never looks: code that runs on without an `.await`, or a request that has left for a third
/// system. Where a late write does harm, send the [`fencing_token`](LockGuard::fencing_token) along and let the
/// receiver refuse lower ones (<https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html>). It is
/// not re-entrant either: a task that asks for a lock that it holds waits for itself.
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
    /// Where the renewer stands when it has nothing to do.
    place: ScheduleHandle<Renewer>,
}

impl LockGuard {
    /// A lock that was just obtained or adopted: from here on its renewer sees to it.
    pub(crate) fn start(hold: Hold, shared: &Arc<Shared>, runtime: &Handle) -> Self {
        let hold = Arc::new(hold);
        #[cfg(test)]
        crate::simulation::born(&hold, Arc::as_ptr(shared) as usize);
        let place = shared.keep(hold.clone(), runtime);
        Self { hold, shared: shared.clone(), place }
    }

    /// The key that is locked; of several, the first.
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
        // A request without a key is refused, so there is a first; the empty slice is only what the type can't say.
        static NONE: std::sync::LazyLock<Key> = std::sync::LazyLock::new(|| Key::from(""));
        self.keys().first().unwrap_or(&NONE)
    }

    /// All keys that are locked.
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

    /// The token that the server stores at the key: this owner's secret.
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
        &self.hold.owned.token
    }

    /// What was stored beside the token; empty where nothing.
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

    /// A number that is greater than those of all earlier holders of the lock, unless the request was not
    /// [`fenced`](crate::LockRequest::fenced).
    ///
    /// Send it along with every write to a store that can refuse lower ones: then even a holder that was stopped in the
    /// middle of a write, and woke up after its lock had passed on, does no harm. It is the larger of the last one plus
    /// one and the server's time in microseconds, so it also grows when the server has lost its memory, as long as its
    /// clock goes on. It never changes during the life of a guard.
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

    /// For how long the server keeps the lock after each renewal. Whole milliseconds.
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

    /// Until when the lock is surely held if no further renewal succeeds.
    ///
    /// `instant just before the last confirmed request was sent + ttl - drift`, on the monotonic clock. That clock
    /// stands still while the whole machine is suspended, and so does this deadline.
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

    /// How much time is left until the [`deadline`](LockGuard::deadline); zero when the lock is held no more.
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

    /// Whether the lock is held now.
    ///
    /// Reads the clock, so it is right even when the runtime has been blocked or the process stopped. Once false it
    /// stays false.
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

    /// Like [`is_held`](LockGuard::is_held), as a result: for `?` between the steps of work that can't be dropped.
    ///
    /// # Errors
    ///
    /// How the lock was lost.
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

    /// Returns why the latest renewal failed, if none has succeeded since: in the background or by a call of this
    /// guard. Where the lock [expired](Loss::Expired), that is what led to it.
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

    /// Waits until the lock is held no more, and says why. Lives on its own: it may outlast the guard, and then says
    /// [`Loss::Released`].
    ///
    /// It watches the deadline by itself, on the runtime that polls it: it is on time also when the runtime that the
    /// lock was obtained on is blocked or not driven.
    ///
    /// # Cancel safety
    ///
    /// May be dropped and made again at any time; nothing is missed.
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

    /// A token that fires when the lock is held no more: lost, released or dropped. For code that already takes one.
    ///
    /// A task on the runtime that the lock was obtained on fires it at the deadline. While that runtime is blocked or
    /// not driven, the token is late, and its `is_cancelled`, which does not read the clock, returns false after the
    /// deadline. [`is_held`](LockGuard::is_held), [`check`](LockGuard::check), [`lost`](LockGuard::lost) and
    /// [`protect`](LockGuard::protect) read the clock themselves; any of them that finds the deadline passed fires the
    /// token, too.
    ///
    /// It is yours: cancelling it, or a child of it, does nothing to the lock.
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

    /// Runs `work` for as long as the lock is held. On a loss the work is dropped at once, and the loss is the answer,
    /// also when the work has become ready at the same time. As with [`lost`](LockGuard::lost), the deadline is watched
    /// on the runtime that polls the future.
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

    /// Renews the lock now, for its ttl. Seldom needed: it is renewed in the background.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] when the lock is lost, known before or found out now. [`Error::Redis`] when the server could
    /// not be asked; the lock may still be held, until its deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the lock held; the renewal may have taken effect at the server.
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

    /// Sets the ttl, from now and for all renewals to come: shorter or longer than before. The deadline follows.
    ///
    /// A shorter ttl counts from the moment of the call, even when the server can't be asked.
    ///
    /// While the outcome of such a call is unknown, the server may still set this ttl: until then, for up to twice the
    /// [command timeout](crate::LockerBuilder::command_timeout), later renewals move the deadline by no more than it.
    ///
    /// # Errors
    ///
    /// Those of [`renew`](LockGuard::renew), and [`Error::InvalidTtl`] for a ttl that can't work; nothing is
    /// changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping it leaves the lock held; the new ttl may have taken effect at the server.
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

    /// Makes sure that the server will keep the lock for at least this long from now; never makes it shorter.
    ///
    /// # Errors
    ///
    /// As [`renew_for`](LockGuard::renew_for).
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

    /// Asks the server how long it will keep the lock unless it is renewed. `None`: it is not held there any more.
    ///
    /// Only an observation: what the guard believes does not change by it. [`Duration::MAX`] where somebody has taken
    /// the key's ttl away.
    ///
    /// # Errors
    ///
    /// [`Error::Redis`] when the server could not be asked.
    ///
    /// # Cancel safety
    ///
    /// It only reads.
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

    /// Releases the lock and waits for the server's word on it. Cleanup that this guard protects is told first.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] when it was lost before or turned out to be: what was done under it may not have been alone.
    /// [`Error::Redis`] when the server could not be asked within the command timeout; the background goes on trying
    /// then, until the ttl has freed the lock.
    ///
    /// # Cancel safety
    ///
    /// A dropped release still releases, in the background.
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
        // From here on, dropping `self` makes the renewer release, unless it is settled otherwise below.
        match self.hold.end(Loss::Released) {
            Loss::Released => {}
            loss => return Err(self.not_held(loss)),
        }
        let until = Instant::now() + self.shared.command_timeout;
        let released = self.shared.release(&self.hold.owned, Ending::Lock, until).await?;
        self.hold.settle(match self.hold.doubt {
            Some(_) => FinalStep::Undo(self.shared.cleanups.register(Cleanup::UndoAttempt(self.hold.clone()))),
            None => FinalStep::Nothing,
        });
        match released {
            Verdict::Done => {
                info!(name: "tenure.released", key = %self.key(), "released");
                Ok(())
            }
            Verdict::NotOurs(loss) => Err(self.not_held(loss)),
        }
    }

    /// Stops the renewal and keeps the lock: what identifies it can be stored, or passed on, to be taken up again by
    /// [`Locker::adopt`](crate::Locker::adopt), here or in another process, before its ttl ends.
    ///
    /// Futures and tokens of this guard say [`Loss::Released`]: it is held here no more. A guard that was lost before
    /// gives a lease too; who adopts it is told.
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
        // Settled before it is ended: the renewer that wakes from the end finds nothing to release.
        self.hold.settle(FinalStep::Nothing);
        self.hold.end(Loss::Released);
        Lease::from_parts(self.hold.owned.clone(), self.ttl(), self.fencing_token())
    }

    /// As [`into_lease`](LockGuard::into_lease), for a lock that is held until then; a lost one is cleaned up after.
    pub(crate) fn into_held_lease(self) -> Result<Lease, Loss> {
        self.check()?;
        // As there: settled first.
        self.hold.settle(FinalStep::Nothing);
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
                let renewing = self.hold.setting_ttl(ttl, self.shared.patience());
                // What is due may be due sooner now.
                self.place.call();
                renewing
            }
            ttl => self.hold.renewing(ttl, self.shared.patience()),
        };
        let renewed = self.shared.renew(&self.hold, renewing).await;
        let renewed = renewed.inspect_err(|error| self.hold.failed(&Arc::new(error.clone())));
        renewed?.map_err(|loss| {
            // It sees to the rest.
            self.place.call();
            self.not_held(loss)
        })
    }

    fn not_held(&self, loss: Loss) -> Error {
        Error::NotHeld { key: self.key().clone(), loss }
    }
}

impl Drop for LockGuard {
    /// Only calls the renewer: nothing here spawns, blocks or panics.
    fn drop(&mut self) {
        self.hold.end(Loss::Released);
        if self.hold.is_settled() {
            return self.place.leave();
        }
        let pending = self.shared.cleanups.register(Cleanup::Release(self.hold.clone()));
        match self.hold.settle(FinalStep::Release(Some(pending))) {
            true => self.place.call(),
            false => self.place.leave(),
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
