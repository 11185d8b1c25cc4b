//! The attempts of one request: sending them, learning their outcome, undoing what they may have left.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::Instant;

use crate::acquire::answer::Held;
use crate::acquire::context::Context;
use crate::hold::{Grant, GrantId, Hold, Owned, Terms};
use crate::locker::cleanups::{Cleanup, PendingCleanup};
use crate::locker::shared::Shared;
use crate::store::{Acquired, GRACE, InLine, Wanted};
use crate::{Error, LockGuard, Token};

/// How long the first attempt may take, even of a request that may not wait at all. Less than the tolerance of
/// [`LockRequest::wait_at_most`](crate::LockRequest::wait_at_most).
const FIRST_ATTEMPT: Duration = Duration::from_millis(30);

/// Asks the server for one lock, as often as its request wants to.
///
/// Whatever was sent may take effect, whether its answer came or not. So an attempt is *pending* from before it is sent
/// until its outcome is known. When this is dropped, what is pending is undone in the background.
pub(crate) struct Attempt {
    pub(crate) context: Context,
    /// An attempt had an unknown outcome, so that it may be run after the lock is released.
    doubt: bool,
    /// There while an attempt is pending. [`Locker::close`](crate::Locker::close) waits for its end, or undoes it.
    pending: Option<PendingCleanup>,
    /// The token has been used.
    was_made: bool,
}

/// One attempt that is about to be sent.
pub(crate) struct Sending {
    sent: Instant,
    timeout: Duration,
    /// No earlier attempt is pending, so that an answer to this one speaks for all.
    is_only_one: bool,
}

impl Sending {
    /// Returns when the attempt ends at the latest.
    pub(crate) fn ends(&self) -> Instant {
        self.sent + self.timeout + GRACE
    }
}

/// What has become of an attempt.
pub(crate) enum Outcome {
    Granted(Grant),
    Held(Held),
    /// It failed, and has left nothing behind.
    Failed(Error),
    /// It failed, and may have been run, or may yet.
    Unknown(Error),
    /// The server was not asked before the time of the request was over.
    NotAsked(Error),
    /// The locker was closed meanwhile.
    Closed,
}

impl Attempt {
    pub(crate) fn new(wanted: Wanted, shared: Arc<Shared>, runtime: Handle) -> Self {
        let context = Context { wanted: Arc::new(wanted), shared, runtime };
        Self { context, doubt: false, pending: None, was_made: false }
    }

    /// Returns until when the server may run a release that would end what the token obtains.
    pub(crate) fn late_release_until(&self) -> Option<Instant> {
        let Context { wanted, shared, .. } = &self.context;
        if wanted.owned.own_token { None } else { shared.late_releases.until(&wanted.owned) }
    }

    /// Prepares an attempt that is sent at `sent` and ends soon after the limit, and registers it as pending.
    pub(crate) fn prepare(&mut self, sent: Instant, limit: Option<Instant>) -> Sending {
        if std::mem::replace(&mut self.was_made, true) {
            self.renew_token();
        }
        let to_limit = limit.map_or(Duration::MAX, |limit| limit.saturating_duration_since(sent));
        let Context { wanted, shared, .. } = &self.context;
        let timeout = shared.command_timeout.min(to_limit.max(FIRST_ATTEMPT));
        let is_only_one = self.pending.is_none();
        if is_only_one {
            self.pending = Some(shared.cleanups.register_since(sent, Cleanup::Undo(wanted.clone())));
        }
        Sending { sent, timeout, is_only_one }
    }

    /// Asks the server once. By reference, as the arguments of an async function are in its future twice.
    pub(crate) async fn send(&mut self, sending: &Sending, in_line: &InLine) -> Outcome {
        let Context { wanted, shared, .. } = &self.context;
        let call = shared.store.acquire(wanted, *in_line, sending.timeout);
        let (answer, undoes_attempts) = select! {
            // Closing comes first: what is granted after it would be undone all the same.
            biased;
            () = shared.closed.cancelled() => return Outcome::Closed,
            answer = call => (answer, shared.store.capabilities().undoes_attempts),
        };
        self.complete(sending, answer, undoes_attempts)
    }

