//! Delivers events to the callback and to subscribers, without making anybody wait for the callback.
//!
//! 1. The callback runs on a thread for blocking work, never on one that renews, and with no mutex of this crate held.
//! 2. One job at a time calls it. The job takes the locks that have events in turn, and all events of one lock
//!    together. So the events of one key come in order, even if it is watched again, and no key waits for a busier one.
//! 3. Each time that a lock is watched, the number of its waiting events is bounded ([`WatchEvent::add_to`]). Last
//!    events are never merged, as none may be missed.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};

use super::events::WatchEvent;
use crate::report::error;

/// The function that is called with every event.
pub(super) type Callback = Box<dyn Fn(&WatchEvent) + Send + Sync>;

/// Identifies one time that a lock is watched.
pub(super) type Id = u64;

/// How many events a subscriber may be behind.
pub(super) const SUBSCRIBERS_MAY_LAG: usize = 1_024;

pub(super) struct Outbox {
    callback: Option<Callback>,
    /// Made on the first subscription.
    subscribers: OnceLock<broadcast::Sender<WatchEvent>>,
    queue: Mutex<Queue>,
    /// How many batches have been delivered.
    delivered: watch::Sender<u64>,
}

#[derive(Default)]
struct Queue {
    /// The batch of waiting events of each lock.
    batches: HashMap<Id, Vec<WatchEvent>>,
    /// The keys of `batches`, each once, in order of delivery.
    order: VecDeque<Id>,
    /// How many batches there have been, including those that wait.
    begun: u64,
    /// A job calls the callback, or is about to.
    delivering: bool,
    /// The runtime that the watchdog was last used on. It need not be the one that renews: if that is a runtime of
    /// this crate's own, tasks that the callback spawns must not run there.
    runtime: Option<Handle>,
}

impl Outbox {
    pub(super) fn new(callback: Option<Callback>) -> Self {
        let (subscribers, queue) = (OnceLock::new(), Mutex::default());
        Self { callback, subscribers, queue, delivered: watch::Sender::new(0) }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<WatchEvent> {
        self.subscribers.get_or_init(|| broadcast::Sender::new(SUBSCRIBERS_MAY_LAG)).subscribe()
    }

    /// From now on, runs the callback on the caller's runtime, if there is one.
    pub(super) fn call_back_here(&self) {
        if let (Some(_), Ok(runtime)) = (&self.callback, Handle::try_current()) {
            let before = self.queue().runtime.replace(runtime);
            drop(before);
        }
    }

    /// Adds an event. Events are delivered in the order of these calls. The caller holds the registry's mutex to keep
    /// that order, and calls [`deliver`](Outbox::deliver) once it is unlocked.
    pub(super) fn put(&self, id: Id, event: WatchEvent) {
        if let Some(subscribers) = self.subscribers.get() {
            // This wakes tasks under the caller's mutex, which it has to, for the order. Their wakers only schedule
            // them. Without any subscriber left, send() returns the event, which nobody needs.
            drop(subscribers.send(event.clone()));
        }
        if self.callback.is_none() {
            return;
        }
        let mut queue = self.queue();
        let Queue { batches, order, begun, .. } = &mut *queue;
        let events = batches.entry(id).or_insert_with(|| {
            order.push_back(id);
            *begun += 1;
            Vec::new()
        });
        event.add_to(events);
    }

    /// Starts a job that delivers the waiting events, unless one is running.
    pub(super) fn deliver(self: &Arc<Self>) {
        let runtime = {
            let mut queue = self.queue();
            if queue.delivering || queue.order.is_empty() {
                return;
            }
            queue.delivering = true;
            queue.runtime.clone()
        };
        let delivery = Delivery { outbox: self.clone(), stage: Stage::OnPool };
        let Some(runtime) = runtime else { return delivery.run_on_a_thread() };
        // Tokio panics if the system has no thread for its pool. The caller may be a renewer, and must not panic.
        let started = catch_unwind(AssertUnwindSafe(|| drop(runtime.spawn_blocking(|| delivery.run()))));
        if started.is_err() {
            error!(name: "tenure.callback_delayed", "tokio has no thread for blocking work");
        }
    }

    /// Waits until every event that has been added so far is delivered.
    pub(super) async fn delivered(&self) {
        let begun = self.queue().begun;
        // The channel can't be closed, as `self` owns the sender.
        drop(self.delivered.subscribe().wait_for(|&delivered| delivered >= begun).await);
    }

    /// Returns the next batch. `None` ends the job: the next event starts another.
    fn next(&self) -> Option<Vec<WatchEvent>> {
        let mut queue = self.queue();
        let Some(id) = queue.order.pop_front() else {
            queue.delivering = false;
            return None;
        };
        Some(queue.batches.remove(&id).unwrap_or_default())
    }

    fn call(&self, event: &WatchEvent) {
        let Some(callback) = &self.callback else { return };
        // Unwind safe: the callback borrows nothing of this crate's but the event, which is read-only.
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| callback(event))) else { return };
        error!(name: "tenure.callback_panicked", key = %event.key(), panic = message(&*panic), "the callback panicked");
        // The panic's value may panic again when it is dropped, and that would end the job.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(again);
        }
    }

    /// No code panics while it holds this mutex, so the data of a poisoned one is intact.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a value that is no text")
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").field("callback", &self.callback.is_some()).finish_non_exhaustive()
    }
}

