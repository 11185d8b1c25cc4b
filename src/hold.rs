//! Decides whether a lock is held.
//!
//! The guard, its renewer and the futures that wait for a loss share one [`Hold`] and read its deadline. Nothing else
//! in the crate decides whether a lock is held. Invariants:
//!
//! 1. Only a confirmed request moves the deadline forward. The new deadline counts from before the request was sent.
//! 2. A lock that is no longer held stays that way: the loss is set once, before the cancellation token fires.
//! 3. A deadline that has passed is the loss `Expired`, or `LimitReached`, whoever notices it first. No later reply
//!    changes that.
//! 4. A request that makes the ttl shorter counts from the moment it is sent, since the server may run it at any time
//!    after that. The reply to a request that was sent before it no longer counts, since the server may have run that
//!    one first.
//! 5. While the outcome of such a request is unknown, the server may still run it, even after a request that it
//!    confirms in the meantime. So no confirmation counts for more than that ttl.
//! 6. One step decides the loss and what is left to do about it: nobody sees one without the other.
//! 7. A renewal of unknown outcome may be run after the release. By a token that others may use it would record, where
//!    one of them has the lock by then, that this hold relies on it. So the grant is ended once more when the server no
//!    longer runs that renewal.
//! 8. No deadline is later than the limit of a hold that has one, and nothing is asked of the server beyond that: the
//!    ttl of each request ends there, or with the minimum of the hold (9) if that is longer. It is the limit that
//!    ends the hold if no request could have moved the deadline further; otherwise the hold expires.
//! 9. A hold with a minimum, counted from when its grant was known, has its keys stay taken until that has passed:
//!    after a release, a drop, or the end at its limit. A hold that expires leaves its keys taken for no longer than
//!    the last confirmed ttl, but doesn't free them before that. After any other loss, nobody may touch what another
//!    may hold; of several keys, those that are still ours stay taken.
//! 10. The server's clock goes on while this machine is suspended. All times that a hold compares with now are made
//!     earlier by that first: [`Hold::current`] returns them so.

mod bounds;
mod claim;
mod downgrade;
mod owned;
mod release;
mod renewer;
mod renewing;
pub(crate) mod scheduler;
mod state;
pub(crate) mod suspension;
mod take_over;
#[cfg(test)]
mod tests;
pub(crate) mod timing;
mod undo;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

pub(crate) use self::bounds::{Bounds, Terms};
pub(crate) use self::owned::{GrantId, Owned};
pub(crate) use self::renewing::Renewing;
pub(crate) use self::state::FinalStep;
use self::state::{Limit, State, Unresolved};
use self::suspension::Reading;
use self::timing::Drift;
use crate::metrics::{self, Held, Label};
use crate::report::warn;
use crate::store::{Latest, Verdict};
use crate::sync::{Mutex, MutexGuard};
use crate::{Error, Loss};

/// A grant of the server, and when it was requested.
pub(crate) struct Grant {
    pub(crate) sent: Instant,
    pub(crate) ttl: Duration,
    pub(crate) fencing_token: Option<u64>,
    /// How many fencing tokens after this one are reserved for the next holders in this process.
    pub(crate) spare_tokens: u64,
    /// Until when the server may run an earlier attempt of the same request, if one had an unknown outcome.
    pub(crate) doubt: Option<Arc<Latest>>,
    /// If the lock is taken over from an earlier holder: until when the server may keep it by that one's requests.
    pub(crate) kept_until: Option<Instant>,
    /// What the clocks said about `sent` when the grant was taken, a moment ago.
    pub(crate) taken: Option<Reading>,
}

impl Grant {
    pub(crate) fn new(sent: Instant, ttl: Duration, fencing_token: Option<u64>) -> Self {
        Self { sent, ttl, fencing_token, spare_tokens: 0, doubt: None, kept_until: None, taken: None }
    }

    /// Returns whether the lock is taken over from an earlier holder of this process, whose token the server keeps.
    pub(crate) fn is_taken_over(&self) -> bool {
        self.kept_until.is_some()
    }
}

