//! The one place that says whether a lock is held.
//!
//! A [`Hold`] is shared by the guard, its renewer and the futures that wait for its loss. They all read its deadline;
//! nothing else in the crate decides whether a lock is held. Its invariants:
//!
//! 1. The deadline moves forward only by a confirmed request, and counts from before that request was sent.
//! 2. What is over stays over: the loss is set once, and before the cancellation token fires.
//! 3. A deadline that has passed is `Expired`, whoever notices first, and no later answer changes that.
//! 4. A request that makes the ttl shorter counts from the moment it is sent, since the server may obey at any time
//!    after; and an answer to a request sent before it, which the server may have obeyed before it too, counts for
//!    nothing.
//! 5. While the outcome of such a request is unknown, the server may still obey it, after what it confirms meanwhile:
//!    no confirmation is worth more than that ttl.
//! 6. The loss and what is left to do about it are decided in one step: whoever learns of the one can rely on the
//!    other.

mod claim;
mod release;
pub(crate) mod renewer;
pub(crate) mod scheduler;
pub(crate) mod timing;
mod undo;

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::timing::{Drift, Renewal};
use crate::locker::cleanups::PendingCleanup;
use crate::store::{Extending, Latest, RECORD_TTL};
use crate::{Error, Key, Loss, Token};

/// What identifies a held lock at the server: its keys, and the token that they hold.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Owned {
    pub(crate) keys: Box<[Key]>,
    pub(crate) token: Token,
    /// The token was made for one request, and nobody has used it before.
    pub(crate) own_token: bool,
    /// Tells this grant from others of the same token. `None`: that of the request that made the token.
    pub(crate) grant: Option<GrantId>,
}

/// Tells grants of one token apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct GrantId(u64);

impl GrantId {
    /// Of a lease that was made by hand: nobody knows which grant its token has the lock by.
    pub(crate) const UNKNOWN: Self = Self(0);