/// The job that calls the callback until no event waits.
struct Delivery {
    outbox: Arc<Outbox>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for, or runs on, a blocking thread of a runtime.
    OnPool,
    /// Runs on a thread of its own, as there is no runtime, or it has shut down.
    OnThread,
    /// Has delivered everything.
    Done,
}

impl Delivery {
    fn run(mut self) {
        while let Some(events) = self.outbox.next() {
            events.iter().for_each(|event| self.outbox.call(event));
            self.outbox.delivered.send_modify(|delivered| *delivered += 1);
        }
        self.stage = Stage::Done;
    }

    fn run_on_a_thread(mut self) {
        self.stage = Stage::OnThread;
        let started = thread::Builder::new().name("tenure-events".into()).spawn(|| self.run());
        if let Err(error) = started {
            error!(name: "tenure.callback_delayed", %error, "the system has no thread for the callback");
        }
    }
}

impl Drop for Delivery {
    /// A runtime that shuts down drops the jobs that wait for a thread. The events have to be delivered all the same.
    fn drop(&mut self) {
        match self.stage {
            Stage::OnPool => Self { outbox: self.outbox.clone(), stage: Stage::OnPool }.run_on_a_thread(),
            // The system has no thread. The next event tries again.
            Stage::OnThread => self.outbox.queue().delivering = false,
            Stage::Done => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::{Key, Loss};

    fn lost(key: impl Into<Key>) -> WatchEvent {
        WatchEvent::Lost { key: key.into(), loss: Loss::Expired, cause: None }
    }

    fn outbox() -> (Arc<Outbox>, mpsc::Receiver<String>) {
        let (sender, receiver) = mpsc::channel();
        let callback = move |event: &WatchEvent| sender.send(event.key().to_string()).unwrap();
        (Arc::new(Outbox::new(Some(Box::new(callback)))), receiver)
    }

    #[test]
    fn without_a_runtime_a_thread_of_its_own_tells() {
        let (outbox, told) = outbox();
        for n in 0..100 {
            outbox.put(n, lost(n.to_string()));
            outbox.deliver();
        }
        let told: Vec<_> = told.iter().take(100).collect();
        assert!(told.iter().map(|key| key.parse::<u32>().unwrap()).eq(0..100), "{told:?}");
    }

    #[test]
    fn a_runtime_that_shuts_down_before_its_job_has_run_loses_no_event() {
        let (outbox, told) = outbox();
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let (release, blocked) = mpsc::channel::<()>();
        // The only thread for blocking work is busy.
        drop(runtime.spawn_blocking(move || blocked.recv()));
        {
            let _context = runtime.enter();
            outbox.call_back_here();
            outbox.put(1, lost("k"));
            outbox.deliver();
        }
        assert!(told.try_recv().is_err());
        runtime.shutdown_background();
        drop(release);
        assert_eq!(told.recv_timeout(std::time::Duration::from_secs(20)).unwrap(), "k");
    }

    #[test]
    fn without_a_callback_nothing_is_kept() {
        let outbox = Outbox::new(None);
        outbox.put(1, lost("k"));
        assert!(outbox.queue().batches.is_empty());
    }
}
