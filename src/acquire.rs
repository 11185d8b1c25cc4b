//! Obtaining a lock: attempts, and what is waited for between them.
//!
//! [`Options::obtain`] decides what comes next. The [`Waiter`] asks and waits: it has an [`Attempt`], which asks the
//! server and undoes what it may have left, and a position in the [queue] of this process and in the server's
//! line.

mod answer;
mod attempt;
mod context;
mod hand_over;
mod position;
pub(crate) mod queue;
mod step;
pub(crate) mod supervisor;
mod take_over;
mod waiter;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tracing::Span;

use self::answer::{Held, LastAnswer};
use self::attempt::{Attempt, Outcome};
use self::queue::{By, Obtained, Ticket};
use self::step::{Step, WaitFor};
use self::waiter::Waiter;
use crate::hold::timing::{self, Reminders, Renewal};
use crate::hold::{Bounds, Grant, GrantId, Owned, Terms, suspension};
use crate::locker::shared::Shared;
use crate::metrics::Waiting;
use crate::mode::{Mode, NO_READERS};
use crate::report::{debug, warn};
use crate::retry::Pauses;
use crate::store::{Queueing, Wanted};
use crate::{Error, Key, LockGuard, Retry, Token};

/// How many grants in a row may come too late to be of use, before a request that waits gives up. One can be a stall of
/// the server, which waiting helps against. A ttl that is always too short for the way to the server would be waited
/// with for ever.
const LATE_GRANTS: u32 = 3;

/// What a request asks for.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) shared: Arc<Shared>,
    pub(crate) keys: Vec<Key>,
    pub(crate) when_refused: WhenRefused,
    pub(crate) wait_at_most: Option<Duration>,
    pub(crate) ttl: Duration,
    pub(crate) renewal: Renewal,
    pub(crate) bounds: Bounds,
    pub(crate) metadata: Vec<u8>,
    pub(crate) token: Option<Token>,
    pub(crate) fenced: bool,
    pub(crate) fair: bool,
    pub(crate) mode: Mode,
    /// At most how many may hold the key together, with a permit each.
    pub(crate) limit: usize,
    /// The span in which the request is awaited.
    pub(crate) caller: Span,
}

/// What a request does when it can't have the lock at once.
#[derive(Clone, Debug)]
pub(crate) enum WhenRefused {
    /// It gives up.
    GiveUp,
    /// It asks again when there is reason to, for as long as it may wait.
    Wait,
    /// It asks again after each of the strategy's pauses.
    Retry(Retry),
}

impl Options {
    pub(crate) fn new(shared: Arc<Shared>, keys: Vec<Key>, when_refused: WhenRefused) -> Self {
        let settings = &shared.settings;
        let (ttl, renewal, fenced) = (settings.ttl, settings.renewal, settings.fenced);
        let (wait_at_most, bounds, metadata, token, fair) = (None, Bounds::default(), Vec::new(), None, false);
        Self {
            shared,
            keys,
            when_refused,
            wait_at_most,
            ttl,
            renewal,
            bounds,
            metadata,
            token,
            fenced,
            fair,
            mode: Mode::Exclusive,
            limit: 0,
            caller: Span::none(),
        }
    }

    /// Obtains the lock. The options are in a box, as arguments stay in their future for as long as that lives.
    pub(crate) async fn obtain(self: Box<Self>) -> Result<LockGuard, Error> {
        let waiting = Waiting::begin(&self.shared.settings.metrics, &self.keys);
        // Not a match around the `await`: it would keep the result beside the acquisition. The future would have 1224
        // bytes instead of 740, more than glibc's allocator keeps at hand.
        let mut acquisition = match (*self).begin() {
            Ok(acquisition) => acquisition,
            Err(error) => {
                let refused = Err(error);
                waiting.end(&refused);
                return refused;
            }
        };
        let obtained = acquisition.run().await;
        waiting.end(&obtained);
        obtained
    }

    /// Refuses what can't work, before anything is sent.
    fn begin(self) -> Result<Acquisition, Error> {
        let started = Instant::now();
        let (ttl, runtime) = self.validate()?;
        let queueing = self.queueing();
        let Self {
            shared,
            keys,
            when_refused,
            wait_at_most,
            renewal,
            bounds,
            metadata,
            token,
            mode,
            limit,
            caller,
            ..
        } = self;
        let wants_token = self.fenced;
        let own_token = token.is_none();
        let token = token.unwrap_or_else(Token::random);
        // A token that others may use as well needs something else to tell its grants apart.
        let grant = (!own_token).then(GrantId::random);
        let owned = Owned { keys: keys.into(), token, own_token, grant, mode };
        // A request may come back by the same token and want a fencing token then, which must not be that of the holder
        // before. So a lock held by a token that can come back has a fencing token of its own, wanted or not.
        let fenced = wants_token || !own_token;
        let latest = Arc::default();
        // Without renewals, the request would get less than its ttl; and its metadata has to be stored. What was asked
        // for by the holder before knows nothing of the request's bounds.
        let is_plain = mode == Mode::Exclusive
            && !self.fair
            && own_token
            && metadata.is_empty()
            && renewal != Renewal::Never
            && !bounds.are_set();
        let takes_over = shared.settings.local_hand_over && is_plain;
        let (metadata, since) = (metadata.into(), started);
        let wanted = Wanted { owned, metadata, ttl, fenced, queueing, takes_over, latest, limit, since };
        let give_up_at = wait_at_most.map(|limit| timing::after(started, limit));
        Ok(Acquisition {
            waiter: Waiter::new(Attempt::new(wanted, shared, runtime), give_up_at, started),
            pacing: Pacing::from(when_refused),
            terms: Terms { renewal, bounds, caller },
            wants_token,
            started,
            attempts: 0,
            late: 0,
            failures: 0,
            last_answer: None,
            reminders: Reminders::default(),
        })
    }

