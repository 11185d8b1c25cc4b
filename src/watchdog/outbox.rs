//! How events get to the callback, and nobody has to wait for it.
//!
//! 1. The callback runs on a thread for blocking work, never on one that renews, and with no lock of ours held.
//! 2. One job at a time calls it. It takes the locks that have events in turn, and all events of one lock together: so
//!    the events of one key come in order, also when it is watched again, and no key has to wait for a busier one.
//! 3. What waits is bounded for each time that a lock is watched ([`WatchEvent::add_to`]). Only the last event of each
//!    can't be merged, as none may be missed.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tracing::error;

use super::events::WatchEvent;

/// What is called with every event.
pub(super) type Callback = Box<dyn Fn(&WatchEvent) + Send + Sync>;

/// Tells apart each time that a lock is watched.
pub(super) type Id = u64;

/// How many events a subscriber may be behind.
pub(super) const SUBSCRIBERS_MAY_LAG: usize = 1_024;

pub(super) struct Outbox {
    callback: Option<Callback>,
    /// Made when somebody first subscribes.
    subscribers: OnceLock<broadcast::Sender<WatchEvent>>,
    queue: Mutex<Queue>,
    /// How many turns have been delivered.
    delivered: watch::Sender<u64>,
}

#[derive(Default)]
struct Queue {
    waiting: HashMap<Id, Vec<WatchEvent>>,
    /// Whose turn it is: each of `waiting` once.
    turns: VecDeque<Id>,
    /// How many turns there have been, those that wait included.
    taken: u64,
    /// A job calls the callback, or is about to.
    delivering: bool,
    /// Where the watchdog was last used from. Not where renewals run, if that is a runtime of their own: what the
    /// callback spawns would run there too.
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

    /// The callback shall run on the runtime of who calls this, if there is one.
    pub(super) fn call_back_here(&self) {
        if let (Some(_), Ok(runtime)) = (&self.callback, Handle::try_current()) {
            let before = self.queue().runtime.replace(runtime);
            drop(before);
        }
    }

    /// Puts an event where it will be told from. The caller sees to the order, and calls [`deliver`](Outbox::deliver)
    /// when it holds no lock any more.
    pub(super) fn put(&self, id: Id, event: WatchEvent) {
        if let Some(subscribers) = self.subscribers.get() {
            // Under the caller's mutex, as the order would be lost otherwise; the wakers of tasks only schedule them.
            // Without any subscriber left it comes back, and is not needed.
            drop(subscribers.send(event.clone()));
        }
        if self.callback.is_none() {
            return;
        }
        let mut queue = self.queue();
        let Queue { waiting, turns, taken, .. } = &mut *queue;
        let events = waiting.entry(id).or_insert_with(|| {
            turns.push_back(id);
            *taken += 1;
            Vec::new()
        });
        event.add_to(events);
    }

    /// Sees to it that a job tells what is there to tell.
    pub(super) fn deliver(self: &Arc<Self>) {
        let runtime = {
            let mut queue = self.queue();
            if queue.delivering || queue.turns.is_empty() {
                return;
            }
            queue.delivering = true;
            queue.runtime.clone()
        };
        let delivery = Delivery { outbox: self.clone(), place: Place::Pool };
        let Some(runtime) = runtime else { return delivery.run_on_a_thread() };
        // Tokio panics where the system has no thread for its pool. The caller, who renews, must not.
        let started = catch_unwind(AssertUnwindSafe(|| drop(runtime.spawn_blocking(|| delivery.run()))));
        if started.is_err() {
            error!(name: "tenure.callback_delayed", "tokio has no thread for blocking work");
        }
    }

    /// Waits until all that is there to tell now has been told.
    pub(super) async fn delivered(&self) {
        let taken = self.queue().taken;
        // It can't be closed, as it is ours.
        drop(self.delivered.subscribe().wait_for(|&delivered| delivered >= taken).await);
    }

    /// The events of the lock whose turn it is. Without any, the job is done.
    fn next(&self) -> Option<Vec<WatchEvent>> {
        let mut queue = self.queue();
        let Some(id) = queue.turns.pop_front() else {
            queue.delivering = false;
            return None;
        };
        Some(queue.waiting.remove(&id).unwrap_or_default())
    }

    fn tell(&self, event: &WatchEvent) {
        let Some(callback) = &self.callback else { return };
        // What it may leave half done is its own: nothing of ours is lent to it but the event.
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| callback(event))) else { return };
        error!(name: "tenure.callback_panicked", key = %event.key(), panic = message(&*panic), "the callback panicked");
        // A value that panics again when it is dropped would end the job.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(again);
        }
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
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

/// The job that calls the callback until nothing is left to tell.
struct Delivery {
    outbox: Arc<Outbox>,
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The blocking threads of a runtime.
    Pool,
    /// A thread of its own: where there is no runtime, or none any more.
    Thread,
    /// It has run.
    Over,
}

impl Delivery {
    fn run(mut self) {
        while let Some(events) = self.outbox.next() {
            events.iter().for_each(|event| self.outbox.tell(event));
            self.outbox.delivered.send_modify(|delivered| *delivered += 1);
        }
        self.place = Place::Over;
    }

    fn run_on_a_thread(mut self) {
        self.place = Place::Thread;
        let started = thread::Builder::new().name("tenure-events".into()).spawn(|| self.run());
        if let Err(error) = started {
            error!(name: "tenure.callback_delayed", %error, "the system has no thread for the callback");
        }
    }
}

impl Drop for Delivery {
    /// A runtime that shuts down drops the jobs that wait for a thread; a loss is to be told all the same.
    fn drop(&mut self) {
        match self.place {
            Place::Pool => Self { outbox: self.outbox.clone(), place: Place::Pool }.run_on_a_thread(),
            // The next event tries again.
            Place::Thread => self.outbox.queue().delivering = false,
            Place::Over => {}
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
        // The only thread for blocking work is taken.
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
        assert!(outbox.queue().waiting.is_empty());
    }
}
