//! Receives the notifications of released locks over pub/sub, for all waiters of the store.
//!
//! Every release publishes a message on the channel of the key. The channel has the key's name, or the name that
//! `names.rs` gives to a key that is no text. Waiters subscribe to it on one connection of the store, which is opened
//! for the first waiter and closed when there have been none for a while. On a cluster the channels are sharded, as
//! other messages go to every node.
//!
//! 1. A channel counts as open once the server has confirmed the subscription. A waiter checks the lock after that.
//! 2. Whenever messages may have been missed (a new connection, a full buffer), all waiters are notified and check.
//! 3. If the server refuses subscriptions (no permission, an old cluster), the channels are refused, and waiters poll.
//!    The subscriber tries again as long as anybody waits.
//! 4. One task serves all waiters. It lives where the connection of the store lives ([`PubSub::runtime`]), or, if the
//!    client is the caller's, on the runtime of a waiter. Its own connection lives with it.
//! 5. Waiters make sure that it runs, every [`CHECK_EVERY`]. If its runtime has ended, or has run nothing for
//!    [`STALLED`], it starts again on one that runs. Only the last start counts: an earlier task that wakes up later
//!    changes no channel.
//! 6. A connection that breaks is replaced, and so is one that is silent: while there are subscriptions, the server
//!    gets a command every [`PING_EVERY`], however many messages come. Without a reply for [`DOUBT`] no channel counts
//!    as open and all waiters check. Without one for [`TIMEOUT`] the connection is replaced. So a silent connection is
//!    doubted within 1.5 s, and replaced within 3 s.
//! 7. When the store has replaced its connection, this one is replaced as well, within [`PING_EVERY`]: after a
//!    failover, the address may lead to another server, and this connection to one that publishes nothing any longer.
//! 8. The connection is closed [`LINGER`] after the last subscription has gone, or up to [`PING_EVERY`] later, whatever
//!    messages come. If its runtime stands still, it is closed when that runtime runs again, or ends.

mod session;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::driver::{Connection, Listener, PubSub, SUBSCRIBING as TIMEOUT};
use super::names;
use crate::report::{debug, warn};
use crate::store::notifications::{CHECK_EVERY, ChannelState, Feed, Subscription, Subscriptions};

/// How long the connection is kept without subscriptions, and how long after a refusal the subscriber tries again.
const LINGER: Duration = Duration::from_secs(5);
/// How long it may take before messages may have been missed.
const DOUBT: Duration = Duration::from_millis(500);
/// How often the server gets a command that shows whether the connection is alive.
const PING_EVERY: Duration = Duration::from_secs(1);
/// The pause after a failure: the first, and the longest.
const RETRY: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(500)];
/// A runtime that has run nothing for this long stands still.
const STALLED: Duration = Duration::from_secs(1);

pub(super) struct Subscriber(Arc<Shared>);

struct Shared {
    subscriptions: Subscriptions,
    pub_sub: Arc<dyn PubSub>,
    /// Returns how many connections the store has made.
    made: Box<dyn Fn() -> u64 + Send + Sync>,
    /// The prefix of this process's places in lines: messages with other places are for other processes.
    process: String,
    /// Lock order: before the mutex of the subscriptions, and before that of the connection's driver.
    running: Mutex<Running>,
}

/// The task that runs.
#[derive(Default)]
struct Running {
    /// How often the task was started.
    starts: u64,
    task: Option<Started>,
    /// The store was dropped.
    is_closed: bool,
}

struct Started {
    handle: AbortOnDropHandle<()>,
    runtime: Handle,
    /// Notified of a channel without earlier subscriptions. Each start has its own, or a task that stands still would
    /// take the notification of the next task.
    added: Arc<Notify>,
    /// A task that shows whether the runtime runs its tasks, and when it was spawned.
    probe: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl Subscriber {
    /// Creates the subscriber of the store with this connection, which may go before the subscriber does. In a cluster,
    /// each channel is subscribed to on the node that owns it, whatever becomes of the others.
    pub(super) fn of(connection: &Arc<dyn Connection>, process: String) -> Self {
        let store = Arc::downgrade(connection);
        let made = move || {
            let connection = store.upgrade().filter(|connection| !connection.is_cluster());
            connection.map_or(0, |connection| connection.connections_made())
        };
        Self::new(connection.pub_sub(), process, made)
    }

    fn new(pub_sub: Arc<dyn PubSub>, process: String, made: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let (subscriptions, running, made) = (Subscriptions::new(), Mutex::default(), Box::new(made));
        Self(Arc::new(Shared { subscriptions, pub_sub, made, process, running }))
    }

    /// Listens to the channel of the key. Outside a runtime nothing will be heard.
    pub(super) fn subscribe(&self, key: Bytes) -> Subscription {
        let Ok(here) = Handle::try_current() else { return Subscription::join([]) };
        let channel = names::channel_of(&key).unwrap_or(key);
        // Under the mutex, the task either sees this subscription before it ends, or is started again for it.
        let mut running = self.0.running();
        let (subscription, first) = self.0.subscriptions.subscribe(channel, ChannelState::Opening);
        let before = self.0.clone().start_if_needed(&mut running, &here);
        if let (None, true, Some(task)) = (&before, first, &running.task) {
            task.added.notify_one();
        }
        drop(running);
        drop(before);
        subscription.fed_by(&self.0)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let mut running = self.0.running();
        running.is_closed = true;
        let task = running.task.take();
        drop(running);
        drop(task);
    }
}

impl Feed for Shared {
    fn keep_running(self: Arc<Self>) {
        let Ok(here) = Handle::try_current() else { return };
        let shared = self.clone();
        let mut running = shared.running();
        let before = self.start_if_needed(&mut running, &here);
        drop(running);
        drop(before);
    }
}

impl Listener for Shared {
    fn message(&self, channel: &[u8], message: &[u8]) {
        if self.is_for_us(message) {
            self.subscriptions.notify(channel);
        }
    }

