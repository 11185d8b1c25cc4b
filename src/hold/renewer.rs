//! Renews a held lock, and releases it in the end: one renewer per lock.
//!
//! A renewer exists from the moment the lock is obtained, and runs as a task while there is something to do for it
//! (`scheduler.rs`). It renews the lock until the lock is no longer held, reports the reason, does what is left to do
//! at the server, and ends. Renewals that are due at the same time are sent together while their renewers rest; a
//! renewer runs when its renewal fails, or when something other than a renewal comes next. Dropping a guard only calls
//! its renewer. So a guard may be dropped on any thread, in a panic, or while the runtime shuts down.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use tokio::select;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, Span, info_span};

use super::scheduler::Handle;
use super::{FinalStep, Hold, Renewing, timing};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::report::{debug, warn};
use crate::store::Verdict;
use crate::{Error, Loss};

impl Shared {
    /// Renews the lock from now on, until it is no longer held.
    pub(crate) fn keep(self: &Arc<Self>, hold: Arc<Hold>, runtime: &Runtime) -> Handle {
        let due = hold.first_duty();
        self.schedulers.add(Renewer { hold, shared: self.clone() }, due, runtime)
    }

    /// Sends a renewal, and passes the server's verdict on to the hold. Returns the hold's.
    pub(crate) async fn renew(&self, hold: &Hold, renewing: Renewing) -> Result<Verdict, Error> {
        let deadline = hold.deadline();
        let timeout = timing::renewal_timeout(self.command_timeout, renewing.sent, deadline);
        let owned = hold.owned_by_all();
        let call = self.store.renew(&owned, renewing.ttl, renewing.how(), timeout);
        // The store keeps to its timeout; if it does not, the deadline still holds.
        let reply = timeout_at(deadline, call).await.unwrap_or_else(|_| Err(Error::timeout()));
        if reply.as_ref().is_err_and(Error::has_not_run) {
            hold.was_refused(renewing);
        }
        reply.map(|verdict| hold.confirm(renewing, verdict))
    }

    /// Sends renewals together. Each of them has time for a whole call.
    async fn renew_all(&self, renewals: &[DueRenewal]) -> Vec<Result<Verdict, Error>> {
        let timed_out = || renewals.iter().map(|_| Err(Error::timeout())).collect();
        if !self.store.capabilities().renews_batches {
            return timed_out();
        }
        let deadlines = renewals.iter().map(|renewal| renewal.renewer.hold.deadline());
        let Some(first) = deadlines.min() else { return Vec::new() };
        let locks: Vec<_> =
            renewals.iter().map(|renewal| (&renewal.renewer.hold.owned, renewal.renewing.ttl)).collect();
        // The store keeps to its timeout; if it does not, the first of the deadlines still holds.
        timeout_at(first, self.store.renew_batch(&locks, self.command_timeout)).await.unwrap_or_else(|_| timed_out())
    }
}

/// Renews one lock. An entry of the scheduler owns it; the tasks that work for the lock have clones.
#[derive(Clone)]
pub(crate) struct Renewer {
    pub(super) hold: Arc<Hold>,
    pub(super) shared: Arc<Shared>,
}

/// A renewal that is due, and may be sent together with others.
pub(super) struct DueRenewal {
    pub(super) renewer: Renewer,
    renewing: Renewing,
}

/// Sends renewals of one locker. Returns the replies in their order.
pub(super) async fn send_together(renewals: &[DueRenewal]) -> Vec<Result<Verdict, Error>> {
    match renewals.first() {
        Some(first) => first.renewer.shared.renew_all(renewals).await,
        None => Vec::new(),
    }
}

/// What a renewer does after its renewal was sent in a batch.
pub(super) enum AfterBatch {
    /// It rests until then.
    Rest(Instant),
    /// It runs: the renewal failed with this error, or the lock is lost.
    Run(Option<Error>),
}

