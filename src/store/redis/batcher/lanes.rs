//! Which calls are in flight and which operations wait, lane by lane: the batcher's state, kept under its mutex.
//!
//! Nothing here has an effect outside. What wakes a caller when it is dropped is handed to the code that called.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;
use std::mem;
use std::time::Duration;

use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{CALLS, Executor, OPERATIONS, TRUSTED};
use crate::Error;

/// All lanes, by what operations must have in common to share a call: nothing, or on a cluster their slot. A lane that
/// has been used is kept.
pub(super) struct Lanes<E: Executor> {
    /// Looked up three times for each operation. Most often there is one lane, for which this is faster than hashing.
    lanes: BTreeMap<u16, Lane<E>>,
    /// The number of the last call.
    last: u64,
}

struct Lane<E: Executor> {
    calls: Vec<InFlight>,
    queue: BinaryHeap<Reverse<Queued<E>>>,
    /// The runtime on which a send loop has last not begun in time. Until one begins there, it counts as one that
    /// stands still.
    stands_still: Option<runtime::Id>,
    /// Until then, all calls in flight are trusted: looking at each of many takes longer.
    all_trusted_until: Option<Instant>,
}

/// A call that is in flight.
struct InFlight {
    number: u64,
    /// How many operations of it wait for their results; at least one, so that the number of calls is limited.
    operations: usize,
    /// The runtime on which its send loop has yet to begin.
    begins_on: Option<runtime::Id>,
    /// Until when it counts as in flight (invariant 3 of the batcher).
    trusted_until: Instant,
}

/// An operation that waits for the next call, or is part of one.
pub(super) struct Queued<E: Executor> {
    pub(super) operation: E::Operation,
    pub(super) result: oneshot::Sender<Result<E::Output, Error>>,
    pub(super) until: Instant,
    /// The runtime on which it can be sent.
    pub(super) runtime: Handle,
}

impl<E: Executor> Lanes<E> {
    pub(super) fn lane(&mut self, number: u16) -> LaneMut<'_, E> {
        let new = || Lane {
            calls: Vec::with_capacity(CALLS),
            queue: BinaryHeap::new(),
            stands_still: None,
            all_trusted_until: None,
        };
        LaneMut { lane: self.lanes.entry(number).or_insert_with(new), last: &mut self.last }
    }
}

/// One lane, looked up once for all that is done to it under the mutex.
pub(super) struct LaneMut<'a, E: Executor> {
    lane: &'a mut Lane<E>,
    last: &'a mut u64,
}

/// A call that has begun, to be driven for the operations that wait.
pub(super) struct NextCall {
    pub(super) number: u64,
    pub(super) runtime: Handle,
}

