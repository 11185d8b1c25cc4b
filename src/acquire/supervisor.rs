//! Looks after those who wait for the same key in this process: one that is not polled any more must not keep the lock
//! from the others (invariants 3 and 4 of `queue.rs`).
//!
//! A task of its own, as nobody else is sure to be polled. It runs while there is somebody to look after, on the
//! runtime of one who waits; when that has ended or stands still, the next one who comes starts it again elsewhere.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use crate::acquire::queue::Abandoned;
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::store::Ending;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(250);
/// After so long without a look, its runtime stands still.
const STALLED: Duration = Duration::from_secs(2);

/// The task, if it was ever needed.
#[derive(Debug, Default)]
pub(crate) struct Supervisor(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    task: AbortOnDropHandle<()>,
    last_look: Arc<Mutex<Instant>>,
}

impl Running {
    fn is_well(&self, now: Instant) -> bool {
        let last_look = *self.last_look.lock().unwrap_or_else(PoisonError::into_inner);
        !self.task.is_finished() && now.saturating_duration_since(last_look) < STALLED
    }
}

impl Shared {
    /// Sees to it that somebody looks after the queues.
    pub(crate) fn supervise_queues(self: &Arc<Self>, runtime: &Handle) {
        let now = Instant::now();
        let mut running = self.supervisor.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_some_and(|running| running.is_well(now)) {
            return;
        }
        let last_look = Arc::new(Mutex::new(now));
        let task = AbortOnDropHandle::new(runtime.spawn(attend(Arc::downgrade(self), last_look.clone())));
        let before = running.replace(Running { task, last_look });
        drop(running);
        drop(before);
    }
}

async fn attend(shared: Weak<Shared>, last_look: Arc<Mutex<Instant>>) {
    loop {
        sleep(EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        *last_look.lock().unwrap_or_else(PoisonError::into_inner) = now;
        let Some(taken_back) = shared.queues.find_abandoned(now) else { return };
        for abandoned in taken_back {
            // Should this runtime stand still, closing does it: it is pending until then.
            tokio::spawn(shared.clone().take_back(abandoned));
        }
    }
}

impl Shared {
    /// Releases what was handed over to one who doesn't take it.
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
        if let Err(error) = self.release(&wanted.owned, Ending::Grant, Instant::now() + wanted.ttl).await {
            debug!(name: "tenure.release_failed", %key, %error, "could not release; the ttl will free the lock");
        }
    }
}
