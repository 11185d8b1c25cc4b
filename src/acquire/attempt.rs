//! The attempts of one request, which leave nothing behind.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::acquire::queue::{Claim, HEARTBEAT, Leftovers, Ticket, Wakeup};
use crate::acquire::waiter::Woken;
use crate::hold::timing::{Drift, Renewal};
use crate::hold::{Grant, GrantId, Hold};
use crate::locker::cleanups::{Cleanup, PendingCleanup};
use crate::locker::shared::Shared;
use crate::store::listen::Listening;
use crate::store::{Acquired, InLine, LinePlace, Queueing, Wanted};
use crate::{Error, Key, LockGuard, Token};

/// Even a request that may not wait at all gives its first attempt this long. Less than the tolerance of
/// [`LockRequest::wait_at_most`].
const FIRST_ATTEMPT: Duration = Duration::from_millis(30);

/// By how much the store may overrun its timeout before its call is given up on from outside.
const GRACE: Duration = Duration::from_millis(10);

/// Asks the server for one lock, as often as its request wants to.
///
/// Whatever was sent may take effect, whether its answer came or not. So an attempt is *pending* from before it is
/// sent until its answer says what became of it, and one that is dropped pending is undone.
pub(crate) struct Attempt {
    wanted: Arc<Wanted>,
    shared: Arc<Shared>,
    runtime: Handle,
    /// An attempt had an unknown outcome, so that it may be run after the lock is released.
    doubt: bool,
    /// There while pending. [`Locker::close`](crate::Locker::close) waits until that is over, or undoes it.
    pending: Option<PendingCleanup>,
    /// The token has been used.
    made: bool,
    /// Where it stands among those in this process who wait for the key.
    place: Option<Ticket>,
    /// The server has said that the lock is held by another, so there is something to wait for.
    was_refused: bool,
    /// Where it may stand in the line of all processes with a place of its own: for this of its keys, with this place,
    /// and the next sign of life is due then.
    own_line_place: Option<(Key, LinePlace, Instant)>,
    /// That place may be in the line no more: it has to be entered again.
    may_be_out_of_line: bool,
    /// A request of unknown outcome may still enter that place in the line.
    may_enter_late: bool,
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
    pub(crate) fn new(wanted: Wanted, shared: Arc<Shared>, runtime: Handle) -> Self {
        Self {
            wanted: Arc::new(wanted),
            shared,
            runtime,
            doubt: false,
            pending: None,
            made: false,
            place: None,
            was_refused: false,
            own_line_place: None,
            may_be_out_of_line: false,
            may_enter_late: false,
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
        let timeout = self.shared.command_timeout.min(patience.max(FIRST_ATTEMPT));
        let doubtful = self.pending.is_some();
        if !doubtful {
            self.pending = Some(self.shared.cleanups.register_since(sent, Cleanup::Undo(self.wanted.clone())));
        }
        self.expect(sent + timeout + GRACE);
        let in_line = self.in_line();
        let call = self.shared.store.acquire(&self.wanted, in_line, timeout);
        let (answer, settles) = select! {
            biased;
            () = closed.cancelled() => return Err(Error::Closed),
            answer = timeout_at(sent + timeout + GRACE, call) => match answer {
                Ok(answer) => (answer, self.shared.store.settles()),
                Err(_) => (Err(Error::timeout()), false),
            },
        };
        let refused = match &answer {
            Ok(Acquired::Held { .. }) => true,
            Ok(Acquired::Granted { .. }) => false,
            Err(error) => settles || error.has_not_run(),
        };
        // After an earlier attempt of unknown outcome, this answer doesn't speak for that one.
        if refused && !doubtful {
            self.pending = None;
        }
        let is_unknown = answer.is_err() && !refused;
        self.doubt |= is_unknown;
        if is_unknown && matches!(in_line, InLine::At { .. }) {
            self.doubt_line();
        }
        Ok(match answer? {
            Acquired::Granted { fencing_token } => {
                Outcome::Granted(Grant { sent, ttl: self.wanted.ttl, fencing_token, doubt: None })
            }
            Acquired::Held { place, remaining } => {
                self.was_refused = true;
                if self.place.is_some() {
                    self.shared.supervise_queues(&self.runtime);
                }
                let key = self.wanted.owned.keys.get(place).cloned().unwrap_or_else(|| self.key());
                Outcome::Held { key, remaining }
            }
        })
    }

    /// What was sent may enter its place in the line for as long as it can be run.
    fn doubt_line(&mut self) {
        match &self.place {
            Some(place) if place.line_place().is_shared => place.may_enter_late(),
            _ => self.may_enter_late = true,
        }
    }

    /// How it asks: with its place in the line, if it has one or shall have one from now on.
    fn in_line(&mut self) -> InLine {
        let queueing = self.wanted.queueing;
        if !self.shared.store.has_line() || queueing == Queueing::None {
            return InLine::No;
        }
        match (&self.place, self.only_key()) {
            // By a token that may hold the lock already: the place is that of those who come first.
            (Some(place), Some(_)) if queueing == Queueing::Shared && !place.is_first() => InLine::No,
            (Some(place), Some(key)) if queueing == Queueing::Own || self.was_refused || place.may_be_in_line() => {
                place.enters_line();
                let place = place.line_place();
                if !place.is_shared {
                    self.own_line_place = Some((key, place, Instant::now() + HEARTBEAT));
                }
                InLine::At { key: 0, place }
            }
            (None, Some(_)) if queueing == Queueing::Behind => InLine::Behind,
            (None, None) => match &self.own_line_place {
                Some((key, place, _)) => {
                    let at = self.wanted.owned.keys.iter().position(|other| other == key);
                    InLine::At { key: at.unwrap_or_default(), place: *place }
                }
                None => InLine::No,
            },
            _ => InLine::No,
        }
    }

    /// Takes the last place among those who wait for the key. Requests for several keys stand in no queue.
    pub(crate) fn queue_up(&mut self) {
        if let (None, Some(key)) = (&self.place, self.only_key()) {
            let place = self.shared.queues.enter(key, self.wanted.clone());
            if !place.is_first() {
                self.shared.supervise_queues(&self.runtime);
            }
            self.was_refused = place.is_contended();
            self.place = Some(place);
        }
    }

    /// The lock was handed over, and taken back because nobody took it. Begins as a new request would, behind all who
    /// wait: what the token may still do at the server must not be this one's.
    pub(crate) fn start_over(&mut self) {
        self.leave_queue();
        self.leave_line();
        // An earlier attempt may have left something by the token that is given up.
        self.undo();
        self.doubt = false;
        let mut owned = self.wanted.owned.clone();
        owned.token = Token::random();
        self.wanted = Arc::new(Wanted { owned, latest: Arc::default(), ..Wanted::clone(&self.wanted) });
        (self.made, self.was_refused) = (false, false);
    }

    /// Whether those before it in this process can hand the lock over to it, so that it need not be in line for that.
    pub(crate) fn can_be_handed(&self) -> bool {
        let store = &self.shared.store;
        !store.has_line() || store.hands_over() && self.wanted.owned.own_token
    }

    /// Whether it has asked without its place in the line, and is to take that now that it was refused.
    pub(crate) fn is_to_enter_line(&self) -> bool {
        let is_waiting = self.was_refused && self.shared.store.has_line();
        let place = self.place.as_ref().filter(|_| is_waiting && self.wanted.queueing == Queueing::Shared);
        place.is_some_and(|place| place.is_first() && !place.may_be_in_line())
    }

    /// It will be polled until then, unless nobody polls it any more.
    pub(crate) fn expect(&self, until: Instant) {
        if let Some(place) = &self.place {
            place.expect(until);
        }
    }

    pub(crate) fn place(&self) -> Option<&Ticket> {
        self.place.as_ref()
    }

    /// What a turn in the queue, other than to be the first, means for this one.
    pub(crate) fn handed(&mut self, wakeup: Wakeup) -> Woken {
        match wakeup {
            Wakeup::HandedOver(grant, pending) => {
                // Until a guard has it.
                self.pending = self.pending.take().or(pending);
                self.register_undo();
                Woken::Granted(grant)
            }
            Wakeup::Unknown(pending) => {
                self.doubt = true;
                self.pending = self.pending.take().or(pending);
                self.doubt_line();
                self.register_undo();
                Woken::Ask
            }
            Wakeup::NotHandedOver | Wakeup::First => Woken::Ask,
            Wakeup::TakenBack => Woken::TakenBack,
        }
    }

    /// The server has said that the lock is ours. Returns why it can't be used all the same, if so: it was taken back,
    /// as a hand-over, before the answer came.
    pub(crate) fn claim(&self) -> Option<Woken> {
        match self.place.as_ref()?.claim() {
            Claim::Kept(pending) => (!pending.is_none_or(PendingCleanup::complete)).then_some(Woken::Closed),
            Claim::TakenBack => Some(Woken::TakenBack),
        }
    }

    fn register_undo(&mut self) {
        if self.pending.is_none() {
            self.pending = Some(self.shared.cleanups.register(Cleanup::Undo(self.wanted.clone())));
        }
    }

    /// When the next sign of life is due, where it is in the line.
    pub(crate) fn next_heartbeat(&self) -> Option<Instant> {
        match &self.place {
            Some(place) => place.next_heartbeat(),
            None => self.own_line_place.as_ref().map(|(_, _, at)| *at),
        }
    }

    /// Gives a sign of life of this process. Returns whether there is more to wait for: else it has to ask.
    pub(crate) async fn heartbeat(&mut self) -> bool {
        let sent = Instant::now();
        let (key, place) = match (&self.place, &mut self.own_line_place) {
            (Some(place), _) => {
                place.enters_line();
                (self.wanted.owned.key(), place.line_place())
            }
            (None, Some((key, place, at))) => {
                *at = sent + HEARTBEAT;
                (key.clone(), *place)
            }
            (None, None) => return true,
        };
        let timeout = self.shared.command_timeout;
        self.expect(sent + timeout + GRACE);
        match timeout_at(sent + timeout + GRACE, self.shared.store.heartbeat(&key, place, timeout)).await {
            Ok(Ok(waits)) => {
                self.may_be_out_of_line |= !waits;
                waits
            }
            Ok(Err(error)) => {
                debug!(name: "tenure.heartbeat_failed", %key, %error, "no sign of life; the place in the line may be lost");
                true
            }
            Err(_) => true,
        }
    }

    /// Whether a token that may be used again holds the lock: then nobody who waits is before this one. Where the
    /// server can't be asked, it isn't.
    pub(crate) async fn is_held_already(&self) -> bool {
        let owned = &self.wanted.owned;
        !owned.own_token && matches!(self.shared.store.remaining(owned, self.shared.command_timeout).await, Ok(Some(_)))
    }

    /// Takes its own place in the line, also while others of this process come first.
    pub(crate) async fn stand_in_line(&mut self) {
        let (Queueing::Own, Some(key), Some(place)) = (self.wanted.queueing, self.only_key(), &self.place) else {
            return;
        };
        let place = place.line_place();
        if self.shared.store.has_line() {
            self.enter_line(key, place).await;
        }
    }

    /// Takes a place in the line for one of several keys, the one that is held by another, and leaves that for the one
    /// before. Does nothing for a request of one key.
    pub(crate) async fn stand_in_line_for(&mut self, key: &Key) {
        if self.only_key().is_some() || !self.wanted.queueing.waits() || !self.shared.store.has_line() {
            return;
        }
        let before = self.own_line_place.as_ref().filter(|(other, ..)| other == key).map(|(_, place, _)| *place);
        let place = match before {
            Some(_) if !self.may_be_out_of_line => return,
            Some(place) => place,
            None => {
                self.leave_line();
                self.shared.queues.new_line_place()
            }
        };
        self.enter_line(key.clone(), place).await;
    }

    async fn enter_line(&mut self, key: Key, place: LinePlace) {
        self.own_line_place = Some((key.clone(), place, Instant::now() + HEARTBEAT));
        self.may_be_out_of_line = false;
        if let Err(error) = self.shared.store.enter(&key, place, self.shared.command_timeout).await {
            self.may_enter_late |= !error.has_not_run();
            debug!(name: "tenure.heartbeat_failed", %key, %error, "not in the line yet");
        }
    }

    fn leave_queue(&mut self) {
        let Some(place) = self.place.take() else { return };
        let left = place.leave();
        if left.may_hold {
            self.register_undo();
        }
        self.leave_shared(&left);
    }

    /// The last of those who shared a place leaves the line for all of them.
    fn leave_shared(&self, left: &Leftovers) {
        if let Some(place) = left.line.filter(|place| place.is_shared) {
            self.leave(self.wanted.owned.key(), place, left.may_enter_late);
        }
    }

    /// Leaves nothing in the line, in the background. Where that fails, the others need a moment to skip it.
    fn leave_line(&mut self) {
        let again = std::mem::take(&mut self.may_enter_late);
        if let Some((key, place, _)) = self.own_line_place.take() {
            self.leave(key, place, again);
        }
    }

    fn leave(&self, key: Key, place: LinePlace, again: bool) {
        if self.shared.store.has_line() {
            self.shared.leave_line(key, place, again, &self.runtime);
        }
    }

    pub(crate) fn only_key(&self) -> Option<Key> {
        match &*self.wanted.owned.keys {
            [key] => Some(key.clone()),
            _ => None,
        }
    }

    pub(crate) fn listen(&self, key: &Key) -> Listening {
        self.shared.store.listen(key)
    }

    /// Several servers decide, each by itself.
    pub(crate) fn is_voted_on(&self) -> bool {
        self.shared.store.settles()
    }

    pub(crate) fn command_timeout(&self) -> Duration {
        self.shared.command_timeout
    }

    /// Another attempt is about to be made. A store that takes attempts back by itself may still do so with the last
    /// one, and must not take this one for it.
    fn renew_token(&mut self) {
        if !self.shared.store.settles() {
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

    /// Undoes what is pending, in the background.
    fn undo(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        if pending.is_taken_over() {
            return;
        }
        let (wanted, shared) = (self.wanted.clone(), self.shared.clone());
        // Where the runtime is gone, this does nothing, and the ttl frees the lock.
        self.runtime.spawn(async move {
            shared.undo(&wanted.owned, &wanted.latest, wanted.ttl).await;
            drop(pending);
        });
    }

    /// The lock is ours: from here on its guard and its renewer see to it.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], where the locker is closed and the attempt is being undone.
    pub(crate) fn succeed(mut self, mut grant: Grant, drift: Drift, renewal: Renewal) -> Result<LockGuard, Error> {
        if !self.pending.take().is_none_or(PendingCleanup::complete) {
            return Err(Error::Closed);
        }
        let Wanted { owned, metadata, latest, .. } = &*self.wanted;
        let is_voted_on = self.is_voted_on();
        grant.doubt = (self.doubt && !is_voted_on).then(|| latest.clone());
        let origin = self.shared.origin;
        let hold = Hold::new(owned.clone(), metadata.clone(), &grant, drift, renewal, origin, is_voted_on);
        let guard = LockGuard::start(hold, &self.shared, &self.runtime);
        match self.place.take() {
            // It left the line when the lock was granted; with those who shared a place with it, if it was the last.
            Some(place) => {
                if !self.may_enter_late {
                    self.own_line_place = None;
                }
                self.leave_line();
                let left = place.leave();
                if left.may_enter_late {
                    self.leave_shared(&left);
                }
            }
            // One for several keys did so only if it was its turn: it may have found them free.
            None => self.leave_line(),
        }
        Ok(guard)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.leave_queue();
        self.leave_line();
        self.undo();
    }
}