impl<E: Executor> LaneMut<'_, E> {
    /// Returns how many operations wait.
    pub(super) fn queued(&self) -> usize {
        self.lane.queue.len()
    }

    pub(super) fn push(&mut self, queued: Queued<E>) {
        self.lane.queue.push(Reverse(queued));
    }

    /// Begins a call for the operations that wait, if there are any and there is room for one. Returns its number, and
    /// the runtime on which the first of them can be sent, or that of the caller if that one stands still. The caller's
    /// does not count if it is `ended`: nothing begins there any longer.
    pub(super) fn begin_for_next(
        &mut self,
        few: usize,
        trusted_until: Instant,
        ended: Option<runtime::Id>,
    ) -> Option<NextCall> {
        let of_first = &self.lane.queue.peek()?.0.runtime;
        let stands_still = self.lane.stands_still.is_some_and(|still| still == of_first.id());
        let here = if stands_still { Handle::try_current().ok() } else { None };
        let here = here.filter(|here| Some(here.id()) != ended);
        let runtime = here.unwrap_or_else(|| of_first.clone());
        Some(NextCall { number: self.begin_call(Some(runtime.id()), few, trusted_until)?, runtime })
    }

    /// Begins a call whose caller sends it. Returns its number, or `None` if enough are in flight, and no fewer than
    /// `few` operations.
    pub(super) fn begin(&mut self, few: usize, trusted_until: Instant) -> Option<u64> {
        self.begin_call(None, few, trusted_until)
    }

    fn begin_call(&mut self, begins_on: Option<runtime::Id>, few: usize, trusted_until: Instant) -> Option<u64> {
        let calls = &mut self.lane.calls;
        if calls.len() >= CALLS && calls.iter().map(|call| call.operations).sum::<usize>() >= few {
            return None;
        }
        *self.last += 1;
        calls.push(InFlight { number: *self.last, operations: 1, begins_on, trusted_until });
        self.lane.is_trusted_until(trusted_until);
        Some(*self.last)
    }

    /// Notes that all operations of the call have their results. If it had many, as many are about to come.
    pub(super) fn has_returned(&mut self, number: u64, few: usize) {
        if let Some(call) = self.lane.calls.iter_mut().find(|call| call.number == number) {
            call.operations = if call.operations > few { call.operations } else { 1 };
        }
    }

    pub(super) fn end(&mut self, number: u64) {
        let calls = &mut self.lane.calls;
        if let Some(ended) = calls.iter().position(|call| call.number == number) {
            calls.swap_remove(ended);
        }
    }

    /// Stops counting the calls that are no longer trusted, so that others can take their place.
    pub(super) fn forget_stalled(&mut self, now: Instant) {
        let Lane { calls, stands_still, all_trusted_until, .. } = &mut *self.lane;
        if all_trusted_until.is_none_or(|until| now < until) {
            return;
        }
        calls.retain(|call| {
            let is_trusted = now < call.trusted_until;
            if let (false, Some(runtime)) = (is_trusted, call.begins_on) {
                *stands_still = Some(runtime);
            }
            is_trusted
        });
        *all_trusted_until = calls.iter().map(|call| call.trusted_until).min();
    }

    /// Moves to `given_up` the first of the operations that wait, as long as nobody waits for them any longer. Their
    /// send loops may never begin.
    pub(super) fn drop_expired(&mut self, now: Instant, given_up: &mut Vec<Queued<E>>) {
        let queue = &mut self.lane.queue;
        while queue.peek().is_some_and(|Reverse(first)| first.time_left(now).is_none()) {
            given_up.extend(queue.pop().map(|Reverse(first)| first));
        }
    }

    /// Notes that a send loop has begun on that runtime.
    pub(super) fn has_begun_on(&mut self, runtime: runtime::Id) {
        self.lane.stands_still.take_if(|still| *still == runtime);
    }

    /// Returns the time at which no call in flight is trusted any longer, unless one of them proceeds until then.
    pub(super) fn trusted_until(&self) -> Option<Instant> {
        self.lane.calls.iter().map(|call| call.trusted_until).max()
    }

    /// Takes the next batch for a call. Returns `None` if nothing waits, which ends the call, or if the call is no
    /// longer counted.
    ///
    /// Moves to `given_up` what nobody waits for any longer.
    pub(super) fn take(&mut self, number: u64, now: Instant, given_up: &mut Vec<Queued<E>>) -> Option<Vec<Queued<E>>> {
        let Lane { calls, queue, .. } = &mut *self.lane;
        let call = calls.iter_mut().find(|call| call.number == number)?;
        call.begins_on = None;
        let mut batch = Vec::with_capacity(queue.len().min(OPERATIONS));
        while batch.len() < OPERATIONS {
            let Some(Reverse(next)) = queue.pop() else { break };
            match next.time_left(now) {
                Some(_) => batch.push(next),
                None => given_up.push(next),
            }
        }
        if queue.is_empty() {
            // Once there may have been many.
            queue.shrink_to(OPERATIONS);
        }
        match batch.iter().map(|next| next.until).max() {
            // By then it has ended, or its send loop is not polled.
            Some(until) => {
                (call.operations, call.trusted_until) = (batch.len(), until + TRUSTED);
                self.lane.is_trusted_until(until + TRUSTED);
            }
            None => {
                self.end(number);
                return None;
            }
        }
        Some(batch)
    }

    /// Takes all operations that can be sent on that runtime only.
    pub(super) fn take_all_of(&mut self, runtime: runtime::Id) -> Vec<Queued<E>> {
        let queue = mem::take(&mut self.lane.queue).into_iter();
        let (taken, others): (Vec<_>, Vec<_>) = queue.partition(|Reverse(next)| next.runtime.id() == runtime);
        self.lane.queue = others.into();
        taken.into_iter().map(|Reverse(queued)| queued).collect()
    }
}

impl<E: Executor> Lane<E> {
    /// Notes that a call in flight is trusted until then.
    fn is_trusted_until(&mut self, until: Instant) {
        self.all_trusted_until = Some(self.all_trusted_until.map_or(until, |before| before.min(until)));
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.calls.is_empty()
    }
}

impl<E: Executor> Default for Lanes<E> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new(), last: 0 }
    }
}

impl<E: Executor> fmt::Debug for Lanes<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busy = self.lanes.values().filter(|lane| !lane.is_idle()).count();
        let queued: usize = self.lanes.values().map(|lane| lane.queue.len()).sum();
        f.debug_struct("Lanes").field("busy", &busy).field("queued", &queued).finish()
    }
}

/// An operation without what it is run with: who waits for it, and until when.
pub(super) struct Caller<E: Executor> {
    result: oneshot::Sender<Result<E::Output, Error>>,
    until: Instant,
    runtime: Handle,
}

impl<E: Executor> Queued<E> {
    /// Returns how long its caller still waits, if it does.
    pub(super) fn time_left(&self, now: Instant) -> Option<Duration> {
        let left = self.until.saturating_duration_since(now);
        (!self.result.is_closed() && !left.is_zero()).then_some(left)
    }

    /// Sends the result to the caller. A caller that has gone takes the outcome for unknown, and cleans up.
    pub(super) fn finish(self, result: Result<E::Output, Error>) {
        drop(self.result.send(result));
    }

    pub(super) fn split(self) -> (E::Operation, Caller<E>) {
        let Self { operation, result, until, runtime } = self;
        (operation, Caller { result, until, runtime })
    }

    pub(super) fn joined((operation, caller): (E::Operation, Caller<E>)) -> Self {
        let Caller { result, until, runtime } = caller;
        Self { operation, result, until, runtime }
    }
}

// Ordered by the time that is left, for the heap alone.
impl<E: Executor> PartialEq for Queued<E> {
    fn eq(&self, other: &Self) -> bool {
        self.until == other.until
    }
}

impl<E: Executor> Eq for Queued<E> {}

impl<E: Executor> PartialOrd for Queued<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E: Executor> Ord for Queued<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.until.cmp(&other.until)
    }
}