    /// Returns an error for what can't work. Otherwise returns the ttl as the server will have it, and the runtime
    /// where the lock will be kept.
    fn validate(&self) -> Result<(Duration, Handle), Error> {
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Key::validate_all(&self.keys)?;
        self.validate_mode()?;
        let drift = self.shared.settings.drift;
        let ttl = drift.validate(self.ttl)?;
        self.renewal.validate(ttl, drift)?;
        self.bounds.validate(drift)?;
        let ttl = self.bounds.cut(ttl);
        Shared::check_runtime()?;
        Ok((ttl, self.shared.runtime()?))
    }

    fn validate_mode(&self) -> Result<(), Error> {
        let capabilities = self.shared.store.capabilities();
        match self.mode {
            Mode::Permit if self.limit == 0 => Err(Error::InvalidLimit("nobody could ever hold a permit of none")),
            Mode::Permit if !capabilities.has_permits => Err(Error::Unsupported(match capabilities.undoes_attempts {
                true => {
                    "a quorum counts no permits: of two majorities of its nodes, each may count fewer holders than \
                     there are; use one server, Sentinels or a cluster"
                }
                false => "this store counts no permits",
            })),
            Mode::Read if !capabilities.has_readers => Err(Error::Unsupported(NO_READERS)),
            Mode::Exclusive | Mode::Read | Mode::Permit => Ok(()),
        }
    }

    fn queueing(&self) -> Queueing {
        let has_line = self.shared.store.capabilities().has_line_for_fair;
        match self.when_refused {
            WhenRefused::Wait if self.fair && has_line => Queueing::Own,
            WhenRefused::Wait => Queueing::Shared,
            WhenRefused::GiveUp | WhenRefused::Retry(_) if self.fair || self.mode.is_shared() => Queueing::Behind,
            WhenRefused::GiveUp | WhenRefused::Retry(_) => Queueing::None,
        }
    }
}

/// A request on its way to the lock.
struct Acquisition {
    waiter: Waiter,
    pacing: Pacing,
    terms: Terms,
    /// The user wants a fencing token.
    wants_token: bool,
    started: Instant,
    attempts: u32,
    /// How many grants have come too late since the lock was last held by another.
    late: u32,
    /// How many attempts have failed since the lock was last held by another.
    failures: u32,
    /// What this request has learned itself. If it is in a queue, what others there have learned may be newer.
    last_answer: Option<LastAnswer>,
    reminders: Reminders,
}

/// What there is between two attempts.
enum Pacing {
    /// There is only one attempt.
    Once,
    /// Whatever makes another attempt worthwhile: a notification, a time.
    Wait,
    /// The pauses that the user has chosen.
    Pauses(Pauses),
}

impl From<WhenRefused> for Pacing {
    fn from(when_refused: WhenRefused) -> Self {
        match when_refused {
            WhenRefused::GiveUp => Self::Once,
            WhenRefused::Wait => Self::Wait,
            WhenRefused::Retry(retry) => Self::Pauses(retry.pauses()),
        }
    }
}

impl Acquisition {
    async fn run(&mut self) -> Result<LockGuard, Error> {
        let mut step = match self.pacing {
            Pacing::Wait => self.waiter.start().await,
            Pacing::Once | Pacing::Pauses(_) => Step::Ask,
        };
        // The long futures are in boxes: a request that is small costs less than these boxes, most of which it never
        // comes to.
        loop {
            step = match step {
                Step::Ask => {
                    self.attempts += 1;
                    if let Some(held) = self.waiter.held_back().await {
                        step = self.held(held);
                        continue;
                    }
                    match Box::pin(self.waiter.ask()).await {
                        Outcome::Granted(grant) => self.take(grant, self.waiter.by_asking())?,
                        Outcome::Held(held) => self.held(held),
                        Outcome::Failed(error) | Outcome::Unknown(error) => self.failed(error)?,
                        Outcome::NotAsked(error) => return Err(error),
                        Outcome::Closed => self.failed(Error::Closed)?,
                    }
                }
                Step::Take(grant) if grant.is_taken_over() => self.take(grant, By::TakeOver)?,
                Step::Take(grant) => self.take(grant, By::HandOver)?,
                Step::Wait(wait_for) => match &mut self.pacing {
                    Pacing::Once => Step::GiveUp,
                    Pacing::Wait => Box::pin(self.waiter.wait(wait_for, self.last_answer.as_ref())).await,
                    Pacing::Pauses(pauses) => Box::pin(self.waiter.pause(pauses)).await,
                },
                Step::StartOver => Box::pin(self.waiter.start_over()).await,
                Step::Finish(guard) => return Ok(guard),
                Step::GiveUp => return Err(self.give_up()),
                Step::Close => return Err(Error::Closed),
            };
        }
    }

