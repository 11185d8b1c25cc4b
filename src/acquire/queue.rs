//! Who waits for a key in this process: first in, first out, and only the first talks to the server.
//!
//! Waiters of a process share one place in the line of all processes, or have one each, if they asked for that: two
//! lanes of one queue. A lock that is released while somebody here waits for it is handed over: the release and the
//! next one's acquire are one step at the server. That goes on for [`IN_A_ROW`] turns or [`TURN`], whichever is over
//! first, while other processes wait; then the server gives the lock to the next process in the line.
//!
//! 1. A waiter is the first of its lane, or behind another that will tell it when it is.
//! 2. A lock is handed over to a waiter that is in the queue at that moment, and is the first of its lane. One that
//!    leaves after that, and hasn't learned how it went, takes it that its token may hold the lock.
//! 3. The first of a lane is polled at the instant that it has [announced](Ticket::expect), or is *parked*: its future is
//!    kept somewhere and not polled. It goes to the end of its lane then, if others wait ([`Queues::look_after`]).
//! 4. A lock that was handed over, or may have been, to a waiter which doesn't take it within [`TAKEN_WITHIN`] is taken
//!    back. A waiter that learns otherwise that it has the lock [makes sure](Ticket::claim) that this is still so. A
//!    release that is not polled while it hands the lock over is one whose outcome nobody knows.
//! 5. Locks are taken in this order: the map, a queue, a waiter. No other is taken under one of them, and nothing that
//!    takes longer with more waiters, or more keys, is done under any.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::iter;
use std::ops::Bound;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::hold::{Grant, Owned};
use crate::locker::cleanups::PendingCleanup;
use crate::store::notifications::Subscription;
use crate::store::{LinePlace, Next, Queueing, Wanted};
use crate::{Error, Key};

/// So many turns, then the lock goes to another process that waits. More would be faster, and less fair.
const IN_A_ROW: u32 = 16;

/// For so long a process hands the lock over to its own waiters while another process waits: with locks that are held
/// for long, turns go round one by one.
const TURN: Duration = Duration::from_millis(100);

/// So much later than announced a waiter may be polled.
const LATE: Duration = Duration::from_millis(700);

/// How long a lock waits for the one that it was handed over to.
const TAKEN_WITHIN: Duration = Duration::from_millis(500);

/// For how long it is remembered that a lock was held by another when it was asked for. Who comes back within this time
/// asks with its place in the line at once, and need not subscribe again.
const CONTENDED: Duration = Duration::from_secs(1);

/// How often the first of a lane that is in the line gives a sign of life: thrice as often as it has to.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

/// The queues of one locker.
#[derive(Default)]
pub(crate) struct Queues {
    by_key: Arc<Mutex<BTreeMap<Key, Arc<Queue>>>>,
    /// The last place in the line that was given to a waiter of this locker.
    last_place: AtomicU64,
}

struct Queue {
    key: Key,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those who share one place in the line.
    shared: Lane,
    /// Those who have one each.
    own: Lane,
    /// How many turns there were here since the lock came from elsewhere, or nobody else waited for it.
    in_a_row: u32,
    /// Since when.
    since: Option<Instant>,
    /// When a request was last refused, because another had the lock.
    refused: Option<Instant>,
    /// What the last of these that asked the server learned, for those whose time runs out before they have asked.
    learned: Option<Learned>,
}

#[derive(Default)]
struct Lane {
    /// In the order in which they came.
    waiters: BTreeMap<i64, Arc<QueueEntry>>,
    /// How many have come.
    count: i64,
    /// Their place in the line, where they share it.
    place: Option<LinePlace>,
    /// They may be in the line with it.
    in_line: bool,
    /// A request of unknown outcome may still enter it there.
    may_enter_late: bool,
    /// When the first of them has to be polled again, at the latest.
    expected: Option<Instant>,
    /// When the server has to hear the next time that they are alive.
    heartbeat: Option<Instant>,
    /// Kept from one first to the next, so that the next has nothing to ask before it listens.
    listening: Option<Subscription>,
    /// What the last that was first has learned of the lock: it is held until then, unless renewed or released.
    held_until: Option<Instant>,
}

/// What an answer of the server says about a lock.
#[derive(Clone, Debug)]
pub(crate) enum Learned {
    /// Another holds this key, at least until then unless it is released; without a time, for ever.
    Held { key: Key, until: Option<Instant> },
    /// Nothing, for this reason.
    Unknown(Error),
}

