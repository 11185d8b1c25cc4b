//! The way to a lock: attempts, and what is waited for between them.

pub(crate) mod answer;
pub(crate) mod attempt;
mod hand_over;
pub(crate) mod queue;
pub(crate) mod supervisor;
pub(crate) mod waiter;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::answer::{Held, LastAnswer};
use self::attempt::{Attempt, Outcome};
use self::queue::{Obtained, Ticket};
use self::waiter::{Known, Waiter, Woken};
use crate::hold::timing::{self, Reminders, Renewal};
use crate::hold::{GrantId, Owned};
use crate::locker::shared::Shared;
use crate::retry::Pauses;
use crate::store::{Queueing, Wanted};
use crate::{Error, Key, LockGuard, Retry, Token};

/// What a request asks for.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) shared: Arc<Shared>,
    pub(crate) keys: Vec<Key>,
    pub(crate) patience: Patience,
    pub(crate) wait_at_most: Option<Duration>,
    pub(crate) ttl: Duration,
    pub(crate) renewal: Renewal,
    pub(crate) metadata: Vec<u8>,
    pub(crate) token: Option<Token>,
    pub(crate) fenced: bool,
    pub(crate) fair: bool,
}

/// How a request goes on when the lock is not to be had at once.
#[derive(Clone, Debug)]
pub(crate) enum Patience {
    /// It doesn't.
    Once,
    /// It looks again when there is reason to, for as long as it may wait.
    Wait,
    /// It tries again after each of the strategy's pauses.
    Retry(Retry),
}

impl Options {
    pub(crate) fn new(shared: Arc<Shared>, keys: Vec<Key>, patience: Patience) -> Self {
        let settings = &shared.settings;
        let (ttl, renewal, fenced) = (settings.ttl, settings.renewal, settings.fenced);
        let (wait_at_most, metadata, token, fair) = (None, Vec::new(), None, false);
        Self { shared, keys, patience, wait_at_most, ttl, renewal, metadata, token, fenced, fair }
    }

