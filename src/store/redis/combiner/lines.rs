//! What is on its way and what waits, line by line: the combiner's books, kept under its mutex. Nothing here has an effect
//! outside, and what wakes a caller when it is dropped is handed out.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::mem;
use std::time::Duration;

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
}

struct OnItsWay {
    number: u64,
    /// For how long it counts.
    trusted_until: Instant,
}

/// An operation that waits for the next call.
pub(super) struct Waiting<C: Carrier> {
    pub(super) operation: C::Operation,
    pub(super) caller: Caller<C::Answer>,
}

/// Who waits for an answer.
pub(super) struct Caller<A> {
    pub(super) until: Instant,
    pub(super) reply: Reply<A>,
    /// Where it can be served.
    pub(super) runtime: Handle,
}

/// How it is answered.
pub(super) enum Reply<A> {
    One(oneshot::Sender<Result<A, Error>>),
    /// With its place among those that were asked for together.
    OfMany(mpsc::Sender<Placed<A>>, usize),
}

pub(super) type Placed<A> = (usize, Result<A, Error>);

impl<C: Carrier> Lines<C> {
    /// How many.
    pub(super) fn waiting(&self, line: u16) -> usize {
        self.busy.get(&line).map_or(0, |line| line.waiting.len())
    }

    pub(super) fn wait(&mut self, line: u16, waiting: Waiting<C>) {
        self.line(line).waiting.push(Reverse(waiting));
    }

    /// The runtime that can serve who comes next, if anyone waits.
    pub(super) fn runtime_of_next(&self, line: u16) -> Option<Handle> {
        Some(self.busy.get(&line)?.waiting.peek()?.0.caller.runtime.clone())
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
    ) -> Option<Vec<Waiting<C>>> {
        let entry = self.busy.get_mut(&line)?;
        let call = entry.calls.iter_mut().flatten().find(|call| call.number == number)?;
        let mut batch = Vec::with_capacity(entry.waiting.len().min(OPERATIONS));
        while batch.len() < OPERATIONS {
            let Some(Reverse(next)) = entry.waiting.pop() else { break };
            match next.caller.patience(now) {
                Some(_) => batch.push(next),
                None => given_up.push(next),
            }
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
        let (taken, others): (Vec<_>, Vec<_>) = waiting.partition(|Reverse(next)| next.caller.runtime.id() == runtime);
        entry.waiting = others.into();
        // The last of its line, maybe.
        self.retain_calls(line, |_| true);
        taken.into_iter().map(|Reverse(waiting)| waiting).collect()
    }

    fn line(&mut self, line: u16) -> &mut Line<C> {
        self.busy.entry(line).or_insert_with(|| Line { calls: [const { None }; CALLS], waiting: BinaryHeap::new() })
    }
}

impl<C: Carrier> Default for Lines<C> {
    fn default() -> Self {
        Self { busy: HashMap::new(), last: 0 }
    }
}

impl<C: Carrier> fmt::Debug for Lines<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting: usize = self.busy.values().map(|line| line.waiting.len()).sum();
        f.debug_struct("Lines").field("busy", &self.busy.len()).field("waiting", &waiting).finish()
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
        self.caller.until == other.caller.until
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
        self.caller.until.cmp(&other.caller.until)
    }
}