/// One lock, from its grant until it is no longer held.
pub(crate) struct Hold {
    pub(crate) owned: Owned,
    pub(crate) metadata: Box<[u8]>,
    /// Fixed when the lock is obtained. Read from the server after a loss, it could be the next holder's.
    pub(crate) fencing_token: Option<u64>,
    /// See [`Grant::spare_tokens`].
    spare_tokens: u64,
    /// Whether a user has read the token, and may use it for another grant of the lock.
    is_token_known: AtomicBool,
    /// The server may have turned the lock into a reader's share. It doesn't count as held any longer.
    may_be_reader: AtomicBool,
    /// A release was sent, so that the server's verdict "not ours" on another one need not tell of a loss.
    may_be_released: AtomicBool,
    /// See [`Grant::doubt`]: what the server runs until then has to be undone after the release.
    pub(crate) doubt: Option<Arc<Latest>>,
    /// Whether a part of the lock may be left at the server after a verdict that it is not ours: some of several keys,
    /// or of several nodes, or the record of grants.
    has_parts: bool,
    /// Several servers decide, each by itself.
    is_voted_on: bool,
    bounds: Bounds,
    /// Until when the keys stay taken, whatever becomes of the hold (invariant 9). In the past if they don't.
    stays_until: Instant,
    drift: Drift,
    /// Where the grid of renewals begins. All locks of a locker share it.
    origin: Instant,
    /// See [`Terms::caller`].
    caller: Span,
    state: Mutex<State>,
}

/// Is notified by the renewer of what happens to the lock: any number of renewals and failures, and then the end.
///
/// The renewer's task calls these functions and has renewals to send, so they must not block.
pub(crate) trait Observer: Send + Sync {
    /// A renewal was confirmed: the lock is held until `deadline`.
    fn renewed(&self, deadline: Instant);

    /// A renewal failed. It is tried again as long as time remains.
    fn renewal_failed(&self, error: Arc<Error>, remaining: Duration);

    /// The lock is lost. May be called twice. Not called for a lock that was released.
    fn lost(&self, loss: Loss);
}

impl Hold {
    pub(crate) fn new(
        owned: Owned,
        metadata: Box<[u8]>,
        grant: &Grant,
        drift: Drift,
        terms: Terms,
        origin: Instant,
        is_voted_on: bool,
    ) -> Self {
        let Terms { renewal, bounds, caller } = terms;
        let taken = grant.taken.unwrap_or_else(|| suspension::read(grant.sent));
        let Reading { now, real: sent, total: suspended } = taken;
        let stays_until = now + bounds.at_least;
        let limit = bounds.at_most.map(|limit| timing::after(sent, limit));
        let mut state = State {
            ttl: grant.ttl,
            renewal,
            limit: limit.map(|of_hold| Limit { of_hold, of_key: of_hold.max(stays_until) }),
            suspended,
            sent,
            worth: grant.ttl,
            deadline: sent,
            ends_at_limit: false,
            kept_until: (now + grant.ttl).max(grant.kept_until.unwrap_or(sent)),
            epoch: 0,
            unresolved: Vec::new(),
            recording: Vec::new(),
            last_error: None,
            loss: None,
            final_step: None,
            observer: None,
            held: Held::default(),
            label: Label::default(),
            over: None,
            shortened: None,
        };
        (state.deadline, state.ends_at_limit) = state.deadline(drift, sent, grant.ttl);
        Self {
            has_parts: is_voted_on || owned.keys.len() > 1 || owned.has_record(),
            is_voted_on,
            owned,
            metadata,
            fencing_token: grant.fencing_token,
            spare_tokens: grant.spare_tokens,
            is_token_known: AtomicBool::new(false),
            may_be_reader: AtomicBool::new(false),
            may_be_released: AtomicBool::new(false),
            doubt: grant.doubt.clone(),
            bounds,
            stays_until,
            drift,
            origin,
            caller,
            state: Mutex::new(state),
        }
    }