struct QueueEntry {
    wanted: Arc<Wanted>,
    /// In the line of all processes.
    place: LinePlace,
    /// Where it stands in its lane. Changes under the queue's mutex alone.
    number: AtomicI64,
    handing: Mutex<Handing>,
    /// It is the first now, or the lock was handed over to it.
    changed: Notify,
}

#[derive(Default)]
enum Handing {
    #[default]
    No,
    /// The server is being asked, by a release that ends by then if it is polled.
    Asked {
        pending: Option<PendingCleanup>,
        until: Option<Instant>,
    },
    Done {
        grant: Grant,
        at: Instant,
        pending: Option<PendingCleanup>,
    },
    /// It was not to be handed over.
    Refused,
    /// Nobody knows whether it was handed over.
    Unknown {
        at: Instant,
        pending: Option<PendingCleanup>,
    },
    /// It was handed over, and taken back (invariant 4).
    TakenBack,
    /// The waiter has left while the server was asked.
    Left,
}

impl Handing {
    /// When it came to this, where the lock may be this one's and is to be taken.
    fn may_be_taken_since(&self) -> Option<Instant> {
        match self {
            Self::Done { at, .. } | Self::Unknown { at, .. } => Some(*at),
            _ => None,
        }
    }
}

/// A place in the queue for a key.
pub(crate) struct Ticket {
    queues: Arc<Mutex<BTreeMap<Key, Arc<Queue>>>>,
    queue: Arc<Queue>,
    waiter: Arc<QueueEntry>,
}

/// What a place learns.
pub(crate) enum Turn {
    /// It is the first.
    First,
    /// The lock was handed over. What is pending is to release it.
    Granted(Grant, Option<PendingCleanup>),
    /// A hand-over has failed. The lock may be free, or, where that is not settled, this one's already.
    AskAgain { settled: bool, pending: Option<PendingCleanup> },
    /// It had the lock, and was not polled: it is in the queue no more, and its token must not be used again.
    TakenBack,
}

/// A lock on its way to the first of a lane. Dropped, it has gone wrong in a way that nobody knows.
pub(crate) struct HandOver {
    queue: Arc<Queue>,
    waiter: Arc<QueueEntry>,
    next: Next,
    over: bool,
}

impl Queues {
    /// Takes the last place.
    pub(crate) fn enter(&self, key: Key, wanted: Arc<Wanted>) -> Ticket {
        let is_shared = wanted.queueing != Queueing::Own;
        let number = self.last_place.fetch_add(1, Ordering::Relaxed) + 1;
        let mut queues = lock(&self.by_key);
        let new = || Arc::new(Queue { key: key.clone(), state: Mutex::default() });
        let queue = queues.entry(key.clone()).or_insert_with(new).clone();
        let mut state = lock(&queue.state);
        drop(queues);
        let lane = state.lane(is_shared);
        let place = LinePlace { number, is_shared };
        let place = if is_shared { *lane.place.get_or_insert(place) } else { place };
        lane.count += 1;
        let number = AtomicI64::new(lane.count);
        let waiter = Arc::new(QueueEntry { wanted, place, number, handing: Mutex::default(), changed: Notify::new() });
        lane.waiters.insert(lane.count, waiter.clone());
        drop(state);
        Ticket { queues: self.by_key.clone(), queue, waiter }
    }

    /// A place in the line for a request that stands in no queue.
    pub(crate) fn new_line_place(&self) -> LinePlace {
        LinePlace { number: self.last_place.fetch_add(1, Ordering::Relaxed) + 1, is_shared: false }
    }

    /// All places that may be in the line.
    pub(crate) fn line_places(&self) -> Vec<(Key, LinePlace)> {
        let mut places = Vec::new();
        for queue in self.queues() {
            let state = lock(&queue.state);
            let shared = state.shared.place.filter(|_| state.shared.in_line);
            let own = state.own.waiters.values().map(|waiter| waiter.place);
            places.extend(shared.into_iter().chain(own).map(|place| (queue.key.clone(), place)));
        }
        places
    }

