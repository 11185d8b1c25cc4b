//! The entries of a scheduler. Nothing here starts or wakes a task, or reads the clock.

use std::collections::BTreeSet;
use std::mem;
use std::task::{Poll, Waker};

use slab::Slab;
use tokio::time::Instant;

use crate::hold::renewer::{DueRenewal, Renewer};

/// The state of one scheduler.
#[derive(Default)]
pub(super) struct State {
    entries: Slab<Entry>,
    /// When the entries that rest are due, and their slots.
    resting: BTreeSet<(Instant, usize)>,
    /// The entries that were called, and have yet to be started.
    called: Vec<EntryId>,
    /// The number of the latest entry.
    last: u64,
    /// When the scheduler's task wakes up by itself.
    pub(super) wakes_at: Option<Instant>,
    /// The scheduler has ended (invariant 3).
    pub(super) over: bool,
}

/// The slot of an entry and its number: slots are used again, numbers are not.
pub(super) type EntryId = (usize, u64);

/// One renewer, until it is finished.
pub(super) struct Entry {
    number: u64,
    phase: Phase,
    renewer: Renewer,
}

/// What a renewer is doing (invariant 1).
enum Phase {
    Resting(Instant),
    /// Its renewal is on its way in a batch.
    InBatch,
    /// It has a task of its own, or is about to be started.
    Running {
        called: bool,
        /// Wakes the task if it waits to be called.
        waker: Option<Waker>,
    },
}

impl Drop for Entry {
    /// However an entry ends, its lock is renewed no longer.
    fn drop(&mut self) {
        self.renewer.abandon();
    }
}

impl Phase {
    const STARTED: Self = Self::Running { called: false, waker: None };
}

/// What is to be done now.
pub(super) struct Due {
    /// The renewers that run, each in a task of its own.
    pub(super) runs: Vec<(EntryId, Renewer)>,
    /// The renewals that are sent together.
    pub(super) batch: Vec<(EntryId, DueRenewal)>,
}

/// What becomes of an entry that is to rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rest {
    Done,
    /// It was called in the meantime (invariant 2).
    LookAgain,
    /// The scheduler has ended (invariant 3).
    Over,
}

impl State {
    /// Adds a renewer that rests until `due`.
    pub(super) fn add(&mut self, renewer: Renewer, due: Instant) -> EntryId {
        self.last += 1;
        let slot = self.entries.insert(Entry { number: self.last, phase: Phase::Resting(due), renewer });
        self.resting.insert((due, slot));
        (slot, self.last)
    }

    /// Takes an entry that rests or is in a batch: it counts as running from now on. Returns false if it runs already
    /// or has ended.
    fn take(&mut self, id: EntryId) -> bool {
        let Some(entry) = self.get(id) else { return false };
        let due = match entry.phase {
            Phase::Resting(due) => Some(due),
            Phase::InBatch => None,
            Phase::Running { .. } => return false,
        };
        entry.phase = Phase::STARTED;
        due.is_none_or(|due| self.resting.remove(&(due, id.0)))
    }

    /// Takes an entry that is in a batch. Returns false if it was called in the meantime (invariant 2), even if it
    /// rests again. It may be in a later batch by now: this one's reply is as good, and the later batch then finds it
    /// gone.
    pub(super) fn take_from_batch(&mut self, id: EntryId) -> bool {
        self.get(id).is_some_and(|entry| matches!(entry.phase, Phase::InBatch)) && self.take(id)
    }

    /// Has an entry started that rests or is in a batch. Returns false if it runs already or has ended.
    pub(super) fn call(&mut self, id: EntryId) -> bool {
        let is_taken = self.take(id);
        if is_taken {
            self.called.push(id);
        }
        is_taken
    }

    /// Notes that the entry was called, if it runs (invariant 2). Returns the waker of its task if that waits for it.
    pub(super) fn interrupt(&mut self, id: EntryId) -> Option<Waker> {
        match &mut self.get(id)?.phase {
            Phase::Running { called, waker } => {
                *called = true;
                waker.take()
            }
            Phase::Resting(_) | Phase::InBatch => None,
        }
    }

