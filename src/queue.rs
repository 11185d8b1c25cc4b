//! Who waits for a key in this process: first in, first out, and only the first talks to the server.
//!
//! A lock that is released while somebody here waits for it is handed over: the release and the first waiter's acquire
//! are one step at the server. After [`IN_A_ROW`] of those it is released for all, so that other processes get their
//! turn.
//!
//! 1. A place is first, or behind another that will tell it when it is.
//! 2. A lock is handed over to a place that is in the queue at that moment, and is the first. Who leaves after that,
//!    and hasn't learned how it went, takes it that its token may hold the lock.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::hold::{Grant, Owned};
use crate::store::listen::Listening;
use crate::store::{Queueing, Wanted};
use crate::{Error, Key, Token};

/// So many hand-overs, then the lock is offered to other processes. More would be faster, and less fair.
const IN_A_ROW: u32 = 16;

/// The queues of one locker.
#[derive(Default)]
pub(crate) struct Queues(Arc<Mutex<HashMap<Key, Queue>>>);

#[derive(Default)]
struct Queue {
    /// In the order in which they came.
    places: BTreeMap<i64, Arc<Waiter>>,
    count: i64,
    in_a_row: u32,
    /// How often the lock was released for all since one of these had it, if one had.
    missed: Option<u32>,
    /// Kept from one first to the next, so that the next has nothing to ask before it listens.
    listening: Option<Listening>,
    /// What the last that was first has learned of the lock: it is held until then, unless renewed or released.
    held_until: Option<Instant>,
    /// What the last of these that asked the server learned, for those whose time runs out before they have asked.
    learned: Option<Learned>,
}

/// What an answer of the server says about a lock.
#[derive(Clone, Debug)]
pub(crate) enum Learned {
    /// Another holds this key, at least until then unless it is released; without a time, for ever.
    Held { key: Key, until: Option<Instant> },
    /// Nothing, for this reason.
    Unknown(Error),
}

struct Waiter {
    wanted: Arc<Wanted>,
    /// Where it stands in the queue. Changes under the queue's mutex alone.
    number: AtomicI64,
    state: Mutex<Handing>,
    /// It is the first now, or the lock was handed over to it.
    changed: Notify,
}

#[derive(Default)]
enum Handing {
    #[default]
    No,
    /// The server is being asked.
    Asked,
    Done(Grant),
    /// It was not to be handed over, or nobody knows.
    Failed {
        settled: bool,
    },
}

/// A place in the queue for a key.
pub(crate) struct Place {
    queues: Arc<Mutex<HashMap<Key, Queue>>>,
    key: Key,
    waiter: Arc<Waiter>,
}

/// What a place learns.
pub(crate) enum Turn {
    /// It is the first.
    First,
    /// The lock was handed over.
    Granted(Grant),
    /// A hand-over has failed. The lock may be free, or, where that is not settled, this one's already.
    AskAgain { settled: bool },
}

/// A lock on its way to the first in the queue. Dropped, it has gone wrong in a way that nobody knows.
pub(crate) struct HandOver {
    waiter: Arc<Waiter>,
    over: bool,
}

impl Queues {
    /// Takes the last place.
    pub(crate) fn enter(&self, key: Key, wanted: Arc<Wanted>) -> Place {
        let mut queues = lock(&self.0);
        let queue = queues.entry(key.clone()).or_default();
        queue.count += 1;
        let number = AtomicI64::new(queue.count);
        let waiter = Arc::new(Waiter { wanted, number, state: Mutex::default(), changed: Notify::new() });
        queue.places.insert(queue.count, waiter.clone());
        drop(queues);
        Place { queues: self.0.clone(), key, waiter }
    }