    /// Whom the lock is to be handed over to, if anybody here waits for it.
    pub(crate) fn next(&self, owned: &Owned) -> Option<HandOver> {
        let [key] = &*owned.keys else { return None };
        let queue = lock(&self.by_key).get(key)?.clone();
        let now = Instant::now();
        let mut state = lock(&queue.state);
        let since = *state.since.get_or_insert(now);
        let has_turn = state.in_a_row < IN_A_ROW && now.saturating_duration_since(since) < TURN;
        let shared = state.shared.next();
        let (waiter, may_keep) = match (shared, state.own.next()) {
            (Some(waiter), _) if has_turn => (waiter, true),
            (_, Some(waiter)) => (waiter, false),
            (Some(waiter), None) => (waiter, false),
            (None, None) => return None,
        };
        state.in_a_row += 1;
        *lock(&waiter.handing) = Handing::Asked { pending: None, until: None };
        let lane = state.lane(waiter.place.is_shared);
        let next = Next { place: waiter.place, in_line: lane.in_line || !waiter.place.is_shared, may_keep };
        drop(state);
        Some(HandOver { queue, waiter, next, over: false })
    }

    /// Forgets what nobody waits for, puts those who are parked behind the others (invariant 3), and takes back what was
    /// handed over to one that doesn't take it (invariant 4): returns what that is. `None`: there is nobody to look after.
    pub(crate) fn find_abandoned(&self, now: Instant) -> Option<Vec<ToTakeBack>> {
        let (mut taken_back, mut firsts, mut has_work) = (Vec::new(), Vec::new(), false);
        for queue in self.queues() {
            let mut state = lock(&queue.state);
            if state.is_unused() {
                drop(state);
                remove(&self.by_key, &queue);
                continue;
            }
            has_work |= state.refused.is_some();
            for is_shared in [true, false] {
                let lane = state.lane(is_shared);
                let Some(first) = lane.waiters.values().next().cloned() else { continue };
                let mut handing = lock(&first.handing);
                has_work |= lane.waiters.len() > 1 || !matches!(*handing, Handing::No | Handing::Refused);
                let since = handing.may_be_taken_since();
                match &mut *handing {
                    Handing::Done { pending, .. } | Handing::Unknown { pending, .. }
                        if since.is_some_and(|at| now.saturating_duration_since(at) >= TAKEN_WITHIN) =>
                    {
                        let (wanted, pending) = (first.wanted.clone(), pending.take());
                        let is_known = matches!(*handing, Handing::Done { .. });
                        taken_back.push(ToTakeBack { wanted, pending, is_known });
                        *handing = Handing::TakenBack;
                        lane.waiters.remove(&first.number());
                    }
                    Handing::Asked { pending, until: Some(until) } if now.saturating_duration_since(*until) >= LATE => {
                        let pending = pending.take();
                        *handing = Handing::Unknown { at: now, pending };
                    }
                    Handing::No | Handing::Refused if lane.waiters.len() > 1 => {
                        if lane.expected.is_none_or(|expected| now.saturating_duration_since(expected) < LATE) {
                            continue;
                        }
                        lane.waiters.remove(&first.number());
                        lane.count += 1;
                        first.number.store(lane.count, Ordering::Relaxed);
                        lane.waiters.insert(lane.count, first.clone());
                    }
                    _ => continue,
                }
                drop(handing);
                lane.expected = Some(now);
                firsts.extend(lane.waiters.values().next().cloned());
            }
        }
        firsts.iter().for_each(|first| first.changed.notify_one());
        has_work.then_some(taken_back)
    }
}

impl Queues {
    /// All of them. The map is never held for longer than it takes to copy a few.
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

/// Removes a queue that nobody stands in and that need not be remembered, unless somebody has come meanwhile.
fn remove(by_key: &Mutex<BTreeMap<Key, Arc<Queue>>>, queue: &Arc<Queue>) {
    let mut queues = lock(by_key);
    let removed = match queues.entry(queue.key.clone()) {
        Entry::Occupied(found) if Arc::ptr_eq(found.get(), queue) && lock(&queue.state).is_unused() => {
            Some(found.remove())
        }
        _ => None,
    };
    drop(queues);
    // What listens locks the list of listeners when it is dropped: not under the mutex.
    drop(removed);
}

impl State {
    fn lane(&mut self, is_shared: bool) -> &mut Lane {
        if is_shared { &mut self.shared } else { &mut self.own }
    }

    /// The lock has come here from elsewhere, or nobody else waits for it.
    fn begin_turn(&mut self, now: Instant) {
        (self.in_a_row, self.since) = (1, Some(now));
    }

    fn is_empty(&self) -> bool {
        self.shared.waiters.is_empty() && self.own.waiters.is_empty()
    }

    fn is_unused(&self) -> bool {
        self.is_empty() && !self.is_contended()
    }

