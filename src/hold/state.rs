//! The state of a hold.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Observer;
use super::bounds::whole_millis;
use super::renewing::Renewing;
use super::timing::Renewal;
use crate::locker::cleanups::PendingCleanup;
use crate::{Error, Loss};

/// What changes while a lock is held. [`Hold`](super::Hold) guards it.
pub(super) struct State {
    pub(super) ttl: Duration,
    pub(super) renewal: Renewal,
    /// When the lock ends at the latest, if its request says so.
    pub(super) limit: Option<Instant>,
    /// When the last confirmed request was sent.
    pub(super) sent: Instant,
    /// The ttl that the lock certainly has from then on, before drift. As if it were held without a limit.
    pub(super) worth: Duration,
    pub(super) deadline: Instant,
    /// The deadline can't move further, because of the limit.
    pub(super) ends_at_limit: bool,
    /// Until when the server may keep the lock, by all requests that were ever sent, confirmed or not.
    pub(super) kept_until: Instant,
    /// Counts the requests that set the ttl. A reply of an earlier epoch moves no deadline (invariant 4).
    pub(super) epoch: u32,
    /// The requests that set the ttl and whose outcome is unknown (invariant 5).
    pub(super) unresolved: Vec<Unresolved>,
    /// The renewals without a reply that write a record of grants: when each was sent, and until when the server may
    /// run it (invariant 7).
    pub(super) recording: Vec<(Instant, Instant)>,
    /// Why the latest renewal failed, if none has succeeded since.
    pub(super) last_error: Option<Arc<Error>>,
    pub(super) loss: Option<Loss>,
    pub(super) final_step: Option<FinalStep>,
    pub(super) observer: Option<Arc<dyn Observer>>,
    /// Fires when the deadline moves closer. Created when the first future sleeps until the deadline.
    pub(super) shortened: Option<CancellationToken>,
}

/// A request that sets the ttl to exactly `ttl`. The server may run it until `until`.
pub(super) struct Unresolved {
    pub(super) epoch: u32,
    pub(super) ttl: Duration,
    pub(super) until: Instant,
}

/// What the renewer has to do when the lock is no longer held.
pub(crate) enum FinalStep {
    /// Release the lock. [`Locker::close`](crate::Locker::close) waits for the pending cleanup; if there is none yet,
    /// the renewer registers it.
    Release(Option<PendingCleanup>),
    /// The lock is released: undo what earlier requests of unknown outcome may still leave.
    Undo(PendingCleanup),
    /// Nothing: the lock is released, or stays at the server as it is.
    Nothing,
}

impl State {
    pub(super) fn verdict(&self, now: Instant) -> Result<(), Loss> {
        match self.loss {
            Some(loss) => Err(loss),
            None if now >= self.deadline && self.ends_at_limit => Err(Loss::LimitReached),
            None if now >= self.deadline => Err(Loss::Expired),
            None => Ok(()),
        }
    }

    /// Returns the ttl of a request that is sent at `sent`, so that the server keeps the lock until the limit at most.
    /// Never zero, which would delete the key.
    pub(super) fn within_limit(&self, sent: Instant, ttl: Duration) -> Duration {
        let left = |limit: Instant| whole_millis(limit.saturating_duration_since(sent)).max(Duration::from_millis(1));
        self.limit.map_or(ttl, |limit| ttl.min(left(limit)))
    }

    /// Returns whether no request can keep the lock for longer than one that was sent at `sent` with this ttl.
    pub(super) fn reaches_limit(&self, sent: Instant, ttl: Duration) -> bool {
        let left = |limit: Instant| whole_millis(limit.saturating_duration_since(sent));
        self.limit.is_some_and(|limit| left(limit) <= ttl)
    }

    pub(super) fn may_record_until(&self, now: Instant) -> Option<Instant> {
        self.recording.iter().map(|(_, until)| *until).filter(|until| now < *until).max()
    }

    /// Notes that the server has run a renewal, or never will.
    pub(super) fn has_replied(&mut self, renewing: Renewing) {
        if let Some(place) = self.recording.iter().position(|(sent, _)| *sent == renewing.sent) {
            self.recording.swap_remove(place);
        }
    }

    pub(super) fn interval(&self) -> Option<Duration> {
        self.renewal.interval(self.ttl.min(self.worth))
    }

    pub(super) fn due(&self, origin: Instant) -> Option<Instant> {
        let due = self.renewal.due(self.sent, self.ttl.min(self.worth), origin)?;
        // A renewal this close to the limit gains nothing: no interval is longer than half of the ttl, so the last
        // request has reached the limit.
        let is_last = |limit| self.interval().is_some_and(|interval| limit < due + interval / 2);
        (!self.limit.is_some_and(is_last)).then_some(due)
    }
}
