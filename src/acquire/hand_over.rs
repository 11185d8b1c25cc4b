//! Handing a lock over to the next waiter of this process, in the same step as its release.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::queue::HandOver;
use crate::Error;
use crate::hold::{Grant, Owned};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::store::{Ending, HandedOver, Released};

impl Shared {
    /// Releases the lock and gives it to one who waits for it here, in one step, or to another process whose turn it is.
    pub(crate) async fn hand_over(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        hand_over: HandOver,
        timeout: Duration,
    ) -> Result<Option<Released>, Error> {
        let (sent, wanted) = (Instant::now(), hand_over.wanted().clone());
        // Should it fail, or be dropped, the next one is told that nobody knows.
        let next = *hand_over.next();
        hand_over.send(self.cleanups.register(Cleanup::Undo(wanted.clone())), sent + timeout);
        let call = self.store.hand_over(owned, ending, &wanted, &next, timeout);
        match timeout_at(sent + timeout, call).await.unwrap_or_else(|_| Err(Error::timeout()))? {
            HandedOver::Done { fencing_token, alone } => {
                debug!(name: "tenure.handed_over", key = %owned.key(), "handed over");
                let grant = Grant { sent, ttl: wanted.ttl, fencing_token, doubt: None };
                let runtime = self.runtime()?;
                if hand_over.granted(grant, alone) {
                    // In case that it isn't polled.
                    self.supervise_queues(&runtime);
                } else {
                    let (shared, pending) = (self.clone(), self.cleanups.register(Cleanup::Undo(wanted.clone())));
                    runtime.spawn(async move {
                        shared.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
                        drop(pending);
                    });
                }
                Ok(Some(Released::Freed))
            }
            HandedOver::NotOurs(loss) => {
                hand_over.not_ours();
                Ok(Some(Released::NotOurs(loss)))
            }
            HandedOver::PassedBy => {
                hand_over.passed_by();
                Ok(Some(Released::Freed))
            }
            HandedOver::NotNow => {
                hand_over.not_now();
                Ok(None)
            }
        }
    }
}
