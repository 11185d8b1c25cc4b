//! The cleanups that are still pending at the server: the locks of dropped guards, and what attempts of unknown outcome
//! may have left.
//!
//! A renewer, a task or the future of a request does each cleanup. But a future may be kept and not polled, and a
//! runtime may no longer be driven. So every cleanup is registered here as well, and [`Locker::close`] does those that
//! are not done in time, on its own runtime. Doing one twice is harmless: it ends a grant by which nobody holds a lock.
//!
//! [`Locker::close`]: crate::Locker::close

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use slab::Slab;
use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::Key;
use crate::hold::{GrantId, Hold, Owned};
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::{LinePlace, Wanted};
use crate::sync::{Mutex, MutexGuard};

/// How long closing leaves a cleanup to the code that registered it.
const GRACE_FOR_OWNER: Duration = Duration::from_millis(250);

/// A cleanup to do.
#[derive(Clone)]
pub(crate) enum Cleanup {
    /// Undo an attempt that may have obtained the lock without anybody's knowledge.
    Undo(Arc<Wanted>),
    /// Release the lock in the background.
    Release(Arc<Hold>),
    /// Undo what an earlier attempt may have left, after the lock was released.
    UndoAttempt(Arc<Hold>),
    /// Give the lock of a lease back: a grant that nobody uses has taken it over.
    GiveBack { owned: Owned, earlier: Option<GrantId>, ttl: Duration, may_run_until: Instant },
    /// Leave a place in the line that no request uses any longer.
    Leave(Key, LinePlace),
}

/// The pending cleanups of one locker.
pub(crate) struct Cleanups {
    /// Counts the cleanups, so that closing can wait for them.
    tracker: TaskTracker,
    entries: Arc<Mutex<Entries>>,
}

#[derive(Default)]
struct Entries {
    slots: Slab<Entry>,
    /// The number of the last entry. It distinguishes entries that use the same slot one after the other.
    last: u64,
}

struct Entry {
    number: u64,
    since: Instant,
    work: Cleanup,
    token: TaskTrackerToken,
}

/// A cleanup that is pending until this is dropped.
pub(crate) struct PendingCleanup {
    entries: Arc<Mutex<Entries>>,
    slot: usize,
    number: u64,
}

impl Cleanups {
    pub(crate) fn new(tracker: TaskTracker) -> Self {
        Self { tracker, entries: Arc::default() }
    }

    pub(crate) fn register(&self, work: Cleanup) -> PendingCleanup {
        self.register_since(Instant::now(), work)
    }

    pub(crate) fn register_since(&self, since: Instant, work: Cleanup) -> PendingCleanup {
        let token = self.tracker.token();
        let mut entries = lock(&self.entries);
        entries.last += 1;
        let number = entries.last;
        let slot = entries.slots.insert(Entry { number, since, work, token });
        drop(entries);
        PendingCleanup { entries: self.entries.clone(), slot, number }
    }

    /// Removes and returns the cleanups that were not done in time. The code that registered one learns of it through
    /// [`PendingCleanup::is_taken_over`].
    fn take_overdue(&self, now: Instant) -> Vec<(Cleanup, TaskTrackerToken)> {
        let mut entries = lock(&self.entries);
        let is_late = |entry: &Entry| now.saturating_duration_since(entry.since) >= GRACE_FOR_OWNER;
        let late: Vec<usize> = entries.slots.iter().filter(|(_, entry)| is_late(entry)).map(|(slot, _)| slot).collect();
        let taken = late.into_iter().filter_map(|slot| entries.slots.try_remove(slot));
        taken.map(|entry| (entry.work, entry.token)).collect()
    }
}

impl PendingCleanup {
    /// Ends the cleanup, because it is done or not needed. Returns false if closing has taken it over and is doing it.
    pub(crate) fn complete(self) -> bool {
        self.remove()
    }

    pub(crate) fn is_taken_over(&self) -> bool {
        lock(&self.entries).slots.get(self.slot).is_none_or(|entry| entry.number != self.number)
    }

    fn remove(&self) -> bool {
        let mut entries = lock(&self.entries);
        if entries.slots.get(self.slot).is_none_or(|entry| entry.number != self.number) {
            return false;
        }
        let entry = entries.slots.try_remove(self.slot);
        // Dropping its token wakes those that wait for the tracker, so the mutex is unlocked first.
        drop(entries);
        drop(entry);
        true
    }
}

impl Drop for PendingCleanup {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Shared {
    /// Waits until no cleanup is pending, and does those that are not done in time.
    pub(crate) async fn finish_cleanups(self: &Arc<Self>) {
        if Self::check_runtime().is_err() {
            return self.releases.wait().await;
        }
        if self.store.capabilities().has_places(1) {
            // Waiters leave the line when they learn that the locker is closed, which may be after the end of the
            // program.
            for (key, place) in self.queues.line_places() {
                self.leave_line(key, place, false, &Handle::current());
            }
        }
        loop {
            select! {
                // Nothing is taken over once all is done.
                biased;
                () = self.releases.wait() => {
                    if self.releases.is_empty() {
                        return;
                    }
                    // Something else came to be pending meanwhile.
                    continue;
                }
                () = sleep(GRACE_FOR_OWNER) => {}
            }
            for (work, token) in self.cleanups.take_overdue(Instant::now()) {
                debug!(name: "tenure.cleanup_adopted", "close() does a cleanup that its own task left undone");
                let shared = self.clone();
                // Closing waits for its token, here or in another call.
                tokio::spawn(async move {
                    shared.perform(work).await;
                    drop(token);
                });
            }
        }
    }

    /// Leaves the line in the background. If `again` is set, a request that was sent may still enter the place, so this
    /// leaves it once more when the server can no longer run that request.
    pub(crate) fn leave_line(self: &Arc<Self>, key: Key, place: LinePlace, again: bool, runtime: &Handle) {
        let work = Cleanup::Leave(key, place);
        let (shared, pending) = (self.clone(), self.cleanups.register(work.clone()));
        runtime.spawn(async move {
            shared.perform(work.clone()).await;
            // Closing doesn't wait for the rest: the places of a process end with it.
            drop(pending);
            if again {
                sleep(shared.may_run_for()).await;
                shared.perform(work).await;
            }
        });
    }

    /// Does a cleanup.
    pub(crate) async fn perform(self: &Arc<Self>, work: Cleanup) {
        match work {
            Cleanup::Undo(wanted) => self.undo(&wanted.owned, &wanted.latest, wanted.ttl).await,
            Cleanup::Release(hold) => self.clean_up(&hold, true).await,
            Cleanup::UndoAttempt(hold) => self.clean_up(&hold, false).await,
            Cleanup::GiveBack { owned, earlier, ttl, may_run_until } => {
                self.return_claim(&owned, earlier, ttl, may_run_until).await;
            }
            Cleanup::Leave(key, place) => {
                if let Err(error) = self.store.leave(&key, place, self.command_timeout).await {
                    debug!(name: "tenure.leave_failed", %key, %error, "could not leave the line; the place expires");
                }
            }
        }
    }
}

/// Locks the entries, poisoned or not: no code panics while it holds this mutex.
fn lock(entries: &Mutex<Entries>) -> MutexGuard<'_, Entries> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Cleanups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cleanups").field("count", &lock(&self.entries).slots.len()).finish()
    }
}
