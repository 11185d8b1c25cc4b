//! Asking for a lock: a chain of options that ends in `.await`.

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::attempt::{Attempt, Outcome};
use crate::hold::{GrantId, Owned};
use crate::keeper::Upkeep;
use crate::locker::Locker;
use crate::queue::{Got, Learned, Place};
use crate::retry::Pauses;
use crate::schedule::{Reminders, Renewal};
use crate::store::{Queueing, Wanted};
use crate::wait::{Known, Waiting, Woken};
use crate::{Error, Key, LockGuard, Retry, Token, schedule};

/// A lock that is asked for: set what you need, then `.await` it for the [`LockGuard`].
///
/// Made by [`Locker::lock`], [`Locker::try_lock`] and [`Locker::obtain`], which differ in nothing but their patience,
/// and by [`Locker::lock_all`] and [`Locker::obtain_all`] for several keys.
/// Nothing happens before it is awaited. What is not set here is as the [`Locker`] was built.
///
/// # Cancel safety
///
/// The future may be dropped at any time. What an attempt may have left at the server is then released in the
/// background, on the runtime that polled it; nothing else is left behind.
///
/// While it is neither polled nor dropped, it keeps its place: those who wait for the key behind it in this process
/// wait for it, as they do with tokio's `Mutex`.
///
/// # Errors
///
/// - [`Error::NotObtained`]: another holds it, as the server last reported, and the request's patience is at an end.
/// - [`Error::Redis`]: the server refused for good, or the last attempt failed, or the server did not answer at all
///   within the time that the request may wait. One that waits behind others in this process has the errors of those
///   that asked before it. [`Error::Quorum`] where that is true of so many nodes that no majority was left.
/// - [`Error::NotReplicated`]: too few [replicas](crate::LockerBuilder::min_replicas) acknowledged it in time, and it
///   was released again.
/// - [`Error::ValidityExpired`]: the answer came so late that too little of the ttl was left, several times in a row
///   where the request waits.
/// - [`Error::InvalidKey`], [`Error::InvalidTtl`], [`Error::InvalidRenewal`]: no such lock can work; nothing was sent.
/// - [`Error::Unsupported`]: replicas are asked for where there can be none; nothing was sent.
/// - [`Error::CrossSlot`]: several keys that lie in different slots of a cluster; nothing was sent.
/// - [`Error::Closed`]: the locker was closed before or meanwhile.
/// - [`Error::NoRuntime`]: it was polled outside a tokio runtime.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
/// use tenure::Locker;
///
/// let locker = Locker::in_memory();
/// let guard = locker
///     .lock("index:products")
///     .ttl(Duration::from_secs(10))
///     .wait_at_most(Duration::from_secs(60))
///     .metadata("host-3, pid 4711")
///     .await?;
/// # guard.release().await
/// # }
/// ```
#[must_use = "a request does nothing until it is awaited"]
#[derive(Clone)]
pub struct LockRequest {
    locker: Locker,
    keys: Vec<Key>,
    patience: Patience,
    wait_at_most: Option<Duration>,
    ttl: Duration,
    renewal: Renewal,
    metadata: Vec<u8>,
    token: Option<Token>,
    fenced: bool,
    fair: bool,
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

impl LockRequest {
    pub(crate) fn new(locker: Locker, keys: Vec<Key>, patience: Patience) -> Self {
        let settings = locker.settings();
        let (ttl, renewal, fenced) = (settings.ttl, settings.renewal, settings.fenced);
        let metadata = Vec::new();
        Self { locker, keys, patience, wait_at_most: None, ttl, renewal, metadata, token: None, fenced, fair: false }
    }

    /// How long the server keeps the lock after each renewal, in whole milliseconds: from 4 ms (with the usual drift)
    /// to 365 days. Default: the locker's, 30 s.
    ///
    /// It is what others wait for when this process dies; and what the process may be cut off from the server before it
    /// loses the lock.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").ttl(Duration::from_secs(5)).await?;
    /// assert_eq!(guard.ttl(), Duration::from_secs(5));
    /// # Ok(())
    /// # }
    /// ```
    pub fn ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// Gives up when the lock could not be had for this long. Kept within 50 ms, whatever the server does.
    ///
    /// Makes [`obtain`](Locker::obtain) wait, and [`try_lock`](Locker::try_lock) too.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").await?;
    /// let refused = locker.lock("k").wait_at_most(Duration::from_millis(100)).await;
    /// assert!(matches!(refused, Err(tenure::Error::NotObtained { .. })));
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_at_most(self, limit: Duration) -> Self {
        let patience = match self.patience {
            Patience::Once => Patience::Wait,
            patience => patience,
        };
        Self { wait_at_most: Some(limit), patience, ..self }
    }

