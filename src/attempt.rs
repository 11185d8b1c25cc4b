//! The attempts of one request, which leave nothing behind.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::debug;

use crate::hold::{Grant, GrantId, Hold};
use crate::keeper::Upkeep;
use crate::queue::{Place, Turn};
use crate::schedule::{Drift, Renewal};
use crate::store::listen::Listening;
use crate::store::{Acquired, Queueing, Wanted};
use crate::wait::Woken;
use crate::{Error, Key, LockGuard, Token};

/// Even a request that may not wait at all gives its first attempt this long. Less than the tolerance of
/// [`LockRequest::wait_at_most`].
const FIRST_ATTEMPT: Duration = Duration::from_millis(30);

/// By how much the store may overrun its timeout before its call is given up on from outside.
const GRACE: Duration = Duration::from_millis(10);

/// Asks the server for one lock, as often as its request wants to.
///
/// Whatever was sent may take effect, whether its answer came or not. So an attempt is *unsettled* from before it is
/// sent until its answer says what became of it, and one that is dropped unsettled is undone.
pub(crate) struct Attempt {
    wanted: Arc<Wanted>,
    upkeep: Arc<Upkeep>,
    runtime: Handle,
    /// An attempt had an unknown outcome, so that it may be run after the lock is released.
    doubt: bool,
    /// There while unsettled. The token makes [`Locker::close`](crate::Locker::close) wait until that is over.
    unsettled: Option<TaskTrackerToken>,
    /// The token has been used.
    made: bool,
    /// Where it stands among those in this process who wait for the key.
    place: Option<Place>,
    /// It may stand in the line of all processes.
    in_line: bool,
}

/// What the server has decided.
pub(crate) enum Outcome {
    Granted(Grant),
    /// By another, for this long unless renewed.
    Held {
        key: Key,
        remaining: Option<Duration>,
    },
}

impl Attempt {
    pub(crate) fn new(wanted: Wanted, upkeep: Arc<Upkeep>, runtime: Handle) -> Self {
        Self {
            wanted: Arc::new(wanted),
            upkeep,
            runtime,
            doubt: false,
            unsettled: None,
            made: false,
            place: None,
            in_line: false,
        }
    }

    pub(crate) fn key(&self) -> Key {
        self.wanted.owned.key()
    }

    /// Asks the server once.
    pub(crate) async fn make(&mut self, limit: Option<Instant>, closed: &CancellationToken) -> Result<Outcome, Error> {
        if std::mem::replace(&mut self.made, true) {
            self.renew_token();
        }
        let sent = Instant::now();
        let patience = limit.map_or(Duration::MAX, |limit| limit.saturating_duration_since(sent));
        let timeout = self.upkeep.command_timeout.min(patience.max(FIRST_ATTEMPT));
        let doubtful = self.unsettled.is_some();
        self.unsettle();
        let call = self.upkeep.store.acquire(&self.wanted, timeout);
        let (answer, settles) = select! {
            biased;
            () = closed.cancelled() => return Err(Error::Closed),
            answer = timeout_at(sent + timeout + GRACE, call) => match answer {
                Ok(answer) => (answer, self.upkeep.store.settles()),
                Err(_) => (Err(Error::timeout()), false),
            },
        };
        let refused = match &answer {
            Ok(Acquired::Held { .. } | Acquired::NotNext { .. }) => true,
            Ok(Acquired::Granted { .. }) => false,
            Err(error) => settles || error.has_not_run(),
        };
        // After an earlier attempt of unknown outcome, this answer doesn't speak for that one.
        if refused && !doubtful {
            self.unsettled = None;
        }
        self.doubt |= answer.is_err() && !refused;
        Ok(match answer? {
            Acquired::Granted { fencing_token } => {
                Outcome::Granted(Grant { sent, ttl: self.wanted.ttl, fencing_token, doubt: None })
            }
            Acquired::Held { place, remaining } => {
                let key = self.wanted.owned.keys.get(place).cloned().unwrap_or_else(|| self.key());
                Outcome::Held { key, remaining }
            }
            Acquired::NotNext { next, remaining } => {
                // It may be one of ours, who came later here and was faster there.
                if let Some(place) = &self.place {
                    place.let_pass(&next);
                }
                Outcome::Held { key: self.key(), remaining: Some(remaining) }
            }
        })
    }

    /// Takes the last place among those who wait for the key. Requests for several keys stand in no queue.
    pub(crate) fn queue_up(&mut self) {
        if let (None, Some(key)) = (&self.place, self.only_key()) {
            self.in_line = true;
            self.place = Some(self.upkeep.queues.enter(key, self.wanted.clone()));
        }
    }

