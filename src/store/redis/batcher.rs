//! Batches operations of many callers, so that they share round trips.
//!
//! A client pays for each command that it sends, and a server for each script that it runs. So an operation that finds
//! few calls in flight is sent at once, by its own caller. What arrives meanwhile waits, and goes in one batch with the
//! next call. This makes tasks that run one operation after the other fall into step: those that get their results
//! together ask for the next together. Operations that one caller asks for together enter together, and go in as few
//! calls as possible.
//!
//! 1. At most [`CALLS`] calls are in flight in one lane, with at most [`OPERATIONS`] operations each; or more, while
//!    fewer operations are in flight than the executor calls [few](Executor::few).
//! 2. While operations wait, a call is in flight: its end starts the next one.
//! 3. That end must be noticed. While a call depends on a task that may never be polled (its caller's, or that of a
//!    send loop which has not begun), it counts as in flight for at most [`TRUSTED`]. No call counts for longer than
//!    its operations have time. A runtime on which a send loop has not begun in time may stand still: those that wait
//!    then run the next ones on their own, until one begins there.
//! 4. Each operation ends within its own timeout. One whose caller has gone before it was sent is not sent.
//! 5. Those that run out of time first go first.
//! 6. A failure is reported to the operation that it is about. A batch that is refused as a whole is halved until that
//!    operation is found. One that came too late for the server goes once more, without those whose callers have gone.
//! 7. A runtime that ends takes with it what was running on it, and nothing else.

#[cfg(all(test, shuttle))]
mod interleaved;
mod lanes;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use self::lanes::{Lanes, NextCall, Queued};
use super::router::all;
use crate::Error;
use crate::store::ByOthers;
use crate::sync::{Mutex, MutexGuard};

/// How many calls are in flight in one lane. With one, client and server would wait for each other in turns. With more,
/// calls get smaller and cost more for each operation: on Redis 7.0, the server takes 11.1 us for an acquire and a
/// release in calls of 2 operations, 6.3 us in calls of 8, and 4.8 us in calls of 32. `benches/versus`
/// measures the pairs that 256 tasks do in a second, `--bench watch` the server time of a renewal.
const CALLS: usize = 2;
/// The most operations of one call. Larger calls gain little: the pair above takes 4.8 us in calls of 32 and 4.6 us in
/// calls of 96. They would keep the server from its other clients for longer, and their results would come later and
/// all at once, so that server and client work less at the same time.
pub(super) const OPERATIONS: usize = 96;
/// With fewer waiting operations than this, a send loop lets other tasks run first, as they may add some. If it waited
/// for many, two calls would become one with the operations of both, and then client and server work in turns: with 48,
/// 64 tasks do 0.7 times as many pairs a second, and 128 tasks 1.05 times (`benches/versus`).
const ENOUGH: usize = 4;
/// For how long others wait for a call whose task may never be polled (invariant 3): its future was polled once and put
/// aside, or a worker thread blocks that was about to poll its send loop. It is longer than almost every call takes,
/// and a small part of a command timeout. The tests `*_no_longer_than_those_are_trusted` (`cargo test --lib batcher`)
/// show it.
const TRUSTED: Duration = Duration::from_millis(50);

/// Runs operations at the server.
pub(super) trait Executor: fmt::Debug + Send + Sync + 'static {
    type Operation: Send + Sync;
    type Output: Send;

    /// Returns the runtime that calls depend on at this moment; send loops run there. Without one, they run on those of
    /// the operations that wait.
    fn home(&self) -> Option<Handle> {
        None
    }

    /// Called when an operation begins to wait. The closure returns the error of an operation that got no result.
    fn begin_waiting(&self, _now: Instant) -> impl FnOnce() -> Error + Send {
        Error::timeout
    }

    /// Runs one operation, from `now` on. Ends by `until`.
    fn run_one(
        &self,
        operation: &Self::Operation,
        now: Instant,
        until: Instant,
    ) -> impl Future<Output = Result<Self::Output, Error>> + Send;

    /// Called before a send loop runs an operation alone, which may send it several times. What this returns ends with
    /// that: until then, what the operation does can't be undone for good.
    fn begin_by_others(&self, _operation: &Self::Operation) -> Option<ByOthers> {
        None
    }

    /// Runs several operations in one call, which ends within `timeout`. Returns a result for each in its place.
    fn run_batch(
        &self,
        operations: &[Self::Operation],
        timeout: Duration,
    ) -> impl Future<Output = Result<BatchResults<Self::Output>, NotRun>> + Send;

    /// Returns the number of operations in flight below which there may be more than [`CALLS`] calls. Few calls overlap
    /// at the client, on the way and at the server, which gains more than sharing them does; many cost the client more
    /// than a shared one.
    fn few(&self) -> usize {
        0
    }

    /// Returns the rank of an operation: those of a batch are sorted by it.
    fn rank(operation: &Self::Operation) -> usize;
}