    /// Takes a lock that was granted, if enough of its ttl is left.
    fn take(&mut self, mut grant: Grant, by: By) -> Result<Step, Error> {
        if let Some(instead) = self.waiter.claim() {
            return Ok(instead);
        }
        let taken = suspension::read(grant.sent);
        let (at, attempts) = (taken.now, self.attempts);
        let waited = at.saturating_duration_since(self.started);
        let ttl = self.terms.bounds.usable(grant.ttl);
        let drift = self.waiter.drift();
        let remaining = drift.deadline(taken.real, ttl).saturating_duration_since(at);
        if drift.suffices(remaining, ttl) {
            debug!(name: "tenure.obtained", ?waited, attempts, ?remaining, "obtained");
            grant.fencing_token = grant.fencing_token.filter(|_| self.wants_token);
            grant.taken = Some(taken);
            let obtained = Obtained { at, held_until: grant.sent + grant.ttl, by };
            return self.waiter.succeed(grant, self.terms.clone(), obtained).map(Step::Finish);
        }
        debug!(name: "tenure.too_late", ?waited, attempts, ?remaining, "obtained too late");
        self.late += 1;
        if self.late == LATE_GRANTS {
            return Err(Error::ValidityExpired);
        }
        self.last_answer = Some(LastAnswer::Failed(Error::ValidityExpired));
        self.waiter.ticket().inspect(|ticket| ticket.give_up_claim());
        if by == By::TakeOver {
            // The server would grant the token of the earlier holder again without a new fencing token. So this
            // releases the lock and goes on with another token.
            return Ok(Step::StartOver);
        }
        // It is this request's alone: the ttl of the next one in the queue may be longer.
        self.waiter.ticket().inspect(|ticket| ticket.set_last_answer(None));
        Ok(Step::Wait(WaitFor::Pause { failures: self.late }))
    }

    /// Waits, as another holds the lock.
    fn held(&mut self, held: Held) -> Step {
        (self.late, self.failures) = (0, 0);
        let (key, attempts, waited) = (&held.key, self.attempts, self.started.elapsed());
        let remaining = held.until.map(|until| until.saturating_duration_since(Instant::now()));
        debug!(name: "tenure.held", %key, attempts, ?waited, ?remaining, "held by another");
        self.learn(LastAnswer::Held(held.clone()));
        Step::Wait(WaitFor::Release(held))
    }

    /// Waits after an attempt that failed, unless the next one would fail as well.
    fn failed(&mut self, error: Error) -> Result<Step, Error> {
        let (attempts, waited) = (self.attempts, self.started.elapsed());
        // An attempt that the limit ends before the server usually answers says nothing about the server, nor about the
        // lock: then the answer before it counts.
        if !(self.waiter.was_cut_short() && error.is_timeout()) {
            self.learn(LastAnswer::Failed(error.clone()));
        }
        if !error.is_transient() {
            return Err(error);
        }
        self.failures += 1;
        if self.reminders.is_due(Instant::now()) {
            warn!(
                name: "tenure.attempt_failed", attempts, ?waited, %error,
                "could not ask the server, still waiting"
            );
        } else {
            debug!(name: "tenure.attempt_failed", attempts, ?waited, %error, "could not ask the server");
        }
        Ok(Step::Wait(WaitFor::Pause { failures: self.failures }))
    }

    fn learn(&mut self, answer: LastAnswer) {
        self.waiter.ticket().inspect(|ticket| ticket.set_last_answer(Some(answer.clone())));
        self.last_answer = Some(answer);
    }

    /// Returns the error of a request whose time is over.
    fn give_up(&mut self) -> Error {
        // In a queue, those before this request may have asked after it did, or in its place.
        let in_queue = self.waiter.ticket().and_then(Ticket::last_answer);
        match in_queue.or_else(|| self.last_answer.take()) {
            // An answer that was no longer true when this request began is about nothing that it has waited for.
            Some(LastAnswer::Held(Held { key, until, .. })) if until.is_none_or(|until| until >= self.started) => {
                Error::NotObtained { key, attempts: self.attempts, waited: self.started.elapsed() }
            }
            Some(LastAnswer::Failed(error)) => error,
            Some(LastAnswer::Held(_)) | None => Error::timeout(),
        }
    }
}
