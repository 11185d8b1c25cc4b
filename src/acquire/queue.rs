//! The waiters for a key in this process: first in, first out, and only the first talks to the server.
//!
//! A queue has two lanes. The waiters of the *plain* lane share one place in the server's line, in which all processes
//! stand; those of the *fair* lane have a place each. When a lock is released while somebody here waits for it, it is
//! handed over: its release and the next waiter's acquire are one step at the server. While other processes wait, that
//! goes on for [`IN_A_ROW`] hand-overs or for [`TURN`], whichever is over first; then the server gives the lock to the
//! next process in its line.
//!
//! A request that may share the key ([`Mode`](crate::mode::Mode)) enters the queue when it is refused, or when others
//! are there already ([`Queues::has_waiters`]): so it passes nobody who waits here. It is handed nothing, and asks when
//! it is the first. Once it is granted, the next one asks, and may share the key with it: those who waited one after
//! another enter together. While they do, the place that they share [stays](Ticket::keeps_place) in the server's line,
//! for as many turns as there may be hand-overs.
//!
//! 1. Each waiter is the first of its lane, or behind another one. A waiter that leaves the front of its lane, in
//!    whatever way, wakes the one that is first after it.
//! 2. A lock is handed over only to a waiter that is in the queue at that moment, and is the first of its lane. If that
//!    waiter leaves before it has learned the outcome, it assumes that its token may hold the lock, until the hand-over
//!    has ended and what it sent can no longer be run.
//! 3. The first of a lane is polled by the instant that it has [announced](Ticket::expect), or it is *parked*: its
//!    future is kept somewhere and not polled. A parked waiter goes to the end of its lane, if others wait there
//!    ([`Queues::find_abandoned`]).
//! 4. If a waiter doesn't take a lock that was handed over to it, or may have been, within [`TAKEN_WITHIN`], the lock
//!    is taken back. A waiter that learns in another way that it has the lock [checks](Ticket::claim) first that this
//!    has not happened. A release that is not polled while it hands a lock over counts as one of unknown outcome.
//! 5. Locks are taken in this order: the map, a queue's state, a waiter's hand-over. No other lock is taken while one
//!    of them is held: what takes others when it is dropped is dropped after they are released. Nothing that takes
//!    longer with more waiters, or more keys, is done under any of them.

mod abandoned;
mod hand_over;
mod ticket;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::iter;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::abandoned::Abandoned;
pub(crate) use self::hand_over::HandOver;
use self::hand_over::HandOverState;
pub(crate) use self::ticket::{By, Claim, Inherited, Leftovers, Obtained, Place, TakenOver, Ticket, Wakeup};
use crate::acquire::answer::{Held, LastAnswer};
use crate::hold::Owned;
use crate::store::notifications::Subscription;
use crate::store::{LinePlace, Next, Queueing, Wanted};
use crate::sync::{Mutex, MutexGuard};
use crate::{Key, Token};

/// How many times in a row a process hands the lock over to its own waiters while another process waits. More would be
/// faster, and less fair.
const IN_A_ROW: u32 = 16;

/// For how long a process hands the lock over to its own waiters while another process waits. Where locks are held for
/// longer than this, the processes alternate.
const TURN: Duration = Duration::from_millis(100);

/// How much later than announced a waiter may be polled, before it counts as parked.
const LATE: Duration = Duration::from_millis(700);

/// How long a lock waits for the waiter that it was handed over to.
const TAKEN_WITHIN: Duration = Duration::from_millis(500);

/// For how long a queue remembers that a request found the lock held by another. A request that comes within this time
/// asks with its place in the line at once, and reuses the subscription.
const CONTENDED: Duration = Duration::from_secs(1);

/// How often the first of a lane that is in the line sends a heartbeat: three times as often as it has to.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

type ByKey = Mutex<BTreeMap<Key, Arc<Queue>>>;

/// The queues of one locker.
#[derive(Default)]
pub(crate) struct Queues {
    by_key: Arc<ByKey>,
    /// The number of the last place in the line that was given to a waiter of this locker.
    last_place: AtomicU64,
}

/// The waiters for one key.
struct Queue {
    key: Key,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The waiters that share one place in the line.
    plain: Lane,
    /// The waiters that have a place each.
    fair: Lane,
    /// How often the lock was handed over here since it came from elsewhere, or since nobody else waited for it.
    in_a_row: u32,
    /// When the first of these hand-overs began.
    turn_began: Option<Instant>,
    /// The last shared grant has left the place in the line for the next waiter. It counts as a turn as hand-overs do.
    keeps_place: bool,
    /// When a request last found the lock held by another.
    last_held: Option<Instant>,
    /// What the last of these requests that asked the server learned. It is for those whose time runs out before they
    /// have asked.
    last_answer: Option<LastAnswer>,
    /// The token that has the lock by that answer, if it is that of a request of this process.
    obtained_by: Option<Token>,
}