    fn is_contended(&self) -> bool {
        self.refused.is_some_and(|refused| refused.elapsed() < CONTENDED)
    }
}

impl Lane {
    /// The first, if the lock can be handed over to it.
    fn next(&self) -> Option<Arc<QueueEntry>> {
        let waiter = self.waiters.values().next()?;
        // A token from elsewhere may hold another lock of this key: what it got by a hand-over couldn't be undone. And
        // what one has not heard of yet may be that its token has got the lock already.
        let is_free = matches!(*lock(&waiter.handing), Handing::No | Handing::Refused);
        (is_free && waiter.wanted.owned.own_token).then(|| waiter.clone())
    }

    fn is_first(&self, waiter: &QueueEntry) -> bool {
        self.waiters.keys().next() == Some(&waiter.number())
    }
}

impl Ticket {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.queue.state)
    }

    fn with_lane<T>(&self, look: impl FnOnce(&mut Lane) -> T) -> T {
        look(self.state().lane(self.waiter.place.is_shared))
    }

    pub(crate) fn is_first(&self) -> bool {
        self.with_lane(|lane| lane.is_first(&self.waiter))
    }

    /// Its place in the line of all processes.
    pub(crate) fn line_place(&self) -> LinePlace {
        self.waiter.place
    }

    /// The server is asked with its place in the line, and has it in the line from now on unless the lock is granted.
    pub(crate) fn enters_line(&self) {
        self.with_lane(|lane| {
            lane.in_line = true;
            lane.heartbeat = Some(Instant::now() + HEARTBEAT);
        });
    }

    /// Whether it may be in the line already.
    pub(crate) fn may_be_in_line(&self) -> bool {
        self.with_lane(|lane| lane.in_line)
    }

    /// A request of unknown outcome may enter its place, which it shares, in the line.
    pub(crate) fn doubt_line(&self) {
        self.with_lane(|lane| lane.may_enter_late = true);
    }

    /// When the next sign of life is due, where it is in the line.
    pub(crate) fn next_heartbeat(&self) -> Option<Instant> {
        self.with_lane(|lane| lane.heartbeat.filter(|_| lane.in_line))
    }

    /// The first announces that it will be polled until then (invariant 3).
    pub(crate) fn expect(&self, until: Instant) {
        self.with_lane(|lane| {
            if lane.is_first(&self.waiter) {
                lane.expected = Some(until);
            }
        });
    }

    /// Waits until it is the first, or has got the lock already.
    pub(crate) async fn turn(&self) -> Turn {
        loop {
            match self.handed() {
                Some(turn) => return turn,
                None if self.is_first() => return Turn::First,
                None => self.waiter.changed.notified().await,
            }
        }
    }

    /// For the first: waits until the lock is handed over to it.
    pub(crate) async fn granted(&self) -> Turn {
        loop {
            match self.handed() {
                Some(turn) => return turn,
                None => self.waiter.changed.notified().await,
            }
        }
    }

    /// How a hand-over went, once.
    pub(crate) fn handed(&self) -> Option<Turn> {
        let mut handing = lock(&self.waiter.handing);
        match std::mem::take(&mut *handing) {
            Handing::No | Handing::Left => None,
            asked @ Handing::Asked { .. } => {
                *handing = asked;
                None
            }
            Handing::Done { grant, pending, .. } => Some(Turn::Granted(grant, pending)),
            Handing::Refused => Some(Turn::AskAgain { settled: true, pending: None }),
            Handing::Unknown { pending, .. } => Some(Turn::AskAgain { settled: false, pending }),
            Handing::TakenBack => Some(Turn::TakenBack),
        }
    }

    /// The server has said that this one has the lock, to whatever request: it is not taken back any more. What is pending,
    /// where it was handed over and that was not heard of yet, is its own business from now on.
    ///
    /// # Errors
    ///
    /// [`TakenBack`], where it was taken back before.
    pub(crate) fn claim(&self) -> Result<Option<PendingCleanup>, TakenBack> {
        let mut handing = lock(&self.waiter.handing);
        match std::mem::take(&mut *handing) {
            Handing::TakenBack => {
                *handing = Handing::TakenBack;
                Err(TakenBack)
            }
            Handing::Asked { pending, .. } | Handing::Done { pending, .. } | Handing::Unknown { pending, .. } => {
                Ok(pending)
            }
            Handing::No | Handing::Refused | Handing::Left => Ok(None),
        }
    }

    /// Whether another had the lock not long ago.
    pub(crate) fn is_contended(&self) -> bool {
        self.state().is_contended()
    }

    /// What the one before has listened with, if it has, and until when it knew the lock held.
    pub(crate) fn take_over(&self) -> (Option<Subscription>, Option<Instant>) {
        self.with_lane(|lane| (lane.listening.take(), lane.held_until.take()))
    }

    /// Keeps what the server answered. `None`: what was learned before is no longer true.
    pub(crate) fn learn(&self, learned: Option<Learned>) {
        let mut state = self.state();
        if let Some(Learned::Held { .. }) = learned {
            state.refused = Some(Instant::now());
        }
        state.learned = learned;
    }

    /// The server is about to be asked: what was learned before was true until now.
    pub(crate) fn ask(&self) {
        if let Some(Learned::Held { until, .. }) = &mut self.state().learned {
            let now = Instant::now();
            *until = Some(until.map_or(now, |until| until.min(now)));
        }
    }

    /// Returns what was last learned by this request, or by one that was before it.
    pub(crate) fn learned(&self) -> Option<Learned> {
        self.state().learned.clone()
    }

    /// It has got the lock, from the server or by a hand-over. Leaves what the next one can use.
    pub(crate) fn pass_on(&self, listening: Option<Subscription>, got: Got) {
        let Got { at, held_until, was_handed_over } = got;
        let before = {
            let mut state = self.state();
            if !was_handed_over {
                state.begin_turn(at);
            }
            state.learned = Some(Learned::Held { key: self.queue.key.clone(), until: Some(held_until) });
            let lane = state.lane(self.waiter.place.is_shared);
            if lane.is_first(&self.waiter) {
                lane.in_line &= !self.waiter.place.is_shared;
                lane.held_until = listening.is_some().then_some(held_until);
                std::mem::replace(&mut lane.listening, listening)
            } else {
                // By a token that had it already: the first still waits, in line.
                listening
            }
        };
        drop(before);
    }

    /// Leaves the queue.
    pub(crate) fn leave(&self) -> Left {
        let mut left = Left { may_hold: false, line: None, may_enter_late: false };
        let (next, listening, is_empty, handing) = {
            let mut state = self.state();
            let mut handing = lock(&self.waiter.handing);
            left.may_hold = !matches!(*handing, Handing::No | Handing::Refused | Handing::TakenBack);
            let is_asked = matches!(*handing, Handing::Asked { .. });
            let handing = is_asked.then(|| std::mem::replace(&mut *handing, Handing::Left));
            let lane = state.lane(self.waiter.place.is_shared);
            let was_first = lane.is_first(&self.waiter);
            lane.waiters.remove(&self.waiter.number());
            let next = lane.waiters.values().next().filter(|_| was_first).cloned();
            if was_first {
                lane.expected = next.is_some().then(Instant::now);
            }
            let mut listening = None;
            if !self.waiter.place.is_shared {
                left.line = Some(self.waiter.place);
            } else if lane.waiters.is_empty() {
                // A hand-over that is on its way may put it into the line.
                left.may_enter_late = std::mem::take(&mut lane.may_enter_late);
                left.line = lane.place.take().filter(|_| lane.in_line || left.may_hold || left.may_enter_late);
                lane.in_line = false;
            }
            let is_empty = lane.waiters.is_empty();
            let is_contended = state.is_contended();
            if is_empty && !is_contended {
                listening = state.lane(self.waiter.place.is_shared).listening.take();
            }
            (next, listening, state.is_empty() && !is_contended, handing)
        };
        // What listens locks the list of listeners when it is dropped, and what is pending that of cleanups: not under the mutex.
        drop((listening, handing));
        if is_empty {
            remove(&self.queues, &self.queue);
        }
        if let Some(next) = next {
            next.changed.notify_one();
        }
        left
    }
}

