//! A hand-over on its way: the releasing side ([`HandOver`]), and what its waiter sees of it ([`HandOverState`]).

use std::sync::Arc;

use tokio::time::Instant;

use super::{HEARTBEAT, Queue, QueueEntry, lock};
use crate::hold::Grant;
use crate::locker::cleanups::PendingCleanup;
use crate::store::{ByOthers, LinePlace, Next, Wanted};

/// What has become of the last hand-over to a waiter. What is `pending` undoes it, until the waiter takes the lock.
#[derive(Default)]
pub(super) enum HandOverState {
    /// There was none, or its outcome was taken.
    #[default]
    None,
    /// The server is being asked. If the release that asks is polled, it has an answer at `until`.
    InFlight { pending: Option<PendingCleanup>, until: Option<Instant> },
    Granted {
        grant: Grant,
        at: Instant,
        pending: Option<PendingCleanup>,
        /// If the waiter takes the lock over from an earlier holder: by which token it is held at the server.
        taken_over: Option<Arc<Wanted>>,
    },
    /// The lock surely was not handed over.
    NotGranted,
    /// Nobody knows whether it was handed over.
    Unknown { at: Instant, pending: Option<PendingCleanup> },
    /// It was handed over, and taken back (invariant 4).
    TakenBack,
    /// The waiter has [claimed](super::Ticket::claim) a lock. While it starts a guard, nobody hands it another one.
    Claimed {
        /// A hand-over was on its way to the waiter, which has learned of the lock by asking.
        by_hand_over: bool,
    },
    /// The waiter left while the server was being asked.
    Abandoned,
}

impl HandOverState {
    /// Returns whether another hand-over may begin: the last one surely left nothing that the waiter has to take.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::NotGranted)
    }
}

/// A lock on its way to the first of a lane. When this is dropped before it is told an outcome, the outcome is unknown.
pub(crate) struct HandOver {
    queue: Arc<Queue>,
    waiter: Arc<QueueEntry>,
    next: Next,
    is_complete: bool,
    /// A waiter that leaves goes on undoing this hand-over until it has ended.
    _by_others: ByOthers,
}

/// Whom an outcome has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    /// The waiter, which will take it.
    Delivered,
    /// Nobody: the waiter got the lock in another way, or asks by itself.
    NotAwaited,
    /// Nobody: the waiter has left.
    WaiterLeft,
}

impl HandOver {
    pub(super) fn new(queue: Arc<Queue>, waiter: Arc<QueueEntry>, next: Next) -> Self {
        let by_others = waiter.wanted.latest.clone().begin_by_others();
        Self { queue, waiter, next, is_complete: false, _by_others: by_others }
    }

    pub(crate) fn wanted(&self) -> &Arc<Wanted> {
        &self.waiter.wanted
    }

    pub(crate) fn next(&self) -> &Next {
        &self.next
    }

    /// Notes that the server is about to be asked, and that its answer is there at `until`, at the latest.
    pub(crate) fn send(&self, pending: PendingCleanup, until: Instant) {
        let mut hand_over = lock(&self.waiter.hand_over);
        if let HandOverState::InFlight { .. } = *hand_over {
            *hand_over = HandOverState::InFlight { pending: Some(pending), until: Some(until) };
        }
    }

    /// Tells the waiter that it has the lock. `alone`: nobody else is in the line.
    ///
    /// Returns false if the waiter has left. It has undone what it knew of then, which may have been before this
    /// hand-over was run: so the caller has to undo it.
    pub(crate) fn granted(mut self, grant: Grant, alone: bool) -> bool {
        self.is_complete = true;
        let at = Instant::now();
        let mut state = lock(&self.queue.state);
        let delivery = self.waiter.deliver(|pending| HandOverState::Granted { grant, at, pending, taken_over: None });
        // If the waiter got the lock in another way, or has left, the line may have changed since.
        if delivery == Delivery::Delivered {
            if alone {
                state.begin_turn(at);
            }
            let place = self.waiter.place;
            let lane = state.lane_of(place);
            // The grant took the place out of the line. If the server was not told of the place, it may have entered
            // the line meanwhile.
            if self.next.in_line && lane.place == Some(place) {
                lane.in_line = false;
            }
        }
        drop(state);
        self.waiter.changed.notify_one();
        delivery != Delivery::WaiterLeft
    }