    /// The request is in a box, as arguments stay in their future for as long as that lives.
    pub(crate) async fn obtain(self: Box<Self>) -> Result<LockGuard, Error> {
        let started = Instant::now();
        // Before anything is sent: what can't work is refused.
        let (ttl, runtime) = self.validate()?;
        let Self { shared, keys, patience, wait_at_most, renewal, metadata, token, fenced: wants_token, fair, .. } =
            *self;
        let (drift, closed) = (shared.settings.drift, &shared.closed);

        let limit = wait_at_most.map(|limit| timing::after(started, limit));
        let own_token = token.is_none();
        let queueing = match patience {
            Patience::Wait if fair => Queueing::Own,
            Patience::Wait => Queueing::Shared,
            Patience::Once | Patience::Retry(_) if fair => Queueing::Behind,
            Patience::Once | Patience::Retry(_) => Queueing::None,
        };
        let token = token.unwrap_or_else(Token::random);
        // A token that others may use as well needs something else to tell its grants apart.
        let grant = (!own_token).then(GrantId::random);
        let owned = Owned { keys: keys.into(), token, own_token, grant };
        // Who comes back by the same token, and wants a fencing token then, must not be told that of the holder before:
        // so what is held by a token that can come back has one of its own, wanted or not.
        let fenced = wants_token || !own_token;
        let (metadata, latest) = (metadata.into(), Arc::default());
        let wanted = Wanted { owned, metadata, ttl, fenced, queueing, latest };
        let mut attempt = Attempt::new(wanted, shared.clone(), runtime);
        let mut waiting = Waiter::new(shared.settings.poll_every, limit, closed);
        let mut between = match patience {
            Patience::Once => Between::Nothing,
            Patience::Wait => Between::News,
            Patience::Retry(retry) => Between::Pauses(retry.pauses()),
        };
        let mut woken = match between {
            Between::News => waiting.behind_others(&mut attempt).await,
            Between::Nothing | Between::Pauses(_) => Woken::Ask,
        };
        let (mut attempts, mut late, mut failures) = (0, 0, 0);
        let (mut learned, mut took) = (None, Duration::ZERO);
        let mut reminders = Reminders::default();
        loop {
            let (asked, mut was_handed_over) = (Instant::now(), false);
            let outcome = match woken {
                Woken::Ask => {
                    attempts += 1;
                    attempt.place().inspect(|place| place.asks_again());
                    Box::pin(attempt.make(limit, closed)).await
                }
                Woken::Granted(grant) => {
                    was_handed_over = true;
                    Ok(Outcome::Granted(grant))
                }
                Woken::TakenBack => {
                    attempt.start_over();
                    waiting.start_over();
                    woken = Box::pin(waiting.behind_others(&mut attempt)).await;
                    continue;
                }
                Woken::Closed => return Err(Error::Closed),
                Woken::Late => {
                    // In a queue, those before this request may have asked after it did, or in its place.
                    return Err(match attempt.place().and_then(Ticket::last_answer).or(learned) {
                        // What was true before this request began is nothing that it has waited for.
                        Some(LastAnswer::Held(Held { key, until })) if until.is_none_or(|until| until >= started) => {
                            Error::NotObtained { key, attempts, waited: started.elapsed() }
                        }
                        Some(LastAnswer::Failed(error)) => error,
                        Some(LastAnswer::Held(_)) | None => Error::timeout(),
                    });
                }
            };
            let now = Instant::now();
            let waited = now.saturating_duration_since(started);
            let known = match outcome {
                Ok(Outcome::Granted(mut grant)) => {
                    if let Some(why_not) = attempt.claim() {
                        woken = why_not;
                        continue;
                    }
                    grant.fencing_token = grant.fencing_token.filter(|_| wants_token);
                    let remaining = drift.deadline(grant.sent, ttl).saturating_duration_since(now);
                    if drift.suffices(remaining, ttl) {
                        info!(name: "tenure.obtained", ?waited, attempts, ?remaining, "obtained");
                        waiting.pass_on(&attempt, Obtained { at: now, held_until: grant.sent + ttl, was_handed_over });
                        return attempt.succeed(grant, drift, renewal);
                    }
                    debug!(name: "tenure.too_late", ?waited, attempts, ?remaining, "obtained too late");
                    // Once can be a stall of the server, which waiting helps against. A ttl that is always too short
                    // for the way to the server would be waited with for ever.
                    late += 1;
                    if late == LATE_GRANTS {
                        return Err(Error::ValidityExpired);
                    }
                    learned = Some(LastAnswer::Failed(Error::ValidityExpired));
                    // The next one's ttl may be longer.
                    attempt.place().inspect(|place| place.set_last_answer(None));
                    Known::Nothing { failures: late }
                }
                Ok(Outcome::Held { key, remaining }) => {
                    (late, failures) = (0, 0);
                    took = asked.elapsed();
                    debug!(name: "tenure.held", %key, attempts, ?waited, ?remaining, "held by another");
                    let until = remaining.and_then(|remaining| Instant::now().checked_add(remaining));
                    learned = Some(LastAnswer::Held(Held { key: key.clone(), until }));
                    attempt.place().inspect(|place| place.set_last_answer(learned.clone()));
                    Known::Held { key, remaining }
                }
                Err(error) => {
                    // An attempt that the limit ends before the server usually answers says nothing about the server,
                    // nor about the lock: then the answer before it counts.
                    let is_cut_short = asked.elapsed() < took * 2 && limit.is_some_and(|limit| Instant::now() >= limit);
                    if !(is_cut_short && error.is_timeout()) {
                        learned = Some(LastAnswer::Failed(error.clone()));
                        attempt.place().inspect(|place| place.set_last_answer(learned.clone()));
                    }
                    if !error.is_transient() {
                        return Err(error);
                    }
                    failures += 1;
                    if reminders.is_due(Instant::now()) {
                        warn!(name: "tenure.attempt_failed", attempts, ?waited, %error, "could not ask the server, still waiting");
                    } else {
                        debug!(name: "tenure.attempt_failed", attempts, ?waited, %error, "could not ask the server");
                    }
                    Known::Nothing { failures }
                }
            };
            // In boxes, here and above: a request that is small costs less than these, which most never come to.
            woken = match &mut between {
                Between::Nothing => Woken::Late,
                Between::News => Box::pin(waiting.wait(&mut attempt, known, asked.elapsed())).await,
                Between::Pauses(pauses) => Box::pin(pause(pauses, limit, closed)).await,
            };
        }
    }

    /// Refuses what can't work. Answers the ttl as the server will have it, and where the lock will be kept.
    fn validate(&self) -> Result<(Duration, Handle), Error> {
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Key::validate_all(&self.keys)?;
        let drift = self.shared.settings.drift;
        let ttl = drift.validate(self.ttl)?;
        self.renewal.validate(ttl, drift)?;
        Shared::check_runtime()?;
        Ok((ttl, self.shared.runtime()?))
    }
}

/// So many grants in a row that came too late to be of use end a request that waits.
const LATE_GRANTS: u32 = 3;

/// What there is between two attempts.
enum Between {
    /// There is only one.
    Nothing,
    /// Whatever makes another worth while.
    News,
    /// What the user has said.
    Pauses(Pauses),
}

async fn pause(pauses: &mut Pauses, limit: Option<Instant>, closed: &CancellationToken) -> Woken {
    let Some(pause) = pauses.next() else { return Woken::Late };
    let wake = timing::after(Instant::now(), pause);
    // A pause that the limit cuts short is waited for all the same: the request was not told to give up earlier.
    let (wake, woken) = match limit {
        Some(limit) if wake >= limit => (limit, Woken::Late),
        _ => (wake, Woken::Ask),
    };
    select! {
        biased;
        () = closed.cancelled() => Woken::Closed,
        () = sleep_until(wake) => woken,
    }
}
