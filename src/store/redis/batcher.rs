//! Many operations, one round trip.
//!
//! A client pays for each command it sends, and a server for each script it runs. So an operation that finds few calls
//! on their way is sent at once, by its own caller; what arrives meanwhile waits, and goes together in the next call.
//! Tasks that do one operation after the other fall into step by that: answered together, they ask for the next
//! together. And what is asked for together from the start waits as one, and goes in as few calls as it takes.
//!
//! 1. No more than [`CALLS`] are on their way on one line, and no more than [`OPERATIONS`] in each.
//! 2. While operations wait, a call is on its way: its end starts the next one.
//! 3. That end must be noticed. A call counts for [`TRUSTED`] at most while it depends on a task that may not be
//!    polled: its caller's, or that of a driver which has not begun. And none counts for longer than its operations
//!    have time.
//! 4. Each operation ends within its own timeout. One whose caller is gone before it was sent is not sent.
//! 5. Those that run out of time first go first.
//! 6. A failure is told to the operation that it is about. A call that is refused as such is halved until that is
//!    clear.
//! 7. A runtime that ends takes along what was on it, and no more.

mod lines;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{self, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use self::lines::{Asked, Brought, Lines, NextCall, Placed, Waiting};
use crate::Error;

/// On their way at a time. With one, client and server would wait for each other in turns; with more, the calls get
/// smaller and dearer.
const CALLS: usize = 2;
/// In one call. Larger ones gain nothing more: what is waited for comes later, and all at once, so that server and
/// client work less at the same time. And they keep the server from its other clients for longer.
pub(super) const OPERATIONS: usize = 96;
/// With fewer than these a call is worth a moment's wait for more.
const ENOUGH: usize = OPERATIONS / 2;
/// A future that was polled once and is put aside holds its call for ever; a worker thread that blocks holds the driver
/// that it was about to poll. Others wait for them no longer than this: more than most calls take, little for a
/// timeout.
const TRUSTED: Duration = Duration::from_millis(50);

/// What brings operations to the server.
pub(super) trait Carrier: fmt::Debug + Send + Sync + 'static {
    type Operation: Send + Sync;
    type Answer: Send;

    /// The runtime without which it can bring nothing, as of now; drivers run there. Where there is none, they run on
    /// those of the operations that wait.
    fn home(&self) -> Option<Handle> {
        None
    }

    /// Called when an operation begins to wait; what it returns says in the end what is known of one that had no
    /// answer.
    fn waits(&self, _now: Instant) -> impl FnOnce() -> Error + Send {
        Error::timeout
    }

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
    ) -> impl Future<Output = Result<Answers<Self::Answer>, Refused>> + Send;

    /// The operations of a call are brought in the order of their ranks.
    fn rank(operation: &Self::Operation) -> usize;
}

pub(super) type Answers<A> = Vec<Option<Result<A, Error>>>;

/// A call was refused as such, and nothing was done, because of some of its operations.
#[derive(Debug)]
pub(super) struct Refused;

#[derive(Debug)]
pub(super) struct Batcher<C: Carrier> {
    shared: Arc<Shared<C>>,
}

#[derive(Debug)]
struct Shared<C: Carrier> {
    carrier: C,
    lines: Mutex<Lines<C>>,
}

impl<C: Carrier> Batcher<C> {
    pub(super) fn new(carrier: C) -> Self {
        Self { shared: Arc::new(Shared { carrier, lines: Mutex::default() }) }
    }

    pub(super) fn carrier(&self) -> &C {
        &self.shared.carrier
    }

    /// Brings the operation to the server, alone or with others of its line.
    ///
    /// Dropped while it waits, it is not sent; later, its call goes on without it.
    pub(super) async fn run(&self, line: u16, operation: C::Operation, timeout: Duration) -> Result<C::Answer, Error> {
        let now = Instant::now();
        let until = now + timeout;
        // Nobody knows how far those came that are not answered: out of time, or their driver has come to its end.
        let unanswered = self.shared.carrier.waits(now);
        let (mut answer, mut relief) = match self.shared.enter(line, operation, now, until)? {
            Entered::First(operation, _call) => return self.shared.carrier.one(&operation, timeout).await,
            Entered::Waits { answer, relief } => (answer, relief),
        };
        while let Some(at) = relief.filter(|at| *at < until) {
            match timeout_at(at, &mut answer).await {
                Ok(answer) => return answer.unwrap_or_else(|_| Err(unanswered())),
                Err(_) => relief = self.shared.relieve(line),
            }
        }
        match timeout_at(until, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(unanswered()),
        }
    }

