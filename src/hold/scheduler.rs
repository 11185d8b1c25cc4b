//! Keeps renewers at rest until they are due, and runs them then.
//!
//! Most locks are released long before their first renewal, and the others rest between renewals. A task with a timer
//! for each lock would cost more than everything else the client does for it. So a resting renewer is only an entry
//! here. There is one scheduler for each runtime; its task sleeps until the first entry is due and starts a task for
//! it. Renewals that are due together are sent as one [`Batch`], whose renewers don't run at all.
//!
//! 1. An entry rests, or its renewal is in a batch, or it runs. The mutex of the scheduler guards this phase. The task
//!    that has taken the entry by a change of its phase decides what comes next.
//! 2. A renewer that is called while it runs looks again before it rests. One that is called while its renewal is in a
//!    batch runs at once, and the batch no longer concerns it: a batch that hangs holds up no release.
//! 3. A scheduler ends with its runtime, and when its task finds no entry after [`LINGER`]. It accepts no entry from
//!    then on. Entries that are left are dropped like the tasks of a runtime that ends; an entry that is dropped
//!    reports the loss of its lock.
//! 4. No entry is dropped under the mutex, and no renewer woken: dropping an entry ends its hold, which runs wakers of
//!    users. Lock order: the list of schedulers, the state of one of them, the state of a hold.

#[cfg(all(test, shuttle))]
mod interleaved;
mod state;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, PoisonError};
use std::task::Waker;
use std::time::Duration;

use tokio::runtime::{self, Handle as Runtime};
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use self::state::{Due, EntryId, Rest, State};
use super::renewer::{AfterBatch, DueRenewal, Renewer, send_together};
use crate::Error;
use crate::sync::{Mutex, MutexGuard};

/// How long the task sleeps at most before it looks whether an entry is left. If it ended with the last entry, a
/// program that takes one lock after another would start a task for each, which cost more than everything else for a
/// lock held for a millisecond (`benches/versus`).
const LINGER: Duration = Duration::from_millis(500);

/// How many renewals are started at a time: as many as fit in three calls of the batcher. The next ones follow after
/// [`PAUSE`].
///
/// Locks that were obtained together are due together. If their renewals were all started at once, the memory in use
/// would grow to many times that of locks at rest: `benches/watch` shows it as bytes per lock.
const AT_A_TIME: usize = 288;

/// The time between two groups of [`AT_A_TIME`] renewals. Their calls take longer than this, so the pause delays
/// nothing that would not have to wait anyway: `benches/watch` counts late renewals.
const PAUSE: Duration = Duration::from_millis(1);

/// The schedulers of one locker: one for each runtime that it is used on.
pub(crate) struct Schedulers(Mutex<Vec<(runtime::Id, Arc<Scheduler>)>>);

/// The scheduler of one runtime.
struct Scheduler {
    state: Mutex<State>,
    /// Wakes the task, which then looks at the state again.
    changed: Notify,
}

/// What a guard and a running renewer have of an entry.
pub(crate) struct Handle {
    scheduler: Arc<Scheduler>,
    id: EntryId,
}

impl Schedulers {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Adds a renewer that has nothing to do until `due`. If the runtime has ended, the renewer is dropped.
    pub(crate) fn add(&self, renewer: Renewer, due: Instant, runtime: &Runtime) -> Handle {
        // Held until a new scheduler is in the list, so that no runtime gets two.
        let mut schedulers = self.schedulers();
        // There are few. One that has ended may have belonged to an earlier runtime with the same id.
        for (_, scheduler) in schedulers.iter().filter(|(id, _)| *id == runtime.id()) {
            let mut state = scheduler.state();
            if !state.over {
                let id = state.add(renewer, due);
                scheduler.wake_by(due, state);
                return Handle { scheduler: scheduler.clone(), id };
            }
        }
        let mut state = State::default();
        let id = state.add(renewer, due);
        let scheduler = Arc::new(Scheduler { state: Mutex::new(state), changed: Notify::new() });
        schedulers.retain(|(_, scheduler)| !scheduler.state().over);
        schedulers.push((runtime.id(), scheduler.clone()));
        drop(schedulers);
        // After the entry: a runtime that has ended drops the task at once, and that drops the entry.
        runtime.spawn(Scheduler::run(EndOnDrop(scheduler.clone())));
        Handle { scheduler, id }
    }