    /// Tries again after each of these pauses, and gives up when they end. Failures of the server count as attempts.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let thrice = tenure::Retry::linear(Duration::from_millis(50)).limit(3);
    /// let guard = locker.obtain("k").retry(thrice).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn retry(self, retry: Retry) -> Self {
        Self { patience: Patience::Retry(retry), ..self }
    }

    /// Bytes to store beside the token, for [`Locker::inspect`] to show: who holds it, and what for.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").metadata("host-3").await?;
    /// assert_eq!(locker.inspect("k").await?.map(|holder| holder.metadata), Some(b"host-3".to_vec()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn metadata(self, metadata: impl Into<Vec<u8>>) -> Self {
        Self { metadata: metadata.into(), ..self }
    }

    /// Obtains the lock in the name of this token: at once also where the same token holds it already, which then has
    /// it renewed. Default: a fresh [random](Token::random) one.
    ///
    /// Several guards may hold the lock by one token. Each is released in the background, when it is dropped or
    /// expires, without ending the others; an explicit [`release`](LockGuard::release) of any of them ends the lock for
    /// all. A holder that died counts until its own ttl has passed: where its token is used again before, the key stays
    /// for that long after a drop.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let first = locker.obtain("k").token("worker-7".parse()?).await?;
    /// let again = locker.obtain("k").token("worker-7".parse()?).await?;
    /// assert_eq!(first.fencing_token(), again.fencing_token());
    /// # Ok(())
    /// # }
    /// ```
    pub fn token(self, token: Token) -> Self {
        Self { token: Some(token), ..self }
    }

    /// The time between renewals: at least 1 ms, and shorter than the ttl less drift. Default: the locker's, or a third
    /// of the ttl.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").ttl(Duration::from_secs(60)).renew_every(Duration::from_secs(5)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn renew_every(self, interval: Duration) -> Self {
        Self { renewal: Renewal::Every(interval), ..self }
    }

    /// Doesn't renew the lock: it expires by itself when its ttl ends, and the guard says so.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").ttl(Duration::from_secs(1)).no_renewal().await?;
    /// assert_eq!(guard.lost().await, tenure::Loss::Expired);
    /// # Ok(())
    /// # }
    /// ```
    pub fn no_renewal(self) -> Self {
        Self { renewal: Renewal::Never, ..self }
    }

    /// Whether the guard shall have a [fencing token](LockGuard::fencing_token). Default: the locker's, true.
    ///
    /// A lock that was obtained without one, and is obtained again with one by its guard's random
    /// [token](LockGuard::token), has that of the holder before. By a token that was [chosen](LockRequest::token) each
    /// time, it has its own.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// assert_eq!(locker.lock("k").fenced(false).await?.fencing_token(), None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fenced(self, fenced: bool) -> Self {
        Self { fenced, ..self }
    }

    /// Whether the request has a place of its own in the line for the lock. Default: false.
    ///
    /// All that wait in one process share a place in the line, and a process that has the lock may serve several of them
    /// in a row ([turns](crate::Locker::lock)). Fair requests have one place and one turn each, in the order of their
    /// arrival in whatever process, at about one call more for each. One that doesn't wait
    /// ([`try_lock`](crate::Locker::try_lock)) is refused while others are in the line.
    ///
    /// Plain and fair requests for one key stand in the same line. For several keys, in a quorum, and on the embedded
    /// store this setting changes nothing.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// # let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("printer").fair(true).await?;
    /// # guard.release().await
    /// # }
    /// ```
    pub fn fair(self, fair: bool) -> Self {
        Self { fair, ..self }
    }

    pub(crate) fn renewal(self, renewal: Renewal) -> Self {
        Self { renewal, ..self }
    }

    /// The request is in a box, as arguments stay in their future for as long as that lives.
    async fn obtain(self: Box<Self>) -> Result<LockGuard, Error> {
        let started = Instant::now();
        // Before anything is sent: what can't work is refused.
        let (ttl, runtime) = self.validate()?;
        let Self { locker, keys, patience, wait_at_most, renewal, metadata, token, fenced: wants_token, fair, .. } =
            *self;
        let (drift, closed) = (locker.settings().drift, locker.closed());

        let limit = wait_at_most.map(|limit| schedule::after(started, limit));
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
        let mut attempt = Attempt::new(wanted, locker.upkeep().clone(), runtime);
        let mut waiting = Waiting::new(locker.settings().poll_every, limit, closed);
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
                    attempt.place().inspect(|place| place.ask());
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
                    return Err(match attempt.place().and_then(Place::learned).or(learned) {
                        // What was true before this request began is nothing that it has waited for.
                        Some(Learned::Held { key, until }) if until.is_none_or(|until| until >= started) => {
                            Error::NotObtained { key, attempts, waited: started.elapsed() }
                        }
                        Some(Learned::Unknown(error)) => error,
                        Some(Learned::Held { .. }) | None => Error::timeout(),
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
                        waiting.pass_on(&attempt, Got { at: now, held_until: grant.sent + ttl, was_handed_over });
                        return attempt.succeed(grant, drift, renewal);
                    }
                    debug!(name: "tenure.too_late", ?waited, attempts, ?remaining, "obtained too late");
                    // Once can be a stall of the server, which waiting helps against. A ttl that is always too short
                    // for the way to the server would be waited with for ever.
                    late += 1;
                    if late == LATE_GRANTS {
                        return Err(Error::ValidityExpired);
                    }
                    learned = Some(Learned::Unknown(Error::ValidityExpired));
                    // The next one's ttl may be longer.
                    attempt.place().inspect(|place| place.learn(None));
                    Known::Nothing { failures: late }
                }
                Ok(Outcome::Held { key, remaining }) => {
                    (late, failures) = (0, 0);
                    took = asked.elapsed();
                    debug!(name: "tenure.held", %key, attempts, ?waited, ?remaining, "held by another");
                    let until = remaining.and_then(|remaining| Instant::now().checked_add(remaining));
                    learned = Some(Learned::Held { key: key.clone(), until });
                    attempt.place().inspect(|place| place.learn(learned.clone()));
                    Known::Held { key, remaining }
                }
                Err(error) => {
                    // An attempt that the limit ends before the server usually answers says nothing about the server,
                    // nor about the lock: then the answer before it counts.
                    let is_cut_short = asked.elapsed() < took * 2 && limit.is_some_and(|limit| Instant::now() >= limit);
                    if !(is_cut_short && error.is_timeout()) {
                        learned = Some(Learned::Unknown(error.clone()));
                        attempt.place().inspect(|place| place.learn(learned.clone()));
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
        if self.locker.closed().is_cancelled() {
            return Err(Error::Closed);
        }
        Key::validate_all(&self.keys)?;
        let drift = self.locker.settings().drift;
        let ttl = drift.validate(self.ttl)?;
        self.renewal.validate(ttl, drift)?;
        Upkeep::check_runtime()?;
        Ok((ttl, self.locker.upkeep().runtime()?))
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
    let wake = schedule::after(Instant::now(), pause);
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

impl fmt::Debug for LockRequest {
    /// Shows how much metadata there is, and no token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockRequest")
            .field("locker", &self.locker)
            .field("keys", &self.keys)
            .field("patience", &self.patience)
            .field("wait_at_most", &self.wait_at_most)
            .field("ttl", &self.ttl)
            .field("renewal", &self.renewal)
            .field("metadata", &format_args!("{} bytes", self.metadata.len()))
            .field("token", &self.token)
            .field("fenced", &self.fenced)
            .field("fair", &self.fair)
            .finish()
    }
}

impl IntoFuture for LockRequest {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Obtaining;

    fn into_future(self) -> Obtaining {
        let keys = Keys(&self.keys);
        let span = info_span!("tenure.obtain", key = %keys, ttl = ?self.ttl);
        Obtaining(Box::pin(Box::new(self).obtain().instrument(span)))
    }
}

/// The keys of a request, as its span shows them.
struct Keys<'a>(&'a [Key]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        self.0.iter().try_for_each(|key| write!(f, "{}{key}", std::mem::replace(&mut separator, ", ")))
    }
}

/// Obtains a lock: the future of a [`LockRequest`], made by awaiting it.
///
/// # Cancel safety
///
/// May be dropped at any time, see [`LockRequest`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::future::IntoFuture;
///
/// let locker = tenure::Locker::in_memory();
/// let waiting = tokio::spawn(locker.lock("k").into_future());
/// let guard = waiting.await??;
/// # Ok(())
/// # }
/// ```
#[must_use = "futures do nothing unless polled"]
pub struct Obtaining(Pin<Box<dyn Future<Output = Result<LockGuard, Error>> + Send>>);

impl Future for Obtaining {
    type Output = Result<LockGuard, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Obtaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Obtaining").finish_non_exhaustive()
    }
}