/// How a place has got the lock.
#[derive(Clone, Copy)]
pub(crate) struct Got {
    pub(crate) at: Instant,
    /// It is held until then at least.
    pub(crate) held_until: Instant,
    pub(crate) was_handed_over: bool,
}

/// What is left of a place in the queue.
pub(crate) struct Left {
    /// Its token may have got the lock by a hand-over that it hasn't heard of.
    pub(crate) may_hold: bool,
    /// It may be in the line with this place, which nobody has any more.
    pub(crate) line: Option<LinePlace>,
    /// And a request that may still be run may enter it again.
    pub(crate) may_enter_late: bool,
}

/// A lock was handed over, and taken back.
#[derive(Debug)]
pub(crate) struct TakenBack;

/// A lock that was handed over to one that doesn't take it.
pub(crate) struct ToTakeBack {
    pub(crate) wanted: Arc<Wanted>,
    pub(crate) pending: Option<PendingCleanup>,
    /// It was handed over, or else nobody knows, and it may be yet.
    pub(crate) is_known: bool,
}

impl QueueEntry {
    fn number(&self) -> i64 {
        self.number.load(Ordering::Relaxed)
    }

    /// How a hand-over went. Returns what came in between instead, where it is waited for no more.
    fn settle(&self, settled: impl FnOnce(Option<PendingCleanup>) -> Handing) -> Option<Between> {
        let mut handing = lock(&self.handing);
        match &mut *handing {
            Handing::Asked { pending, .. } => {
                let pending = pending.take();
                *handing = settled(pending);
                None
            }
            Handing::Left => Some(Between::Left),
            _ => Some(Between::Claimed),
        }
    }
}

