//! What is on its way and what waits, line by line: the combiner's books, kept under its mutex. Nothing here has an
//! effect outside, and what wakes a caller when it is dropped is handed out.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::iter::Enumerate;
use std::mem;
use std::time::Duration;
use std::vec;

use tokio::runtime::{self, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::{CALLS, Carrier, OPERATIONS, TRUSTED};
use crate::Error;

/// By what operations must have in common to travel together. Lines that nothing is on are not kept.
pub(super) struct Lines<C: Carrier> {
    busy: HashMap<u16, Line<C>>,
    /// The number of the last call.
    last: u64,
}

struct Line<C: Carrier> {
    calls: [Option<OnItsWay>; CALLS],
    waiting: BinaryHeap<Reverse<Waiting<C>>>,
    /// How many operations wait.
    count: usize,
}

struct OnItsWay {
    number: u64,
    /// For how long it counts.
    trusted_until: Instant,
}

/// Who waits for the next call.
pub(super) struct Waiting<C: Carrier> {
    pub(super) until: Instant,
    pub(super) asked: Asked<C>,
    /// Where it can be served.
    pub(super) runtime: Handle,
}

pub(super) enum Asked<C: Carrier> {
    One(C::Operation, oneshot::Sender<Result<C::Answer, Error>>),
    /// Together, and those that are left of them are told by their places.
    Many(Enumerate<vec::IntoIter<C::Operation>>, mpsc::Sender<Placed<C::Answer>>),
}

/// An operation of a call.
pub(super) struct Brought<C: Carrier> {
    pub(super) operation: C::Operation,
    pub(super) caller: Caller<C::Answer>,
}

/// Who waits for its answer.
pub(super) struct Caller<A> {
    pub(super) until: Instant,
    reply: Reply<A>,
}

enum Reply<A> {
    One(oneshot::Sender<Result<A, Error>>),
    OfMany(mpsc::Sender<Placed<A>>, usize),
}

/// With its place among those that were asked for together.
pub(super) type Placed<A> = (usize, Result<A, Error>);

impl<C: Carrier> Lines<C> {
    /// How many.
    pub(super) fn waiting(&self, line: u16) -> usize {
        self.busy.get(&line).map_or(0, |line| line.count)
    }

    pub(super) fn wait(&mut self, line: u16, waiting: Waiting<C>) {
        let line = self.line(line);
        line.count += waiting.asked.len();
        line.waiting.push(Reverse(waiting));
    }

    /// The runtime that can serve who comes next, if anyone waits.
    pub(super) fn runtime_of_next(&self, line: u16) -> Option<Handle> {
        Some(self.busy.get(&line)?.waiting.peek()?.0.runtime.clone())
    }

    /// Counts one more call. `None`: there are enough.
    pub(super) fn begin(&mut self, line: u16, trusted_until: Instant) -> Option<u64> {
        let number = self.last + 1;
        let place = self.line(line).calls.iter_mut().find(|place| place.is_none())?;
        *place = Some(OnItsWay { number, trusted_until });
        self.last = number;
        Some(number)
    }

    pub(super) fn end(&mut self, line: u16, number: u64) {
        self.retain_calls(line, |call| call.number != number);
    }

    /// What is not trusted any more counts no more: its place is another's from here on.
    pub(super) fn forget_stalled(&mut self, line: u16, now: Instant) {
        self.retain_calls(line, |call| now < call.trusted_until);
    }

    fn retain_calls(&mut self, line: u16, keep: impl Fn(&OnItsWay) -> bool) {
        let Some(entry) = self.busy.get_mut(&line) else { return };
        for place in &mut entry.calls {
            place.take_if(|call| !keep(call));
        }
        if entry.waiting.is_empty() && entry.calls.iter().all(Option::is_none) {
            self.busy.remove(&line);
        }
    }

    /// When none of the calls is trusted any more, should they not go on by then.
    pub(super) fn relief(&self, line: u16) -> Option<Instant> {
        self.busy.get(&line)?.calls.iter().flatten().map(|call| call.trusted_until).max()
    }

    /// What the call is to bring next. `None`: there is nothing, or the call had lost its place; now it is over.
    ///
    /// Those that nobody wants any more go to `given_up`.
    pub(super) fn take(
        &mut self,
        line: u16,
        number: u64,
        now: Instant,
        given_up: &mut Vec<Waiting<C>>,
    ) -> Option<Vec<Brought<C>>> {
        let entry = self.busy.get_mut(&line)?;
        let call = entry.calls.iter_mut().flatten().find(|call| call.number == number)?;
        let mut batch = Vec::with_capacity(entry.count.min(OPERATIONS));
        while batch.len() < OPERATIONS {
            let Some(Reverse(next)) = entry.waiting.pop() else { break };
            if next.until <= now || next.asked.is_given_up() {
                entry.count -= next.asked.len();
                given_up.push(next);
                continue;
            }
            let before = batch.len();
            let left = next.give(OPERATIONS - before, &mut batch);
            entry.count -= batch.len() - before;
            entry.waiting.extend(left.map(Reverse));
        }
        match batch.iter().map(|next| next.caller.until).max() {
            // By then it has ended, or its driver is not driven.
            Some(until) => call.trusted_until = until + TRUSTED,
            None => {
                self.end(line, number);
                return None;
            }
        }
        Some(batch)
    }

    /// What can be served on that runtime only.
    pub(super) fn take_all_of(&mut self, line: u16, runtime: runtime::Id) -> Vec<Waiting<C>> {
        let Some(entry) = self.busy.get_mut(&line) else { return Vec::new() };
        let waiting = mem::take(&mut entry.waiting).into_iter();
        let (taken, others): (Vec<_>, Vec<_>) = waiting.partition(|Reverse(next)| next.runtime.id() == runtime);
        entry.waiting = others.into();
        entry.count -= taken.iter().map(|Reverse(next)| next.asked.len()).sum::<usize>();
        // The last of its line, maybe.
        self.retain_calls(line, |_| true);
        taken.into_iter().map(|Reverse(waiting)| waiting).collect()
    }

    fn line(&mut self, line: u16) -> &mut Line<C> {
        let new = || Line { calls: [const { None }; CALLS], waiting: BinaryHeap::new(), count: 0 };
        self.busy.entry(line).or_insert_with(new)
    }
}

impl<C: Carrier> Default for Lines<C> {
    fn default() -> Self {
        Self { busy: HashMap::new(), last: 0 }
    }
}

impl<C: Carrier> fmt::Debug for Lines<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting: usize = self.busy.values().map(|line| line.count).sum();
        f.debug_struct("Lines").field("busy", &self.busy.len()).field("waiting", &waiting).finish()
    }
}

