//! The reasons why a lock ends, and the futures that wait for the end or stop work at it.

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio::runtime::{self, Handle};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::hold::Hold;

/// The reason why a lock is no longer held.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
/// use tenure::{Locker, Loss};
///
/// let locker = Locker::in_memory();
/// let guard = locker.obtain("k").ttl(Duration::from_secs(1)).no_renewal().await?;
/// assert_eq!(guard.check(), Ok(()));
/// assert_eq!(guard.lost().await, Loss::Expired);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Loss {
    /// The deadline passed without a confirmed renewal: the server could not be reached or did not reply, or this
    /// process or its machine was suspended. Others may hold the lock a little later.
    #[error("it expired: no renewal was confirmed in time")]
    Expired,
    /// It was held for as long as its request allowed ([`hold_at_most`](crate::LockRequest::hold_at_most)). It is
    /// released in the background, and others may hold it at once.
    #[error("it was held for as long as its request allowed")]
    LimitReached,
    /// The key holds another token, according to the server. Another holder may be at work.
    #[error("another has it: the key holds another token")]
    Taken,
    /// The key is gone, according to the server: deleted, evicted, flushed, expired, or lost in a restart or a
    /// failover.
    #[error("its key is gone from the server")]
    Missing,
    /// Its holder released it.
    #[error("it was released")]
    Released,
}

/// Waits until a lock is no longer held; created by [`LockGuard::lost`](crate::LockGuard::lost).
///
/// It reads the clock itself and sleeps until the deadline on the runtime that polls it. So it is on time even if the
/// runtime that renews the lock is blocked or not driven. Outside any tokio runtime it has no timer, and waits for the
/// task that renews the lock.
///
/// # Cancel safety
///
/// It may be dropped and created again at any time; no loss is missed.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let guard = tenure::Locker::in_memory().lock("k").await?;
/// // It doesn't borrow the guard: a task can wait for it.
/// let waiter = tokio::spawn(guard.lost());
/// guard.release().await?;
/// assert_eq!(waiter.await?, tenure::Loss::Released);
/// # Ok(())
/// # }
/// ```
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Lost {
    hold: Arc<Hold>,
    #[pin]
    over: WaitForCancellationFutureOwned,
    /// Fires when the deadline has moved closer.
    #[pin]
    shortened: Option<WaitForCancellationFutureOwned>,
    #[pin]
    timer: Timer,
}

impl Lost {
    pub(crate) fn new(hold: Arc<Hold>) -> Self {
        let over = hold.over().cancelled_owned();
        Self { hold, over, shortened: None, timer: Timer::default() }
    }
}

impl Future for Lost {
    type Output = Loss;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Loss> {
        let mut this = self.project();
        loop {
            // The clock comes first: a runtime that was blocked past the deadline may poll this before the renewer.
            if let Err(loss) = this.hold.check() {
                return Poll::Ready(loss);
            }
            if this.over.as_mut().poll(cx).is_ready() {
                // The reason is set before the token fires, so there is one.
                return Poll::Ready(this.hold.check().err().unwrap_or(Loss::Expired));
            }
            if this.shortened.is_none() {
                this.shortened.set(Some(this.hold.shortened().cancelled_owned()));
            }
            // Polled before the deadline is read, so a change that comes in between is not missed.
            if this.shortened.as_mut().as_pin_mut().is_some_and(|shortened| shortened.poll(cx).is_ready()) {
                this.shortened.set(None);
                continue;
            }
            ready!(this.timer.as_mut().poll_elapsed(this.hold.deadline(), cx));
        }
    }
}

/// Sleeps until a deadline that may move, on the runtime that polls it.
#[pin_project]
#[derive(Default)]
struct Timer {
    /// Created when first needed: most futures of this module end long before the deadline.
    #[pin]
    sleep: Option<Sleep>,
    /// The runtime whose timers `sleep` uses. On another runtime a new `sleep` is needed, as this one may shut down
    /// first.
    runtime: Option<runtime::Id>,
}

impl Timer {
    /// Returns ready once the deadline has passed. A later deadline only resets the timer when the earlier one has
    /// passed, so renewals cost nothing.
    fn poll_elapsed(self: Pin<&mut Self>, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let runtime = Handle::try_current().ok().map(|handle| handle.id());
        if *this.runtime != runtime {
            this.sleep.set(None);
            *this.runtime = runtime;
        }
        if runtime.is_none() {
            return Poll::Pending;
        }
        // Tokio panics where the runtime has no timers or is shutting down. Without a timer the cancellation token
        // still wakes the future.
        let polled = catch_unwind(AssertUnwindSafe(|| {
            loop {
                match this.sleep.as_mut().as_pin_mut() {
                    None => this.sleep.set(Some(sleep_until(deadline))),
                    Some(sleep) if deadline < sleep.deadline() => sleep.reset(deadline),
                    Some(sleep) => {
                        let wakes = sleep.deadline();
                        ready!(sleep.poll(cx));
                        if deadline <= wakes {
                            return Poll::Ready(());
                        }
                        this.sleep.set(Some(sleep_until(deadline)));
                    }
                }
            }
        }));
        polled.unwrap_or(Poll::Pending)
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lost").field("hold", &self.hold).finish_non_exhaustive()
    }
}

/// Runs a future for as long as a lock is held; created by [`LockGuard::protect`](crate::LockGuard::protect).
///
/// It checks the lock before it polls the work, and once more when the work is done. The output of work that was not
/// under the lock from beginning to end is dropped, and the loss returned. On a loss the work is dropped at once. Like
/// [`Lost`], it reads the clock and sleeps until the deadline.
///
/// # Cancel safety
///
/// Dropping it drops the work, and leaves the lock as it is.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tenure::Error> {
/// let guard = tenure::Locker::in_memory().lock("k").no_renewal().await?;
/// let endless = guard.protect(std::future::pending::<()>());
/// assert_eq!(endless.await, Err(tenure::Loss::Expired));
/// # Ok(())
/// # }
/// ```
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Protected<F> {
    #[pin]
    lost: Lost,
    #[pin]
    work: Option<F>,
}

impl<F> Protected<F> {
    pub(crate) fn new(hold: Arc<Hold>, work: F) -> Self {
        Self { lost: Lost::new(hold), work: Some(work) }
    }
}

impl<F: Future> Future for Protected<F> {
    type Output = Result<F::Output, Loss>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Err(loss) = this.lost.hold.check() {
            // Dropped before the loss is returned: the caller may rely on the work having stopped.
            this.work.set(None);
            return Poll::Ready(Err(loss));
        }
        if let Some(work) = this.work.as_mut().as_pin_mut() {
            if let Poll::Ready(output) = work.poll(cx) {
                this.work.set(None);
                return Poll::Ready(this.lost.hold.check().map(|()| output));
            }
        }
        // Polled after the work: work that is never pending needs no timer.
        let loss = ready!(this.lost.poll(cx));
        this.work.set(None);
        Poll::Ready(Err(loss))
    }
}

impl<F> fmt::Debug for Protected<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protected").field("lost", &self.lost).field("running", &self.work.is_some()).finish()
    }
}
