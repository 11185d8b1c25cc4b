//! What is owed to the server: releases of guards that were dropped, and what attempts of unknown outcome may have left.
//!
//! Whoever owes something sees to it: a keeper, a task, the future of a request. But a future may be kept and not polled,
//! and a runtime may not be driven any more. So what is owed is noted here as well, and [`Locker::close`] does what is
//! not done in time, on its own runtime. All of it may be done twice: it ends a grant that nobody holds by.
//!
//! [`Locker::close`]: crate::Locker::close

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use slab::Slab;
use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::debug;

use crate::Key;
use crate::hold::{GrantId, Hold, Owned};
use crate::keeper::Upkeep;
use crate::store::{LinePlace, Wanted};

/// How long closing leaves what is owed to those who owe it.
const PATIENCE: Duration = Duration::from_millis(250);

/// What has to be done.
#[derive(Clone)]
pub(crate) enum Work {
    /// An attempt may have obtained the lock, and nobody knows.
    Undo(Arc<Wanted>),
    /// The lock is to be released in the background.
    Release(Arc<Hold>),
    /// It is released; what an earlier attempt has left is not.
    UndoAttempt(Arc<Hold>),
    /// A lease's lock was taken over by a grant that nobody holds by.
    GiveBack { owned: Owned, earlier: Option<GrantId>, ttl: Duration },
    /// A place in the line is nobody's any more.
    Leave(Key, LinePlace),
}

/// All that is owed by one locker.
pub(crate) struct Debts {
    /// Counts them, so that closing can wait.
    tracker: TaskTracker,
    entries: Arc<Mutex<Entries>>,
}

#[derive(Default)]
struct Entries {
    slots: Slab<Entry>,
    /// The number of the last entry: slots are used again.
    last: u64,
}

struct Entry {
    number: u64,
    since: Instant,
    work: Work,
    token: TaskTrackerToken,
}

/// Something that is owed, until this is dropped.
pub(crate) struct Debt {
    entries: Arc<Mutex<Entries>>,
    slot: usize,
    number: u64,
}

impl Debts {
    pub(crate) fn new(tracker: TaskTracker) -> Self {
        Self { tracker, entries: Arc::default() }
    }

    pub(crate) fn owe(&self, work: Work) -> Debt {
        self.owe_since(Instant::now(), work)
    }

    pub(crate) fn owe_since(&self, since: Instant, work: Work) -> Debt {
        let token = self.tracker.token();
        let mut entries = lock(&self.entries);
        entries.last += 1;
        let number = entries.last;
        let slot = entries.slots.insert(Entry { number, since, work, token });
        drop(entries);
        Debt { entries: self.entries.clone(), slot, number }
    }

    /// Takes over what was not done in time. Those who owe it learn of that when they come to it.
    fn take_over(&self, now: Instant) -> Vec<(Work, TaskTrackerToken)> {
        let mut entries = lock(&self.entries);
        let is_late = |entry: &Entry| now.saturating_duration_since(entry.since) >= PATIENCE;
        let late: Vec<usize> = entries.slots.iter().filter(|(_, entry)| is_late(entry)).map(|(slot, _)| slot).collect();
        let taken = late.into_iter().filter_map(|slot| entries.slots.try_remove(slot));
        taken.map(|entry| (entry.work, entry.token)).collect()
    }
}

impl Debt {
    /// It is done, or was never owed. Returns false where another has taken it over: it is being undone.
    pub(crate) fn settle(self) -> bool {
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
        // Its token wakes others: not under the mutex.
        drop(entries);
        drop(entry);
        true
    }
}

impl Drop for Debt {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Upkeep {
    /// Waits until nothing is owed any more, and does itself what others don't.
    pub(crate) async fn settle_all(self: &Arc<Self>) {
        if Self::check_runtime().is_err() {
            return self.releases.wait().await;
        }
        if self.store.has_line() {
            // Those who wait leave the line when they learn that it is over, which may be after the end of the program.
            for (key, place) in self.queues.line_places() {
                self.leave_line(key, place, false, &Handle::current());
            }
        }
        loop {
            select! {
                biased;
                () = self.releases.wait() => return,
                () = sleep(PATIENCE) => {}
            }
            for (work, token) in self.debts.take_over(Instant::now()) {
                debug!(name: "tenure.taken_over", "done while closing, as nobody else does");
                let upkeep = self.clone();
                // Its token is what closing waits for, here or in another call.
                tokio::spawn(async move {
                    upkeep.perform(work).await;
                    drop(token);
                });
            }
        }
    }

    /// Leaves the line in the background. `again`: once more when what was sent can't be run any more, as it may enter
    /// the place after this.
    pub(crate) fn leave_line(self: &Arc<Self>, key: Key, place: LinePlace, again: bool, runtime: &Handle) {
        let work = Work::Leave(key, place);
        let (upkeep, owed) = (self.clone(), self.debts.owe(work.clone()));
        runtime.spawn(async move {
            upkeep.perform(work.clone()).await;
            // Closing doesn't wait for the rest: with the process, its places end.
            drop(owed);
            if again {
                sleep(upkeep.patience()).await;
                upkeep.perform(work).await;
            }
        });
    }

    /// Does what is owed.
    pub(crate) async fn perform(self: &Arc<Self>, work: Work) {
        match work {
            Work::Undo(wanted) => self.undo(&wanted.owned, &wanted.latest, wanted.ttl).await,
            Work::Release(hold) => self.clean_up(&hold, true).await,
            Work::UndoAttempt(hold) => self.clean_up(&hold, false).await,
            Work::GiveBack { owned, earlier, ttl } => self.return_claim(&owned, earlier, ttl).await,
            Work::Leave(key, place) => {
                if let Err(error) = self.store.leave(&key, place, self.command_timeout).await {
                    debug!(name: "tenure.leave_failed", %key, %error, "the place in the line ends by its time");
                }
            }
        }
    }
}

/// No code panics while it holds this mutex, so a poisoned one would be as good as any.
fn lock(entries: &Mutex<Entries>) -> MutexGuard<'_, Entries> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Debts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debts").field("count", &lock(&self.entries).slots.len()).finish()
    }
}
