//! Releasing a lock: by its holder, or in the background.

use std::sync::Arc;

use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use super::{Hold, Owned, timing};
use crate::Error;
use crate::locker::shared::Shared;
use crate::store::{Ending, Verdict};

impl Shared {
    /// Releases, trying again after failures, until then.
    ///
    /// After a try of unknown outcome the lock may be free by that very try, and whoever has it now got it rightly:
    /// then "not ours" is a success.
    ///
    /// Whatever comes after the first try ends the owner's grant alone: the lock may have been obtained again by then.
    pub(crate) async fn release(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        until: Instant,
    ) -> Result<Verdict, Error> {
        Self::check_runtime()?;
        let mut handed_over = None;
        if let Some(hand_over) = self.store.capabilities().hands_over.then(|| self.queues.next(owned)).flatten() {
            let patience = self.command_timeout.min(until.saturating_duration_since(Instant::now()));
            handed_over = Some(self.hand_over(owned, ending, hand_over, patience).await);
        }
        if let Some(Ok(Some(released))) = handed_over {
            return Ok(released);
        }
        let ending = if matches!(handed_over, Some(Err(_))) { Ending::Grant } else { ending };
        let (released, doubtful) = self.release_until(owned, ending, until).await?;
        Ok(if doubtful || matches!(handed_over, Some(Err(_))) { Verdict::Done } else { released })
    }

    /// Answers also whether a try of unknown outcome came before.
    async fn release_until(&self, owned: &Owned, mut ending: Ending, until: Instant) -> Result<(Verdict, bool), Error> {
        let (mut failures, mut doubtful) = (0, false);
        loop {
            let now = Instant::now();
            let timeout = timing::call_timeout(self.command_timeout, now, until);
            let call = self.store.release(owned, ending, timeout);
            let error = match timeout_at(until, call).await.unwrap_or_else(|_| Err(Error::timeout())) {
                Ok(released) => return Ok((released, doubtful)),
                Err(error) => error,
            };
            failures += 1;
            if !error.has_not_run() {
                (doubtful, ending) = (true, Ending::Grant);
            }
            let remaining = until.saturating_duration_since(Instant::now());
            let pause = timing::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
            if !error.is_transient() || pause >= remaining {
                return Err(error);
            }
            sleep(pause).await;
        }
    }

    /// Does what the end of a lock has left to do: ends its grant, if that is not done, and then undoes what an attempt
    /// of unknown outcome may leave.
    pub(crate) async fn clean_up(self: &Arc<Self>, hold: &Hold, releases: bool) {
        if releases {
            // Until the ttl has done the same, whichever of those that were asked for; for one call, at least.
            let until = hold.kept_until().max(Instant::now() + self.command_timeout);
            match self.release(&hold.owned, Ending::Grant, until).await {
                Ok(outcome) => info!(name: "tenure.released", ?outcome, "released in the background"),
                Err(error) => {
                    warn!(name: "tenure.release_failed", %error, "could not release; the ttl will free the lock");
                }
            }
        }
        if let Some(latest) = &hold.doubt {
            let left = hold.kept_until().saturating_duration_since(Instant::now());
            self.undo(&hold.owned, latest, left).await;
        }
    }
}