    /// Returns ready once for all calls since the entry was started, or since this was last ready.
    pub(super) fn poll_called(&mut self, id: EntryId, task: &Waker) -> Poll<()> {
        // Cannot be otherwise: only the task of a running entry asks, and the entry runs until that task ends.
        if let Some(Phase::Running { called, waker }) = self.get(id).map(|entry| &mut entry.phase) {
            if mem::take(called) {
                return Poll::Ready(());
            }
            *waker = Some(task.clone());
        }
        Poll::Pending
    }

    /// Has a running entry rest until `due`.
    pub(super) fn rest(&mut self, id: EntryId, due: Instant) -> Rest {
        if self.over {
            return Rest::Over;
        }
        // There is one: an entry ends with its task, which has called this.
        let Some(entry) = self.get(id) else { return Rest::Over };
        if let Phase::Running { called: called @ true, .. } = &mut entry.phase {
            *called = false;
            return Rest::LookAgain;
        }
        entry.phase = Phase::Resting(due);
        self.resting.insert((due, id.0));
        Rest::Done
    }

    /// Ends an entry, whatever it is doing. The caller drops it outside the mutex (invariant 4).
    pub(super) fn end(&mut self, id: EntryId) -> Option<Entry> {
        self.take(id);
        self.get(id)?;
        self.entries.try_remove(id.0)
    }

    /// Ends an entry that doesn't run. The caller drops it outside the mutex (invariant 4).
    pub(super) fn remove(&mut self, id: EntryId) -> Option<Entry> {
        if self.take(id) { self.end(id) } else { None }
    }

    /// Ends the scheduler, and all entries that have no task. The caller drops them outside the mutex (invariant 4).
    pub(super) fn end_all(&mut self) -> Vec<Option<Entry>> {
        self.over = true;
        let resting = mem::take(&mut self.resting).into_iter().map(|(_, slot)| slot);
        let slots = resting.chain(mem::take(&mut self.called).into_iter().map(|(slot, _)| slot));
        slots.map(|slot| self.entries.try_remove(slot)).collect()
    }

    /// Takes at most `limit` entries that have something to do. Those that are due come first, in the order of time,
    /// since a renewal can be too late.
    pub(super) fn take_due(&mut self, now: Instant, limit: usize) -> Due {
        let (mut runs, mut batch) = (Vec::new(), Vec::new());
        while let Some(&(due, slot)) = self.resting.first().filter(|_| runs.len() + batch.len() < limit) {
            if due > now {
                break;
            }
            self.resting.pop_first();
            // There is one: `resting` changes along with the phase.
            let Some(entry) = self.entries.get_mut(slot) else { continue };
            let id = (slot, entry.number);
            match entry.renewer.due_renewal(now) {
                Some(renewal) => {
                    entry.phase = Phase::InBatch;
                    batch.push((id, renewal));
                }
                None => {
                    entry.phase = Phase::STARTED;
                    runs.push(id);
                }
            }
        }
        // One alone needs no batch.
        if batch.len() == 1 {
            runs.extend(batch.drain(..).map(|(id, _)| id).filter(|id| self.take(*id)));
        }
        let called = self.called.len().min(limit - runs.len() - batch.len());
        runs.extend(self.called.drain(..called));
        let runs = runs.into_iter().filter_map(|id| Some((id, self.get(id)?.renewer.clone())));
        Due { runs: runs.collect(), batch }
    }

    /// Returns when the first entry that rests is due.
    pub(super) fn first_due(&self) -> Option<Instant> {
        self.resting.first().map(|(due, _)| *due)
    }

    /// Returns whether no entry is left.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn get(&mut self, (slot, number): EntryId) -> Option<&mut Entry> {
        self.entries.get_mut(slot).filter(|entry| entry.number == number)
    }
}