    /// Whom the lock is to be handed over to, if anybody here waits for it, and it is not the others' turn.
    pub(crate) fn next(&self, owned: &Owned) -> Option<HandOver> {
        let [key] = &*owned.keys else { return None };
        let mut queues = lock(&self.0);
        let queue = queues.get_mut(key)?;
        let waiter = queue.places.first_key_value()?.1.clone();
        // A token from elsewhere may hold another lock of this key: what it got by a hand-over couldn't be undone.
        if queue.in_a_row >= IN_A_ROW && waiter.wanted.queueing == Queueing::None || !waiter.wanted.owned.own_token {
            queue.in_a_row = 0;
            return None;
        }
        let mut state = lock(&waiter.state);
        // What it has not heard of yet may be that its token has got the lock already.
        if !matches!(*state, Handing::No | Handing::Failed { settled: true }) {
            return None;
        }
        queue.in_a_row += 1;
        *state = Handing::Asked;
        drop(state);
        Some(HandOver { waiter, over: false })
    }
}

impl Place {
    pub(crate) fn is_first(&self) -> bool {
        let queues = lock(&self.queues);
        let first = queues.get(&self.key).and_then(|queue| queue.places.first_key_value());
        first.is_some_and(|(number, _)| *number == self.waiter.number())
    }

    /// The lock was released for all. Answers how often that has been since one of this queue had it, if one had.
    pub(crate) fn released_for_all(&self) -> Option<u32> {
        let mut queues = lock(&self.queues);
        let missed = queues.get_mut(&self.key)?.missed.as_mut()?;
        *missed = missed.saturating_add(1);
        Some(*missed)
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
        let mut state = lock(&self.waiter.state);
        match std::mem::take(&mut *state) {
            Handing::No => None,
            Handing::Asked => {
                *state = Handing::Asked;
                None
            }
            Handing::Done(grant) => Some(Turn::Granted(grant)),
            Handing::Failed { settled } => Some(Turn::AskAgain { settled }),
        }
    }

    /// Whether anybody here stands in line with others.
    pub(crate) fn stands_in_line(&self) -> bool {
        let queues = lock(&self.queues);
        let mut waiters = queues.get(&self.key).into_iter().flat_map(|queue| queue.places.values());
        waiters.any(|waiter| waiter.wanted.queueing == Queueing::Queued)
    }

    /// Those here who stand in line with others, and have to give signs of life.
    pub(crate) fn queued(&self) -> Vec<Token> {
        let queues = lock(&self.queues);
        let waiters = queues.get(&self.key).into_iter().flat_map(|queue| queue.places.values());
        let queued = waiters.filter(|waiter| waiter.wanted.queueing == Queueing::Queued);
        queued.map(|waiter| waiter.wanted.owned.token.clone()).collect()
    }

    /// What the one before has listened with, if it has, and until when it knew the lock held.
    pub(crate) fn take_over(&self) -> (Option<Listening>, Option<Instant>) {
        let mut queues = lock(&self.queues);
        queues.get_mut(&self.key).map(|queue| (queue.listening.take(), queue.held_until.take())).unwrap_or_default()
    }

    /// Keeps what the server answered. `None`: what was learned before is no longer true.
    pub(crate) fn learn(&self, learned: Option<Learned>) {
        let mut queues = lock(&self.queues);
        if let Some(queue) = queues.get_mut(&self.key) {
            queue.learned = learned;
        }
    }

    /// The server is about to be asked: what was learned before was true until now.
    pub(crate) fn ask(&self) {
        let mut queues = lock(&self.queues);
        if let Some(Learned::Held { until, .. }) = queues.get_mut(&self.key).and_then(|queue| queue.learned.as_mut()) {
            let now = Instant::now();
            *until = Some(until.map_or(now, |until| until.min(now)));
        }
    }

    /// Returns what was last learned by this request, or by one that was before it.
    pub(crate) fn learned(&self) -> Option<Learned> {
        let queues = lock(&self.queues);
        queues.get(&self.key)?.learned.clone()
    }

    /// It has got the lock. Leaves what the next one can use.
    pub(crate) fn pass_on(&self, listening: Option<Listening>, held_until: Instant) {
        let before = {
            let mut queues = lock(&self.queues);
            let Some(queue) = queues.get_mut(&self.key) else { return };
            queue.missed = Some(0);
            queue.learned = Some(Learned::Held { key: self.key.clone(), until: Some(held_until) });
            queue.held_until = listening.is_some().then_some(held_until);
            std::mem::replace(&mut queue.listening, listening)
        };
        drop(before);
    }