    /// Returns whether the lock is held now. It reads the clock, so the result is right even if no task of the crate
    /// has run for a while. The first call that finds the deadline passed ends the hold.
    pub(crate) fn check(&self) -> Result<(), Loss> {
        let (verdict, has_ended) = {
            let state = self.current();
            (state.verdict(Instant::now()), state.loss.is_some())
        };
        match verdict {
            Err(loss) if !has_ended => Err(self.end(loss)),
            verdict => verdict,
        }
    }

    pub(crate) fn drift(&self) -> Drift {
        self.drift
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.current().deadline
    }

    /// Returns until when the server may keep the lock unless it is released. Never before the deadline.
    pub(crate) fn kept_until(&self) -> Instant {
        self.state().kept_until
    }

    /// Returns until when the keys stay taken after the release of the lock, if that is not over yet (invariant 9).
    pub(crate) fn stays_until(&self) -> Option<Instant> {
        if self.bounds.at_least.is_zero() || self.stays_until <= Instant::now() {
            return None;
        }
        let state = self.current();
        match state.loss {
            None | Some(Loss::Released | Loss::LimitReached) => Some(self.stays_until),
            // The deadline lies before the end of the ttl: to free the key there would be too early.
            Some(Loss::Expired) => Some(self.stays_until.min(state.sent + state.worth)),
            // Of several keys, others may still be ours: no store leaves to nobody what is not.
            Some(Loss::Taken | Loss::Missing) if self.owned.keys.len() == 1 => None,
            // On a node of a quorum that is behind, a key may still be ours that is another's by the votes of the
            // others.
            Some(Loss::Taken | Loss::Missing) if self.is_voted_on => {
                Some(self.stays_until.min(state.sent + state.worth))
            }
            Some(Loss::Taken | Loss::Missing) => Some(self.stays_until),
        }
    }

    pub(crate) fn ttl(&self) -> Duration {
        self.state().ttl
    }

    /// Returns when there is something to do for the lock: the time of the next renewal, if there is one, or else the
    /// deadline.
    pub(crate) fn next_duty(&self) -> Instant {
        self.current().next_duty(self.origin)
    }

    /// Returns what [`next_duty`](Self::next_duty) does. For a new hold: it was made from a reading of the clocks.
    pub(crate) fn first_duty(&self) -> Instant {
        self.state().next_duty(self.origin)
    }

    pub(crate) fn renewal_interval(&self) -> Option<Duration> {
        self.state().interval()
    }

    /// Returns the token that fires when the lock is no longer held. Users only get children of it: cancelling one of
    /// those must not end the lock.
    pub(crate) fn over(&self) -> CancellationToken {
        let mut state = self.state();
        let is_late = state.loss.is_some() && state.over.is_none();
        let over = state.over.get_or_insert_default().clone();
        if is_late {
            // Under the mutex, as nobody waits for it yet.
            over.cancel();
        }
        over
    }

    /// Notifies the observer from now on. Fails if the lock is no longer held: so an observer is notified of the end of
    /// every lock that it observes.
    pub(crate) fn observe(&self, observer: Arc<dyn Observer>) -> Result<(), Loss> {
        let mut state = self.current();
        state.verdict(Instant::now())?;
        state.observer = Some(observer);
        Ok(())
    }

    /// Counts the lock as held from now until the end of the hold.
    pub(crate) fn count(&self, held: Held) {
        let mut state = self.state();
        (state.label, state.held) = (held.label(), held);
    }

    /// Notes that the lock is about to be released. Returns whether that may have happened before.
    pub(crate) fn begin_release(&self) -> bool {
        self.may_be_released.swap(true, Ordering::Relaxed)
    }

    /// Reports a loss that only the release has found.
    pub(crate) fn report_lost_before_release(&self, loss: Loss) {
        let label = self.state().label.clone();
        warn!(name: "tenure.lost", key = %self.owned.key(), %loss, "found lost when it was released");
        metrics::lost(&label, loss);
    }

