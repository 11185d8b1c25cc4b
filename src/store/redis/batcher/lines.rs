//! What is on its way and what waits, line by line: the batcher's books, kept under its mutex. Nothing here has an
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

/// By what operations must have in common to travel together: one, or the slots of a cluster. Those that have been used
/// are kept.
pub(super) struct Lines<C: Carrier> {
    lines: HashMap<u16, Line<C>>,
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
    pub(super) fn on(&mut self, line: u16) -> OnLine<'_, C> {
        let new = || Line { calls: [const { None }; CALLS], waiting: BinaryHeap::new(), count: 0 };
        OnLine { line: self.lines.entry(line).or_insert_with(new), last: &mut self.last }
    }
}

/// One line, found once for all that is done to it under the mutex.
pub(super) struct OnLine<'a, C: Carrier> {
    line: &'a mut Line<C>,
    last: &'a mut u64,
}

/// A call that has begun, for who waits next.
pub(super) struct NextCall {
    pub(super) number: u64,
    pub(super) runtime: Handle,
}

impl<C: Carrier> OnLine<'_, C> {
    /// How many operations wait.
    pub(super) fn waiting(&self) -> usize {
        self.line.count
    }

    pub(super) fn wait(&mut self, waiting: Waiting<C>) {
        self.line.count += waiting.asked.len();
        self.line.waiting.push(Reverse(waiting));
    }

    /// Begins a call for those who wait, if there are any and there is room for one. Returns its number, and the
    /// runtime that can serve who comes next.
    pub(super) fn begin_for_next(&mut self, trusted_until: Instant) -> Option<NextCall> {
        let runtime = self.line.waiting.peek()?.0.runtime.clone();
        Some(NextCall { number: self.begin(trusted_until)?, runtime })
    }

    /// Counts one more call. `None`: there are enough.
    pub(super) fn begin(&mut self, trusted_until: Instant) -> Option<u64> {
        let place = self.line.calls.iter_mut().find(|place| place.is_none())?;
        *self.last += 1;
        *place = Some(OnItsWay { number: *self.last, trusted_until });
        Some(*self.last)
    }

    pub(super) fn end(&mut self, number: u64) {
        self.line.retain_calls(|call| call.number != number);
    }

    /// What is not trusted any more counts no more: its place is another's from here on.
    pub(super) fn forget_stalled(&mut self, now: Instant) {
        self.line.retain_calls(|call| now < call.trusted_until);
    }

    /// When none of the calls is trusted any more, should they not go on by then.
    pub(super) fn relief(&self) -> Option<Instant> {
        self.line.calls.iter().flatten().map(|call| call.trusted_until).max()
    }

    /// What the call is to bring next. `None`: there is nothing, or the call had lost its place; now it is over.
    ///
    /// Those that nobody wants any more go to `given_up`.
    pub(super) fn take(
        &mut self,
        number: u64,
        now: Instant,
        given_up: &mut Vec<Waiting<C>>,
    ) -> Option<Vec<Brought<C>>> {
        let Line { calls, waiting, count } = &mut *self.line;
        let call = calls.iter_mut().flatten().find(|call| call.number == number)?;
        let mut batch = Vec::with_capacity((*count).min(OPERATIONS));
        while batch.len() < OPERATIONS {
            let Some(Reverse(next)) = waiting.pop() else { break };
            if next.until <= now || next.asked.is_given_up() {
                *count -= next.asked.len();
                given_up.push(next);
                continue;
            }
            let before = batch.len();
            let left = next.give(OPERATIONS - before, &mut batch);
            *count -= batch.len() - before;
            waiting.extend(left.map(Reverse));
        }
        if waiting.is_empty() {
            // Once there may have been many.
            waiting.shrink_to(OPERATIONS);
        }
        match batch.iter().map(|next| next.caller.until).max() {
            // By then it has ended, or its driver is not driven.
            Some(until) => call.trusted_until = until + TRUSTED,
            None => {
                self.end(number);
                return None;
            }
        }
        Some(batch)
    }

    /// What can be served on that runtime only.
    pub(super) fn take_all_of(&mut self, runtime: runtime::Id) -> Vec<Waiting<C>> {
        let waiting = mem::take(&mut self.line.waiting).into_iter();
        let (taken, others): (Vec<_>, Vec<_>) = waiting.partition(|Reverse(next)| next.runtime.id() == runtime);
        self.line.waiting = others.into();
        self.line.count -= taken.iter().map(|Reverse(next)| next.asked.len()).sum::<usize>();
        taken.into_iter().map(|Reverse(waiting)| waiting).collect()
    }
}

impl<C: Carrier> Line<C> {
    fn retain_calls(&mut self, keep: impl Fn(&OnItsWay) -> bool) {
        for place in &mut self.calls {
            place.take_if(|call| !keep(call));
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.calls.iter().all(Option::is_none)
    }
}

impl<C: Carrier> Default for Lines<C> {
    fn default() -> Self {
        Self { lines: HashMap::new(), last: 0 }
    }
}

impl<C: Carrier> fmt::Debug for Lines<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busy = self.lines.values().filter(|line| !line.is_idle()).count();
        let waiting: usize = self.lines.values().map(|line| line.count).sum();
        f.debug_struct("Lines").field("busy", &busy).field("waiting", &waiting).finish()
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