    /// Lets the one with this token go first, if it stands in this queue: in the line of all processes it does.
    pub(crate) fn let_pass(&self, token: &Token) {
        let mut queues = lock(&self.queues);
        let Some(queue) = queues.get_mut(&self.key) else { return };
        let found = queue.places.values().find(|waiter| waiter.wanted.owned.token == *token).cloned();
        let first = queue.places.first_key_value().map(|(number, _)| *number);
        let (Some(waiter), Some(first)) = (found, first) else { return };
        if let Some(waiter) = queue.places.remove(&waiter.number()) {
            waiter.number.store(first - 1, Ordering::Relaxed);
            queue.places.insert(first - 1, waiter);
        }
        drop(queues);
        waiter.changed.notify_one();
    }

    /// Leaves the queue, and tells whether its token may have got the lock by a hand-over that it hasn't heard of.
    pub(crate) fn leave(&self) -> bool {
        let (next, emptied) = {
            let mut queues = lock(&self.queues);
            let Some(queue) = queues.get_mut(&self.key) else { return false };
            let first = queue.places.first_key_value().map(|(number, _)| *number);
            queue.places.remove(&self.waiter.number());
            let next = queue.places.first_key_value().filter(|_| first == Some(self.waiter.number()));
            let next = next.map(|(_, waiter)| waiter.clone());
            (next, queue.places.is_empty().then(|| queues.remove(&self.key)))
        };
        // What listens locks the list of listeners when it is dropped: not under the mutex.
        drop(emptied);
        if let Some(next) = next {
            next.changed.notify_one();
        }
        !matches!(&*lock(&self.waiter.state), Handing::No | Handing::Failed { settled: true })
    }
}

impl Waiter {
    fn number(&self) -> i64 {
        self.number.load(Ordering::Relaxed)
    }
}

impl HandOver {
    pub(crate) fn wanted(&self) -> &Arc<Wanted> {
        &self.waiter.wanted
    }

    pub(crate) fn granted(self, grant: Grant) {
        self.tell(Handing::Done(grant));
    }

    /// The lock was not ours to hand over.
    pub(crate) fn refused(self) {
        self.tell(Handing::Failed { settled: true });
    }

    /// Another is next, and nothing has happened.
    pub(crate) fn not_next(mut self) {
        self.over = true;
        *lock(&self.waiter.state) = Handing::No;
    }

