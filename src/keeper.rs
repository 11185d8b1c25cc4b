//! What keeps a held lock alive, and releases it in the end: one keeper per lock.
//!
//! The keeper is there from the moment the lock is obtained, and runs as a task while there is something to do for it
//! (`roster.rs`). It renews until the lock is held no more, says why, does what is left to do at the server, and ends.
//! Renewals that are due at the same time are sent together, while their keepers rest: one of them runs when its
//! renewal fails, or is not the next thing to do. Dropping a guard only calls it: so a guard may be dropped on any
//! thread, in a panic, or while the runtime shuts down.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span, debug, info, info_span, warn};

use crate::attendant::Attendant;
use crate::debts::{Debt, Debts, Work};
use crate::hold::{Cleanup, Grant, GrantId, Hold, Owned, Renewing};
use crate::isolated::Isolated;
use crate::queue::{HandOver, Queues};
use crate::roster::{self, Place, Rosters};
use crate::store::{Ending, Extending, HandedOver, Latest, Released, Renewed, Store, Undone};
use crate::{Error, Loss, schedule};

/// What all keepers of one locker share.
#[derive(Debug)]
pub(crate) struct Upkeep {
    pub(crate) store: Box<dyn Store>,
    pub(crate) command_timeout: Duration,
    /// Counts the releases that are in flight, and all that is owed, so that closing can wait for them.
    pub(crate) releases: TaskTracker,
    pub(crate) debts: Debts,
    /// Who waits for what in this process.
    pub(crate) queues: Queues,
    pub(crate) attendant: Attendant,
    /// Where the grid of renewals begins.
    pub(crate) origin: Instant,
    /// Keepers that have nothing to do for now.
    pub(crate) rosters: Rosters<Keeper>,
    /// The runtime of their own that keepers run on, where the user wants one.
    pub(crate) isolated: Option<Isolated>,
}

impl Upkeep {
    /// The runtime that background work belongs on: our own, or the caller's.
    pub(crate) fn runtime(&self) -> Result<Handle, Error> {
        match &self.isolated {
            Some(isolated) => Ok(isolated.handle().clone()),
            None => Handle::try_current().map_err(|_| Error::NoRuntime),
        }
    }

    /// Every call waits by the clock of a tokio runtime, also where background work has one of its own: to be asked
    /// first.
    pub(crate) fn check_runtime() -> Result<(), Error> {
        Handle::try_current().map(drop).map_err(|_| Error::NoRuntime)
    }

    /// Sees to it that the lock is kept.
    pub(crate) fn keep(self: &Arc<Self>, hold: Arc<Hold>, runtime: &Handle) -> Place<Keeper> {
        let due = hold.next_duty();
        self.rosters.enter(Keeper { hold, upkeep: self.clone() }, due, runtime)
    }

    /// Sends a renewal. A definite answer is passed on to the hold.
    pub(crate) async fn renew(&self, hold: &Hold, renewing: Renewing) -> Result<Result<(), Loss>, Error> {
        let deadline = hold.deadline();
        let timeout = schedule::renewal_timeout(self.command_timeout, renewing.sent, deadline);
        let call = self.store.renew(&hold.owned, renewing.ttl, renewing.how(), timeout);
        // The store keeps to its timeout; should it not, the deadline still holds.
        let answer = timeout_at(deadline, call).await.unwrap_or_else(|_| Err(Error::timeout()));
        if answer.as_ref().is_err_and(Error::has_not_run) {
            hold.was_refused(renewing);
        }
        answer.map(|renewed| learn(hold, renewing, renewed))
    }

    /// For how long the server may run a request after it was sent: the timeout of its call, and as much again for what
    /// our idea of the server's clock has drifted by since it last answered.
    pub(crate) fn patience(&self) -> Duration {
        self.command_timeout.saturating_mul(2)
    }

    /// Sends renewals that all have the whole of a call's time.
    async fn renew_all(&self, errands: &[Errand]) -> Vec<Result<Renewed, Error>> {
        let timed_out = || errands.iter().map(|_| Err(Error::timeout())).collect();
        let Some(store) = self.store.together() else { return timed_out() };
        let locks: Vec<_> = errands.iter().map(|errand| (&errand.hold.owned, errand.renewing.ttl)).collect();
        // As above: the first of their deadlines.
        match errands.iter().map(|errand| errand.hold.deadline()).min() {
            None => Vec::new(),
            Some(until) => match timeout_at(until, store.renew_all(&locks, self.command_timeout)).await {
                Ok(answers) => answers,
                Err(_) => timed_out(),
            },
        }
    }

