//! Undoes what an attempt of unknown outcome may have left at the server.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::{Owned, timing};
use crate::Error;
use crate::locker::shared::Shared;
use crate::report::{debug, warn};
use crate::store::{Latest, Undone};

/// The timeout of the last call, which is made when the time for all of them is over.
const LAST_LOOK: Duration = Duration::from_millis(100);

impl Shared {
    /// Undoes what a request of unknown outcome has left, as often as it takes. The request may still wait to be run,
    /// on a connection that has broken or behind another call, but the server won't run it after `latest` by its own
    /// clock. Gives up when the ttl has done the same.
    pub(crate) async fn undo(&self, owned: &Owned, latest: &Latest, ttl: Duration) {
        let until = Instant::now() + self.command_timeout + ttl;
        let mut failures = 0;
        let error = loop {
            let timeout = timing::call_timeout(self.command_timeout, Instant::now(), until).max(LAST_LOOK);
            let call = self.store.undo(owned, latest, timeout);
            let pause = match timeout_at(until + LAST_LOOK, call).await.unwrap_or_else(|_| Err(Error::timeout())) {
                Ok(Undone::Complete) => {
                    debug!(name: "tenure.undone", key = %owned.key(), "undid an attempt of unknown outcome");
                    return;
                }
                // What it has left is gone, and what it may still leave ends with its ttl.
                Ok(Undone::MayRun(_)) if Instant::now() >= until => return,
                Ok(Undone::MayRun(within)) => {
                    failures = 0;
                    within
                }
                Err(error) => {
                    failures += 1;
                    let remaining = until.saturating_duration_since(Instant::now());
                    let pause = timing::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
                    if !error.is_transient() || pause >= remaining {
                        break error;
                    }
                    pause
                }
            };
            // If the server's clock was set back, or another server replies, the pause may be far too long: it ends
            // with the ttl.
            sleep_until(until.min(Instant::now() + pause)).await;
        };
        warn!(
            name: "tenure.undo_failed", key = %owned.key(), %error,
            "could not undo an attempt of unknown outcome; its ttl will free the lock"
        );
    }
}