    /// Brings all of them, in as many calls as it takes. Answers for each in its place.
    ///
    /// Dropped, it is to each of them as if its own call of [`run`](Self::run) were.
    pub(super) async fn run_all(
        &self,
        line: u16,
        operations: Vec<C::Operation>,
        timeout: Duration,
    ) -> Vec<Result<C::Answer, Error>> {
        let now = Instant::now();
        let until = now + timeout;
        let count = operations.len();
        let mut answers: Vec<_> = (0..count).map(|_| None).collect();
        let unanswered = self.shared.carrier.waits(now);
        let (mut told, mut relief) = match self.shared.enter_all(line, operations, now, until) {
            Ok(entered) => entered,
            Err(error) => return (0..count).map(|_| Err(error.clone())).collect(),
        };
        let mut news = Vec::with_capacity(count.min(OPERATIONS));
        loop {
            let look_after = relief.filter(|at| *at < until);
            match timeout_at(look_after.unwrap_or(until), told.recv_many(&mut news, OPERATIONS)).await {
                // Nobody is left who might answer.
                Ok(0) => break,
                Ok(_) => {
                    for (place, answer) in news.drain(..) {
                        if let Some(place) = answers.get_mut(place) {
                            *place = Some(answer);
                        }
                    }
                }
                Err(_) if look_after.is_none() => break,
                Err(_) => relief = self.shared.relieve(line),
            }
        }
        if answers.iter().all(Option::is_some) {
            return answers.into_iter().flatten().collect();
        }
        let unanswered = unanswered();
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(unanswered.clone()))).collect()
    }
}

/// Where the answers come from to those that were asked for together.
type News<A> = mpsc::Receiver<Placed<A>>;

enum Entered<'a, C: Carrier> {
    First(C::Operation, Call<'a, C>),
    Waits {
        answer: oneshot::Receiver<Result<C::Answer, Error>>,
        /// When to look after the calls that are on their way, should they not have gone on by then (invariant 3).
        relief: Option<Instant>,
    },
}

impl<C: Carrier> Shared<C> {
    fn enter(
        self: &Arc<Self>,
        line: u16,
        operation: C::Operation,
        now: Instant,
        until: Instant,
    ) -> Result<Entered<'_, C>, Error> {
        let mut lines = self.lines();
        let mut on = lines.on(line);
        on.forget_stalled(now);
        if on.waiting() == 0 {
            if let Some(number) = on.begin(now + TRUSTED) {
                return Ok(Entered::First(operation, Call { shared: self, line, number }));
            }
        }
        let runtime = self.runtime()?;
        let (answer, receiver) = oneshot::channel();
        on.wait(Waiting { until, asked: Asked::One(operation, answer), runtime });
        let next = on.begin_for_next(now + TRUSTED);
        let relief = on.relief();
        drop(lines);
        self.spawn(line, next);
        Ok(Entered::Waits { answer: receiver, relief })
    }

    /// Answers as [`drive`](Self::drive) does, and where the answers will come from, each with its place.
    fn enter_all(
        self: &Arc<Self>,
        line: u16,
        operations: Vec<C::Operation>,
        now: Instant,
        until: Instant,
    ) -> Result<(News<C::Answer>, Option<Instant>), Error> {
        let runtime = self.runtime()?;
        let calls = operations.len().div_ceil(OPERATIONS).min(CALLS);
        // Each is answered once, so there is always room.
        let (told, receiver) = mpsc::channel(operations.len().max(1));
        let mut lines = self.lines();
        let mut on = lines.on(line);
        on.forget_stalled(now);
        on.wait(Waiting { until, asked: Asked::Many(operations.into_iter().enumerate(), told), runtime });
        let mut relief = self.drive(lines, line, now);
        for _ in 1..calls {
            relief = self.drive(self.lines(), line, now);
        }
        Ok((receiver, relief))
    }

    /// Where a driver can run.
    fn runtime(&self) -> Result<Handle, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(self.carrier.home().unwrap_or(runtime))
    }

    /// Replaces calls that are not trusted any more. Answers when to look again.
    fn relieve(self: &Arc<Self>, line: u16) -> Option<Instant> {
        let (now, mut lines) = (Instant::now(), self.lines());
        lines.on(line).forget_stalled(now);
        self.drive(lines, line, now)
    }

    /// Starts a call for what waits, if there is room for one (invariant 2). Answers how long those are trusted that
    /// are on their way then: when to look again.
    fn drive(self: &Arc<Self>, mut lines: MutexGuard<'_, Lines<C>>, line: u16, now: Instant) -> Option<Instant> {
        let mut on = lines.on(line);
        let next = on.begin_for_next(now + TRUSTED);
        let relief = on.relief();
        drop(lines);
        self.spawn(line, next);
        relief
    }

    /// On a runtime that has ended, the driver is dropped at once, and needs the mutex: not under that.
    fn spawn(self: &Arc<Self>, line: u16, next: Option<NextCall>) {
        let Some(NextCall { number, runtime }) = next else { return };
        let shared = self.clone();
        let driver = Driver { shared, line, number, runtime: runtime.id(), has_begun: false, is_done: false };
        runtime.spawn(driver.run());
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn lines(&self) -> MutexGuard<'_, Lines<C>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The call of an operation that goes alone. Its end, also by being dropped, starts the next call.
struct Call<'a, C: Carrier> {
    shared: &'a Arc<Shared<C>>,
    line: u16,
    number: u64,
}

