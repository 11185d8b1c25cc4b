//! The supervisor of the queues: a waiter that is no longer polled must not keep the lock from the others (invariants 3
//! and 4 of `queue.rs`).
//!
//! It is a task of its own, as nothing else is sure to be polled. It runs while a queue needs it, on the runtime of one
//! of the waiters. If that runtime has ended or is not driven, the next waiter that comes starts the task on its own.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::acquire::queue::Abandoned;
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::Ending;

/// How often the supervisor checks the queues.
const EVERY: Duration = Duration::from_millis(250);
/// After so long without a check, the supervisor's runtime counts as not driven.
const STALLED: Duration = Duration::from_secs(2);

/// The supervisor's task, if it was ever needed.
#[derive(Debug, Default)]
pub(crate) struct Supervisor(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    task: AbortOnDropHandle<()>,
    last_check: Arc<Mutex<Instant>>,
}

impl Running {
    fn is_running(&self, now: Instant) -> bool {
        let last_check = *self.last_check.lock().unwrap_or_else(PoisonError::into_inner);
        !self.task.is_finished() && now.saturating_duration_since(last_check) < STALLED
    }
}

impl Shared {
    /// Starts the supervisor, if it doesn't run.
    pub(crate) fn supervise_queues(self: &Arc<Self>, runtime: &Handle) {
        let now = Instant::now();
        let mut running = self.supervisor.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_some_and(|running| running.is_running(now)) {
            return;
        }
        let last_check = Arc::new(Mutex::new(now));
        let task = AbortOnDropHandle::new(runtime.spawn(supervise(Arc::downgrade(self), last_check.clone())));
        let before = running.replace(Running { task, last_check });
        // Dropping the task aborts it, which may run code of its runtime: not under the mutex.
        drop(running);
        drop(before);
    }
}

async fn supervise(shared: Weak<Shared>, last_check: Arc<Mutex<Instant>>) {
    loop {
        sleep(EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        *last_check.lock().unwrap_or_else(PoisonError::into_inner) = now;
        let Some(abandoned) = shared.queues.find_abandoned(now) else { return };
        for one in abandoned {
            // If this runtime isn't driven, closing does it: what is to be undone is registered as pending.
            tokio::spawn(shared.clone().take_back(one));
        }
    }
}

impl Shared {
    /// Releases a lock that was handed over to a waiter that doesn't take it.
    async fn take_back(self: Arc<Self>, abandoned: Abandoned) {
        let Abandoned { wanted, pending, is_confirmed } = abandoned;
        let pending = pending.unwrap_or_else(|| self.cleanups.register(Cleanup::Undo(wanted.clone())));
        if pending.is_taken_over() {
            return;
        }
        let key = wanted.owned.key();
        debug!(name: "tenure.taken_back", %key, "a lock was handed over to a future that is not polled");
        if !is_confirmed {
            return self.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
        }
        if let Err(error) = self.release(&wanted.owned, Ending::Grant, None, Instant::now() + wanted.ttl).await {
            debug!(name: "tenure.release_failed", %key, %error, "could not release; the ttl will free the lock");
        }
    }
}