impl DueRenewal {
    /// Passes the reply on to the hold.
    pub(super) fn conclude(&self, reply: Result<Verdict, Error>) -> AfterBatch {
        let Self { renewer, renewing } = self;
        match reply.map(|verdict| renewer.hold.confirm(*renewing, verdict)) {
            Ok(Verdict::Done) => {
                renewer.span().in_scope(|| renewer.report_renewed(*renewing));
                AfterBatch::Rest(renewer.hold.next_duty())
            }
            // The hold has the reason.
            Ok(Verdict::NotOurs(_)) => AfterBatch::Run(None),
            Err(error) => AfterBatch::Run(Some(error)),
        }
    }
}

/// What comes next for a lock.
enum Next {
    /// Nothing until then.
    Rest(Instant),
    /// Its end.
    Over(Loss),
}

impl Renewer {
    /// Does what there is to do; first what follows from `failure`, if a renewal failed in a batch. Returns when there
    /// is more to do, or `None` when the renewer is finished. `handle` is that of its entry.
    pub(super) async fn run(&self, handle: &Handle, failure: Option<Error>) -> Option<Instant> {
        async {
            match self.renew_when_due(handle, failure).await {
                Next::Rest(due) => Some(due),
                Next::Over(loss) => {
                    self.report_end(loss);
                    self.clean_up(handle).await;
                    None
                }
            }
        }
        .instrument(self.span())
        .await
    }

    /// Returns the renewal if it is all that is to do now, and may be sent together with others. The scheduler asks
    /// under its mutex.
    ///
    /// A renewal that could outlast the deadline is not sent together: its renewer has to watch the deadline as well.
    pub(super) fn due_renewal(&self, now: Instant) -> Option<DueRenewal> {
        let Self { hold, shared } = self;
        let is_alike = hold.owned.keys.len() == 1 && !hold.owned.mode.is_shared();
        // Where others may use the token, the renewal has to look who relies on the key.
        if !shared.store.capabilities().renews_batches || !is_alike || hold.may_share_token() {
            return None;
        }
        // The time for two calls, so that another try fits in before the deadline.
        let renewing = hold.renewing_when_due(now, shared.command_timeout.saturating_mul(2))?;
        Some(DueRenewal { renewer: self.clone(), renewing })
    }

    /// Reports the end of a lock that is renewed no longer, as the entry of its renewer has ended.
    ///
    /// If the lock is still held, its runtime shuts down, and no task would report the deadline. So the lock is
    /// reported lost at once: too early is safe, too late is not.
    pub(super) fn abandon(&self) {
        let loss = self.hold.end(Loss::Expired);
        // Nobody is left to release it either, so that nothing waits for that.
        self.hold.set_final_step(FinalStep::Nothing);
        drop(self.hold.take_final_step());
        if let (true, Some(observer)) = (loss != Loss::Released, self.hold.observer()) {
            observer.lost(loss);
        }
    }

    fn span(&self) -> Span {
        info_span!(parent: &self.hold.caller, "tenure.keep", key = %self.hold.owned.key())
    }