impl<C: Carrier> Drop for Call<'_, C> {
    fn drop(&mut self) {
        let mut lines = self.shared.lines();
        lines.on(self.line).end(self.number);
        self.shared.drive(lines, self.line, Instant::now());
    }
}

/// Sends what waits, call after call, until nothing does. No one else has to end it: each call ends in time.
struct Driver<C: Carrier> {
    shared: Arc<Shared<C>>,
    line: u16,
    number: u64,
    /// Where it was spawned.
    runtime: runtime::Id,
    has_begun: bool,
    is_done: bool,
}

impl<C: Carrier> Driver<C> {
    async fn run(mut self) {
        loop {
            // Those that were just answered are about to ask for more: a turn of the scheduler, and they come along.
            if self.shared.lines().on(self.line).waiting() < ENOUGH {
                yield_now().await;
            }
            let Some(batch) = self.next() else { break };
            self.bring(batch).await;
        }
    }

    /// The next to be sent. When there are none, the call is over: said under the same mutex, so that who comes a
    /// moment later sends by itself.
    fn next(&mut self) -> Option<Vec<Brought<C>>> {
        self.has_begun = true;
        let mut given_up = Vec::new();
        let batch = self.shared.lines().on(self.line).take(self.number, Instant::now(), &mut given_up);
        self.is_done = batch.is_none();
        batch
    }

    async fn bring(&self, mut batch: Vec<Brought<C>>) {
        batch.sort_by_key(|brought| C::rank(&brought.operation));
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            let now = Instant::now();
            part.retain(|brought| brought.caller.patience(now).is_some());
            // As long as the most patient of them wants: the others stop waiting by themselves.
            let Some(patience) = part.iter().filter_map(|brought| brought.caller.patience(now)).max() else { continue };
            if part.len() == 1 {
                self.bring_alone(part).await;
                continue;
            }
            let (operations, callers): (Vec<_>, Vec<_>) = part.into_iter().map(|b| (b.operation, b.caller)).unzip();
            let answers = self.shared.carrier.many(&operations, patience).await;
            let asked = operations.into_iter().zip(callers).map(|(operation, caller)| Brought { operation, caller });
            match answers {
                Ok(answers) => {
                    let mut left_over = Vec::new();
                    for (brought, answer) in asked.zip(answers) {
                        match answer {
                            Some(answer) => brought.caller.tell(answer),
                            None => left_over.push(brought),
                        }
                    }
                    self.bring_alone(left_over).await;
                }
                Err(Refused) => {
                    let mut first: Vec<_> = asked.collect();
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
            }
        }
    }

    async fn bring_alone(&self, operations: Vec<Brought<C>>) {
        for Brought { operation, caller } in operations {
            if let Some(patience) = caller.patience(Instant::now()) {
                caller.tell(self.shared.carrier.one(&operation, patience).await);
            }
        }
    }
}

impl<C: Carrier> Drop for Driver<C> {
    /// Its runtime has ended under it, or before it. What waits goes on elsewhere, if it can (invariant 7).
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let mut lines = self.shared.lines();
        lines.on(self.line).end(self.number);
        // Not begun: nothing can be done there any more. This ends, as every driver takes something out.
        let abandoned = match self.has_begun {
            true => Vec::new(),
            false => lines.on(self.line).take_all_of(self.runtime),
        };
        self.shared.drive(lines, self.line, Instant::now());
        // This wakes the callers: not under the mutex.
        drop(abandoned);
    }
}
