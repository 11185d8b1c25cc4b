//! Handing a lock over to the next waiter of this process, in the same step as its release.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use super::queue::HandOver;
use crate::Error;
use crate::hold::{Grant, Owned};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::{Ending, HandedOver, Verdict, Wanted};

impl Shared {
    /// Releases the lock and gives it, in one step, to a waiter of this process, or to another process whose turn it
    /// is. Returns `None` if the lock is still held, as other grants rely on it.
    pub(crate) async fn hand_over(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        hand_over: HandOver,
        timeout: Duration,
    ) -> Result<Option<Verdict>, Error> {
        let (sent, wanted) = (Instant::now(), hand_over.wanted().clone());
        // If this fails, or is dropped, the hand-over is dropped: then the waiter learns that its outcome is unknown.
        let next = *hand_over.next();
        hand_over.send(self.cleanups.register(Cleanup::Undo(wanted.clone())), sent + timeout);
        // In case that the waiter isn't polled: also where the outcome stays unknown, or this is dropped.
        self.supervise_queues(&self.runtime()?);
        let call = self.store.hand_over(owned, ending, &wanted, &next, timeout);
        match timeout_at(sent + timeout, call).await.unwrap_or_else(|_| Err(Error::timeout()))? {
            HandedOver::Done { fencing_token, alone } => {
                debug!(name: "tenure.handed_over", key = %owned.key(), "handed over");
                let runtime = self.runtime()?;
                let grant = Grant {
                    spare_tokens: next.tokens.saturating_sub(1),
                    ..Grant::new(sent, wanted.ttl, fencing_token)
                };
                if !hand_over.granted(grant, alone) {
                    self.undo_hand_over(wanted, &runtime);
                }
                Ok(Some(Verdict::Done))
            }
            HandedOver::NotOurs(loss) => {
                hand_over.not_ours();
                Ok(Some(Verdict::NotOurs(loss)))
            }
            HandedOver::PassedBy => {
                if let Some(place) = hand_over.passed_by() {
                    self.leave_line(owned.key(), place, false, &self.runtime()?);
                }
                Ok(Some(Verdict::Done))
            }
            HandedOver::NotNow => {
                hand_over.not_now();
                Ok(None)
            }
        }
    }

    /// Undoes, in the background, a hand-over to a waiter that has left.
    fn undo_hand_over(self: &Arc<Self>, wanted: Arc<Wanted>, runtime: &Handle) {
        let (shared, pending) = (self.clone(), self.cleanups.register(Cleanup::Undo(wanted.clone())));
        runtime.spawn(async move {
            shared.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
            drop(pending);
        });
    }
}