    fn schedulers(&self) -> MutexGuard<'_, Vec<(runtime::Id, Arc<Scheduler>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Schedulers {
    fn drop(&mut self) {
        for (_, scheduler) in &*self.schedulers() {
            scheduler.state().over = true;
            scheduler.changed.notify_one();
        }
    }
}

impl Handle {
    /// Runs the renewer now; if it runs already, interrupts it. Works on any thread, and starts no task itself.
    pub(crate) fn call(&self) {
        let mut state = self.scheduler.state();
        if state.over {
            // Its task is gone, and would start nothing (invariant 3).
            drop(state);
            return self.remove();
        }
        if state.call(self.id) {
            drop(state);
            self.scheduler.changed.notify_one();
        } else {
            wake(state.interrupt(self.id), state);
        }
    }

    /// Has the renewer look again at what there is to do, if it runs. One that rests is left alone.
    pub(crate) fn interrupt(&self) {
        let mut state = self.scheduler.state();
        wake(state.interrupt(self.id), state);
    }

    /// Drops a renewer that has nothing left to do. If it runs, it is interrupted, and finds that by itself.
    pub(crate) fn remove(&self) {
        let mut state = self.scheduler.state();
        match state.remove(self.id) {
            None => wake(state.interrupt(self.id), state),
            removed => drop((state, removed)),
        }
    }

    /// Waits until the renewer is called while it runs. For the task that runs it.
    pub(super) async fn called(&self) {
        poll_fn(|cx| self.scheduler.state().poll_called(self.id, cx.waker())).await;
    }
}