#[derive(Default)]
struct Lane {
    /// In the order in which they came.
    waiters: BTreeMap<i64, Arc<QueueEntry>>,
    /// The number of the last waiter that came.
    last_number: i64,
    /// The place in the line that the waiters share. `None` in the fair lane.
    place: Option<LinePlace>,
    /// That place may be in the line.
    in_line: bool,
    /// A request of unknown outcome may still enter that place into the line.
    may_enter_late: bool,
    /// How many of the waiters were found parked and have not been the first since (invariant 3).
    parked: usize,
    /// When the first waiter has to be polled again, at the latest (invariant 3).
    expected: Option<Instant>,
    /// When the next heartbeat is due.
    heartbeat: Option<Instant>,
    /// The subscription. The first waiter leaves it to the next one, which then has nothing to ask before it listens.
    subscription: Option<Subscription>,
    /// The end of the ttl of the last waiter that obtained the lock, for the one that takes over the subscription.
    held_until: Option<Instant>,
    /// That waiter shares the key, and hands nothing over.
    is_shared: bool,
}

struct QueueEntry {
    wanted: Arc<Wanted>,
    place: LinePlace,
    /// Its number in its lane. Changes under the queue's mutex alone.
    number: AtomicI64,
    /// It counts as parked in its lane. Changes under the queue's mutex alone.
    is_parked: AtomicBool,
    hand_over: Mutex<HandOverState>,
    /// Notified when this waiter becomes the first, and when the outcome of a hand-over is there.
    changed: Notify,
}

impl Queues {
    /// Appends a waiter to the queue for the key.
    pub(crate) fn enter(&self, key: Key, wanted: Arc<Wanted>) -> Ticket {
        let own_place = LinePlace { number: self.next_number(), is_shared: wanted.queueing != Queueing::Own };
        let mut queues = lock(&self.by_key);
        let new = || Arc::new(Queue { key: key.clone(), state: Mutex::default() });
        let queue = queues.entry(key.clone()).or_insert_with(new).clone();
        // The queue is locked before the map is released: so nobody removes it as unused in between.
        let mut state = lock(&queue.state);
        drop(queues);
        let lane = state.lane_of(own_place);
        let place = if own_place.is_shared { *lane.place.get_or_insert(own_place) } else { own_place };
        lane.last_number += 1;
        let number = AtomicI64::new(lane.last_number);
        let (is_parked, hand_over, changed) = (AtomicBool::new(false), Mutex::default(), Notify::new());
        let waiter = Arc::new(QueueEntry { wanted, place, number, is_parked, hand_over, changed });
        lane.waiters.insert(lane.last_number, waiter.clone());
        drop(state);
        Ticket::new(self.by_key.clone(), queue, waiter)
    }

    /// Returns a new place in the line, for a request that is in no queue. The places of fair requests have their turns
    /// in the order of their requests here, which this one is not part of: its turn must be nobody else's.
    pub(crate) fn new_line_place(&self) -> LinePlace {
        LinePlace { number: self.next_number(), is_shared: true }
    }