/// The results of a batch. `None` is for an operation that was not run, and must go alone.
pub(super) type BatchResults<T> = Vec<Option<Result<T, Error>>>;

/// Why the server has run no operation of a batch; the last time, if the client has sent it again by itself.
#[derive(Debug)]
pub(super) enum NotRun {
    /// It refused the batch as a whole because of some of its operations.
    Refused,
    /// No server has all of its keys.
    Split,
    /// By its clock the batch came too late. What is known of that clock was wrong, and is right now.
    TooLate,
}

#[derive(Debug)]
pub(super) struct Batcher<E: Executor> {
    shared: Arc<Shared<E>>,
}

#[derive(Debug)]
struct Shared<E: Executor> {
    executor: E,
    lanes: Mutex<Lanes<E>>,
}

impl<E: Executor> Batcher<E> {
    pub(super) fn new(executor: E) -> Self {
        Self { shared: Arc::new(Shared { executor, lanes: Mutex::default() }) }
    }

    pub(super) fn executor(&self) -> &E {
        &self.shared.executor
    }

    /// Runs the operation at the server, alone or in a batch with others of its lane.
    ///
    /// Dropped while the operation waits, it is not sent. Dropped later, the call goes on without the caller.
    pub(super) async fn run(&self, lane: u16, operation: E::Operation, timeout: Duration) -> Result<E::Output, Error> {
        let now = Instant::now();
        let until = now + timeout;
        let no_result = self.shared.executor.begin_waiting(now);
        let (waiter, mut check_at) = match self.shared.enter(lane, operation, now, until)? {
            Entered::First(operation, _call) => return self.shared.executor.run_one(&operation, now, until).await,
            Entered::Waits { waiter, check_at } => (waiter, check_at),
        };
        self.shared.wait(lane, waiter, now, until, &mut check_at).await.unwrap_or_else(|| Err(no_result()))
    }

    /// Runs all of the operations, in as few calls as possible. Returns a result for each in its place.
    ///
    /// Dropped, it does to each of them what dropping [`run`](Self::run) does.
    pub(super) async fn run_all(
        &self,
        lane: u16,
        operations: Vec<E::Operation>,
        timeout: Duration,
    ) -> Vec<Result<E::Output, Error>> {
        let now = Instant::now();
        let until = now + timeout;
        let count = operations.len();
        let no_result = self.shared.executor.begin_waiting(now);
        let (waiters, mut check_at) = match self.shared.enter_all(lane, operations, now, until) {
            Ok(entered) => entered,
            Err(error) => return (0..count).map(|_| Err(error.clone())).collect(),
        };
        let mut results = Vec::with_capacity(count);
        for waiter in waiters {
            // One after the other: the results that come meanwhile stay in their channels, also those that are there
            // when the time is over.
            results.push(self.shared.wait(lane, waiter, Instant::now(), until, &mut check_at).await);
        }
        if results.iter().all(Option::is_some) {
            return results.into_iter().flatten().collect();
        }
        let no_result = no_result();
        results.into_iter().map(|result| result.unwrap_or_else(|| Err(no_result.clone()))).collect()
    }
}

/// Receives the result of an operation that waits.
type Waiter<E> = oneshot::Receiver<Result<<E as Executor>::Output, Error>>;

/// What becomes of an operation when it arrives.
enum Entered<'a, E: Executor> {
    /// Its caller sends it.
    First(E::Operation, Call<'a, E>),
    Waits {
        waiter: Waiter<E>,
        /// When to check whether the calls in flight have stalled (invariant 3).
        check_at: Option<Instant>,
    },
}