    /// Gives the waiter a lock that the server keeps under the token in `taken_over`. `pending` releases the lock until
    /// a guard has it. Returns false if the waiter no longer waits; the caller still has the lock then.
    pub(crate) fn taken_over(mut self, grant: Grant, taken_over: Arc<Wanted>, pending: PendingCleanup) -> bool {
        self.is_complete = true;
        let at = Instant::now();
        let mut unused = Some(pending);
        let delivery = self.waiter.deliver(|_| HandOverState::Granted {
            grant,
            at,
            pending: unused.take(),
            taken_over: Some(taken_over),
        });
        self.waiter.changed.notify_one();
        drop(unused);
        delivery == Delivery::Delivered
    }

    /// Tells the waiter that the lock was not the releaser's to hand over.
    pub(crate) fn not_ours(mut self) {
        self.is_complete = true;
        drop(self.deliver_nothing(HandOverState::NotGranted));
        self.waiter.changed.notify_one();
    }

    /// Ends a hand-over that changed nothing, as other grants rely on the lock.
    pub(crate) fn not_now(mut self) {
        self.is_complete = true;
        drop(self.deliver_nothing(HandOverState::None));
    }

    /// Ends a hand-over that turned out to be impossible. It doesn't count as a turn.
    pub(crate) fn not_tried(mut self) {
        self.is_complete = true;
        drop(self.deliver_nothing(HandOverState::None));
        let mut state = lock(&self.queue.state);
        state.in_a_row = state.in_a_row.saturating_sub(1);
    }

    /// Ends a hand-over that gave the lock to another process, and left the waiter's place in the line. Returns the
    /// place if nobody waits with it any longer: then the caller has to leave it.
    #[must_use]
    pub(crate) fn passed_by(mut self) -> Option<LinePlace> {
        self.is_complete = true;
        let place = self.waiter.place;
        let mut state = lock(&self.queue.state);
        let (delivery, pending) = self.deliver_nothing(HandOverState::None);
        // If the waiter got the lock in another way since, the turn that has ended is not the present one.
        if delivery == Delivery::Delivered {
            (state.in_a_row, state.turn_began) = (0, None);
        }
        let heartbeat = Some(Instant::now() + HEARTBEAT);
        let lane = state.lane_of(place);
        // Those who shared the place may have left, and others, with another place, have come since.
        let is_had = match place.is_shared {
            true => lane.place == Some(place),
            false => lane.waiters.contains_key(&self.waiter.number()) && !self.waiter.has_claimed(),
        };
        if is_had {
            (lane.in_line, lane.heartbeat) = (true, lane.heartbeat.or(heartbeat));
        }
        // The plain lane is not in the line yet, if the lock was to go to the fair one: its first waiter has to ask.
        let to_ask = (!place.is_shared && !state.plain.in_line).then(|| state.plain.free()).flatten();
        if let Some(first) = &to_ask {
            *lock(&first.hand_over) = HandOverState::NotGranted;
        }
        drop(state);
        drop(pending);
        if let Some(first) = to_ask {
            first.changed.notify_one();
        }
        (!is_had).then_some(place)
    }

    /// Notes that nothing happened for the waiter, so that nothing is pending any longer. Returns what was: it locks
    /// the list of cleanups when it is dropped, which must not happen under a mutex of the queue (invariant 5).
    #[must_use]
    fn deliver_nothing(&self, outcome: HandOverState) -> (Delivery, Option<PendingCleanup>) {
        let mut before = None;
        let delivery = self.waiter.deliver(|pending| {
            before = pending;
            outcome
        });
        (delivery, before)
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        if !self.is_complete {
            self.waiter.deliver(|pending| HandOverState::Unknown { at: Instant::now(), pending });
            self.waiter.changed.notify_one();
        }
    }
}

impl QueueEntry {
    fn has_claimed(&self) -> bool {
        matches!(*lock(&self.hand_over), HandOverState::Claimed { .. })
    }

    /// Stores the outcome of a hand-over, if this waiter still waits for it.
    fn deliver(&self, outcome: impl FnOnce(Option<PendingCleanup>) -> HandOverState) -> Delivery {
        let mut hand_over = lock(&self.hand_over);
        match &mut *hand_over {
            HandOverState::InFlight { pending, .. } => {
                let pending = pending.take();
                *hand_over = outcome(pending);
                Delivery::Delivered
            }
            HandOverState::Abandoned => Delivery::WaiterLeft,
            _ => Delivery::NotAwaited,
        }
    }
}