    pub(crate) fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// What a turn in the queue, other than to be the first, means for this one.
    pub(crate) fn handed(&mut self, turn: Turn) -> Woken {
        match turn {
            Turn::Granted(grant) => {
                // Until a guard has it.
                self.unsettle();
                Woken::Granted(grant)
            }
            Turn::AskAgain { settled: false } => {
                self.doubt = true;
                self.unsettle();
                Woken::Ask
            }
            Turn::AskAgain { settled: true } | Turn::First => Woken::Ask,
        }
    }

    fn unsettle(&mut self) {
        if self.unsettled.is_none() {
            self.unsettled = Some(self.upkeep.releases.token());
        }
    }

    /// Gives signs of life of all in this process who stand in line with others.
    pub(crate) async fn attend(&self) {
        let (Some(key), Some(place)) = (self.only_key(), &self.place) else { return };
        let queued = place.queued();
        for some in queued.chunks(128) {
            if let Err(error) = self.upkeep.store.attend(&key, some, self.upkeep.command_timeout).await {
                debug!(name: "tenure.attend_failed", %key, %error, "no sign of life; the place in the queue may be lost");
                return;
            }
        }
    }

    /// Whether a token that may be used again holds the lock: then nobody who waits is before this one. Where the
    /// server can't be asked, it isn't.
    pub(crate) async fn is_held_already(&self) -> bool {
        let owned = &self.wanted.owned;
        !owned.own_token && matches!(self.upkeep.store.remaining(owned, self.upkeep.command_timeout).await, Ok(Some(_)))
    }

    /// Stands in line with those of other processes, also while others of this one come first.
    pub(crate) async fn stand_in_line(&self) {
        if let (Queueing::Queued, Some(key)) = (self.wanted.queueing, self.only_key()) {
            let token = std::slice::from_ref(&self.wanted.owned.token);
            if let Err(error) = self.upkeep.store.attend(&key, token, self.upkeep.command_timeout).await {
                debug!(name: "tenure.attend_failed", %key, %error, "not in the queue yet");
            }
        }
    }

    /// Leaves nothing in the line, in the background. Where that fails, the others need a moment to skip it.
    fn leave_line(&self) {
        if self.wanted.queueing != Queueing::Queued || !self.in_line {
            return;
        }
        let (wanted, upkeep, owed) = (self.wanted.clone(), self.upkeep.clone(), self.upkeep.releases.token());
        self.runtime.spawn(async move {
            if let Err(error) = upkeep.store.leave(&wanted.owned, upkeep.command_timeout).await {
                debug!(name: "tenure.leave_failed", key = %wanted.owned.key(), %error, "the place in the queue ends by its time");
            }
            drop(owed);
        });
    }

    pub(crate) fn only_key(&self) -> Option<Key> {
        match &*self.wanted.owned.keys {
            [key] => Some(key.clone()),
            _ => None,
        }
    }

    pub(crate) fn listen(&self, key: &Key) -> Listening {
        self.upkeep.store.listen(key)
    }

    /// Several servers decide, each by itself.
    pub(crate) fn is_voted_on(&self) -> bool {
        self.upkeep.store.settles()
    }

    pub(crate) fn command_timeout(&self) -> Duration {
        self.upkeep.command_timeout
    }

    /// Another attempt is about to be made. A store that takes attempts back by itself may still do so with the last
    /// one, and must not take this one for it.
    fn renew_token(&mut self) {
        if !self.upkeep.store.settles() {
            return;
        }
        self.undo();
        let mut owned = self.wanted.owned.clone();
        match owned.own_token {
            true => owned.token = Token::random(),
            false => owned.grant = Some(GrantId::random()),
        }
        self.wanted = Arc::new(Wanted { owned, latest: Arc::default(), ..Wanted::clone(&self.wanted) });
    }

    /// Undoes what is unsettled, in the background.
    fn undo(&mut self) {
        let Some(unsettled) = self.unsettled.take() else { return };
        let (wanted, upkeep) = (self.wanted.clone(), self.upkeep.clone());
        // Where the runtime is gone, this does nothing, and the ttl frees the lock.
        self.runtime.spawn(async move {
            upkeep.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
            drop(unsettled);
        });
    }

    /// The lock is ours: from here on its guard and its keeper see to it.
    pub(crate) fn succeed(mut self, mut grant: Grant, drift: Drift, renewal: Renewal) -> LockGuard {
        let Wanted { owned, metadata, latest, .. } = &*self.wanted;
        let is_voted_on = self.is_voted_on();
        grant.doubt = (self.doubt && !is_voted_on).then(|| latest.clone());
        let origin = self.upkeep.origin;
        let hold = Hold::new(owned.clone(), metadata.clone(), &grant, drift, renewal, origin, is_voted_on);
        let guard = LockGuard::start(hold, &self.upkeep, &self.runtime);
        self.unsettled = None;
        self.in_line = false;
        if let Some(place) = self.place.take() {
            place.leave();
        }
        guard
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.place.take().is_some_and(|place| place.leave()) {
            self.unsettle();
        }
        self.leave_line();
        self.undo();
    }
}
