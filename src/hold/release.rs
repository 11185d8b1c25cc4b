//! Releases locks: for their holders, or in the background.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::{Hold, Owned, timing};
use crate::locker::late_releases::Releasing;
use crate::locker::shared::Shared;
use crate::report::{debug, warn};
use crate::store::{Ending, Verdict};
use crate::{Error, Loss};

/// What the server has said to a release.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Released {
    pub(crate) verdict: Verdict,
    /// To the first call. What a later one finds may have happened since.
    pub(crate) at_once: bool,
}

impl Shared {
    /// Releases the lock, or hands it over to a waiter of this process. Tries again after failures, until `until`. If
    /// the keys have to stay taken until a time, it leaves them to nobody instead, and hands nothing over.
    ///
    /// After a try of unknown outcome, the verdict "not ours" is a success: that try may have freed the lock, and
    /// another may rightly hold it now. Later tries only end the grant of `owned`, since the lock may have been
    /// obtained again by the same token. For the same reason, this goes on only when the server can't run the first try
    /// any longer, if that may end the grants of others.
    pub(crate) async fn release(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        stays_until: Option<Instant>,
        until: Instant,
    ) -> Result<Released, Error> {
        Self::check_runtime()?;
        let ends_all = ending == Ending::Lock && !owned.own_token;
        // If this future is dropped, this locker knows of a release that may come late. Each call ends by `until`.
        let releasing = ends_all.then(|| self.late_releases.begin(owned, until));
        let released = self.release_or_hand_over(owned, ending, stays_until, until).await;
        releasing.into_iter().for_each(Releasing::end);
        released
    }

    async fn release_or_hand_over(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        stays_until: Option<Instant>,
        until: Instant,
    ) -> Result<Released, Error> {
        let (mut handed_over, mut has_tried) = (None, false);
        let next = match stays_until {
            None if self.store.capabilities().hands_over => self.queues.next(owned),
            None => {
                self.queues.ended(owned);
                None
            }
            // The keys stay taken.
            Some(_) => None,
        };
        if let Some(hand_over) = next {
            let ends_others = self.ends_others(owned, ending);
            let now = Instant::now();
            let timeout = self.timeout_of_try(now, until, ends_others);
            handed_over = Some(self.hand_over(owned, ending, hand_over, timeout).await);
            has_tried = matches!(&handed_over, Some(Err(error)) if !error.has_not_run());
            if ends_others && has_tried {
                sleep_until(may_run_until(now, timeout)).await;
            }
        }
        if let Some(Ok(Some(verdict))) = handed_over {
            return Ok(Released { verdict, at_once: true });
        }
        let is_first = !matches!(handed_over, Some(Err(_)));
        let released = self.release_until(owned, ending, stays_until, until, has_tried).await?;
        Ok(Released { at_once: released.at_once && is_first, ..released })
    }

    /// Releases the lock. `has_tried`: a hand-over of unknown outcome came before.
    async fn release_until(
        &self,
        owned: &Owned,
        ending: Ending,
        stays_until: Option<Instant>,
        until: Instant,
        mut has_tried: bool,
    ) -> Result<Released, Error> {
        let mut failures = 0;
        loop {
            let now = Instant::now();
            let ending = if has_tried { Ending::Grant } else { ending };
            let ends_others = self.ends_others(owned, ending);
            let timeout = self.timeout_of_try(now, until, ends_others);
            let call = match stays_until.and_then(|stays_until| timing::rest_until(stays_until, now)) {
                Some(rest) => self.store.linger(owned, ending, rest, timeout),
                None => self.store.release(owned, ending, timeout),
            };
            let error = match call.await {
                Ok(_) if has_tried => return Ok(Released { verdict: Verdict::Done, at_once: false }),
                Ok(verdict) => return Ok(Released { verdict, at_once: failures == 0 }),
                Err(error) => error,
            };
            failures += 1;
            has_tried |= !error.has_not_run();
            if ends_others && has_tried {
                sleep_until(may_run_until(now, timeout)).await;
            }
            let remaining = until.saturating_duration_since(Instant::now());
            let pause = timing::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
            if !error.is_transient() || pause >= remaining {
                return Err(error);
            }
            sleep(pause).await;
        }
    }

    /// Returns whether a release may end the grants of others as well. A quorum waits for its nodes by itself.
    fn ends_others(&self, owned: &Owned, ending: Ending) -> bool {
        ending == Ending::Lock && !owned.own_token && !self.store.capabilities().undoes_attempts
    }

    /// Returns the timeout of a try. If its end is waited for, there is time left for that, and for another try.
    fn timeout_of_try(&self, now: Instant, until: Instant, is_awaited: bool) -> Duration {
        let timeout = timing::call_timeout(self.command_timeout, now, until);
        if is_awaited { timeout / 3 } else { timeout }
    }

    /// Does what the end of a lock leaves to do: ends its grant if `releases`, and then undoes what an attempt or a
    /// renewal of unknown outcome may have left.
    pub(crate) async fn clean_up(self: &Arc<Self>, hold: &Hold, releases: bool) {
        if releases {
            // Until the longest ttl that was ever requested has freed the lock; at least for one call.
            let until = hold.kept_until().max(Instant::now() + self.command_timeout);
            let is_released = hold.check() == Err(Loss::Released) && hold.as_reader().is_none();
            // Otherwise the end of its ttl explains that it is gone.
            let is_in_time = Instant::now() < hold.deadline();
            let was_held = !hold.begin_release() && is_released && is_in_time;
            match self.release(&hold.owned, Ending::Grant, hold.stays_until(), until).await {
                Ok(Released { verdict: Verdict::NotOurs(loss), at_once: true }) if was_held => {
                    hold.report_lost_before_release(loss);
                }
                Ok(Released { verdict: outcome, .. }) => {
                    debug!(name: "tenure.released", ?outcome, "released in the background");
                }
                Err(error) => {
                    warn!(name: "tenure.release_failed", %error, "could not release; the ttl will free the lock");
                }
            }
            if let Some(reader) = hold.as_reader() {
                let released = self.release_until(&reader, Ending::Grant, hold.stays_until(), until, true).await;
                if let Err(error) = released {
                    warn!(name: "tenure.release_failed", %error, "could not release; the ttl will free the lock");
                }
            }
        }
        if let Some(latest) = &hold.doubt {
            let left = hold.kept_until().saturating_duration_since(Instant::now());
            self.undo(&hold.owned, latest, left).await;
        }
        if let Some(until) = hold.may_record_until() {
            sleep_until(until).await;
            let until = Instant::now() + self.command_timeout;
            let stays_until = hold.stays_until();
            if let Err(error) = self.release_until(&hold.owned, Ending::Grant, stays_until, until, true).await {
                warn!(name: "tenure.undo_failed", key = %hold.owned.key(), %error, "a late renewal may keep the lock");
            }
        }
    }
}

/// Returns until when the server may run a call: its timeout, and as much again for what is not known of the server's
/// clock.
fn may_run_until(sent: Instant, timeout: Duration) -> Instant {
    sent + timeout * 2
}
