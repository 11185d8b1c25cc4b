//! What keeps a held lock alive, and releases it in the end: one renewer per lock.
//!
//! The renewer is there from the moment the lock is obtained, and runs as a task while there is something to do for it
//! (`scheduler.rs`). It renews until the lock is held no more, says why, does what is left to do at the server, and ends.
//! Renewals that are due at the same time are sent together, while their renewers rest: one of them runs when its
//! renewal fails, or is not the next thing to do. Dropping a guard only calls it: so a guard may be dropped on any
//! thread, in a panic, or while the runtime shuts down.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, Span, debug, info_span, warn};

use super::scheduler::{self, ScheduleHandle};
use super::{FinalStep, Hold, Renewing, timing};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::store::Verdict;
use crate::{Error, Loss};

impl Shared {
    /// Sees to it that the lock is kept.
    pub(crate) fn keep(self: &Arc<Self>, hold: Arc<Hold>, runtime: &Handle) -> ScheduleHandle<Renewer> {
        let due = hold.next_duty();
        self.schedulers.enter(Renewer { hold, shared: self.clone() }, due, runtime)
    }

    /// Sends a renewal. A definite answer is passed on to the hold.
    pub(crate) async fn renew(&self, hold: &Hold, renewing: Renewing) -> Result<Result<(), Loss>, Error> {
        let deadline = hold.deadline();
        let timeout = timing::renewal_timeout(self.command_timeout, renewing.sent, deadline);
        let call = self.store.renew(&hold.owned, renewing.ttl, renewing.how(), timeout);
        // The store keeps to its timeout; should it not, the deadline still holds.
        let answer = timeout_at(deadline, call).await.unwrap_or_else(|_| Err(Error::timeout()));
        if answer.as_ref().is_err_and(Error::has_not_run) {
            hold.was_refused(renewing);
        }
        answer.map(|renewed| learn(hold, renewing, renewed))
    }

    /// Sends renewals that all have the whole of a call's time.
    async fn renew_all(&self, errands: &[DueRenewal]) -> Vec<Result<Verdict, Error>> {
        let timed_out = || errands.iter().map(|_| Err(Error::timeout())).collect();
        if !self.store.capabilities().renews_batches {
            return timed_out();
        }
        let locks: Vec<_> = errands.iter().map(|errand| (&errand.hold.owned, errand.renewing.ttl)).collect();
        // As above: the first of their deadlines.
        match errands.iter().map(|errand| errand.hold.deadline()).min() {
            None => Vec::new(),
            Some(until) => match timeout_at(until, self.store.renew_batch(&locks, self.command_timeout)).await {
                Ok(answers) => answers,
                Err(_) => timed_out(),
            },
        }
    }
}

/// Passes on what the server has said to a renewal.
fn learn(hold: &Hold, renewing: Renewing, renewed: Verdict) -> Result<(), Loss> {
    match renewed {
        Verdict::Done => hold.renewed(renewing),
        Verdict::NotOurs(loss) => Err(hold.end(loss)),
    }
}

/// Keeps one lock.
pub(crate) struct Renewer {
    hold: Arc<Hold>,
    shared: Arc<Shared>,
}

/// A renewal that is due, to be sent along with those of others.
pub(crate) struct DueRenewal {
    hold: Arc<Hold>,
    shared: Arc<Shared>,
    renewing: Renewing,
}

impl scheduler::Job for Renewer {
    type DueRenewal = DueRenewal;
    type Outcome = (Renewing, Result<Verdict, Error>);
    type Failure = Error;

    fn run(self, failure: Option<Error>) -> impl Future<Output = Option<(Self, Instant)>> + Send + 'static {
        let span = self.span();
        self.keep(failure).instrument(span)
    }

    /// Where the deadline comes before the call is given up on, that has to be watched as well: not along with others.
    fn errand(&self, now: Instant) -> Option<DueRenewal> {
        let Self { hold, shared } = self;
        if !shared.store.capabilities().renews_batches || hold.owned.keys.len() != 1 {
            return None;
        }
        // Twice, so that another try fits in before the deadline.
        let renewing = hold.renewing_when_due(now, shared.command_timeout.saturating_mul(2))?;
        Some(DueRenewal { hold: hold.clone(), shared: shared.clone(), renewing })
    }

    async fn run_errands(errands: Vec<DueRenewal>) -> Vec<Self::Outcome> {
        let Some(shared) = errands.first().map(|errand| errand.shared.clone()) else { return Vec::new() };
        let answers = shared.renew_all(&errands).await;
        errands.iter().map(|errand| errand.renewing).zip(answers).collect()
    }

    fn conclude(&self, (renewing, answer): Self::Outcome) -> Result<Instant, Option<Error>> {
        match answer.map(|renewed| learn(&self.hold, renewing, renewed)) {
            Ok(Ok(())) => {
                self.span().in_scope(|| self.tell_renewed(renewing));
                Ok(self.hold.next_duty())
            }
            // The hold knows.
            Ok(Err(_)) => Err(None),
            Err(error) => Err(Some(error)),
        }
    }
}