    fn missed(&self) {
        self.subscriptions.notify_all();
    }
}

impl Shared {
    /// Returns whether a message asks all waiters to check, or gives the turn to a waiter of this process.
    fn is_for_us(&self, place: &[u8]) -> bool {
        place.is_empty() || place.strip_prefix(self.process.as_bytes()).is_some_and(|rest| rest.starts_with(b":"))
    }

    /// Starts the task unless it runs. Returns the task that has run until now, to be dropped without the mutex.
    fn start_if_needed(self: Arc<Self>, running: &mut Running, here: &Handle) -> Option<Started> {
        if running.is_closed || running.task.as_mut().is_some_and(|task| task.runs(here)) {
            return None;
        }
        let before = running.task.take();
        let stalled = before.as_ref().filter(|task| !task.handle.is_finished()).map(|task| task.runtime.id());
        if before.is_some() {
            debug!(name: "tenure.revive", stalled = stalled.is_some(), "restarted the subscriber to releases");
        }
        self.subscriptions.close(ChannelState::Opening);
        let home = self.pub_sub.runtime().filter(|home| Some(home.id()) != stalled);
        for runtime in home.iter().chain([here]) {
            running.starts += 1;
            let added = Arc::new(Notify::new());
            let task = Task { shared: self.clone(), start: running.starts, added: added.clone() };
            let handle = AbortOnDropHandle::new(runtime.spawn(task.run()));
            // A runtime that has ended drops at once what is spawned on it.
            let has_started = !handle.is_finished();
            running.task = Some(Started { handle, runtime: runtime.clone(), added, probe: None });
            if has_started {
                break;
            }
        }
        before
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Started {
    /// Returns whether it runs, as far as can be told from here.
    fn runs(&mut self, here: &Handle) -> bool {
        if self.handle.is_finished() {
            return false;
        }
        if self.runtime.id() == here.id() {
            // That runtime runs the caller.
            self.probe = None;
            return true;
        }
        match &self.probe {
            Some((since, probe)) if !probe.is_finished() => since.elapsed() < STALLED,
            Some((since, _)) if since.elapsed() < CHECK_EVERY => true,
            _ => {
                self.probe = Some((Instant::now(), AbortOnDropHandle::new(self.runtime.spawn(async {}))));
                true
            }
        }
    }
}

/// One start of the task.
struct Task {
    shared: Arc<Shared>,
    start: u64,
    added: Arc<Notify>,
}

impl Task {
    async fn run(self) {
        let mut end = End { task: self, over: false };
        let (mut warned, mut failures) = (false, 0_u32);
        while !end.if_unused() {
            let task = &end.task;
            let mut was_open = false;
            let Err(error) = session::serve(task, &mut was_open).await else { continue };
            failures = if was_open { 0 } else { failures + 1 };
            // After the first failure of a connection that has worked, it is replaced at once.
            if warned || failures == 0 {
                debug!(name: "tenure.no_news", %error, "no subscription to releases");
            } else {
                warn!(name: "tenure.no_news", %error, "no subscription to releases; waiters poll");
                warned = true;
            }
            let [shortest, longest] = RETRY;
            let pause = if error.is_transient() { longest.min(shortest * (1 << failures.min(8))) } else { LINGER };
            let again = Instant::now() + pause;
            loop {
                task.if_last(|subscriptions| subscriptions.close(ChannelState::Refused));
                select! {
                    () = task.added.notified() => {}
                    () = sleep_until(again) => break,
                }
            }
        }
    }

    /// Changes the channels, unless there was another start, which owns them from then on.
    fn if_last(&self, change: impl FnOnce(&Subscriptions)) {
        let running = self.shared.running();
        if running.starts == self.start {
            change(&self.shared.subscriptions);
        }
    }
}

/// The end of the task.
struct End {
    task: Task,
    over: bool,
}

impl End {
    /// Ends the task if there are no subscriptions, or another task has taken over.
    fn if_unused(&mut self) -> bool {
        let mut running = self.task.shared.running();
        let is_last = running.starts == self.task.start;
        self.over = !is_last || self.task.shared.subscriptions.len() == 0;
        let ended = if self.over && is_last { running.task.take() } else { None };
        drop(running);
        if let Some(ended) = ended {
            // The task ends by itself.
            drop(ended.handle.detach());
        }
        self.over
    }
}

impl Drop for End {
    /// Its runtime has ended. There are no notifications until a waiter, which checks the lock now, starts it again.
    fn drop(&mut self) {
        if !self.over {
            self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Refused));
        }
    }
}

impl fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber").field("channels", &self.0.subscriptions.len()).finish()
    }
}
