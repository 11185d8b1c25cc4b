//! A waiter's handle to its queue.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::hand_over::HandOverState;
use super::{ByKey, HEARTBEAT, Lane, Queue, QueueEntry, State, lock, remove};
use crate::Token;
use crate::acquire::answer::{Held, LastAnswer};
use crate::hold::Grant;
use crate::locker::cleanups::PendingCleanup;
use crate::store::notifications::Subscription;
use crate::store::{InLine, LinePlace, Wanted};
use crate::sync::MutexGuard;

/// A waiter's handle to its queue. Its owner calls [`leave`](Ticket::leave) before it drops it.
pub(crate) struct Ticket {
    queues: Arc<ByKey>,
    queue: Arc<Queue>,
    pub(super) waiter: Arc<QueueEntry>,
}

/// Why a waiter was woken.
pub(crate) enum Wakeup {
    /// It is the first of its lane.
    First,
    /// The lock was handed over to it. What is pending is to release it.
    HandedOver(Grant, Option<PendingCleanup>),
    /// It takes the lock over from an earlier holder, whose token the server keeps.
    TakenOver(Grant, TakenOver),
    /// The lock surely was not handed over to it, and may be free.
    NotHandedOver,
    /// Nobody knows whether the lock was handed over to it. What is pending is to undo that.
    Unknown(Option<PendingCleanup>),
    /// The lock was handed over, and taken back: the waiter is not in the queue any longer, and its token must not be
    /// used again.
    TakenBack,
}

/// A lock that a waiter takes over from an earlier holder of this process.
pub(crate) struct TakenOver {
    /// By which token the server keeps the lock.
    pub(crate) wanted: Arc<Wanted>,
    /// Releases the lock until a guard has it.
    pub(crate) pending: Option<PendingCleanup>,
}

/// Whether a waiter may keep a lock that the server has given it.
pub(crate) enum Claim {
    /// It may. What is pending, of a hand-over that it had not heard of, is the waiter's from now on.
    Kept(Option<PendingCleanup>),
    /// The lock was taken back before.
    TakenBack,
}

/// What the waiter before has left to the next one.
#[derive(Default)]
pub(crate) struct Inherited {
    pub(crate) subscription: Option<Subscription>,
    /// When the ttl ends with which the waiter before obtained the lock.
    pub(crate) held_until: Option<Instant>,
    /// The waiter before shares the key: it won't hand it over.
    pub(crate) is_shared: bool,
}

/// How a waiter has obtained the lock.
#[derive(Clone, Copy)]
pub(crate) struct Obtained {
    pub(crate) at: Instant,
    /// The end of its ttl.
    pub(crate) held_until: Instant,
    pub(crate) by: By,
}

/// By what a waiter has obtained the lock.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// Its own request.
    Asking(Place),
    /// A hand-over by the server. [`HandOver`](super::HandOver) knows what this did to the place.
    HandOver,
    /// A hand-over that the server doesn't know of, so that it took no place out of the line.
    TakeOver,
}

/// What a request that was granted has done to the place in the line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing.
    #[default]
    Untouched,
    /// It has taken it out of the line.
    TakenOut,
    /// It has left it there for the next waiter.
    Kept,
}

impl Place {
    /// Returns what a request does to its place if it is granted.
    pub(crate) fn after(in_line: InLine) -> Self {
        match in_line {
            InLine::At { stays: true, .. } => Self::Kept,
            InLine::At { stays: false, .. } => Self::TakenOut,
            InLine::No | InLine::Behind => Self::Untouched,
        }
    }
}

/// What a waiter that has left the queue still has to clean up.
pub(crate) struct Leftovers {
    /// Its token may have got the lock by a hand-over that it hasn't heard of (invariant 2).
    pub(crate) may_hold: bool,
    /// What is registered to undo that. Until the waiter does, closing the locker waits for this.
    pub(crate) pending: Option<PendingCleanup>,
    /// A lock that it was to take over from an earlier holder, and has not heard of.
    pub(crate) taken_over: Option<TakenOver>,
    /// A place that may be in the line, and that nobody has any longer.
    pub(crate) line: Option<LinePlace>,
    /// A request that may still be run may enter that place into the line again.
    pub(crate) may_enter_late: bool,
}