    pub(crate) fn random() -> Self {
        Self(fastrand::u64(1..))
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl FromStr for GrantId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

impl Owned {
    /// The key that messages and events name.
    pub(crate) fn key(&self) -> Key {
        self.keys.first().cloned().unwrap_or_else(|| Key::from(""))
    }
}

/// What the server granted, and when it was asked.
pub(crate) struct Grant {
    pub(crate) sent: Instant,
    pub(crate) ttl: Duration,
    pub(crate) fencing_token: Option<u64>,
    /// An earlier attempt of the same request had an unknown outcome, and may be run until then.
    pub(crate) doubt: Option<Arc<Latest>>,
}

/// One held lock, until it is held no more.
pub(crate) struct Hold {
    pub(crate) owned: Owned,
    pub(crate) metadata: Box<[u8]>,
    /// Fixed when the lock is obtained: read again after a loss, it would be the successor's.
    pub(crate) fencing_token: Option<u64>,
    /// What is left of it may come to pass after the release.
    pub(crate) doubt: Option<Arc<Latest>>,
    /// A part of it may be left at the server when the server says that it is not held: one of several keys, a few
    /// nodes.
    has_parts: bool,
    drift: Drift,
    /// Where the grid of renewals begins, for all locks of one locker.
    origin: Instant,
    state: Mutex<State>,
    over: CancellationToken,
    /// Tells the renewer to look at the state again: the only one that waits for it.
    changed: Notify,
}

struct State {
    ttl: Duration,
    renewal: Renewal,
    /// When the last confirmed request was sent.
    sent: Instant,
    /// For how long the lock is surely held from then on, before drift.
    worth: Duration,
    deadline: Instant,
    /// Until when the server may keep the lock, by all that was ever asked for, confirmed or not.
    kept_until: Instant,
    /// Counts the requests that set the ttl: an answer from an earlier epoch moves no deadline (invariant 4).
    epoch: u32,
    /// Requests that set the ttl, and whose outcome is unknown (invariant 5).
    unresolved: Vec<Unresolved>,
    /// When the record of grants was last written, and the longest ttl that it knows of.
    recorded: Instant,
    recorded_ttl: Duration,
    /// Why the latest renewal failed, if none has succeeded since.
    last_error: Option<Arc<Error>>,
    loss: Option<Loss>,
    final_step: Option<FinalStep>,
    observer: Option<Arc<dyn Observer>>,
    /// Fires when the deadline moves closer. Created for the first future that sleeps until the deadline.
    shortened: Option<CancellationToken>,
}

/// Learns from the renewer what becomes of the lock, in this order: any number of renewals and failures, then the end.
///
/// Called on the renewer's task, which has renewals to see to: nothing here may wait for anybody.
pub(crate) trait Observer: Send + Sync {
    /// A renewal was confirmed, and the lock is held until then.
    fn renewed(&self, deadline: Instant);

    /// A renewal failed and will be tried again, as long as something remains.
    fn renewal_failed(&self, error: Arc<Error>, remaining: Duration);

    /// The lock is lost. May be said twice. What was released is not lost, and nothing is said then.
    fn lost(&self, loss: Loss);
}

/// A request that sets the ttl to exactly this, and may be run until then.
struct Unresolved {
    epoch: u32,
    ttl: Duration,
    until: Instant,
}

/// What the renewer still has to do once the lock is held no more.
pub(crate) enum FinalStep {
    /// Release it. [`Locker::close`](crate::Locker::close) waits for what is pending; the renewer owes it where nobody does
    /// yet.
    Release(Option<PendingCleanup>),
    /// It is released: undo what an earlier attempt of unknown outcome may still leave.
    Undo(PendingCleanup),
    /// Nothing: it is released, or shall stay as it is.
    Nothing,
}

/// A renewal on its way: what its confirmation will be worth.
#[derive(Clone, Copy)]
pub(crate) struct Renewing {
    pub(crate) sent: Instant,
    pub(crate) ttl: Duration,
    /// The ttl shall be exactly this; otherwise at least this.
    pub(crate) exact: bool,
    /// The record of grants shall live on, too.
    pub(crate) keeps_record: bool,
    epoch: u32,
}

impl Renewing {
    pub(crate) fn how(self) -> Extending {
        match (self.exact, self.keeps_record) {
            (true, _) => Extending::Exactly,
            (false, true) => Extending::KeepRecord,
            (false, false) => Extending::AtLeast,
        }
    }
}

impl Hold {
    pub(crate) fn new(
        owned: Owned,
        metadata: Box<[u8]>,
        grant: &Grant,
        drift: Drift,
        renewal: Renewal,
        origin: Instant,
        is_voted_on: bool,
    ) -> Self {
        Self {
            has_parts: is_voted_on || owned.keys.len() > 1,
            owned,
            metadata,
            fencing_token: grant.fencing_token,
            doubt: grant.doubt.clone(),
            drift,
            origin,
            state: Mutex::new(State {
                ttl: grant.ttl,
                renewal,
                sent: grant.sent,
                worth: grant.ttl,
                deadline: drift.deadline(grant.sent, grant.ttl),
                kept_until: Instant::now() + grant.ttl,
                epoch: 0,
                unresolved: Vec::new(),
                recorded: grant.sent,
                recorded_ttl: grant.ttl,
                last_error: None,
                loss: None,
                final_step: None,
                observer: None,
                shortened: None,
            }),
            over: CancellationToken::new(),
            changed: Notify::new(),
        }
    }

    /// Whether the lock is held now, by the clock: right even when no task of ours has run for a while. The first to
    /// find that it is not tells all others.
    pub(crate) fn check(&self) -> Result<(), Loss> {
        let (verdict, told) = {
            let state = self.state();
            (state.verdict(Instant::now()), state.loss.is_some())
        };
        match verdict {
            Err(loss) if !told => Err(self.end(loss)),
            verdict => verdict,
        }
    }

    pub(crate) fn drift(&self) -> Drift {
        self.drift
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.state().deadline
    }

    /// Until when the server may keep the lock, unless it is released: never before the deadline.
    pub(crate) fn kept_until(&self) -> Instant {
        self.state().kept_until
    }

    pub(crate) fn ttl(&self) -> Duration {
        self.state().ttl
    }

    /// When there is something to do for the lock: the next renewal, if it is renewed at all, or else its deadline.
    pub(crate) fn next_duty(&self) -> Instant {
        let state = self.state();
        state.due(self.origin).map_or(state.deadline, |due| due.min(state.deadline))
    }

    pub(crate) fn renewal_interval(&self) -> Option<Duration> {
        self.state().interval()
    }

    /// The token that fires when the lock is held no more. Never handed out itself, only its children: who cancels one
    /// of those ends no lock.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// Waits until the state has changed since the last call returned. For the renewer alone.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Has the observer told of all that becomes of the lock from now on, its loss above all. Refused when the lock is
    /// held no more: either its end is told, or there is none to tell.
    pub(crate) fn observe(&self, observer: Arc<dyn Observer>) -> Result<(), Loss> {
        let mut state = self.state();
        state.verdict(Instant::now())?;
        state.observer = Some(observer);
        Ok(())
    }

    pub(crate) fn observer(&self) -> Option<Arc<dyn Observer>> {
        self.state().observer.clone()
    }

    /// A renewal is about to be sent, for the ttl as it is or for at least `ttl`. The server refuses to run it after
    /// `patience`.
    pub(crate) fn renewing(&self, ttl: Option<Duration>, patience: Duration) -> Renewing {
        let mut state = self.state();
        let (sent, ttl) = (Instant::now(), ttl.unwrap_or(state.ttl));
        state.kept_until = state.kept_until.max(sent + patience + ttl);
        let keeps_record = self.must_keep_record(&state, sent, ttl);
        Renewing { sent, ttl, exact: false, keeps_record, epoch: state.epoch }
    }

    /// Whether the record of grants comes of age, or does not know of this ttl.
    fn must_keep_record(&self, state: &State, now: Instant, ttl: Duration) -> bool {
        let is_old = now.saturating_duration_since(state.recorded) > RECORD_TTL / 4;
        self.owned.grant.is_some() && (is_old || ttl > state.recorded_ttl)
    }

    /// The renewal that is due, if one is and it may take `time`: else the deadline comes first. `sent` is now, or a
    /// moment ago.
    pub(crate) fn renewing_when_due(&self, sent: Instant, time: Duration) -> Option<Renewing> {
        let mut state = self.state();
        state.verdict(sent).ok()?;
        let due = state.due(self.origin)?;
        let is_one_of_many =
            due <= sent && time <= state.deadline - sent && !self.must_keep_record(&state, sent, state.ttl);
        if is_one_of_many {
            state.kept_until = state.kept_until.max(sent + time + state.ttl);
        }
        is_one_of_many.then_some(Renewing {
            sent,
            ttl: state.ttl,
            exact: false,
            keeps_record: false,
            epoch: state.epoch,
        })
    }

    /// A renewal is about to be sent that sets the ttl to exactly `ttl` (invariant 4). The server refuses to run it
    /// after `patience`.
    pub(crate) fn setting_ttl(&self, ttl: Duration, patience: Duration) -> Renewing {
        let mut state = self.state();
        let sent = Instant::now();
        state.epoch = state.epoch.wrapping_add(1);
        state.deadline = state.deadline.min(self.drift.deadline(sent, ttl));
        state.kept_until = state.kept_until.max(sent + patience + ttl);
        state.ttl = state.ttl.min(ttl);
        let epoch = state.epoch;
        state.unresolved.retain(|earlier| sent < earlier.until);
        state.unresolved.push(Unresolved { epoch, ttl, until: sent + patience });
        let shortened = state.shortened.take();
        drop(state);
        // Not under the mutex: it runs others' wakers.
        if let Some(shortened) = shortened {
            shortened.cancel();
        }
        Renewing { sent, ttl, exact: true, keeps_record: false, epoch }
    }

    /// The server has refused a renewal, so that it was surely not run.
    pub(crate) fn was_refused(&self, renewing: Renewing) {
        if renewing.exact {
            self.state().unresolved.retain(|request| request.epoch != renewing.epoch);
        }
    }

    /// Returns a token that fires when the deadline next moves closer: a future that sleeps until then has to read it
    /// again.
    pub(crate) fn shortened(&self) -> CancellationToken {
        self.state().shortened.get_or_insert_default().clone()
    }

    /// The server has confirmed a renewal. Tells what became of the lock meanwhile, if it is over.
    pub(crate) fn renewed(&self, renewing: Renewing) -> Result<(), Loss> {
        let mut state = self.state();
        let now = Instant::now();
        if let Err(loss) = state.verdict(now) {
            drop(state);
            self.end(loss);
            return Err(loss);
        }
        state.last_error = None;
        if renewing.epoch == state.epoch {
            // One that may be run after this one counts from this one at the earliest (invariant 5).
            let may_follow = state.unresolved.iter().filter(|request| {
                renewing.sent < request.until && !(renewing.exact && request.epoch == renewing.epoch)
            });
            let worth = may_follow.map(|request| request.ttl).fold(renewing.ttl, Duration::min);
            let deadline = self.drift.deadline(renewing.sent, worth);
            state.deadline = state.deadline.max(deadline);
            if renewing.sent >= state.sent {
                state.sent = renewing.sent;
                state.worth = worth;
            }
            if renewing.exact {
                state.ttl = renewing.ttl;
            }
            if renewing.keeps_record || renewing.exact {
                state.recorded = renewing.sent;
                state.recorded_ttl = state.recorded_ttl.max(renewing.ttl);
            }
        }
        if renewing.exact {
            // It has been run. What was sent before now may have been so before it, and be answered after it.
            let has_run = state.unresolved.iter_mut().filter(|request| request.epoch == renewing.epoch);
            has_run.for_each(|request| request.until = request.until.min(now));
        }
        drop(state);
        if renewing.exact {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// A renewal has failed, for this reason.
    pub(crate) fn failed(&self, error: &Arc<Error>) {
        let mut state = self.state();
        // A renewal that the deadline cut short says less than the failure before it.
        let is_cut_short = error.is_timeout() && Instant::now() >= state.deadline;
        if state.last_error.is_none() || !is_cut_short {
            state.last_error = Some(error.clone());
        }
    }

    /// Returns why the latest renewal failed, if none has succeeded since.
    pub(crate) fn last_error(&self) -> Option<Arc<Error>> {
        self.state().last_error.clone()
    }

    /// Returns what led to this loss, where that is known: other losses than by the deadline are answers of the server.
    pub(crate) fn cause_of(&self, loss: Loss) -> Option<Arc<Error>> {
        self.last_error().filter(|_| loss == Loss::Expired)
    }

    /// The lock is held no more. The first reason stays (invariant 2), and a passed deadline goes before any (3).
    /// Answers the reason that holds.
    pub(crate) fn end(&self, loss: Loss) -> Loss {
        let mut state = self.state();
        if let Some(loss) = state.loss {
            return loss;
        }
        let loss = state.verdict(Instant::now()).err().unwrap_or(loss);
        state.loss = Some(loss);
        if state.final_step.is_none() {
            // In the same step as the loss (invariant 6). What its owner ends, its owner says what to do about.
            state.final_step = match loss {
                Loss::Released => None,
                // A renewal that nobody heard of may have been run, and would hold the key for a whole ttl.
                Loss::Expired => Some(FinalStep::Release(None)),
                Loss::Taken | Loss::Missing if self.has_parts || self.doubt.is_some() => Some(FinalStep::Release(None)),
                Loss::Taken | Loss::Missing => Some(FinalStep::Nothing),
            };
        }
        // Only now: whoever the token wakes finds the reason. And not under the mutex: it runs others' wakers.
        drop(state);
        self.over.cancel();
        self.changed.notify_one();
        loss
    }

    /// Tells the renewer what is left to do, unless that is decided already. Returns whether there is anything.
    pub(crate) fn settle(&self, final_step: FinalStep) -> bool {
        let (refused, is_left) = {
            let mut state = self.state();
            let refused = match state.final_step {
                None => state.final_step.replace(final_step),
                // The same, and closing waits for it from now on.
                Some(FinalStep::Release(None)) if matches!(final_step, FinalStep::Release(Some(_))) => {
                    state.final_step.replace(final_step)
                }
                Some(_) => Some(final_step),
            };
            (refused, !matches!(state.final_step, Some(FinalStep::Nothing)))
        };
        self.changed.notify_one();
        // What is pending wakes others when it is dropped: not under the mutex.
        drop(refused);
        is_left
    }

    /// Whether there is nothing left to do, whatever the renewer is told.
    pub(crate) fn is_settled(&self) -> bool {
        matches!(self.state().final_step, Some(FinalStep::Nothing))
    }

    /// What [`settle`](Hold::settle) said, once it has.
    pub(crate) fn take_final_step(&self) -> Option<FinalStep> {
        let mut state = self.state();
        state.final_step.as_mut().map(|final_step| std::mem::replace(final_step, FinalStep::Nothing))
    }

    /// What [`check`](Hold::check) would say, without telling anybody.
    #[cfg(test)]
    pub(crate) fn peek(&self) -> Peek {
        let state = self.state();
        Peek { verdict: state.verdict(Instant::now()), deadline: state.deadline, sent: state.sent }
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold as it stands.
#[cfg(test)]
pub(crate) struct Peek {
    pub(crate) verdict: Result<(), Loss>,
    pub(crate) deadline: Instant,
    pub(crate) sent: Instant,
}

impl State {
    fn verdict(&self, now: Instant) -> Result<(), Loss> {
        match self.loss {
            Some(loss) => Err(loss),
            None if now >= self.deadline => Err(Loss::Expired),
            None => Ok(()),
        }
    }

    fn interval(&self) -> Option<Duration> {
        self.renewal.interval(self.ttl.min(self.worth))
    }

    fn due(&self, origin: Instant) -> Option<Instant> {
        self.renewal.due(self.sent, self.ttl.min(self.worth), origin)
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.state().verdict(Instant::now());
        f.debug_struct("Hold").field("keys", &self.owned.keys).field("verdict", &verdict).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, pause};

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Held for 1,000 ms from now, as its drift is none.
    fn hold() -> Hold {
        of(&["k"])
    }

    fn of(keys: &[&'static str]) -> Hold {
        let keys = keys.iter().copied().map(Key::from).collect();
        let owned = Owned { keys, token: Token::random(), own_token: true, grant: None };
        let grant = Grant { sent: Instant::now(), ttl: ms(1_000), fencing_token: None, doubt: None };
        let drift = Drift { factor: 0.0, margin: Duration::ZERO };
        Hold::new(owned, Box::default(), &grant, drift, Renewal::Third, Instant::now(), false)
    }

    #[tokio::test(start_paused = true)]
    async fn held_until_the_deadline_and_not_at_it() {
        let hold = hold();
        advance(ms(999)).await;
        assert_eq!(hold.check(), Ok(()));
        advance(ms(1)).await;
        assert_eq!(hold.check(), Err(Loss::Expired));
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirmation_counts_from_its_send() {
        let hold = hold();
        advance(ms(300)).await;
        let renewing = hold.renewing(None, Duration::ZERO);
        advance(ms(600)).await;
        hold.renewed(renewing).unwrap();
        assert_eq!(hold.deadline(), renewing.sent + ms(1_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirmation_after_the_deadline_revives_nothing() {
        let hold = hold();
        let renewing = hold.renewing(None, Duration::ZERO);
        advance(ms(1_000)).await;
        assert_eq!(hold.renewed(renewing), Err(Loss::Expired));
        assert!(hold.over().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_reason_stays() {
        let hold = hold();
        assert_eq!(hold.end(Loss::Taken), Loss::Taken);
        assert_eq!(hold.end(Loss::Missing), Loss::Taken);
        advance(ms(5_000)).await;
        assert_eq!(hold.check(), Err(Loss::Taken));
    }

    #[tokio::test(start_paused = true)]
    async fn a_passed_deadline_goes_before_any_reason() {
        let hold = hold();
        advance(ms(1_000)).await;
        assert_eq!(hold.check(), Err(Loss::Expired));
        assert_eq!(hold.end(Loss::Released), Loss::Expired);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shorter_ttl_counts_from_its_send_and_outdates_what_was_sent_before() {
        let hold = hold();
        let before = hold.renewing(None, Duration::ZERO);
        advance(ms(100)).await;
        let shorter = hold.setting_ttl(ms(200), ms(500));
        assert_eq!(hold.deadline(), shorter.sent + ms(200), "before any answer");
        hold.renewed(shorter).unwrap();
        hold.renewed(before).unwrap();
        assert_eq!(hold.deadline(), shorter.sent + ms(200), "the older answer counts for nothing");
        advance(ms(50)).await;
        let after = hold.renewing(None, Duration::ZERO);
        hold.renewed(after).unwrap();
        assert_eq!(hold.deadline(), after.sent + ms(200), "later renewals follow the new ttl");
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_goes_along_with_others_when_it_is_due_and_the_deadline_is_far() {
        let hold = hold();
        let start = Instant::now();
        let renewing_after =
            |past, time| hold.renewing_when_due(start + ms(past), ms(time)).map(|renewing| renewing.sent);
        assert_eq!(renewing_after(300, 0), None, "not due");
        assert_eq!(renewing_after(400, 600), Some(start + ms(400)));
        assert_eq!(renewing_after(400, 601), None, "it might end after the deadline");
        assert_eq!(renewing_after(1_000, 0), None, "too late");
        hold.end(Loss::Released);
        assert_eq!(renewing_after(400, 600), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_longer_ttl_counts_from_its_confirmation() {
        let hold = hold();
        let was = hold.deadline();
        let longer = hold.setting_ttl(ms(9_000), ms(500));
        assert_eq!((hold.deadline(), hold.ttl()), (was, ms(1_000)));
        hold.renewed(longer).unwrap();
        assert_eq!((hold.deadline(), hold.ttl()), (longer.sent + ms(9_000), ms(9_000)));
    }

    #[tokio::test(start_paused = true)]
    async fn while_an_exact_ttl_may_still_be_set_no_confirmation_is_worth_more() {
        let hold = hold();
        hold.setting_ttl(ms(200), ms(600));
        advance(ms(100)).await;
        let longer = hold.setting_ttl(ms(9_000), ms(600));
        hold.renewed(longer).unwrap();
        assert_eq!(hold.deadline(), longer.sent + ms(200), "the first may come after the second");
        assert!(hold.next_duty() < longer.sent + ms(100), "renewed as a lock with this little time is");
        advance(ms(50)).await;
        let renewal = hold.renewing(None, Duration::ZERO);
        hold.renewed(renewal).unwrap();
        assert_eq!(hold.deadline(), renewal.sent + ms(200));
        // At 600 ms the server refuses the first.
        for _ in 0..4 {
            advance(ms(120)).await;
            let renewal = hold.renewing(None, Duration::ZERO);
            hold.renewed(renewal).unwrap();
        }
        assert_eq!(hold.deadline(), Instant::now() + ms(9_000));
    }

    #[tokio::test(start_paused = true)]
    async fn an_exact_ttl_that_was_refused_or_confirmed_limits_nothing() {
        let hold = hold();
        let refused = hold.setting_ttl(ms(500), ms(600));
        hold.was_refused(refused);
        let longer = hold.setting_ttl(ms(9_000), ms(600));
        hold.renewed(longer).unwrap();
        assert_eq!(hold.deadline(), longer.sent + ms(9_000));
        let shorter = hold.setting_ttl(ms(500), ms(600));
        hold.renewed(shorter).unwrap();
        let longer = hold.setting_ttl(ms(9_000), ms(600));
        hold.renewed(longer).unwrap();
        assert_eq!(hold.deadline(), longer.sent + ms(9_000));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_comes_after_that_of_an_exact_ttl_but_was_asked_for_before_is_worth_no_more() {
        let hold = hold();
        let shorter = hold.setting_ttl(ms(200), ms(500));
        let longer = hold.renewing(Some(ms(9_000)), ms(500));
        advance(ms(50)).await;
        hold.renewed(shorter).unwrap();
        // It may have been run before the other.
        hold.renewed(longer).unwrap();
        assert_eq!(hold.deadline(), longer.sent + ms(200));
        advance(ms(1)).await;
        let after = hold.renewing(Some(ms(9_000)), ms(500));
        hold.renewed(after).unwrap();
        assert_eq!(hold.deadline(), after.sent + ms(9_000));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_to_do_is_decided_with_the_loss() {
        for (loss, keys, is_left) in [
            (Loss::Missing, &["k"][..], false),
            (Loss::Taken, &["k"], false),
            (Loss::Missing, &["k", "l"], true),
            (Loss::Taken, &["k", "l"], true),
        ] {
            let hold = of(keys);
            hold.end(loss);
            // As a guard does that is dropped.
            assert_eq!(hold.settle(FinalStep::Release(None)), is_left, "{loss:?} {keys:?}");
        }
        let hold = hold();
        advance(ms(1_000)).await;
        assert_eq!(hold.end(Loss::Missing), Loss::Expired);
        assert!(hold.settle(FinalStep::Nothing), "a late renewal may have to be undone");
    }

    #[test]
    fn the_clock_decides_even_where_no_runtime_runs() {
        let hold = hold();
        assert_eq!(hold.check(), Ok(()));
    }

    #[tokio::test]
    async fn the_reason_is_there_when_the_token_fires() {
        pause();
        let hold = Arc::new(hold());
        let waiter = tokio::spawn({
            let hold = hold.clone();
            async move {
                hold.over().cancelled().await;
                hold.check()
            }
        });
        tokio::task::yield_now().await;
        hold.end(Loss::Missing);
        assert_eq!(waiter.await.unwrap(), Err(Loss::Missing));
    }
}