    /// The renewal loop. It ends when the lock is no longer held, for whatever reason, and when nothing is due.
    async fn renew_when_due(&self, handle: &Handle, failure: Option<Error>) -> Next {
        let hold = &*self.hold;
        let mut failure = failure.map(|error| self.note(error));
        let (mut failures, mut retry_at) = (0, None);
        loop {
            if let Err(loss) = hold.check() {
                // It may be only the clock that has shown it: this makes it known to all.
                return Next::Over(hold.end(loss));
            }
            if let Some(error) = failure.take() {
                failures += 1;
                retry_at = Some(self.report_failure(failures, error));
            }
            match retry_at.take() {
                None => {
                    let due = hold.next_duty();
                    if Instant::now() < due {
                        return Next::Rest(due);
                    }
                }
                Some(at) => select! {
                    // In this order: nothing is renewed after a release, even if a renewal is due as well.
                    biased;
                    // The guard was released or has another ttl: look again.
                    () = handle.called() => continue,
                    () = sleep_until(hold.deadline().min(at)) => {}
                },
            }
            if Instant::now() >= hold.deadline() {
                continue;
            }
            let renewing = hold.renewing(None, self.shared.may_run_for());
            let renewal = select! {
                // In this order: a release is not held up by a renewal. The renewal is given up; if the server runs it
                // all the same, it finds the lock released, or extends it once more.
                biased;
                () = handle.called() => continue,
                renewal = self.shared.renew(hold, renewing) => renewal,
            };
            match renewal {
                Ok(Verdict::Done) => {
                    failures = 0;
                    self.report_renewed(renewing);
                }
                // The hold has the reason, and is checked at the top of the loop.
                Ok(Verdict::NotOurs(_)) => {}
                Err(error) => failure = Some(self.note(error)),
            }
        }
    }

    /// Stores the error with the hold, even if the lock is lost by now: it may be the cause.
    fn note(&self, error: Error) -> Arc<Error> {
        let error = Arc::new(error);
        self.hold.failed(&error);
        error
    }

    fn report_renewed(&self, renewing: Renewing) {
        // The fields are only evaluated if somebody subscribes to the event.
        debug!(
            name: "tenure.renewed", remaining = ?remaining(&self.hold), took = ?renewing.sent.elapsed(),
            "renewed"
        );
        if let Some(observer) = self.hold.observer() {
            observer.renewed(self.hold.deadline());
        }
    }

    /// Returns when to try again. The first failure in a row is a warning; the others are logged at a lower level.
    fn report_failure(&self, failures: u32, error: Arc<Error>) -> Instant {
        let interval = self.hold.renewal_interval().unwrap_or_default();
        let remaining = remaining(&self.hold);
        let pause = timing::pause_after(failures, interval, remaining, fastrand::f64());
        if failures == 1 {
            warn!(name: "tenure.renew_failed", ?remaining, ?pause, %error, "could not renew, will try again");
        } else {
            debug!(
                name: "tenure.renew_failed", failures, ?remaining, ?pause, %error,
                "could not renew, will try again"
            );
        }
        let retry_at = Instant::now() + pause;
        if let Some(observer) = self.hold.observer() {
            observer.renewal_failed(error, remaining);
        }
        retry_at
    }

    fn report_end(&self, loss: Loss) {
        if loss == Loss::Released {
            return;
        }
        if matches!(loss, Loss::Taken | Loss::Missing) {
            // Nothing will be released that would note this.
            self.shared.queues.ended(&self.hold.owned);
        }
        let cause = self.hold.cause_of(loss);
        let cause = cause.as_deref().map(tracing::field::display);
        warn!(name: "tenure.lost", key = %self.hold.owned.key(), %loss, cause, "lost");
        if let Some(observer) = self.hold.observer() {
            observer.lost(loss);
        }
    }

    /// Does what the end of the lock leaves to do. While an explicit release is under way, that is not known yet.
    async fn clean_up(&self, handle: &Handle) {
        let final_step = loop {
            match self.hold.take_final_step() {
                Some(final_step) => break final_step,
                // The release ends with the guard, which then calls its renewer.
                None => handle.called().await,
            }
        };
        let register = || self.shared.cleanups.register(Cleanup::Release(self.hold.clone()));
        let (releases, pending) = match final_step {
            FinalStep::Release(pending) => (true, pending.unwrap_or_else(register)),
            FinalStep::Undo(pending) => (false, pending),
            FinalStep::Nothing => return,
        };
        if !pending.is_taken_over() {
            self.shared.clean_up(&self.hold, releases).await;
        }
    }
}

fn remaining(hold: &Hold) -> Duration {
    hold.deadline().saturating_duration_since(Instant::now())
}