impl Ticket {
    pub(super) fn new(queues: Arc<ByKey>, queue: Arc<Queue>, waiter: Arc<QueueEntry>) -> Self {
        Self { queues, queue, waiter }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.queue.state)
    }

    fn with_lane<T>(&self, look: impl FnOnce(&mut Lane) -> T) -> T {
        look(self.state().lane_of(self.waiter.place))
    }

    pub(crate) fn is_first(&self) -> bool {
        self.with_lane(|lane| lane.is_first(&self.waiter))
    }

    /// Returns whether a request found the lock held by another not long ago.
    pub(crate) fn is_contended(&self) -> bool {
        self.state().is_contended()
    }

    /// Returns the waiter's place in the line, which it may share.
    pub(crate) fn line_place(&self) -> LinePlace {
        self.waiter.place
    }

    /// Notes that the server is about to be asked with the place in the line: it is in the line from now on, unless the
    /// lock is granted.
    pub(crate) fn enters_line(&self) {
        self.with_lane(|lane| {
            lane.in_line = true;
            lane.heartbeat = Some(Instant::now() + HEARTBEAT);
        });
    }

    /// Returns whether the place stays in the line if this waiter, the first, gets a shared grant: the next one may
    /// share the key with it. That goes on for as many grants as hand-overs may follow each other.
    pub(crate) fn keeps_place(&self) -> bool {
        let mode = self.waiter.wanted.owned.mode;
        let mut state = self.state();
        let lane = state.lane_of(self.waiter.place);
        let next = lane.waiters.values().nth(1).filter(|_| self.waiter.place.is_shared && lane.is_first(&self.waiter));
        // One that isn't polled would keep the place from the others, and do nothing with it.
        let is_polled = |next: &&Arc<QueueEntry>| !next.is_parked.load(Ordering::Relaxed);
        let is_alike = next.filter(is_polled).is_some_and(|next| next.wanted.owned.mode == mode);
        mode.is_shared() && is_alike && state.may_keep_place(Instant::now())
    }

    /// Returns whether the shared place may be in the line already.
    pub(crate) fn may_be_in_line(&self) -> bool {
        self.with_lane(|lane| lane.in_line)
    }

    /// Notes that a request of unknown outcome may still enter the shared place into the line.
    pub(crate) fn may_enter_late(&self) {
        self.with_lane(|lane| lane.may_enter_late = true);
    }

    /// Returns when the next heartbeat is due, if the waiter is in the line.
    pub(crate) fn next_heartbeat(&self) -> Option<Instant> {
        self.with_lane(|lane| lane.heartbeat.filter(|_| lane.in_line))
    }

    /// Announces that this waiter, if it is the first, will be polled by then (invariant 3).
    pub(crate) fn expect(&self, until: Instant) {
        self.with_lane(|lane| {
            if lane.is_first(&self.waiter) {
                lane.expected = Some(until);
                lane.set_parked(&self.waiter, false);
            }
        });
    }

    /// Waits until this waiter is the first, or has an outcome of a hand-over.
    pub(crate) async fn until_first(&self) -> Wakeup {
        loop {
            match self.take_outcome() {
                Some(wakeup) => return wakeup,
                None if self.is_first() => return Wakeup::First,
                // `notify_one` leaves a permit if nobody waits for it: nothing is missed since the look above.
                None => self.waiter.changed.notified().await,
            }
        }
    }

    /// Waits for the outcome of a hand-over. For the first of a lane.
    pub(crate) async fn until_handed_over(&self) -> Wakeup {
        loop {
            match self.take_outcome() {
                Some(wakeup) => return wakeup,
                None => self.waiter.changed.notified().await,
            }
        }
    }

    /// Takes the outcome of a hand-over, if there is one that was not taken yet.
    pub(crate) fn take_outcome(&self) -> Option<Wakeup> {
        let mut hand_over = lock(&self.waiter.hand_over);
        match std::mem::take(&mut *hand_over) {
            HandOverState::None | HandOverState::Abandoned => None,
            in_flight @ HandOverState::InFlight { .. } => {
                *hand_over = in_flight;
                None
            }
            HandOverState::Granted { grant, pending, taken_over: Some(wanted), .. } => {
                Some(Wakeup::TakenOver(grant, TakenOver { wanted, pending }))
            }
            HandOverState::Granted { grant, pending, .. } => Some(Wakeup::HandedOver(grant, pending)),
            HandOverState::NotGranted => Some(Wakeup::NotHandedOver),
            HandOverState::Unknown { pending, .. } => Some(Wakeup::Unknown(pending)),
            HandOverState::TakenBack => Some(Wakeup::TakenBack),
            claimed @ HandOverState::Claimed { .. } => {
                *hand_over = claimed;
                None
            }
        }
    }

    /// Claims the lock that this waiter was given, by whichever request: after this, it is not taken back (invariant
    /// 4), and the waiter is not handed another lock, unless it [gives its claim up](Self::give_up_claim).
    ///
    /// If the server has granted the waiter's own request, a lock that it was to take over has ended there, and its
    /// pending release is no longer needed.
    pub(crate) fn claim(&self) -> Claim {
        let mut hand_over = lock(&self.waiter.hand_over);
        let by_hand_over = matches!(*hand_over, HandOverState::InFlight { .. } | HandOverState::Granted { .. });
        match std::mem::replace(&mut *hand_over, HandOverState::Claimed { by_hand_over }) {
            HandOverState::TakenBack => {
                *hand_over = HandOverState::TakenBack;
                Claim::TakenBack
            }
            HandOverState::InFlight { pending, .. }
            | HandOverState::Granted { pending, .. }
            | HandOverState::Unknown { pending, .. } => Claim::Kept(pending),
            HandOverState::None
            | HandOverState::NotGranted
            | HandOverState::Abandoned
            | HandOverState::Claimed { .. } => Claim::Kept(None),
        }
    }

    /// Notes that the waiter can't use the lock that it has claimed, and goes on waiting.
    pub(crate) fn give_up_claim(&self) {
        let mut hand_over = lock(&self.waiter.hand_over);
        if matches!(*hand_over, HandOverState::Claimed { .. }) {
            *hand_over = HandOverState::None;
        }
    }

    /// Takes what the waiter before has left.
    pub(crate) fn inherit(&self) -> Inherited {
        self.with_lane(|lane| Inherited {
            subscription: lane.subscription.take(),
            held_until: lane.held_until.take(),
            is_shared: lane.is_shared,
        })
    }

    /// Stores what a request has learned. `None`: what was stored is no longer true.
    pub(crate) fn set_last_answer(&self, answer: Option<LastAnswer>) {
        let mut state = self.state();
        if let Some(LastAnswer::Held(_)) = answer {
            state.last_held = Some(Instant::now());
        }
        (state.last_answer, state.obtained_by) = (answer, None);
    }

    /// Returns what was last learned by this request, or by one that was before it.
    ///
    /// That the lock is held is no answer to a request whose own token has it: no other holds it.
    pub(crate) fn last_answer(&self) -> Option<LastAnswer> {
        let state = self.state();
        let is_by_own_token = state.obtained_by.as_ref() == Some(&self.waiter.wanted.owned.token);
        if is_by_own_token { None } else { state.last_answer.clone() }
    }

    /// Notes that the server is about to be asked: from now on, the last answer says nothing about the present.
    pub(crate) fn asks_again(&self) {
        self.state().end_last_answer();
    }

    /// Notes that this waiter has obtained the lock, which the server keeps under this token, and leaves to the next
    /// one what it can use.
    pub(crate) fn pass_on(&self, subscription: Option<Subscription>, obtained: Obtained, token: &Token) {
        let Obtained { at, held_until, by } = obtained;
        let before = {
            let mut state = self.state();
            let by_hand_over = matches!(*lock(&self.waiter.hand_over), HandOverState::Claimed { by_hand_over: true });
            if let (By::Asking(place), false) = (by, by_hand_over) {
                state.has_asked(place == Place::Kept, at);
            }
            let held = Held::until(self.queue.key.clone(), Some(held_until));
            state.last_answer = Some(LastAnswer::Held(held));
            state.obtained_by = Some(token.clone());
            let lane = state.lane_of(self.waiter.place);
            if lane.is_first(&self.waiter) {
                // A hand-over may have put the place into the line while a request without it was on its way.
                lane.in_line &= !(self.waiter.place.is_shared && by == By::Asking(Place::TakenOut));
                // A waiter that got the lock before it ran as the first has not taken the subscription of the lane.
                let subscription = subscription.or_else(|| lane.subscription.take());
                lane.held_until = subscription.is_some().then_some(held_until);
                lane.is_shared = self.waiter.wanted.owned.mode.is_shared();
                std::mem::replace(&mut lane.subscription, subscription)
            } else {
                // It got the lock by a token that had it already. The first still waits, in the line.
                subscription
            }
        };
        // A subscription locks the list of listeners when it is dropped: not under the queue's mutex (invariant 5).
        drop(before);
    }

    /// Leaves the queue, and wakes the waiter that is the first after that (invariant 1).
    pub(crate) fn leave(&self) -> Leftovers {
        let mut guard = self.state();
        let state = &mut *guard;
        let Abandoned { may_hold, pending, taken_over } = self.abandon_hand_over();
        let lane = state.lane_of(self.waiter.place);
        let was_first = lane.is_first(&self.waiter);
        lane.remove(&self.waiter);
        let next = lane.first().filter(|_| was_first).cloned();
        if was_first {
            lane.expected = next.is_some().then(Instant::now);
        }
        let leftovers = lane.leftovers(self.waiter.place, may_hold);
        let is_lane_empty = lane.waiters.is_empty();
        let is_contended = state.is_contended();
        let lane = state.lane_of(self.waiter.place);
        let subscription = if is_lane_empty && !is_contended { lane.subscription.take() } else { None };
        let is_unused = state.is_empty() && !is_contended;
        drop(guard);
        // A subscription locks the list of listeners when it is dropped: not under the queue's mutex (invariant 5).
        drop(subscription);
        if is_unused {
            remove(&self.queues, &self.queue);
        }
        if let Some(next) = next {
            next.changed.notify_one();
        }
        Leftovers { pending, taken_over, ..leftovers }
    }

    /// Takes what a hand-over may have left that the waiter has not heard of.
    fn abandon_hand_over(&self) -> Abandoned {
        let mut hand_over = lock(&self.waiter.hand_over);
        let mut abandoned = Abandoned { may_hold: !hand_over.is_over(), pending: None, taken_over: None };
        match &mut *hand_over {
            HandOverState::Granted { taken_over, pending, .. } => match taken_over.take() {
                Some(wanted) => {
                    abandoned.taken_over = Some(TakenOver { wanted, pending: pending.take() });
                    abandoned.may_hold = false;
                    *hand_over = HandOverState::None;
                }
                None => abandoned.pending = pending.take(),
            },
            HandOverState::Unknown { pending, .. } => abandoned.pending = pending.take(),
            HandOverState::InFlight { pending, .. } => {
                abandoned.pending = pending.take();
                *hand_over = HandOverState::Abandoned;
            }
            // The attempt undoes what the waiter has claimed.
            HandOverState::TakenBack | HandOverState::Claimed { .. } => abandoned.may_hold = false,
            HandOverState::None | HandOverState::NotGranted | HandOverState::Abandoned => {}
        }
        abandoned
    }
}

/// What a hand-over may have left to a waiter that leaves.
struct Abandoned {
    /// The waiter's token may have got the lock.
    may_hold: bool,
    /// What is registered to undo that.
    pending: Option<PendingCleanup>,
    taken_over: Option<TakenOver>,
}

impl Lane {
    /// Returns what a waiter with this place, which has just left the lane, has to clean up. The last waiter that
    /// leaves the plain lane gives the shared place up.
    fn leftovers(&mut self, place: LinePlace, may_hold: bool) -> Leftovers {
        if !place.is_shared {
            return Leftovers { may_hold, pending: None, taken_over: None, line: Some(place), may_enter_late: false };
        }
        if !self.waiters.is_empty() {
            return Leftovers { may_hold, pending: None, taken_over: None, line: None, may_enter_late: false };
        }
        // A hand-over that is on its way may put the place into the line, also after it was left.
        let may_enter_late = std::mem::take(&mut self.may_enter_late) || may_hold;
        let line = self.place.take().filter(|_| self.in_line || may_enter_late);
        self.in_line = false;
        Leftovers { may_hold, pending: None, taken_over: None, line, may_enter_late }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("key", &self.queue.key).field("first", &self.is_first()).finish()
    }
}