/// What is next for a lock.
enum Next {
    /// Nothing until then.
    Rest(Instant),
    /// Its end.
    Over(Loss),
}

impl Renewer {
    fn span(&self) -> Span {
        info_span!(parent: None, "tenure.keep", key = %self.hold.owned.key())
    }

    async fn keep(self, failure: Option<Error>) -> Option<(Self, Instant)> {
        match self.renew_when_due(failure).await {
            Next::Rest(until) => return Some((self, until)),
            Next::Over(Loss::Released) => {}
            Next::Over(loss) => {
                let cause = self.hold.cause_of(loss);
                let cause = cause.as_deref().map(tracing::field::display);
                warn!(name: "tenure.lost", key = %self.hold.owned.key(), %loss, cause, "lost");
                if let Some(observer) = self.hold.observer() {
                    observer.lost(loss);
                }
            }
        }
        self.clean_up().await;
        None
    }

    /// The renewal loop. Ends when the lock is held no more, for whatever reason, and when nothing is due.
    async fn renew_when_due(&self, failure: Option<Error>) -> Next {
        let hold = &*self.hold;
        let mut failure = failure.map(|error| self.note(error));
        let (mut failures, mut retry_at) = (0, None);
        loop {
            if let Err(loss) = hold.check() {
                // Also when the clock alone says so: now everybody learns it.
                return Next::Over(hold.end(loss));
            }
            if let Some(error) = failure.take() {
                failures += 1;
                retry_at = Some(self.tell_failed(failures, error));
            }
            match retry_at.take() {
                None => {
                    let due = hold.next_duty();
                    if Instant::now() < due {
                        return Next::Rest(due);
                    }
                }
                Some(at) => select! {
                    // In this order: after a release nothing is renewed any more, even when a renewal is due as well.
                    biased;
                    // Released, or another ttl.
                    () = hold.changed() => continue,
                    () = sleep_until(hold.deadline().min(at)) => {}
                },
            }
            if Instant::now() >= hold.deadline() {
                continue;
            }
            let renewing = hold.renewing(None, self.shared.patience());
            let renewal = select! {
                biased;
                // Given up on: should it still be run, it finds the lock released, or extends it once more.
                () = hold.changed() => continue,
                renewal = self.shared.renew(hold, renewing) => renewal,
            };
            match renewal {
                Ok(Ok(())) => {
                    failures = 0;
                    self.tell_renewed(renewing);
                }
                // Learned at the top of the loop.
                Ok(Err(_)) => {}
                Err(error) => failure = Some(self.note(error)),
            }
        }
    }

    /// Keeps the error, which counts also where the lock is lost by now.
    fn note(&self, error: Error) -> Arc<Error> {
        let error = Arc::new(error);
        self.hold.failed(&error);
        error
    }

    fn tell_renewed(&self, renewing: Renewing) {
        // Looked at only where it is told.
        debug!(
            name: "tenure.renewed", remaining = ?remaining(&self.hold), took = ?renewing.sent.elapsed(),
            "renewed"
        );
        if let Some(observer) = self.hold.observer() {
            observer.renewed(self.hold.deadline());
        }
    }

    /// Answers when to try again. The first failure of a row is told, the others more quietly.
    fn tell_failed(&self, failures: u32, error: Arc<Error>) -> Instant {
        let interval = self.hold.renewal_interval().unwrap_or_default();
        let remaining = remaining(&self.hold);
        let pause = timing::pause_after(failures, interval, remaining, fastrand::f64());
        if failures == 1 {
            warn!(name: "tenure.renew_failed", ?remaining, ?pause, %error, "could not renew, will try again");
        } else {
            debug!(name: "tenure.renew_failed", failures, ?remaining, ?pause, %error, "could not renew, will try again");
        }
        let retry_at = Instant::now() + pause;
        if let Some(observer) = self.hold.observer() {
            observer.renewal_failed(error, remaining);
        }
        retry_at
    }

    /// Does what the end of the lock has left to do: known already, or as soon as an explicit release has said.
    async fn clean_up(&self) {
        let final_step = loop {
            match self.hold.take_final_step() {
                Some(final_step) => break final_step,
                None => self.hold.changed().await,
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

impl Drop for Renewer {
    /// A renewer that ends while the lock is held, because its runtime shuts down, leaves a lock that nobody renews and
    /// whose deadline nobody announces: said at once, since too early is safe and too late is not.
    fn drop(&mut self) {
        let loss = self.hold.end(Loss::Expired);
        // Nobody is left to release it either: let no one wait for that.
        self.hold.settle(FinalStep::Nothing);
        drop(self.hold.take_final_step());
        if let (true, Some(observer)) = (loss != Loss::Released, self.hold.observer()) {
            observer.lost(loss);
        }
    }
}
