//! The entries of a registry: which locks are watched, under which keys, and what sees to each.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;

use super::outbox::Id;
use crate::hold::Owned;
use crate::{Error, Key, LockGuard};

/// Nothing here runs code of others: what is replaced or removed is handed out.
#[derive(Default)]
pub(super) struct Entries {
    ids: HashMap<Key, Id>,
    entries: HashMap<Id, Entry>,
    /// How many of them are only reserved.
    reserved: usize,
    next: Id,
    /// Takes nothing new.
    pub(super) closed: bool,
}

pub(super) struct Entry {
    pub(super) owned: Owned,
    /// Came as a lease: not released unless somebody asks for it.
    pub(super) leased: bool,
    pub(super) keeping: Keeping,
    pub(super) renewals: u64,
    pub(super) last_error: Option<Arc<Error>>,
}

pub(super) enum Keeping {
    /// A lease that is about to be taken up. Nobody sees it but who would use one of its keys too.
    Reserved,
    /// A task waits for the lock. It is entered a moment later than it starts.
    Obtaining(Option<AbortOnDropHandle<()>>),
    /// The guard's renewer renews it.
    Held(LockGuard),
    /// Somebody has taken out what was here and is about to say how it ended.
    Ending,
}

impl Entries {
    /// Refuses what is watched already.
    pub(super) fn admits(&self, owned: &Owned) -> Result<(), Error> {
        if self.closed {
            return Err(Error::Closed);
        }
        match owned.keys.iter().find(|&key| self.ids.contains_key(key)) {
            Some(key) => Err(Error::AlreadyWatched { key: key.clone() }),
            None => Ok(()),
        }
    }

    /// The id of what is entered next.
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

    /// What sees to the lock from now on; answers what did before. Never reserved again.
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

    /// How many are watched.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.reserved
    }

    /// Which are watched, each by the first of its keys, in the order in which they came.
    pub(super) fn watched(&self) -> Vec<(Id, Key)> {
        let watched = self.entries.iter().filter(|(_, entry)| !matches!(entry.keeping, Keeping::Reserved));
        let mut watched: Vec<_> = watched.map(|(&id, entry)| (id, entry.owned.key())).collect();
        watched.sort_unstable_by_key(|&(id, _)| id);
        watched
    }

    /// What is watched under the key.
    pub(super) fn find(&self, key: &Key) -> Option<(Id, &Entry)> {
        let id = *self.ids.get(key)?;
        let entry = self.entries.get(&id)?;
        (!matches!(entry.keeping, Keeping::Reserved)).then_some((id, entry))
    }
}