    fn next_number(&self) -> u64 {
        self.last_place.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns all places that may be in the line.
    pub(crate) fn line_places(&self) -> Vec<(Key, LinePlace)> {
        let mut places = Vec::new();
        for queue in self.queues() {
            let state = lock(&queue.state);
            let shared = state.plain.place.filter(|_| state.plain.in_line);
            let own = state.fair.waiters.values().map(|waiter| waiter.place);
            places.extend(shared.into_iter().chain(own).map(|place| (queue.key.clone(), place)));
        }
        places
    }

    /// Returns whether anybody here waits for the key. One whose future is not polled doesn't count.
    pub(crate) fn has_waiters(&self, key: &Key) -> bool {
        let Some(queue) = lock(&self.by_key).get(key).cloned() else { return false };
        let state = lock(&queue.state);
        state.has_waiters(Instant::now())
    }

    /// Returns whether somebody here waits for the key whom the server has told that another holds it, as it still may.
    pub(crate) fn has_waiters_for_holder(&self, key: &Key) -> bool {
        let Some(queue) = lock(&self.by_key).get(key).cloned() else { return false };
        let (state, now) = (lock(&queue.state), Instant::now());
        state.has_waiters(now) && state.is_held_at(now)
    }

    /// Makes the first waiter for the key ask, as the holder that would have handed the lock over to it has none any
    /// longer: without that, the waiter need not be in the line.
    pub(crate) fn ask_again(&self, key: &Key) {
        let Some(queue) = lock(&self.by_key).get(key).cloned() else { return };
        let state = lock(&queue.state);
        let Some(first) = state.plain.free() else { return };
        drop(state);
        let mut hand_over = lock(&first.hand_over);
        if hand_over.is_over() {
            *hand_over = HandOverState::NotGranted;
        }
        drop(hand_over);
        first.changed.notify_one();
    }

    /// Notes that a lock of this process has ended, or is about to end. That it is held is no answer for requests that
    /// begin after this.
    pub(crate) fn ended(&self, owned: &Owned) {
        let [key] = &*owned.keys else { return };
        let Some(queue) = lock(&self.by_key).get(key).cloned() else { return };
        lock(&queue.state).ended(owned);
    }

    /// Begins to hand the lock over, which is about to [end](Self::ended), if anybody here waits for it and can take it
    /// (invariant 2).
    pub(crate) fn next(&self, owned: &Owned) -> Option<HandOver> {
        let [key] = &*owned.keys else { return None };
        let queue = lock(&self.by_key).get(key)?.clone();
        let mut state = lock(&queue.state);
        state.ended(owned);
        if owned.mode.is_shared() {
            return None;
        }
        let has_turn = state.has_turn(Instant::now());
        let (waiter, may_keep) = match (state.plain.next(), state.fair.next()) {
            (Some(waiter), _) if has_turn => (waiter, true),
            (_, Some(waiter)) => (waiter, false),
            (Some(waiter), None) => (waiter, false),
            (None, None) => return None,
        };
        let hand_over = state.begin_hand_over(&queue, waiter, may_keep);
        Some(hand_over)
    }

    /// Begins to hand the lock over without asking the server, if it is still the turn of this process and a waiter
    /// here may take the lock over. Returns `None` if the place of that waiter is in the line: the server has to remove
    /// it.
    pub(crate) fn next_to_take_over(&self, owned: &Owned) -> Option<HandOver> {
        let [key] = &*owned.keys else { return None };
        let queue = lock(&self.by_key).get(key)?.clone();
        let mut state = lock(&queue.state);
        let waiter = state.plain.next().filter(|waiter| waiter.wanted.takes_over && !state.plain.in_line)?;
        if !state.has_turn(Instant::now()) {
            return None;
        }
        let hand_over = state.begin_hand_over(&queue, waiter, true);
        Some(hand_over)
    }

    /// Returns all queues, one after the other. The map is never locked for longer than it takes to copy a few
    /// (invariant 5).
    fn queues(&self) -> impl Iterator<Item = Arc<Queue>> + '_ {
        const AT_A_TIME: usize = 128;
        let (mut last, mut some) = (None::<Key>, Vec::new().into_iter());
        iter::from_fn(move || {
            if some.len() == 0 {
                let after = last.take().map_or(Bound::Unbounded, Bound::Excluded);
                let queues = lock(&self.by_key);
                let next = queues.range((after, Bound::Unbounded)).take(AT_A_TIME);
                some = next.map(|(_, queue)| queue.clone()).collect::<Vec<_>>().into_iter();
            }
            let queue: Arc<Queue> = some.next()?;
            last = Some(queue.key.clone());
            Some(queue)
        })
    }
}

/// Removes a queue that is unused, unless somebody has entered it meanwhile.
fn remove(by_key: &ByKey, queue: &Arc<Queue>) {
    let mut queues = lock(by_key);
    let removed = match queues.entry(queue.key.clone()) {
        Entry::Occupied(found) if Arc::ptr_eq(found.get(), queue) && lock(&queue.state).is_unused() => {
            Some(found.remove())
        }
        _ => None,
    };
    drop(queues);
    // A subscription locks the list of listeners when it is dropped: not under the map's mutex (invariant 5).
    drop(removed);
}

impl State {
    fn lane_of(&mut self, place: LinePlace) -> &mut Lane {
        if place.is_shared { &mut self.plain } else { &mut self.fair }
    }

    /// Returns whether this process may hand the lock over to its own waiters once more, while another process waits.
    fn has_turn(&mut self, now: Instant) -> bool {
        let turn_began = *self.turn_began.get_or_insert(now);
        self.in_a_row < IN_A_ROW && now.saturating_duration_since(turn_began) < TURN
    }

    fn begin_hand_over(&mut self, queue: &Arc<Queue>, waiter: Arc<QueueEntry>, may_keep: bool) -> HandOver {
        self.in_a_row += 1;
        *lock(&waiter.hand_over) = HandOverState::InFlight { pending: None, until: None };
        let lane = self.lane_of(waiter.place);
        let others_take_over = waiter.place.is_shared && waiter.wanted.takes_over && lane.waiters.len() > 1;
        let tokens = if others_take_over { u64::from(IN_A_ROW) + 1 } else { 1 };
        let next = Next { place: waiter.place, in_line: lane.in_line || !waiter.place.is_shared, may_keep, tokens };
        HandOver::new(queue.clone(), waiter, next)
    }