    pub(crate) fn observer(&self) -> Option<Arc<dyn Observer>> {
        self.state().observer.clone()
    }

    /// Notes that a renewal is about to be sent: for the current ttl, or for at least `ttl`. The server refuses to run
    /// it after `may_run_for`.
    pub(crate) fn renewing(&self, ttl: Option<Duration>, may_run_for: Duration) -> Renewing {
        let mut state = self.current();
        let (sent, unlimited) = (Instant::now(), ttl.unwrap_or(state.ttl));
        let ttl = state.within_limit(sent, unlimited);
        state.kept_until = state.kept_until.max(sent + may_run_for + ttl);
        self.will_record(&mut state, sent, may_run_for);
        Renewing { sent, ttl, unlimited, exact: false, epoch: state.epoch }
    }

    /// Returns the renewal that is due, if there is one, it can share a call with others, and it may take `time`
    /// without outlasting the deadline. `sent` is now, or a moment ago.
    pub(crate) fn renewing_when_due(&self, sent: Instant, time: Duration) -> Option<Renewing> {
        // It has a record of its own to keep.
        if self.owned.grant.is_some() {
            return None;
        }
        let mut state = self.current();
        state.verdict(sent).ok()?;
        let due = state.due(self.origin)?;
        let is_one_of_many = due <= sent && time <= state.deadline - sent;
        let (ttl, unlimited) = (state.within_limit(sent, state.ttl), state.ttl);
        if is_one_of_many {
            state.kept_until = state.kept_until.max(sent + time + ttl);
        }
        is_one_of_many.then_some(Renewing { sent, ttl, unlimited, exact: false, epoch: state.epoch })
    }

    /// Notes that a renewal is about to be sent that sets the ttl to exactly `ttl` (invariant 4). The server refuses to
    /// run it after `may_run_for`.
    pub(crate) fn setting_ttl(&self, ttl: Duration, may_run_for: Duration) -> Renewing {
        let mut state = self.current();
        let (sent, unlimited) = (Instant::now(), ttl);
        let ttl = state.within_limit(sent, unlimited);
        state.epoch = state.epoch.wrapping_add(1);
        let (deadline, ends_at_limit) = state.deadline(self.drift, sent, ttl);
        if deadline < state.deadline {
            (state.deadline, state.ends_at_limit) = (deadline, ends_at_limit);
        }
        state.kept_until = state.kept_until.max(sent + may_run_for + ttl);
        state.ttl = state.ttl.min(unlimited);
        let epoch = state.epoch;
        state.unresolved.retain(|earlier| sent < earlier.until);
        state.unresolved.push(Unresolved { epoch, ttl, until: sent + may_run_for });
        self.will_record(&mut state, sent, may_run_for);
        let shortened = state.shortened.take();
        drop(state);
        // Outside the mutex, as it runs wakers of users.
        if let Some(shortened) = shortened {
            shortened.cancel();
        }
        Renewing { sent, ttl, unlimited, exact: true, epoch }
    }

    /// Notes that a renewal is about to be sent which records the grant, if there is a record: of a shared grant, the
    /// server keeps nothing else, so that a late renewal finds it gone.
    fn will_record(&self, state: &mut State, sent: Instant, may_run_for: Duration) {
        if self.owned.has_record() {
            state.recording.retain(|(_, until)| sent < *until);
            state.recording.push((sent, sent + may_run_for));
        }
    }

    /// Returns until when the server may still record the grant, if it may.
    pub(crate) fn may_record_until(&self) -> Option<Instant> {
        self.state().may_record_until(Instant::now())
    }

    /// Returns whether something that was sent for this hold may be run after its end, and has to be undone then.
    pub(crate) fn has_late_requests(&self) -> bool {
        self.may_be_late(&self.state())
    }

    fn may_be_late(&self, state: &State) -> bool {
        let may_record = || !state.recording.is_empty() && state.may_record_until(Instant::now()).is_some();
        self.doubt.is_some() || may_record()
    }