    /// `undoes_attempts`: the store leaves nothing behind where it doesn't grant.
    fn complete(&mut self, sending: &Sending, answer: Result<Acquired, Error>, undoes_attempts: bool) -> Outcome {
        let Context { wanted, .. } = &self.context;
        let outcome = match answer {
            Ok(Acquired::Granted { fencing_token }) => {
                return Outcome::Granted(Grant::new(sending.sent, wanted.ttl, fencing_token));
            }
            Ok(Acquired::Held { place, remaining, refusal }) => {
                let key = wanted.owned.keys.get(place).cloned().unwrap_or_else(|| wanted.owned.key());
                let until = remaining.and_then(|remaining| Instant::now().checked_add(remaining));
                Outcome::Held(Held { key, until, refusal })
            }
            Err(error) if undoes_attempts || error.has_not_run() => Outcome::Failed(error),
            Err(error) => {
                self.doubt = true;
                return Outcome::Unknown(error);
            }
        };
        // This answer says nothing about an earlier attempt of unknown outcome: then that is still pending.
        if sending.is_only_one {
            self.pending = None;
        }
        outcome
    }

    /// Notes that a hand-over may have given the lock to the token. `pending` is what undoes that, where somebody has
    /// registered it already.
    pub(crate) fn keep_pending(&mut self, pending: Option<PendingCleanup>) {
        self.pending = self.pending.take().or(pending);
        if self.pending.is_none() {
            let undo = Cleanup::Undo(self.context.wanted.clone());
            self.pending = Some(self.context.shared.cleanups.register(undo));
        }
    }

    /// Goes on with the token of an earlier holder of this process, which holds the lock at the server. Undoes what the
    /// request's own token may have left. `pending` releases the lock until a guard has it.
    pub(crate) fn take_over(&mut self, wanted: Arc<Wanted>, pending: Option<PendingCleanup>) {
        self.undo();
        self.doubt = false;
        self.context.wanted = wanted;
        self.keep_pending(pending);
    }

    /// Notes that a hand-over had an unknown outcome, as [`keep_pending`](Self::keep_pending) does.
    pub(crate) fn doubt(&mut self, pending: Option<PendingCleanup>) {
        self.doubt = true;
        self.keep_pending(pending);
    }

    /// Returns whether a token that may be used again holds the lock: then no waiter is before this one. Returns false
    /// where the server can't be asked.
    pub(crate) async fn is_held_already(&self) -> bool {
        let Context { wanted, shared, .. } = &self.context;
        if wanted.owned.own_token {
            return false;
        }
        // Any grant of the token will do.
        let owned = Owned { grant: Some(GrantId::UNKNOWN), ..wanted.owned.clone() };
        matches!(shared.store.remaining(&owned, shared.command_timeout).await, Ok(Some(_)))
    }

    /// Gives up the token, and what it may have left, for a new one. The lock was handed over and taken back: what the
    /// old token may still do at the server must not count for what comes.
    pub(crate) fn start_over(&mut self) {
        self.undo();
        self.doubt = false;
        self.was_made = false;
        let mut owned = self.context.wanted.owned.clone();
        owned.token = Token::random();
        let wanted = Wanted { owned, latest: Arc::default(), ..Wanted::clone(&self.context.wanted) };
        self.context.wanted = Arc::new(wanted);
    }

    /// Prepares for another attempt. A store that takes attempts back by itself may still do so with the last one, and
    /// must not take this one for it.
    fn renew_token(&mut self) {
        if !self.context.shared.store.capabilities().undoes_attempts {
            return;
        }
        self.undo();
        let mut owned = self.context.wanted.owned.clone();
        match owned.own_token {
            true => owned.token = Token::random(),
            false => owned.grant = Some(GrantId::random()),
        }
        let wanted = Wanted { owned, latest: Arc::default(), ..Wanted::clone(&self.context.wanted) };
        self.context.wanted = Arc::new(wanted);
    }

    /// Undoes what is pending, in the background.
    fn undo(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        if pending.is_taken_over() {
            return;
        }
        let (wanted, shared) = (self.context.wanted.clone(), self.context.shared.clone());
        // Where the runtime is gone, this does nothing, and the ttl frees the lock.
        self.context.runtime.spawn(async move {
            shared.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
            drop(pending);
        });
    }

    /// Starts a guard for a lock that was granted. From here on, the guard and its renewer release it.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], where the locker is closed and the attempt is being undone.
    pub(crate) fn succeed(&mut self, mut grant: Grant, terms: Terms) -> Result<LockGuard, Error> {
        if !self.pending.take().is_none_or(PendingCleanup::complete) {
            return Err(Error::Closed);
        }
        let Context { wanted, shared, runtime } = &self.context;
        let Wanted { owned, metadata, latest, .. } = &**wanted;
        let is_voted_on = self.context.is_voted_on();
        grant.doubt = (self.doubt && !is_voted_on).then(|| latest.clone());
        let (drift, origin) = (shared.settings.drift, shared.origin);
        let hold = Hold::new(owned.clone(), metadata.clone(), &grant, drift, terms, origin, is_voted_on);
        Ok(LockGuard::start(hold, shared, runtime))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.undo();
    }
}
