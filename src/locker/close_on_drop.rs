//! Closes a locker at the end of a scope, for programs whose `main` just returns.

use std::fmt;
use std::sync::mpsc;
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

use crate::Locker;
use crate::locker::isolated::Background;

/// Closes a [`Locker`] when it is dropped, and waits for the releases in flight; created by [`Locker::close_on_drop`].
///
/// A task releases a dropped guard in the background. A runtime that shuts down ends that task, and the key then stays
/// until its ttl ends. This happens to a guard that lives until the end of `main`. Declare this value before the
/// guards, so that it is dropped after them.
///
/// Dropping it blocks the thread for as long as the releases take, up to the limit. On a `current_thread` runtime
/// nothing could be released meanwhile, so there it does not wait: end such a program with [`Locker::close`], or use
/// [`Locker::scope`]. The same is true if it is dropped on a runtime's only worker thread, or on the thread of an
/// [isolated](crate::LockerBuilder::isolated) locker.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::Locker;
///
/// #[tokio::main]
/// async fn main() -> Result<(), tenure::Error> {
///     let locker = Locker::in_memory();
///     let _closes = locker.close_on_drop(Duration::from_secs(2));
///     let guard = locker.lock("k").await?;
///     Ok(()) // drops the guard, then closes the locker, which waits until the key is free
/// }
/// ```
#[must_use = "the locker is closed as soon as this is dropped"]
pub struct CloseOnDrop {
    locker: Locker,
    limit: Duration,
}

impl CloseOnDrop {
    pub(crate) fn new(locker: Locker, limit: Duration) -> Self {
        Self { locker, limit }
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        let releases = self.locker.refuse_new_requests().clone();
        // A runtime that keeps running while this thread waits.
        let runtime = match &self.locker.shared().background {
            Background::Isolated(isolated) => Some(isolated.handle().clone()).filter(|_| !isolated.is_here()),
            Background::WithCallers | Background::NoThread => {
                Handle::try_current().ok().filter(|here| here.runtime_flavor() != RuntimeFlavor::CurrentThread)
            }
        };
        let Some(runtime) = runtime else { return };
        if releases.is_empty() {
            return;
        }
        let (ended, wait) = mpsc::channel::<()>();
        let locker = self.locker.clone();
        runtime.spawn(async move {
            locker.close().await;
            drop(ended);
        });
        // The last task that a worker thread spawned or woke is in a slot that no other worker looks at while this one
        // blocks. An empty task takes that slot.
        runtime.spawn(async {});
        // Nothing is sent: this returns when the task ends or its runtime drops it.
        wait.recv_timeout(self.limit).ok();
    }
}

impl fmt::Debug for CloseOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloseOnDrop").field("limit", &self.limit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn on_the_thread_that_does_the_releases_it_does_not_wait_for_them() {
        let limit = Duration::from_secs(5);
        let locker = Locker::builder().isolated(true).in_memory();
        let (guard, closes) = (locker.lock("k").await.unwrap(), locker.close_on_drop(limit));
        let Background::Isolated(isolated) = &locker.shared().background else { panic!("it is isolated") };
        let dropping = isolated.handle().spawn(async move {
            // Its release can run only after this.
            drop(guard);
            let began = Instant::now();
            drop(closes);
            began.elapsed()
        });
        let took = dropping.await.unwrap();
        assert!(took < limit, "{took:?}");
        locker.close().await;
    }
}