impl<C: Carrier> Waiting<C> {
    /// Moves so many of the operations to the batch, or all. Answers what is left.
    fn give(self, room: usize, batch: &mut Vec<Brought<C>>) -> Option<Self> {
        let Self { until, asked, runtime } = self;
        match asked {
            Asked::One(operation, answer) => {
                batch.push(Brought { operation, caller: Caller { until, reply: Reply::One(answer) } });
                None
            }
            Asked::Many(mut operations, answers) => {
                batch.extend(operations.by_ref().take(room).map(|(place, operation)| {
                    let reply = Reply::OfMany(answers.clone(), place);
                    Brought { operation, caller: Caller { until, reply } }
                }));
                let is_left = operations.len() > 0;
                is_left.then_some(Self { until, asked: Asked::Many(operations, answers), runtime })
            }
        }
    }
}

impl<C: Carrier> Asked<C> {
    fn len(&self) -> usize {
        match self {
            Self::One(..) => 1,
            Self::Many(operations, _) => operations.len(),
        }
    }

    fn is_given_up(&self) -> bool {
        match self {
            Self::One(_, answer) => answer.is_closed(),
            Self::Many(_, answers) => answers.is_closed(),
        }
    }
}

impl<A> Caller<A> {
    /// For how long it still wants an answer, if it does.
    pub(super) fn patience(&self, now: Instant) -> Option<Duration> {
        let left = self.until.saturating_duration_since(now);
        let is_wanted = match &self.reply {
            Reply::One(answer) => !answer.is_closed(),
            Reply::OfMany(answers, _) => !answers.is_closed(),
        };
        (is_wanted && !left.is_zero()).then_some(left)
    }

    pub(super) fn tell(self, answer: Result<A, Error>) {
        // Who has stopped waiting takes it for unknown, and cleans up.
        match self.reply {
            Reply::One(one) => drop(one.send(answer)),
            Reply::OfMany(all, place) => drop(all.try_send((place, answer))),
        }
    }
}

// By the time that is left, for the heap alone.
impl<C: Carrier> PartialEq for Waiting<C> {
    fn eq(&self, other: &Self) -> bool {
        self.until == other.until
    }
}

impl<C: Carrier> Eq for Waiting<C> {}

impl<C: Carrier> PartialOrd for Waiting<C> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<C: Carrier> Ord for Waiting<C> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.until.cmp(&other.until)
    }
}
