//! Many operations, one round trip.
//!
//! A client pays for each command it sends, and a server for each script it runs. So an operation that finds nothing on
//! its way is sent at once, by its own caller; what arrives meanwhile waits, and goes together in the next call.
//!
//! 1. No more than [`CALLS`] are on their way on one line, and no more than [`OPERATIONS`] in each.
//! 2. While operations wait, a call is on its way: its end starts the next one.
//! 3. Each operation ends within its own timeout. One whose caller is gone before it was sent is not sent.
//! 4. Those that run out of time first go first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::future::Future;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::Error;

/// On their way at a time. With one, client and server would wait for each other in turns; with more, the calls get
/// smaller and dearer.
const CALLS: usize = 2;
/// In one call. Larger ones gain nothing more, and keep the server from its other clients for longer.
const OPERATIONS: usize = 128;

/// What brings operations to the server.
pub(super) trait Carrier: fmt::Debug + Send + Sync + 'static {
    type Operation: Send + Sync;
    type Answer: Send;

    /// Brings one. Ends within `timeout`.
    fn one(
        &self,
        operation: &Self::Operation,
        timeout: Duration,
    ) -> impl Future<Output = Result<Self::Answer, Error>> + Send;

    /// Brings several in one call, which ends within `timeout`. Answers for each of them in its place; `None` where it
    /// was not done, and must go alone.
    fn many(
        &self,
        operations: &[Self::Operation],
        timeout: Duration,
    ) -> impl Future<Output = Vec<Option<Result<Self::Answer, Error>>>> + Send;

    /// The operations of a call are brought in the order of their ranks.
    fn rank(operation: &Self::Operation) -> usize;
}

#[derive(Debug)]
pub(super) struct Combiner<C: Carrier> {
    shared: Arc<Shared<C>>,
}

#[derive(Debug)]
struct Shared<C: Carrier> {
    carrier: C,
    /// By what operations must have in common to travel together. Lines that nothing is on are not kept.
    lines: Mutex<Lines<C>>,
}

struct Lines<C: Carrier>(HashMap<u16, Line<C>>);

struct Line<C: Carrier> {
    calls: usize,
    waiting: BinaryHeap<Reverse<Waiting<C>>>,
}

/// An operation that waits for the next call.
struct Waiting<C: Carrier> {
    operation: C::Operation,
    caller: Caller<C::Answer>,
}

/// Who waits for an answer.
struct Caller<A> {
    until: Instant,
    answer: oneshot::Sender<Result<A, Error>>,
    /// Where it lives, and so where it can be served.
    runtime: Handle,
}

impl<C: Carrier> Combiner<C> {
    pub(super) fn new(carrier: C) -> Self {
        Self { shared: Arc::new(Shared { carrier, lines: Mutex::new(Lines(HashMap::new())) }) }
    }

    pub(super) fn carrier(&self) -> &C {
        &self.shared.carrier
    }

    /// Brings the operation to the server, alone or with others of its line.
    pub(super) async fn run(&self, line: u16, operation: C::Operation, timeout: Duration) -> Result<C::Answer, Error> {
        let until = Instant::now() + timeout;
        let answer = match self.shared.enter(line, operation, until)? {
            Entered::First(operation, _call) => return self.shared.carrier.one(&operation, timeout).await,
            Entered::Waits(answer) => answer,
        };
        match timeout_at(until, answer).await {
            Ok(Ok(answer)) => answer,
            // Nobody knows how far it came: the runtime that had it has ended.
            Ok(Err(_)) | Err(_) => Err(Error::timeout()),
        }
    }
}

enum Entered<C: Carrier> {
    First(C::Operation, Call<C>),
    Waits(oneshot::Receiver<Result<C::Answer, Error>>),
}

