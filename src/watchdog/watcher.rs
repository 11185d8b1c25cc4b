//! What connects a renewer to the registry.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::entries::{Entry, Keeping};
use super::events::WatchEvent;
use super::outbox::Id;
use super::registry::Registry;
use crate::hold::Observer;
use crate::{Error, Loss};

/// What a renewer tells of the lock with this id.
pub(super) struct Watcher {
    /// Not owned: the registry owns the guard, that owns the hold, that owns this.
    registry: Weak<Registry>,
    id: Id,
}

impl Watcher {
    pub(super) fn new(registry: &Arc<Registry>, id: Id) -> Self {
        Self { registry: Arc::downgrade(registry), id }
    }

    /// Only as long as the lock is held here: what comes after somebody has ended the watching is no news.
    fn tell(&self, event: impl FnOnce(&mut Entry) -> WatchEvent) {
        let Some(registry) = self.registry.upgrade() else { return };
        registry.change(|entries| {
            let Some(entry) = entries.get_mut(self.id) else { return };
            if let Keeping::Held(_) = entry.keeping {
                registry.outbox.put(self.id, event(entry));
            }
        });
    }
}

impl Observer for Watcher {
    fn renewed(&self, deadline: Instant) {
        self.tell(|entry| {
            entry.renewals += 1;
            entry.last_error = None;
            WatchEvent::Renewed { key: entry.owned.key(), count: 1, deadline }
        });
    }

    fn renewal_failed(&self, error: Arc<Error>, remaining: Duration) {
        self.tell(|entry| {
            entry.last_error = Some(error.clone());
            WatchEvent::RenewFailed { key: entry.owned.key(), count: 1, error, remaining }
        });
    }

    fn lost(&self, loss: Loss) {
        if let Some(registry) = self.registry.upgrade() {
            registry.lost(self.id, loss);
        }
    }
}