impl<E: Executor> Shared<E> {
    fn enter(
        self: &Arc<Self>,
        lane: u16,
        operation: E::Operation,
        now: Instant,
        until: Instant,
    ) -> Result<Entered<'_, E>, Error> {
        // Dropped after the mutex is unlocked, as that wakes callers.
        let mut given_up = Vec::new();
        let mut lanes = self.lanes();
        let mut in_lane = lanes.lane(lane);
        in_lane.forget_stalled(now);
        in_lane.drop_expired(now, &mut given_up);
        if in_lane.queued() == 0 {
            if let Some(number) = in_lane.begin(self.executor.few(), now + TRUSTED) {
                return Ok(Entered::First(operation, Call { shared: self, lane, number }));
            }
        }
        let runtime = self.runtime()?;
        let (result, waiter) = oneshot::channel();
        in_lane.push(Queued { operation, result, until, runtime });
        let check_at = self.drive(lanes, lane, now, None);
        Ok(Entered::Waits { waiter, check_at })
    }

    /// Returns a waiter for each of the operations, and when to check whether the calls in flight have stalled.
    fn enter_all(
        self: &Arc<Self>,
        lane: u16,
        operations: Vec<E::Operation>,
        now: Instant,
        until: Instant,
    ) -> Result<(Vec<Waiter<E>>, Option<Instant>), Error> {
        let runtime = self.runtime()?;
        let calls = operations.len().div_ceil(OPERATIONS).min(CALLS);
        let mut waiters = Vec::with_capacity(operations.len());
        let mut given_up = Vec::new();
        let mut lanes = self.lanes();
        let mut in_lane = lanes.lane(lane);
        in_lane.forget_stalled(now);
        in_lane.drop_expired(now, &mut given_up);
        for operation in operations {
            let (result, waiter) = oneshot::channel();
            in_lane.push(Queued { operation, result, until, runtime: runtime.clone() });
            waiters.push(waiter);
        }
        let mut check_at = self.drive(lanes, lane, now, None);
        for _ in 1..calls {
            check_at = self.drive(self.lanes(), lane, now, None);
        }
        Ok((waiters, check_at))
    }

    /// Waits for the result from `now` until then, and replaces calls that have stalled meanwhile. Returns `None` if
    /// there is no result: the time is over, or the send loop has ended with its runtime.
    async fn wait(
        self: &Arc<Self>,
        lane: u16,
        mut waiter: Waiter<E>,
        now: Instant,
        until: Instant,
        check_at: &mut Option<Instant>,
    ) -> Option<Result<E::Output, Error>> {
        // One call may have stalled while another is trusted for longer than the caller has time. So this checks at
        // least once.
        let half_time = now + until.saturating_duration_since(now) / 2;
        *check_at = check_at.map(|at| at.min(half_time));
        while let Some(at) = check_at.filter(|at| *at < until) {
            match timeout_at(at, &mut waiter).await {
                Ok(result) => return result.ok(),
                Err(_) => *check_at = self.replace_stalled(lane),
            }
        }
        match timeout_at(until, &mut waiter).await {
            Ok(result) => result.ok(),
            // A task that has used up its budget is not told of a result that is there.
            Err(_) => waiter.try_recv().ok(),
        }
    }

    /// Returns a runtime on which a send loop can run.
    fn runtime(&self) -> Result<Handle, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(self.executor.home().unwrap_or(runtime))
    }

    /// Replaces calls that have stalled. Returns when to check again.
    fn replace_stalled(self: &Arc<Self>, lane: u16) -> Option<Instant> {
        let mut given_up = Vec::new();
        let (now, mut lanes) = (Instant::now(), self.lanes());
        let mut in_lane = lanes.lane(lane);
        in_lane.forget_stalled(now);
        in_lane.drop_expired(now, &mut given_up);
        self.drive(lanes, lane, now, None)
    }

    /// Starts a call for what waits, if there is room for one (invariant 2). Returns until when the calls are trusted
    /// that are in flight then, which is when to check them. On the runtime that has `ended`, the call is only started
    /// for an operation that can be sent nowhere else.
    fn drive(
        self: &Arc<Self>,
        mut lanes: MutexGuard<'_, Lanes<E>>,
        lane: u16,
        now: Instant,
        ended: Option<runtime::Id>,
    ) -> Option<Instant> {
        let mut in_lane = lanes.lane(lane);
        let next = in_lane.begin_for_next(self.executor.few(), now + TRUSTED, ended);
        let check_at = in_lane.trusted_until();
        // A runtime that has ended drops the send loop at once, and its destructor takes the mutex.
        drop(lanes);
        self.spawn(lane, next);
        check_at
    }

    fn spawn(self: &Arc<Self>, lane: u16, next: Option<NextCall>) {
        let Some(NextCall { number, runtime }) = next else { return };
        let shared = self.clone();
        let send_loop = SendLoop { shared, lane, number, runtime: runtime.id(), has_begun: false, is_done: false };
        runtime.spawn(send_loop.run());
    }

    /// Nothing panics while it holds this mutex, so a poisoned one is still valid.
    fn lanes(&self) -> MutexGuard<'_, Lanes<E>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The call of an operation that its caller sends. Its end, also by being dropped, starts the next call.
struct Call<'a, E: Executor> {
    shared: &'a Arc<Shared<E>>,
    lane: u16,
    number: u64,
}

impl<E: Executor> Drop for Call<'_, E> {
    fn drop(&mut self) {
        let mut lanes = self.shared.lanes();
        let mut in_lane = lanes.lane(self.lane);
        in_lane.end(self.number);
        if in_lane.queued() > 0 {
            self.shared.drive(lanes, self.lane, Instant::now(), None);
        }
    }
}