impl<C: Carrier> Shared<C> {
    fn enter(self: &Arc<Self>, line: u16, operation: C::Operation, until: Instant) -> Result<Entered<C>, Error> {
        let mut lines = self.lines();
        let entry = lines.line(line);
        if entry.calls < CALLS {
            entry.calls += 1;
            return Ok(Entered::First(operation, Call { shared: self.clone(), line }));
        }
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let (answer, receiver) = oneshot::channel();
        entry.waiting.push(Reverse(Waiting { operation, caller: Caller { until, answer, runtime } }));
        Ok(Entered::Waits(receiver))
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn lines(&self) -> MutexGuard<'_, Lines<C>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The call of an operation that goes alone. Its end, also by being dropped, starts the next call (invariant 2).
struct Call<C: Carrier> {
    shared: Arc<Shared<C>>,
    line: u16,
}

impl<C: Carrier> Drop for Call<C> {
    fn drop(&mut self) {
        let mut lines = self.shared.lines();
        match lines.line(self.line).waiting.peek() {
            Some(Reverse(next)) => {
                // Not ours: it may be what ends, or none at all.
                let runtime = next.caller.runtime.clone();
                drop(lines);
                runtime.spawn(Driver { shared: self.shared.clone(), line: self.line, done: false }.run());
            }
            None => lines.end_call(self.line),
        }
    }
}

/// Sends what waits, call after call, until nothing does. No one else has to end it: each call ends in time.
struct Driver<C: Carrier> {
    shared: Arc<Shared<C>>,
    line: u16,
    done: bool,
}

impl<C: Carrier> Driver<C> {
    async fn run(mut self) {
        while let Some(batch) = self.next() {
            match batch.waiting.len() {
                1 => self.bring_alone(batch.waiting).await,
                _ => self.bring_together(batch).await,
            }
        }
    }

    async fn bring_together(&self, mut batch: Batch<C>) {
        batch.waiting.sort_by_key(|waiting| C::rank(&waiting.operation));
        let (operations, callers): (Vec<_>, Vec<_>) = batch.waiting.into_iter().map(Waiting::split).unzip();
        let answers = self.shared.carrier.many(&operations, batch.patience).await;
        let mut left_over = Vec::new();
        for ((operation, caller), answer) in operations.into_iter().zip(callers).zip(answers) {
            match answer {
                Some(answer) => caller.tell(answer),
                None => left_over.push(Waiting { operation, caller }),
            }
        }
        self.bring_alone(left_over).await;
    }

    async fn bring_alone(&self, operations: Vec<Waiting<C>>) {
        for Waiting { operation, caller } in operations {
            if let Some(left) = caller.patience(Instant::now()) {
                caller.tell(self.shared.carrier.one(&operation, left).await);
            }
        }
    }

    /// The next to be sent. When there are none, the call is over: said under the same mutex, so that who comes a moment
    /// later sends by itself.
    fn next(&mut self) -> Option<Batch<C>> {
        let now = Instant::now();
        let mut lines = self.shared.lines();
        let line = lines.line(self.line);
        let mut batch =
            Batch { waiting: Vec::with_capacity(line.waiting.len().min(OPERATIONS)), patience: Duration::ZERO };
        while batch.waiting.len() < OPERATIONS {
            let Some(Reverse(next)) = line.waiting.pop() else { break };
            if let Some(patience) = next.caller.patience(now) {
                batch.patience = batch.patience.max(patience);
                batch.waiting.push(next);
            }
        }
        if batch.waiting.is_empty() {
            self.done = true;
            lines.end_call(self.line);
            return None;
        }
        Some(batch)
    }
}

/// What goes together.
struct Batch<C: Carrier> {
    waiting: Vec<Waiting<C>>,
    /// The time that the most patient of them has.
    patience: Duration,
}

impl<C: Carrier> Drop for Driver<C> {
    /// Its runtime has ended under it. What waits learns that, unless another call will take it along.
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut lines = self.shared.lines();
        let line = lines.line(self.line);
        line.calls = line.calls.saturating_sub(1);
        let abandoned = if line.calls == 0 { mem::take(&mut line.waiting) } else { BinaryHeap::new() };
        if line.calls == 0 {
            lines.0.remove(&self.line);
        }
        // This wakes the callers: not under the mutex.
        drop(lines);
        drop(abandoned);
    }
}

impl<C: Carrier> Lines<C> {
    fn line(&mut self, line: u16) -> &mut Line<C> {
        self.0.entry(line).or_insert_with(|| Line { calls: 0, waiting: BinaryHeap::new() })
    }

    fn end_call(&mut self, line: u16) {
        let Some(ended) = self.0.get_mut(&line) else { return };
        ended.calls = ended.calls.saturating_sub(1);
        if ended.calls == 0 && ended.waiting.is_empty() {
            self.0.remove(&line);
        }
    }
}

impl<C: Carrier> fmt::Debug for Lines<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting: usize = self.0.values().map(|line| line.waiting.len()).sum();
        f.debug_struct("Lines").field("busy", &self.0.len()).field("waiting", &waiting).finish()
    }
}

impl<C: Carrier> Waiting<C> {
    fn split(self) -> (C::Operation, Caller<C::Answer>) {
        (self.operation, self.caller)
    }
}

impl<A> Caller<A> {
    /// For how long it still wants an answer, if it does.
    fn patience(&self, now: Instant) -> Option<Duration> {
        let left = self.until.saturating_duration_since(now);
        (!left.is_zero() && !self.answer.is_closed()).then_some(left)
    }

    fn tell(self, answer: Result<A, Error>) {
        // Who has stopped waiting takes it for unknown, and cleans up.
        drop(self.answer.send(answer));
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
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<C: Carrier> Ord for Waiting<C> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.caller.until.cmp(&other.caller.until)
    }
}
