//! How a lock ends, and the futures that wait for it or guard against it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::hold::Hold;

/// How a lock came to be held no more.
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
    /// The deadline passed without a confirmed renewal: the server could not be reached or did not answer, or this
    /// process stood still. Others may hold the lock a little later.
    #[error("it expired: no renewal was confirmed in time")]
    Expired,
    /// The server said that the key holds something else now. Others may already be at work.
    #[error("another has it: the key holds another token")]
    Taken,
    /// The server said that the key is gone: deleted, evicted, flushed, expired, or lost in a restart or a failover.
    #[error("its key is gone from the server")]
    Missing,
    /// Its owner gave it up.
    #[error("it was released")]
    Released,
}

/// Waits until a lock is held no more; made by [`LockGuard::lost`](crate::LockGuard::lost).
///
/// # Cancel safety
///
/// It may be dropped at any time, and made again: nothing is missed.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let guard = tenure::Locker::in_memory().lock("k").await?;
/// // It lives on its own: a task can wait for it.
/// let told = tokio::spawn(guard.lost());
/// guard.release().await?;
/// assert_eq!(told.await?, tenure::Loss::Released);
/// # Ok(())
/// # }
/// ```
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Lost {
    hold: Arc<Hold>,
    #[pin]
    over: WaitForCancellationFutureOwned,
}

impl Lost {
    pub(crate) fn new(hold: Arc<Hold>) -> Self {
        let over = hold.over().clone().cancelled_owned();
        Self { hold, over }
    }
}

impl Future for Lost {
    type Output = Loss;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Loss> {
        let this = self.project();
        // The clock first: a runtime that stood still past the deadline may poll this before it runs the keeper.
        if let Err(loss) = this.hold.check() {
            return Poll::Ready(loss);
        }
        ready!(this.over.poll(cx));
        // The reason is set before the token fires, so there is one.
        Poll::Ready(this.hold.check().err().unwrap_or(Loss::Expired))
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lost").field("hold", &self.hold).finish_non_exhaustive()
    }
}

/// Runs a future for as long as a lock is held; made by [`LockGuard::protect`](crate::LockGuard::protect).
///
/// The loss is looked at before the work is polled, and once more when the work is done: work that was not under the
/// lock from beginning to end has lost, and its output is dropped. On a loss the work is dropped at once.
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
        if let Poll::Ready(loss) = this.lost.as_mut().poll(cx) {
            // Before the answer: whoever hears of the loss may rely on the work having stopped.
            this.work.set(None);
            return Poll::Ready(Err(loss));
        }
        let Some(work) = this.work.as_mut().as_pin_mut() else {
            return Poll::Pending;
        };
        let output = ready!(work.poll(cx));
        this.work.set(None);
        Poll::Ready(this.lost.hold.check().map(|()| output))
    }
}

impl<F> fmt::Debug for Protected<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protected").field("lost", &self.lost).field("running", &self.work.is_some()).finish()
    }
}