    /// Notes that the server has refused a renewal and will not run it.
    pub(crate) fn was_refused(&self, renewing: Renewing) {
        let mut state = self.state();
        state.has_replied(renewing);
        if renewing.exact {
            state.unresolved.retain(|request| request.epoch != renewing.epoch);
        }
    }

    /// Returns a token that fires when the deadline next moves closer. A future that sleeps until the deadline then has
    /// to read it again.
    pub(crate) fn shortened(&self) -> CancellationToken {
        self.state().shortened.get_or_insert_default().clone()
    }

    /// Applies the server's verdict on a renewal. Returns that of the hold: a lock that is no longer held stays lost,
    /// even if the server has extended it.
    pub(crate) fn confirm(&self, renewing: Renewing, verdict: Verdict) -> Verdict {
        self.state().has_replied(renewing);
        match verdict {
            Verdict::Done => self.renewed(renewing).err().map_or(Verdict::Done, Verdict::NotOurs),
            Verdict::NotOurs(loss) => Verdict::NotOurs(self.end(loss)),
        }
    }

    /// Applies the confirmation of a renewal. Returns the loss if the lock is no longer held.
    fn renewed(&self, renewing: Renewing) -> Result<(), Loss> {
        let mut state = self.current();
        let now = Instant::now();
        if let Err(loss) = state.verdict(now) {
            drop(state);
            self.end(loss);
            return Err(loss);
        }
        let left = state.deadline.saturating_duration_since(now);
        state.last_error = None;
        if renewing.epoch == state.epoch {
            // A request that may be run after this one counts from this one at the earliest (invariant 5).
            let may_follow = state.unresolved.iter().filter(|request| {
                renewing.sent < request.until && !(renewing.exact && request.epoch == renewing.epoch)
            });
            let worth = may_follow.map(|request| request.ttl).fold(renewing.ttl, Duration::min);
            let sent = suspension::real(renewing.sent);
            let (deadline, ends_at_limit) = state.deadline(self.drift, sent, worth);
            if deadline >= state.deadline {
                (state.deadline, state.ends_at_limit) = (deadline, ends_at_limit);
            }
            if sent >= state.sent {
                state.sent = sent;
                // The limit makes renewals no more frequent.
                state.worth = if worth < renewing.ttl { worth } else { renewing.unlimited };
            }
            if renewing.exact {
                state.ttl = renewing.unlimited;
            }
        }
        if renewing.exact {
            // The server has run it. Requests that were sent before now may have been run before it, and their replies
            // may come after it.
            let has_run = state.unresolved.iter_mut().filter(|request| request.epoch == renewing.epoch);
            has_run.for_each(|request| request.until = request.until.min(now));
        }
        let label = state.held.label();
        drop(state);
        metrics::renewed(&label, now.saturating_duration_since(renewing.sent), left);
        Ok(())
    }

    /// Notes why a renewal has failed.
    pub(crate) fn failed(&self, error: &Arc<Error>) {
        let mut state = self.current();
        // The timeout of a renewal that the deadline cut short explains less than the failure before it.
        let is_cut_short = error.is_timeout() && Instant::now() >= state.deadline;
        if state.last_error.is_none() || !is_cut_short {
            state.last_error = Some(error.clone());
        }
        let label = state.held.label();
        drop(state);
        metrics::renewal_failed(&label);
    }

    /// Returns why the latest renewal failed, if none has succeeded since.
    pub(crate) fn last_error(&self) -> Option<Arc<Error>> {
        self.state().last_error.clone()
    }

    /// Returns the cause of a loss, if it is known. Only an expiry has one: the other losses are verdicts of the
    /// server.
    pub(crate) fn cause_of(&self, loss: Loss) -> Option<Arc<Error>> {
        self.last_error().filter(|_| loss == Loss::Expired)
    }

