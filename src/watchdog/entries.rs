//! The entries of a registry: which locks are watched, under which keys, and what keeps each of them.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;

use super::outbox::Id;
use crate::hold::Owned;
use crate::{Error, Key, LockGuard};

/// Nothing here runs foreign code: what is replaced or removed is returned to the caller, which drops it.
#[derive(Default)]
pub(super) struct Entries {
    ids: HashMap<Key, Id>,
    entries: HashMap<Id, Entry>,
    /// How many of the entries are only reserved.
    reserved: usize,
    next: Id,
    /// No further lock is accepted.
    pub(super) closed: bool,
}

pub(super) struct Entry {
    pub(super) owned: Owned,
    /// The lock came as a lease, so it is released only on request.
    pub(super) leased: bool,
    pub(super) keeping: Keeping,
    pub(super) renewals: u64,
    pub(super) last_error: Option<Arc<Error>>,
}

pub(super) enum Keeping {
    /// A lease that is about to be taken up. It only keeps others from entering one of its keys.
    Reserved,
    /// A task waits for the lock. The handle is entered a moment after the task was started.
    Obtaining(Option<AbortOnDropHandle<()>>),
    /// The guard's renewer renews it.
    Held(LockGuard),
    /// Somebody has taken out the guard or the task, and is about to report how the watching ended.
    Ending,
}

impl Entries {
    /// Refuses a lock of which a key is already entered.
    pub(super) fn admits(&self, owned: &Owned) -> Result<(), Error> {
        if self.closed {
            return Err(Error::ShutDown);
        }
        match owned.keys.iter().find(|&key| self.ids.contains_key(key)) {
            Some(key) => Err(Error::AlreadyWatched { key: key.clone() }),
            None => Ok(()),
        }
    }

    /// Returns the id that the next entry will have.
    pub(super) fn next(&self) -> Id {
        self.next
    }

    pub(super) fn enter(&mut self, owned: Owned, leased: bool, keeping: Keeping) -> Id {
        let id = self.next;
        self.next += 1;
        self.reserved += usize::from(matches!(keeping, Keeping::Reserved));
        self.ids.extend(owned.keys.iter().map(|key| (key.clone(), id)));
        self.entries.insert(id, Entry { owned, leased, keeping, renewals: 0, last_error: None });
        id
    }

    /// Replaces what keeps the lock, and returns what did so before. An entry never becomes reserved again.
    pub(super) fn replace(&mut self, id: Id, keeping: Keeping) -> Option<Keeping> {
        let before = std::mem::replace(&mut self.entries.get_mut(&id)?.keeping, keeping);
        self.reserved -= usize::from(matches!(before, Keeping::Reserved));
        Some(before)
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        for key in &entry.owned.keys {
            self.ids.remove(key);
        }
        self.reserved -= usize::from(matches!(entry.keeping, Keeping::Reserved));
        Some(entry)
    }

    pub(super) fn get(&self, id: Id) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// Returns how many locks are watched.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.reserved
    }

    /// Returns the watched locks, each with the first of its keys, in order of entry.
    pub(super) fn watched(&self) -> Vec<(Id, Key)> {
        let watched = self.entries.iter().filter(|(_, entry)| !matches!(entry.keeping, Keeping::Reserved));
        let mut watched: Vec<_> = watched.map(|(&id, entry)| (id, entry.owned.key())).collect();
        watched.sort_unstable_by_key(|&(id, _)| id);
        watched
    }

    /// Returns the entry that is watched under the key.
    pub(super) fn find(&self, key: &Key) -> Option<(Id, &Entry)> {
        let id = *self.ids.get(key)?;
        let entry = self.entries.get(&id)?;
        (!matches!(entry.keeping, Keeping::Reserved)).then_some((id, entry))
    }
}
