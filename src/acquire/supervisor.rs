//! The supervisor of the queues: a waiter that is no longer polled must not keep the lock from the others (invariants 3
//! and 4 of `queue.rs`).
//!
//! It is a task of its own, as nothing else is sure to be polled. It runs while a queue needs it, on the runtime of one
//! of the waiters. If that runtime has ended or is not driven, the next waiter that comes starts the task on its own.
//! So do those that wait on other runtimes: they look from time to time.
//!
//! The task decides under the mutex that it ends. A waiter is in its queue before it looks whether the task runs. So
//! either the task's last check has found that queue, or the waiter starts another task.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::acquire::queue::Abandoned;
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::Ending;
use crate::sync::{Mutex, MutexGuard};

/// How often the supervisor checks the queues.
const EVERY: Duration = Duration::from_millis(250);
/// After so long without a check, the supervisor's runtime counts as not driven.
const STALLED: Duration = Duration::from_secs(2);

/// The supervisor's task, if it was ever needed.
#[derive(Debug, Default)]
pub(crate) struct Supervisor(Mutex<Running>);

#[derive(Debug, Default)]
struct Running {
    task: Option<AbortOnDropHandle<()>>,
    /// The runtime of that task.
    runtime: Option<Id>,
    /// The number of the last task that was started. Only that one decides for the supervisor.
    starts: u64,
    /// When that task last checked, or was started. `None` if it has ended, or if none was ever started.
    last_check: Option<Instant>,
    /// Whether a waiter has relied on the task since it began its last check.
    is_needed: bool,
}

impl Supervisor {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that a task runs that checks what is in the queues now. `start` spawns one, which has this number, on
    /// this runtime. Returns whether the task runs on that runtime.
    fn start_if_needed(&self, now: Instant, runtime: Id, start: impl FnOnce(u64) -> AbortOnDropHandle<()>) -> bool {
        let mut running = self.running();
        running.is_needed = true;
        let is_finished = running.task.as_ref().is_none_or(AbortOnDropHandle::is_finished);
        let is_driven = running.last_check.is_some_and(|last| now.saturating_duration_since(last) < STALLED);
        if !is_finished && is_driven {
            return running.runtime == Some(runtime);
        }
        running.starts += 1;
        (running.last_check, running.runtime) = (Some(now), Some(runtime));
        let task = start(running.starts);
        let before = running.task.replace(task);
        // Dropping the task aborts it, which may run code of its runtime: not under the mutex.
        drop(running);
        drop(before);
        true
    }

    /// Notes that the task with this number begins a check.
    fn begin_check(&self, number: u64, now: Instant) {
        let mut running = self.running();
        if running.starts == number {
            (running.last_check, running.is_needed) = (Some(now), false);
        }
    }

    /// Ends the task with this number, whose check has found no queue that needs it. Returns false if it has to go on,
    /// as a waiter has relied on it since.
    fn end(&self, number: u64) -> bool {
        let mut running = self.running();
        if running.starts != number {
            return true;
        }
        if !running.is_needed {
            running.last_check = None;
        }
        !running.is_needed
    }
}

impl Shared {
    /// Starts the supervisor, if it doesn't run. Returns when to do that again, for a waiter of this runtime: if the
    /// supervisor runs on another one, that may come to stand still.
    pub(crate) fn supervise_queues(self: &Arc<Self>, runtime: &Handle) -> Option<Instant> {
        let now = Instant::now();
        let is_here = self.supervisor.start_if_needed(now, runtime.id(), |number| {
            AbortOnDropHandle::new(runtime.spawn(supervise(Arc::downgrade(self), number)))
        });
        (!is_here).then(|| now + STALLED)
    }
}

async fn supervise(shared: Weak<Shared>, number: u64) {
    loop {
        sleep(EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        shared.supervisor.begin_check(number, now);
        let Some(abandoned) = shared.queues.find_abandoned(now) else {
            if shared.supervisor.end(number) {
                return;
            }
            continue;
        };
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

#[cfg(all(test, shuttle))]
mod interleaved;
#[cfg(test)]
mod tests;