    /// Ends the hold, and returns the loss that counts: the first one stays (invariant 2), and a deadline that has
    /// passed comes before any other (3).
    pub(crate) fn end(&self, loss: Loss) -> Loss {
        let mut state = self.state();
        if state.loss.is_none() {
            state = self.brought_up_to_date(state);
        }
        if let Some(loss) = state.loss {
            return loss;
        }
        let loss = state.verdict(Instant::now()).err().unwrap_or(loss);
        state.loss = Some(loss);
        if state.final_step.is_none() {
            // Under the same lock as the loss (invariant 6). After a release, the guard sets the final step.
            state.final_step = match loss {
                Loss::Released => None,
                // The server may have run a renewal whose reply never came, and would keep the key for a whole ttl.
                Loss::Expired | Loss::LimitReached => Some(FinalStep::Release(None)),
                Loss::Taken | Loss::Missing if self.has_parts || self.may_be_late(&state) => {
                    Some(FinalStep::Release(None))
                }
                Loss::Taken | Loss::Missing => Some(FinalStep::Nothing),
            };
        }
        self.has_ended(state, loss);
        loss
    }

    /// Fires the token, and counts the lock as held no longer.
    fn has_ended(&self, mut state: MutexGuard<'_, State>, loss: Loss) {
        let (held, over) = (std::mem::take(&mut state.held), state.over.clone());
        // After the loss is set, so that those who wake find it; and outside the mutex, as it runs wakers of users.
        drop(state);
        if let Some(over) = over {
            over.cancel();
        }
        held.end(loss);
    }

    /// Sets what is left to do, unless that is decided already. Returns whether anything is left. The caller has to
    /// call the renewer, or to remove it.
    pub(crate) fn set_final_step(&self, final_step: FinalStep) -> bool {
        let (refused, is_left) = {
            let mut state = self.state();
            let refused = match state.final_step {
                None => state.final_step.replace(final_step),
                // The same step, but from now on closing waits for it.
                Some(FinalStep::Release(None)) if matches!(final_step, FinalStep::Release(Some(_))) => {
                    state.final_step.replace(final_step)
                }
                Some(_) => Some(final_step),
            };
            (refused, !matches!(state.final_step, Some(FinalStep::Nothing)))
        };
        // Outside the mutex, as dropping a pending cleanup wakes tasks.
        drop(refused);
        is_left
    }

    /// Returns whether it is decided that nothing is left to do.
    pub(crate) fn nothing_left(&self) -> bool {
        matches!(self.state().final_step, Some(FinalStep::Nothing))
    }

    /// Takes what is left to do, once it is decided. Nothing is left after that.
    pub(crate) fn take_final_step(&self) -> Option<FinalStep> {
        let mut state = self.state();
        state.final_step.as_mut().map(|final_step| std::mem::replace(final_step, FinalStep::Nothing))
    }

    /// Returns what [`check`](Hold::check) would return, without ending the hold.
    #[cfg(test)]
    pub(crate) fn peek(&self) -> Peek {
        let state = self.current();
        let (limit, stays_until) = (state.limit.map(|limit| limit.of_hold), self.stays_until);
        Peek { verdict: state.verdict(Instant::now()), deadline: state.deadline, sent: state.sent, limit, stays_until }
    }

    /// Returns the state with its times as they are now (invariant 10).
    fn current(&self) -> MutexGuard<'_, State> {
        self.brought_up_to_date(self.state())
    }

    fn brought_up_to_date<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if let Some(shortened) = state.count_suspension() {
            // Outside the mutex, as it runs wakers of users.
            drop(state);
            shortened.cancel();
            state = self.state();
        }
        state
    }

    /// No code panics while it holds this mutex, so the state is sound even if the mutex is poisoned.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A snapshot of a hold.
#[cfg(test)]
pub(crate) struct Peek {
    pub(crate) verdict: Result<(), Loss>,
    pub(crate) deadline: Instant,
    pub(crate) sent: Instant,
    pub(crate) limit: Option<Instant>,
    pub(crate) stays_until: Instant,
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.current().verdict(Instant::now());
        f.debug_struct("Hold").field("keys", &self.owned.keys).field("verdict", &verdict).finish_non_exhaustive()
    }
}
