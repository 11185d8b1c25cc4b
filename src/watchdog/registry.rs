//! The table of watched locks, and the events that its changes cause.
//!
//! This module is the base that the others stand on: it obtains, renews and releases nothing.
//!
//! 1. A lock is entered under all of its keys or under none. It stays entered until its last event is in the outbox,
//!    and both happen in one step. So the events of one key come in order, whoever watches the key next.
//! 2. Whoever takes the guard or the task out of an entry ends the watching, and nobody else reports how it ended.
//! 3. Nothing that runs foreign code is dropped under the mutex: guards, tasks and reservations are returned first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::entries::{Entries, Keeping};
use super::events::WatchEvent;
use super::outbox::{Id, Outbox};
use crate::hold::Hold;
use crate::{Error, Key, Loss};

pub(super) struct Registry {
    pub(super) outbox: Arc<Outbox>,
    entries: Mutex<Entries>,
}

/// How the watching of a lock ends.
pub(super) enum End {
    Lost(Loss, Option<Arc<Error>>),
    Released,
    Stopped(Option<Arc<Error>>),
}

impl End {
    pub(super) fn lost(loss: Loss, hold: &Hold) -> Self {
        Self::Lost(loss, hold.cause_of(loss))
    }

    fn event(self, key: Key) -> WatchEvent {
        match self {
            Self::Lost(loss, cause) => WatchEvent::Lost { key, loss, cause },
            Self::Released => WatchEvent::Released { key },
            Self::Stopped(reason) => WatchEvent::Stopped { key, reason },
        }
    }
}

impl Registry {
    pub(super) fn new(outbox: Outbox) -> Self {
        Self { outbox: Arc::new(outbox), entries: Mutex::default() }
    }

    /// Changes entries under the mutex, and starts the delivery of the events that this caused once it is unlocked.
    pub(super) fn change<T>(&self, act: impl FnOnce(&mut Entries) -> T) -> T {
        let outcome = act(&mut self.entries());
        self.outbox.deliver();
        outcome
    }

    /// Takes out what keeps the lock: its guard, or the task that waits for it. Whoever gets it has to
    /// [`finish`](Registry::finish) the entry (invariant 2).
    pub(super) fn take_out(&self, id: Id) -> Option<Keeping> {
        self.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_) | Keeping::Held(_)))
    }

    pub(super) fn take_out_if(&self, id: Id, wanted: impl FnOnce(&Keeping) -> bool) -> Option<Keeping> {
        let mut entries = self.entries();
        if !wanted(&entries.get(id)?.keeping) {
            return None;
        }
        entries.replace(id, Keeping::Ending)
    }

    /// Removes the entry and reports how it ended, in one step (invariant 1).
    pub(super) fn finish(&self, id: Id, end: End) {
        let entry = self.change(|entries| {
            let entry = entries.remove(id)?;
            self.outbox.put(id, end.event(entry.owned.key()));
            Some(entry)
        });
        drop(entry);
    }

    pub(super) fn find(&self, key: &Key) -> Option<Id> {
        self.entries().find(key).map(|(id, _)| id)
    }

    /// Returns a copy of the list, so that nothing is locked while the caller goes through it.
    pub(super) fn watched(&self) -> Vec<(Id, Key)> {
        self.entries().watched()
    }

    /// No code panics while it holds this mutex, so the data of a poisoned one is intact.
    pub(super) fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
