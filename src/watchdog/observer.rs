//! What a renewer reports to the registry about one watched lock.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::entries::{Entry, Keeping};
use super::events::WatchEvent;
use super::outbox::Id;
use super::registry::{End, Registry};
use crate::hold::Observer;
use crate::{Error, Loss};

/// Turns what the renewer of the lock with this id reports into events.
pub(super) struct RenewalObserver {
    /// Weak, as the registry owns the guard, the guard owns the hold, and the hold owns this.
    registry: Weak<Registry>,
    id: Id,
}

impl RenewalObserver {
    pub(super) fn new(registry: &Arc<Registry>, id: Id) -> Arc<Self> {
        Arc::new(Self { registry: Arc::downgrade(registry), id })
    }

    /// Reports an event while the lock is held here. Once somebody has ended the watching, later reports are dropped.
    fn report(&self, event: impl FnOnce(&mut Entry) -> WatchEvent) {
        let Some(registry) = self.registry.upgrade() else { return };
        registry.change(|entries| {
            let Some(entry) = entries.get_mut(self.id) else { return };
            if let Keeping::Held(_) = entry.keeping {
                registry.outbox.put(self.id, event(entry));
            }
        });
    }
}

impl Observer for RenewalObserver {
    fn renewed(&self, deadline: Instant) {
        self.report(|entry| {
            entry.renewals += 1;
            entry.last_error = None;
            WatchEvent::Renewed { key: entry.owned.key(), count: 1, deadline }
        });
    }

    fn renewal_failed(&self, error: Arc<Error>, remaining: Duration) {
        self.report(|entry| {
            entry.last_error = Some(error.clone());
            WatchEvent::RenewFailed { key: entry.owned.key(), count: 1, error, remaining }
        });
    }

    fn lost(&self, loss: Loss) {
        let Some(registry) = self.registry.upgrade() else { return };
        // Somebody else may be ending the watching at this moment, and then reports the loss (invariant 2).
        if let Some(Keeping::Held(guard)) = registry.take_out_if(self.id, |keeping| matches!(keeping, Keeping::Held(_)))
        {
            registry.finish(self.id, End::lost(loss, &guard.hold()));
        }
    }
}