    /// Renews a lock that no guard of ours holds, to at least this ttl.
    pub(crate) async fn extend(&self, owned: &Owned, ttl: Duration) -> Result<(), Error> {
        Self::check_runtime()?;
        match self.store.renew(owned, ttl, Extending::Ensure, self.command_timeout).await? {
            Renewed::Extended => Ok(()),
            Renewed::NotOurs(loss) => Err(Error::NotHeld { key: owned.key(), loss }),
        }
    }

    /// Takes a lease's lock over for a grant of our own, `owned`. The claim is given back in the background when it is
    /// dropped before a guard [keeps](Claim::keep) it.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        owned: Owned,
        earlier: Option<GrantId>,
        ttl: Duration,
        runtime: &Handle,
    ) -> Result<Claim, Error> {
        let unsettled = Some(self.debts.owe(Work::GiveBack { owned: owned.clone(), earlier, ttl }));
        let mut claim = Claim { upkeep: self.clone(), runtime: runtime.clone(), owned, earlier, ttl, unsettled };
        let how = Extending::Claim { earlier };
        match self.store.renew(&claim.owned, ttl, how, self.command_timeout).await {
            Ok(Renewed::Extended) => Ok(claim),
            Ok(Renewed::NotOurs(loss)) => {
                claim.unsettled = None;
                Err(Error::NotHeld { key: claim.owned.key(), loss })
            }
            Err(error) => {
                if error.has_not_run() {
                    claim.unsettled = None;
                }
                Err(error)
            }
        }
    }

    /// Gives the lock back to the lease that a guard had it from, in the background: nobody will hold it by `owned`.
    pub(crate) fn give_back(self: &Arc<Self>, owned: Owned, earlier: Option<GrantId>, ttl: Duration) {
        let Ok(runtime) = self.runtime() else { return };
        let unsettled = Some(self.debts.owe(Work::GiveBack { owned: owned.clone(), earlier, ttl }));
        drop(Claim { upkeep: self.clone(), runtime, owned, earlier, ttl, unsettled });
    }

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
    ) -> Result<Released, Error> {
        Self::check_runtime()?;
        let mut handed_over = None;
        if let Some(hand_over) = self.store.hands_over().then(|| self.queues.next(owned)).flatten() {
            let patience = self.command_timeout.min(until.saturating_duration_since(Instant::now()));
            handed_over = Some(self.hand_over(owned, ending, hand_over, patience).await);
        }
        if let Some(Ok(Some(released))) = handed_over {
            return Ok(released);
        }
        let ending = if matches!(handed_over, Some(Err(_))) { Ending::Grant } else { ending };
        let (released, doubtful) = self.release_until(owned, ending, until).await?;
        Ok(if doubtful || matches!(handed_over, Some(Err(_))) { Released::Freed } else { released })
    }

    /// Releases the lock and gives it to one who waits for it here, in one step, or to another process whose turn it is.
    async fn hand_over(
        self: &Arc<Self>,
        owned: &Owned,
        ending: Ending,
        hand_over: HandOver,
        timeout: Duration,
    ) -> Result<Option<Released>, Error> {
        let (sent, wanted) = (Instant::now(), hand_over.wanted().clone());
        // Should it fail, or be dropped, the next one is told that nobody knows.
        let next = *hand_over.next();
        hand_over.send(self.debts.owe(Work::Undo(wanted.clone())), sent + timeout);
        let call = self.store.hand_over(owned, ending, &wanted, &next, timeout);
        match timeout_at(sent + timeout, call).await.unwrap_or_else(|_| Err(Error::timeout()))? {
            HandedOver::Done { fencing_token, alone } => {
                debug!(name: "tenure.handed_over", key = %owned.key(), "handed over");
                let grant = Grant { sent, ttl: wanted.ttl, fencing_token, doubt: None };
                let runtime = self.runtime()?;
                if hand_over.granted(grant, alone) {
                    // In case that it isn't polled.
                    self.look_after_queues(&runtime);
                } else {
                    let (upkeep, owed) = (self.clone(), self.debts.owe(Work::Undo(wanted.clone())));
                    runtime.spawn(async move {
                        upkeep.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
                        drop(owed);
                    });
                }
                Ok(Some(Released::Freed))
            }
            HandedOver::NotOurs(loss) => {
                hand_over.refused();
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

    /// Undoes what a request has left whose outcome nobody has learned, as often as it takes: it may still wait
    /// somewhere to be run, on a connection that has broken or behind another call, but not after `latest` by the
    /// server's clock. Gives up when the ttl has done the same.
    pub(crate) async fn undo(&self, owned: &Owned, latest: &Latest, ttl: Duration) {
        let until = Instant::now() + self.command_timeout + ttl;
        let mut failures = 0;
        let error = loop {
            let timeout = schedule::call_timeout(self.command_timeout, Instant::now(), until).max(LAST_LOOK);
            let call = self.store.undo(owned, latest, timeout);
            let pause = match timeout_at(until + LAST_LOOK, call).await.unwrap_or_else(|_| Err(Error::timeout())) {
                Ok(Undone::Settled) => {
                    debug!(name: "tenure.undone", key = %owned.key(), "undid an attempt of unknown outcome");
                    return;
                }
                // What it left until now is gone, and what it leaves later ends by its ttl.
                Ok(Undone::MayRun(_)) if Instant::now() >= until => return,
                Ok(Undone::MayRun(within)) => {
                    failures = 0;
                    within
                }
                Err(error) => {
                    failures += 1;
                    let remaining = until.saturating_duration_since(Instant::now());
                    let pause = schedule::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
                    if !error.is_transient() || pause >= remaining {
                        break error;
                    }
                    pause
                }
            };
            // A server whose clock was set back, or another's, may say that this takes long: no longer than the ttl.
            sleep_until(until.min(Instant::now() + pause)).await;
        };
        warn!(
            name: "tenure.undo_failed", key = %owned.key(), %error,
            "could not undo an attempt of unknown outcome; its ttl will"
        );
    }

    /// Answers also whether a try of unknown outcome came before.
    async fn release_until(
        &self,
        owned: &Owned,
        mut ending: Ending,
        until: Instant,
    ) -> Result<(Released, bool), Error> {
        let (mut failures, mut doubtful) = (0, false);
        loop {
            let now = Instant::now();
            let timeout = schedule::call_timeout(self.command_timeout, now, until);
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
            let pause = schedule::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
            if !error.is_transient() || pause >= remaining {
                return Err(error);
            }
            sleep(pause).await;
        }
    }
}

/// Passes on what the server has said to a renewal.
fn learn(hold: &Hold, renewing: Renewing, renewed: Renewed) -> Result<(), Loss> {
    match renewed {
        Renewed::Extended => hold.renewed(renewing),
        Renewed::NotOurs(loss) => Err(hold.end(loss)),
    }
}

/// The time for a call that is made when its own is over.
const LAST_LOOK: Duration = Duration::from_millis(100);

/// A lease's lock, which a grant of our own has taken over.
pub(crate) struct Claim {
    upkeep: Arc<Upkeep>,
    runtime: Handle,
    owned: Owned,
    /// The lease's.
    earlier: Option<GrantId>,
    ttl: Duration,
    /// There while no guard has it. Makes [`Locker::close`](crate::Locker::close) wait until it is given back.
    unsettled: Option<Debt>,
}

impl Claim {
    /// From here on a guard sees to it. Returns false where it was given back already: the locker is closed.
    pub(crate) fn keep(mut self) -> bool {
        self.unsettled.take().is_none_or(Debt::settle)
    }
}

impl Drop for Claim {
    /// Nobody will hold by this grant: the lease's takes its place again, or the lock would be kept for one that is not
    /// there.
    fn drop(&mut self) {
        let Some(unsettled) = self.unsettled.take() else { return };
        let (upkeep, owned, earlier, ttl) = (self.upkeep.clone(), self.owned.clone(), self.earlier, self.ttl);
        self.runtime.spawn(async move {
            upkeep.return_claim(&owned, earlier, ttl).await;
            drop(unsettled);
        });
    }
}

impl Upkeep {
    /// Gives the lock back to the lease that the grant `owned` took it over from.
    pub(crate) async fn return_claim(&self, owned: &Owned, earlier: Option<GrantId>, ttl: Duration) {
        let until = Instant::now() + ttl;
        // The claim itself may be run until then: after that, once more.
        let settled = Instant::now() + self.patience();
        let mut failures = 0;
        loop {
            let timeout = schedule::call_timeout(self.command_timeout, Instant::now(), until);
            let given_back = self.store.renew(owned, ttl, Extending::GiveBack { earlier }, timeout).await;
            let remaining = until.saturating_duration_since(Instant::now());
            let pause = match given_back {
                Ok(Renewed::NotOurs(_)) => return,
                Ok(Renewed::Extended) if Instant::now() >= settled => return,
                Ok(Renewed::Extended) => settled.saturating_duration_since(Instant::now()),
                Err(error) if !error.is_transient() => return,
                Err(_) => {
                    failures += 1;
                    schedule::pause_after(failures, self.command_timeout, remaining, fastrand::f64())
                }
            };
            if pause >= remaining {
                return;
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

/// Keeps one lock.
pub(crate) struct Keeper {
    hold: Arc<Hold>,
    upkeep: Arc<Upkeep>,
}

/// A renewal that is due, to be sent along with those of others.
pub(crate) struct Errand {
    hold: Arc<Hold>,
    upkeep: Arc<Upkeep>,
    renewing: Renewing,
}

impl roster::Work for Keeper {
    type Errand = Errand;
    type Outcome = (Renewing, Result<Renewed, Error>);
    type Failure = Error;

    fn run(self, failure: Option<Error>) -> impl Future<Output = Option<(Self, Instant)>> + Send + 'static {
        let span = self.span();
        self.keep(failure).instrument(span)
    }

    /// Where the deadline comes before the call is given up on, that has to be watched as well: not along with others.
    fn errand(&self, now: Instant) -> Option<Errand> {
        let Self { hold, upkeep } = self;
        if upkeep.store.together().is_none() || hold.owned.keys.len() != 1 {
            return None;
        }
        // Twice, so that another try fits in before the deadline.
        let renewing = hold.renewing_when_due(now, upkeep.command_timeout.saturating_mul(2))?;
        Some(Errand { hold: hold.clone(), upkeep: upkeep.clone(), renewing })
    }

    async fn run_errands(errands: Vec<Errand>) -> Vec<Self::Outcome> {
        let Some(upkeep) = errands.first().map(|errand| errand.upkeep.clone()) else { return Vec::new() };
        let answers = upkeep.renew_all(&errands).await;
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

impl Keeper {
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
            let renewing = hold.renewing(None, self.upkeep.patience());
            let renewal = select! {
                biased;
                // Given up on: should it still be run, it finds the lock released, or extends it once more.
                () = hold.changed() => continue,
                renewal = self.upkeep.renew(hold, renewing) => renewal,
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
        let pause = schedule::pause_after(failures, interval, remaining, fastrand::f64());
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
        let cleanup = loop {
            match self.hold.take_cleanup() {
                Some(cleanup) => break cleanup,
                None => self.hold.changed().await,
            }
        };
        let owe = || self.upkeep.debts.owe(Work::Release(self.hold.clone()));
        let (releases, owed) = match cleanup {
            Cleanup::Release(owed) => (true, owed.unwrap_or_else(owe)),
            Cleanup::Undo(owed) => (false, owed),
            Cleanup::Nothing => return,
        };
        if !owed.is_taken_over() {
            self.upkeep.clean_up(&self.hold, releases).await;
        }
    }
}

fn remaining(hold: &Hold) -> Duration {
    hold.deadline().saturating_duration_since(Instant::now())
}

impl Drop for Keeper {
    /// A keeper that ends while the lock is held, because its runtime shuts down, leaves a lock that nobody renews and
    /// whose deadline nobody announces: said at once, since too early is safe and too late is not.
    fn drop(&mut self) {
        let loss = self.hold.end(Loss::Expired);
        // Nobody is left to release it either: let no one wait for that.
        self.hold.settle(Cleanup::Nothing);
        drop(self.hold.take_cleanup());
        if let (true, Some(observer)) = (loss != Loss::Released, self.hold.observer()) {
            observer.lost(loss);
        }
    }
}
