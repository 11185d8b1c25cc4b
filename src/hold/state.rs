//! The state of a hold.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Observer;
use super::bounds::whole_millis;
use super::renewing::Renewing;
use super::suspension;
use super::timing::{Drift, Renewal};
use crate::locker::cleanups::PendingCleanup;
use crate::metrics::{Held, Label};
use crate::{Error, Loss};

/// What changes while a lock is held. [`Hold`](super::Hold) guards it.
pub(super) struct State {
    pub(super) ttl: Duration,
    pub(super) renewal: Renewal,
    /// When the lock ends at the latest, if its request says so.
    pub(super) limit: Option<Limit>,
    /// For how long the machine had been suspended in all when these times were set. A suspension since then makes
    /// them that much earlier.
    pub(super) suspended: Duration,
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
    /// Counts the lock as held, while it is.
    pub(super) held: Held,
    /// As what it is counted.
    pub(super) label: Label,
    /// Fires when the lock is no longer held. Created when it is first asked for.
    pub(super) over: Option<CancellationToken>,
    /// Fires when the deadline moves closer. Created when the first future sleeps until the deadline.
    pub(super) shortened: Option<CancellationToken>,
}

/// When a lock ends at the latest.
#[derive(Clone, Copy)]
pub(super) struct Limit {
    pub(super) of_hold: Instant,
    /// Until when the server may be asked to keep the key: as long as the lock may be held, or has to stay taken. In
    /// the latter case the release at the limit has time to arrive.
    pub(super) of_key: Instant,
}

impl Limit {
    fn left_of_key(self, sent: Instant) -> Duration {
        whole_millis(self.of_key.saturating_duration_since(sent))
    }
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
    /// Makes the times earlier by what the machine was suspended since they were set. Returns the token to fire if the
    /// deadline is closer by that.
    pub(super) fn count_suspension(&mut self) -> Option<CancellationToken> {
        let total = suspension::total();
        let by = total.saturating_sub(self.suspended);
        if by.is_zero() {
            return None;
        }
        self.suspended = total;
        self.sent = suspension::earlier(self.sent, by);
        self.deadline = suspension::earlier(self.deadline, by);
        if let Some(limit) = &mut self.limit {
            limit.of_hold = suspension::earlier(limit.of_hold, by);
            limit.of_key = suspension::earlier(limit.of_key, by);
        }
        self.shortened.take()
    }

    pub(super) fn verdict(&self, now: Instant) -> Result<(), Loss> {
        match self.loss {
            Some(loss) => Err(loss),
            None if now >= self.deadline && self.ends_at_limit => Err(Loss::LimitReached),
            None if now >= self.deadline => Err(Loss::Expired),
            None => Ok(()),
        }
    }

    /// Returns the ttl of a request that is sent at `sent`, so that the server keeps the key no longer than it should.
    /// Never zero, which would delete the key.
    pub(super) fn within_limit(&self, sent: Instant, ttl: Duration) -> Duration {
        self.limit.map_or(ttl, |limit| ttl.min(limit.left_of_key(sent).max(Duration::from_millis(1))))
    }

    /// Returns the deadline that a request sets which was sent at `sent` with this ttl, and whether no other request
    /// could set a later one.
    pub(super) fn deadline(&self, drift: Drift, sent: Instant, ttl: Duration) -> (Instant, bool) {
        let deadline = drift.deadline(sent, ttl);
        match self.limit {
            Some(limit) if deadline >= limit.of_hold => (limit.of_hold, true),
            Some(limit) => (deadline, limit.left_of_key(sent) <= ttl),
            None => (deadline, false),
        }
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

    /// See [`Hold::next_duty`](super::Hold::next_duty).
    pub(super) fn next_duty(&self, origin: Instant) -> Instant {
        self.due(origin).map_or(self.deadline, |due| due.min(self.deadline))
    }

    pub(super) fn due(&self, origin: Instant) -> Option<Instant> {
        let due = self.renewal.due(self.sent, self.ttl.min(self.worth), origin)?;
        // The deadline can't move any more, and so close to the limit the renewal would find no loss that matters.
        let is_needless = |limit: Limit| self.interval().is_some_and(|interval| limit.of_hold < due + interval / 2);
        (!(self.ends_at_limit && self.limit.is_some_and(is_needless))).then_some(due)
    }
}