/// Sends what waits, call after call, until nothing is left. Nothing else has to end it: each call ends in time.
struct SendLoop<E: Executor> {
    shared: Arc<Shared<E>>,
    lane: u16,
    number: u64,
    /// The runtime that it was spawned on.
    runtime: runtime::Id,
    has_begun: bool,
    is_done: bool,
}

impl<E: Executor> SendLoop<E> {
    async fn run(mut self) {
        loop {
            // The callers that have just got their results are about to ask for more. After one turn of the scheduler
            // their operations are in the next batch.
            if self.shared.lanes().lane(self.lane).queued() < ENOUGH {
                yield_now().await;
            }
            let Some(batch) = self.next() else { break };
            self.send(batch).await;
        }
    }

    /// Takes the next batch. When there is none, the call is over. That is decided under the mutex that took the last
    /// batch, so an operation that arrives a moment later is sent by its own caller.
    fn next(&mut self) -> Option<Vec<Queued<E>>> {
        self.has_begun = true;
        let mut given_up = Vec::new();
        let mut lanes = self.shared.lanes();
        let mut in_lane = lanes.lane(self.lane);
        in_lane.has_begun_on(self.runtime);
        let batch = in_lane.take(self.number, Instant::now(), &mut given_up);
        drop(lanes);
        self.is_done = batch.is_none();
        batch
    }

    async fn send(&self, mut batch: Vec<Queued<E>>) {
        batch.sort_by_key(|queued| E::rank(&queued.operation));
        let mut parts = vec![batch];
        let mut was_late = false;
        while let Some(mut part) = parts.pop() {
            let (now, mut longest) = (Instant::now(), None);
            part.retain(|queued| {
                let left = queued.time_left(now);
                longest = longest.max(left);
                left.is_some()
            });
            // As long as the most patient caller wants: the others stop waiting by themselves.
            let Some(timeout) = longest else { continue };
            if part.len() == 1 {
                self.send_one_by_one(part).await;
                continue;
            }
            let (operations, callers): (Vec<_>, Vec<_>) = part.into_iter().map(Queued::split).unzip();
            let results = self.shared.executor.run_batch(&operations, timeout).await;
            let sent = operations.into_iter().zip(callers).map(Queued::joined);
            match results {
                Ok(results) => {
                    if parts.is_empty() {
                        // Before the callers have them, who may ask for more at once.
                        let few = self.shared.executor.few();
                        self.shared.lanes().lane(self.lane).has_returned(self.number, few);
                    }
                    let mut left_over = Vec::new();
                    for (queued, result) in sent.zip(results) {
                        match result {
                            Some(result) => queued.finish(result),
                            None => left_over.push(queued),
                        }
                    }
                    self.send_one_by_one(left_over).await;
                }
                Err(NotRun::TooLate) if was_late => self.send_one_by_one(sent.collect()).await,
                // Callers may have gone by now, and their attempts have been undone. They are left out.
                Err(NotRun::TooLate) => {
                    was_late = true;
                    parts.push(sent.collect());
                }
                Err(NotRun::Split) => drop(all(sent.map(|queued| self.send_alone(queued))).await),
                Err(NotRun::Refused) => {
                    let mut first: Vec<_> = sent.collect();
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
            }
        }
    }

    async fn send_one_by_one(&self, batch: Vec<Queued<E>>) {
        for queued in batch {
            self.send_alone(queued).await;
        }
    }

    async fn send_alone(&self, queued: Queued<E>) {
        let now = Instant::now();
        if queued.time_left(now).is_some() {
            // Its caller may go, and have undone all that was sent, before this sends it again.
            let _by_others = self.shared.executor.begin_by_others(&queued.operation);
            let result = self.shared.executor.run_one(&queued.operation, now, queued.until).await;
            queued.finish(result);
        }
    }
}

impl<E: Executor> Drop for SendLoop<E> {
    /// Its runtime has ended while it ran, or before. What waits goes on elsewhere, if it can (invariant 7).
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let (now, mut abandoned) = (Instant::now(), Vec::new());
        let mut lanes = self.shared.lanes();
        let mut in_lane = lanes.lane(self.lane);
        in_lane.end(self.number);
        in_lane.drop_expired(now, &mut abandoned);
        // A send loop that has not begun shows that nothing can run on its runtime any longer. The next one may be
        // dropped as it is spawned, within `drive`. This recursion ends: a send loop that is spawned for want of
        // another runtime takes its operations out of the lane here, and one that was spawned on the caller's runtime,
        // which no operation may name, is followed by one that was not.
        let ended = (!self.has_begun).then_some(self.runtime);
        abandoned.extend(ended.into_iter().flat_map(|ended| in_lane.take_all_of(ended)));
        self.shared.drive(lanes, self.lane, now, ended);
        // This wakes the callers, so not under the mutex.
        drop(abandoned);
    }
}