    fn tell(mut self, state: Handing) {
        self.over = true;
        *lock(&self.waiter.state) = state;
        self.waiter.changed.notify_one();
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        if !self.over {
            *lock(&self.waiter.state) = Handing::Failed { settled: false };
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
        f.debug_struct("Queues").field("keys", &lock(&self.0).len()).finish()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("key", &self.key).field("first", &self.is_first()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn wanted(queueing: Queueing) -> Arc<Wanted> {
        let owned = Owned { keys: Box::new([Key::from("k")]), token: Token::random(), own_token: true, grant: None };
        let ttl = Duration::from_secs(1);
        let (metadata, latest) = (Box::default(), Arc::default());
        Arc::new(Wanted { owned, metadata, ttl, fenced: false, queueing, is_patient: true, latest })
    }

    fn grant() -> Grant {
        Grant { sent: Instant::now(), ttl: Duration::from_secs(1), fencing_token: None, doubt: None }
    }

    fn enter(queues: &Queues, queueing: Queueing) -> Place {
        queues.enter(Key::from("k"), wanted(queueing))
    }

    #[test]
    fn the_first_to_come_is_the_first_and_the_next_when_it_leaves() {
        let queues = Queues::default();
        let [a, b, c] = [0; 3].map(|_| enter(&queues, Queueing::None));
        assert!(a.is_first() && !b.is_first());
        assert!(!b.leave() && !a.leave());
        assert!(c.is_first());
        assert!(!c.leave());
        assert!(lock(&queues.0).is_empty());
    }

    #[test]
    fn a_hand_over_is_for_the_first_and_one_at_a_time() {
        let queues = Queues::default();
        let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::None));
        let from = wanted(Queueing::None).owned.clone();
        let hand_over = queues.next(&from).unwrap();
        assert_eq!(hand_over.wanted().owned.token, a.waiter.wanted.owned.token);
        assert!(queues.next(&from).is_none(), "nobody knows yet how the first one goes");
        hand_over.granted(grant());
        assert!(queues.next(&from).is_none(), "it has not heard of it yet");
        assert!(matches!(a.handed(), Some(Turn::Granted(_))));
        assert!(!a.leave());
        assert!(b.is_first() && queues.next(&from).is_some());
    }

    #[test]
    fn who_leaves_while_the_lock_is_on_its_way_may_have_got_it() {
        let from = wanted(Queueing::None).owned.clone();
        let (asked, given, lost, refused) = (0, 1, 2, 3);
        for what in [asked, given, lost, refused] {
            let queues = Queues::default();
            let place = enter(&queues, Queueing::None);
            let hand_over = queues.next(&from).unwrap();
            let mut pending = None;
            match what {
                0 => pending = Some(hand_over),
                1 => hand_over.granted(grant()),
                2 => drop(hand_over),
                _ => hand_over.refused(),
            }
            assert_eq!(place.leave(), what != refused, "{what}");
            drop(pending);
        }
    }

    #[test]
    fn a_hand_over_that_went_wrong_unheard_is_not_forgotten_for_the_next() {
        let queues = Queues::default();
        let place = enter(&queues, Queueing::None);
        let from = wanted(Queueing::None).owned.clone();
        drop(queues.next(&from));
        assert!(queues.next(&from).is_none());
        assert!(matches!(place.handed(), Some(Turn::AskAgain { settled: false })));
        assert!(queues.next(&from).is_some());
    }

    #[test]
    fn after_many_in_a_row_it_is_the_turn_of_others_unless_all_stand_in_one_line() {
        for (queueing, others) in [(Queueing::None, true), (Queueing::Queued, false)] {
            let queues = Queues::default();
            let place = enter(&queues, queueing);
            let from = wanted(Queueing::None).owned.clone();
            for _ in 0..IN_A_ROW {
                queues.next(&from).unwrap().granted(grant());
                assert!(matches!(place.handed(), Some(Turn::Granted(_))));
            }
            assert_eq!(queues.next(&from).is_none(), others);
        }
    }

    #[test]
    fn it_is_counted_how_often_others_could_have_had_the_lock() {
        let queues = Queues::default();
        let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::None));
        assert_eq!(a.released_for_all(), None);
        a.pass_on(None, Instant::now());
        assert!(!a.leave());
        assert_eq!(b.released_for_all(), Some(1));
        assert_eq!(b.released_for_all(), Some(2));
        b.pass_on(None, Instant::now());
        assert_eq!(b.released_for_all(), Some(1));
    }

    #[test]
    fn what_the_first_learned_is_known_to_those_behind_it_and_after_it() {
        let queues = Queues::default();
        let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::None));
        assert!(b.learned().is_none());
        a.learn(Some(Learned::Unknown(Error::Closed)));
        assert!(!a.leave());
        assert!(matches!(b.learned(), Some(Learned::Unknown(Error::Closed))));
        let c = enter(&queues, Queueing::None);
        b.pass_on(None, Instant::now());
        assert!(matches!(c.learned(), Some(Learned::Held { key, .. }) if key == "k".into()));
        c.learn(None);
        assert!(c.learned().is_none());
    }

    #[test]
    fn a_token_from_elsewhere_is_handed_nothing() {
        let queues = Queues::default();
        let mut wanted = Wanted::clone(&wanted(Queueing::None));
        wanted.owned.own_token = false;
        let _place = queues.enter(Key::from("k"), Arc::new(wanted.clone()));
        assert!(queues.next(&wanted.owned).is_none());
    }

    #[test]
    fn who_is_first_in_the_line_of_all_is_let_pass() {
        let queues = Queues::default();
        let [a, b, c] = [0; 3].map(|_| enter(&queues, Queueing::Queued));
        a.let_pass(&c.waiter.wanted.owned.token);
        assert!(c.is_first() && !a.is_first());
        a.let_pass(&Token::random());
        assert!(!c.leave());
        assert!(a.is_first() && !b.is_first());
    }
}