/// Unlocks the state, and then wakes the task (invariant 4).
fn wake(waker: Option<Waker>, state: MutexGuard<'_, State>) {
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl Scheduler {
    /// The scheduler's task.
    async fn run(ends: EndOnDrop) {
        let scheduler = &ends.0;
        let mut is_called = true;
        while let Some((Due { runs, batch }, wakes_at)) = scheduler.take_due(is_called) {
            let is_full = runs.len() + batch.len() == AT_A_TIME;
            for (id, renewer) in runs {
                Run::new(scheduler, id).spawn(renewer, None);
            }
            if !batch.is_empty() {
                // In a task of its own, as it may hang.
                let (members, renewals) = batch.into_iter().unzip();
                tokio::spawn(Batch { scheduler: scheduler.clone(), members }.run(renewals));
            }
            if is_full {
                sleep(PAUSE).await;
                continue;
            }
            // In any order, as the task looks at the whole state after either.
            select! {
                () = scheduler.changed.notified() => is_called = true,
                () = sleep_until(wakes_at) => is_called = false,
            }
        }
    }

    /// Takes what is due, and returns it along with the time when the task wakes up by itself. Returns `None` when the
    /// scheduler ends: no entry is left, and none has come since the task last went to sleep (invariant 3).
    fn take_due(&self, is_called: bool) -> Option<(Due, Instant)> {
        let (mut state, now) = (self.state(), Instant::now());
        if state.is_empty() && (state.over || !is_called) {
            state.over = true;
            return None;
        }
        let due = state.take_due(now, AT_A_TIME);
        let wakes_at = state.first_due().map_or(now + LINGER, |first| first.min(now + LINGER));
        state.wakes_at = Some(wakes_at);
        Some((due, wakes_at))
    }

    /// Makes sure that the task looks at the state at `due` or earlier.
    fn wake_by(&self, due: Instant, state: MutexGuard<'_, State>) {
        let is_sooner = state.wakes_at.is_none_or(|wakes_at| due < wakes_at);
        drop(state);
        if is_sooner {
            self.changed.notify_one();
        }
    }

    /// No code panics while it holds this mutex, so the state is sound even if the mutex is poisoned.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the scheduler with its task: after [`Scheduler::run`], or when the runtime drops it.
struct EndOnDrop(Arc<Scheduler>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // Two statements: the entries are dropped outside the mutex (invariant 4).
        let ended = self.0.state().end_all();
        drop(ended);
    }
}

/// An entry that runs. It ends with this, unless it rests by then.
struct Run {
    handle: Handle,
    rests: bool,
}

impl Run {
    fn new(scheduler: &Arc<Scheduler>, id: EntryId) -> Self {
        Self { handle: Handle { scheduler: scheduler.clone(), id }, rests: false }
    }

    /// Runs the renewer in a task of its own; `failure` is that of its renewal in a batch.
    fn spawn(self, renewer: Renewer, failure: Option<Error>) {
        tokio::spawn(self.run(renewer, failure));
    }

    async fn run(mut self, renewer: Renewer, mut failure: Option<Error>) {
        while let Some(due) = renewer.run(&self.handle, failure.take()).await {
            let scheduler = &self.handle.scheduler;
            let mut state = scheduler.state();
            match state.rest(self.handle.id, due) {
                Rest::LookAgain => {}
                Rest::Over => return,
                Rest::Done => {
                    self.rests = true;
                    return scheduler.wake_by(due, state);
                }
            }
        }
    }
}

impl Drop for Run {
    /// Also runs after a panic, and when a runtime that ends drops the task.
    fn drop(&mut self) {
        if !self.rests {
            // Two statements: the entry is dropped outside the mutex (invariant 4).
            let ended = self.handle.scheduler.state().end(self.handle.id);
            drop(ended);
        }
    }
}

/// The task that sends renewals together. The renewers don't run, unless they are called.
struct Batch {
    scheduler: Arc<Scheduler>,
    members: Vec<EntryId>,
}

impl Batch {
    async fn run(mut self, renewals: Vec<DueRenewal>) {
        let replies = send_together(&renewals).await;
        let members = self.take_back();
        let mut rests = Vec::with_capacity(renewals.len());
        for ((renewal, member), reply) in renewals.into_iter().zip(members).zip(replies) {
            // One that was called no longer is a member, and its renewer is running.
            let Some(run) = member else { continue };
            match renewal.conclude(reply) {
                AfterBatch::Rest(due) => rests.push((run, due, renewal.renewer)),
                AfterBatch::Run(failure) => run.spawn(renewal.renewer, failure),
            }
        }
        self.rest(rests);
    }

    /// Takes the entries that are still in the batch. The others were called (invariant 2).
    fn take_back(&mut self) -> Vec<Option<Run>> {
        let mut state = self.scheduler.state();
        let take = |id| state.take_from_batch(id).then(|| Run::new(&self.scheduler, id));
        self.members.drain(..).map(take).collect()
    }

    /// Has entries rest, all under one lock.
    fn rest(&self, mut rests: Vec<(Run, Instant, Renewer)>) {
        let Some(first_due) = rests.iter().map(|(_, due, _)| *due).min() else { return };
        let mut state = self.scheduler.state();
        rests.retain_mut(|(run, due, _)| {
            run.rests = state.rest(run.handle.id, *due) == Rest::Done;
            !run.rests
        });
        self.scheduler.wake_by(first_due, state);
        // The others were called in the meantime. If the scheduler has ended, so has the runtime, and drops the tasks.
        for (run, _, renewer) in rests {
            run.spawn(renewer, None);
        }
    }
}

impl Drop for Batch {
    /// Ends the entries that are still in the batch, if a runtime that ends drops the task.
    fn drop(&mut self) {
        self.take_back();
    }
}

impl fmt::Debug for Schedulers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schedulers").field("runtimes", &self.schedulers().len()).finish()
    }
}