    /// Begins to count hand-overs: the lock has come here from elsewhere, or nobody else waits for it.
    fn begin_turn(&mut self, now: Instant) {
        (self.in_a_row, self.turn_began) = (1, Some(now));
    }

    /// Notes that a request of this process was granted. If it has kept the place, its turn goes on with the next one.
    fn has_asked(&mut self, keeps_place: bool, now: Instant) {
        match std::mem::replace(&mut self.keeps_place, keeps_place) && keeps_place {
            true => self.in_a_row += 1,
            false => self.begin_turn(now),
        }
    }

    /// Returns whether a shared grant may keep the place in the line.
    fn may_keep_place(&mut self, now: Instant) -> bool {
        !self.keeps_place || self.has_turn(now)
    }

    /// Ends the last answer, if it is that this lock is held.
    fn ended(&mut self, owned: &Owned) {
        if self.obtained_by.as_ref() == Some(&owned.token) {
            self.end_last_answer();
        }
    }

    /// Notes that the lock may be free from now on, if the last answer is that it is held.
    fn end_last_answer(&mut self) {
        if let Some(LastAnswer::Held(Held { until, .. })) = &mut self.last_answer {
            let now = Instant::now();
            *until = Some(until.map_or(now, |until| until.min(now)));
        }
    }

    fn has_waiters(&self, now: Instant) -> bool {
        self.plain.has_waiters(now) || self.fair.has_waiters(now)
    }

    /// Returns whether the lock is held by the last answer, which is still true by then for all that it tells.
    fn is_held_at(&self, now: Instant) -> bool {
        matches!(&self.last_answer, Some(LastAnswer::Held(held)) if held.until.is_none_or(|until| now < until))
    }

    fn is_empty(&self) -> bool {
        self.plain.waiters.is_empty() && self.fair.waiters.is_empty()
    }

    /// Returns whether the queue can be removed: it has no waiters and nothing to remember.
    fn is_unused(&self) -> bool {
        self.is_empty() && !self.is_contended()
    }

    fn is_contended(&self) -> bool {
        self.last_held.is_some_and(|at| at.elapsed() < CONTENDED)
    }
}

impl Lane {
    fn first(&self) -> Option<&Arc<QueueEntry>> {
        self.waiters.values().next()
    }

    /// Returns the first waiter, if the lock can be handed over to it.
    fn next(&self) -> Option<Arc<QueueEntry>> {
        // A shared grant is one of several, and nobody's to hand over.
        self.free().filter(|waiter| !waiter.wanted.owned.mode.is_shared())
    }

    /// Returns the first waiter, if no hand-over to it is on its way, and none could be in doubt.
    fn free(&self) -> Option<Arc<QueueEntry>> {
        let waiter = self.first()?;
        // While the waiter hasn't taken the outcome of an earlier hand-over, its token may have the lock already. And
        // a token from elsewhere may hold another grant of this key: what it got by a hand-over couldn't be undone.
        let is_free = lock(&waiter.hand_over).is_over();
        (is_free && waiter.wanted.owned.own_token).then(|| waiter.clone())
    }

    /// Returns whether a waiter is here that isn't parked, as far as that is known by now.
    fn has_waiters(&self, now: Instant) -> bool {
        let is_known = |first: &Arc<QueueEntry>| first.is_parked.load(Ordering::Relaxed);
        let is_first_parked = self.is_first_late(now) && !self.first().is_some_and(is_known);
        self.waiters.len() > self.parked + usize::from(is_first_parked)
    }

    /// Returns whether the first waiter was not polled when it had to be.
    fn is_first_late(&self, now: Instant) -> bool {
        self.expected.is_some_and(|expected| now.saturating_duration_since(expected) >= LATE)
    }

    fn remove(&mut self, waiter: &QueueEntry) {
        if self.waiters.remove(&waiter.number()).is_some() {
            self.set_parked(waiter, false);
        }
    }

    /// Notes that a waiter is parked, or no longer.
    fn set_parked(&mut self, waiter: &QueueEntry, is_parked: bool) {
        match (waiter.is_parked.swap(is_parked, Ordering::Relaxed), is_parked) {
            (false, true) => self.parked += 1,
            (true, false) => self.parked = self.parked.saturating_sub(1),
            _ => {}
        }
    }

    fn is_first(&self, waiter: &QueueEntry) -> bool {
        self.waiters.keys().next() == Some(&waiter.number())
    }
}

impl QueueEntry {
    fn number(&self) -> i64 {
        self.number.load(Ordering::Relaxed)
    }
}

/// Locks a mutex, poisoned or not: no code panics while it holds one of these.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("keys", &lock(&self.by_key).len()).finish()
    }
}

#[cfg(all(test, shuttle))]
mod interleaved;
#[cfg(test)]
mod tests;