/// What may come in between while the server is asked to hand a lock over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    /// The waiter has got the lock by itself.
    Claimed,
    Left,
}

impl HandOver {
    pub(crate) fn wanted(&self) -> &Arc<Wanted> {
        &self.waiter.wanted
    }

    pub(crate) fn next(&self) -> &Next {
        &self.next
    }

    /// The server is about to be asked, and answers by then. While nobody has taken the lock, this is pending.
    pub(crate) fn send(&self, pending: PendingCleanup, until: Instant) {
        let mut handing = lock(&self.waiter.handing);
        if let Handing::Asked { .. } = *handing {
            *handing = Handing::Asked { pending: Some(pending), until: Some(until) };
        }
    }

    /// `alone`: nobody else waits for the lock. Returns false where the one that it was for has left: it has undone what
    /// it knew of, which this need not have been.
    pub(crate) fn granted(mut self, grant: Grant, alone: bool) -> bool {
        self.over = true;
        {
            let mut state = lock(&self.queue.state);
            if alone {
                state.begin_turn(Instant::now());
            }
            let place = self.waiter.place;
            let lane = state.lane(place.is_shared);
            // Where it wasn't said to be in the line, it may have entered it meanwhile.
            if self.next.in_line && lane.place == Some(place) {
                lane.in_line = false;
            }
        }
        let between = self.waiter.settle(|pending| Handing::Done { grant, at: Instant::now(), pending });
        self.waiter.changed.notify_one();
        between != Some(Between::Left)
    }

    /// The lock was not ours to hand over.
    pub(crate) fn refused(mut self) {
        self.over = true;
        self.nothing_happened(Handing::Refused);
        self.waiter.changed.notify_one();
    }

    /// Others rely on the lock, and nothing has happened.
    pub(crate) fn not_now(mut self) {
        self.over = true;
        self.nothing_happened(Handing::No);
    }

    /// The lock went to another process, and the place is in the line.
    pub(crate) fn passed_by(mut self) {
        self.over = true;
        self.nothing_happened(Handing::No);
        let place = self.waiter.place;
        let mut state = lock(&self.queue.state);
        (state.in_a_row, state.since) = (0, None);
        let heartbeat = Some(Instant::now() + HEARTBEAT);
        let lane = state.lane(place.is_shared);
        // Those who shared it may have left, and others have come since.
        if !place.is_shared || lane.place == Some(place) {
            (lane.in_line, lane.heartbeat) = (true, lane.heartbeat.or(heartbeat));
        }
        let first = (!place.is_shared && !state.shared.in_line).then(|| state.shared.next()).flatten();
        if let Some(first) = &first {
            *lock(&first.handing) = Handing::Refused;
        }
        drop(state);
        // Those of the other lane are not in the line yet: the first has to ask.
        if let Some(first) = first {
            first.changed.notify_one();
        }
    }

    fn nothing_happened(&self, handing: Handing) {
        let mut before = None;
        self.waiter.settle(|pending| {
            before = pending;
            handing
        });
        // Not under the mutex.
        drop(before);
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        if !self.over {
            self.waiter.settle(|pending| Handing::Unknown { at: Instant::now(), pending });
            self.waiter.changed.notify_one();
        }
    }
}

/// No code panics while it holds one of these, so a poisoned one would be as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("keys", &lock(&self.by_key).len()).finish()
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("key", &self.queue.key).field("first", &self.is_first()).finish()
    }
}

#[cfg(test)]
mod tests;
