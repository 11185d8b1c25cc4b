//! News of released locks, by message.
//!
//! Every release publishes an empty message on the channel that is called as the key, or, where the key is no text, as
//! `names.rs` says. Who waits has it subscribed to, on one connection of the store, which is opened when somebody first
//! waits and closed when nobody has for a while. On a cluster both are sharded, as its other messages go to every node.
//!
//! 1. A channel's line is open only once the server has confirmed the subscription; a waiter looks at the lock after
//!    that.
//! 2. Whenever messages may have been missed (a new connection, a full buffer), everybody is notified and looks.
//! 3. Where it can't be had (no permission, an old cluster) the lines are refused: waiters go by time then. It is tried
//!    again as long as anybody waits.
//! 4. One task serves all. It lives where the connection of the store lives (see `Home`), or, where the client is the
//!    caller's, on the runtime of whoever waits. Its own connection lives with it.
//! 5. Those who wait make sure that it runs, every [`CHECK_EVERY`]: when its runtime has ended, or has run nothing for
//!    [`STALLED`], it starts again on one that runs. Only the last start counts: an earlier task that wakes up later
//!    changes no line.
//! 6. A connection that breaks is replaced, and so is one that is silent: while anybody listens the server is asked
//!    something every [`ASK_EVERY`], however many messages come. Without an answer for [`DOUBT`] no line counts as open
//!    and everybody looks; without one for [`TIMEOUT`] the connection is replaced. So a silent connection is doubted
//!    within 1.5 s, and replaced within 3 s.
//! 7. The connection is closed [`LINGER`] after nobody listens any more, or up to [`ASK_EVERY`] later, whatever
//!    messages come. One that is left on a runtime that stands still is closed when that runtime runs again, or ends.

mod session;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::bytes::Bytes;
use fred::types::Value;
use fred::types::config::Config;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::connection::Home;
use super::names;
use crate::store::notifications::{CHECK_EVERY, ChannelState, Feed, Subscription, Subscriptions};

/// For how long the connection is kept when nobody listens. And how long after a refusal it is tried again.
const LINGER: Duration = Duration::from_secs(5);
/// How long the server may take to answer. No lock depends on it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take before messages may have been missed.
const DOUBT: Duration = Duration::from_millis(500);
/// How often the server is asked whether it is still there.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long after a failure it is tried again: at first, and at most.
const RETRY: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(500)];
/// A runtime that has run nothing for so long stands still.
const STALLED: Duration = Duration::from_secs(1);

pub(super) struct Subscriber(Arc<Shared>);

struct Shared {
    subscriptions: Subscriptions,
    config: Config,
    home: Home,
    /// Whose turns are announced to us.
    process: String,
    /// Taken before the mutex of the subscriptions, and before that of the connection's driver.
    running: Mutex<Running>,
}

/// What runs.
#[derive(Default)]
struct Running {
    /// How often it was started.
    starts: u64,
    task: Option<Started>,
    /// The store is gone.
    is_closed: bool,
}

struct Started {
    handle: AbortOnDropHandle<()>,
    runtime: Handle,
    /// There is a channel that nobody has listened to before. One for each start: a task that stands still would take
    /// what is meant for the next.
    added: Arc<Notify>,
    /// Shows whether the runtime runs its tasks.
    probe: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl Subscriber {
    pub(super) fn new(config: Config, home: Home, process: String) -> Self {
        Self(Arc::new(Shared { subscriptions: Subscriptions::new(), config, home, process, running: Mutex::default() }))
    }

    /// Listens to the channel of the key. Outside a runtime nothing will be heard.
    pub(super) fn subscribe(&self, key: Bytes) -> Subscription {
        let Ok(here) = Handle::try_current() else { return Subscription::join([]) };
        let channel = names::channel_of(&key).unwrap_or(key);
        // Under the mutex nobody comes too late to be seen and too soon to start.
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

impl Shared {
    /// Whether a message says that everybody has to look, or that it is the turn of one of ours.
    fn is_for_us(&self, message: &Value) -> bool {
        let place = message.as_bytes().unwrap_or_default();
        place.is_empty() || place.strip_prefix(self.process.as_bytes()).is_some_and(|rest| rest.starts_with(b":"))
    }

    /// Starts the task, unless it runs. Returns what has run until now, to be dropped without the mutex.
    fn start_if_needed(self: Arc<Self>, running: &mut Running, here: &Handle) -> Option<Started> {
        if running.is_closed || running.task.as_mut().is_some_and(|task| task.runs(here)) {
            return None;
        }
        let before = running.task.take();
        let stalled = before.as_ref().filter(|task| !task.handle.is_finished()).map(|task| task.runtime.id());
        if before.is_some() {
            debug!(name: "tenure.revive", stalled = stalled.is_some(), "somebody listens to releases again");
        }
        self.subscriptions.close(ChannelState::Opening);
        let home = self.home.runtime().filter(|home| Some(home.id()) != stalled);
        for runtime in home.iter().chain([here]) {
            running.starts += 1;
            let added = Arc::new(Notify::new());
            let task = Task { shared: self.clone(), start: running.starts, added: added.clone() };
            let handle = AbortOnDropHandle::new(runtime.spawn(task.run()));
            // A runtime that has ended ends at once what is spawned on it.
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
    /// Whether it runs, as far as is known here.
    fn runs(&mut self, here: &Handle) -> bool {
        if self.handle.is_finished() {
            return false;
        }
        if self.runtime.id() == here.id() {
            // It runs the one who asks.
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
            // The first failure of a connection that has worked is mended at once.
            if warned || failures == 0 {
                debug!(name: "tenure.no_news", %error, "releases are not heard of");
            } else {
                warn!(name: "tenure.no_news", %error, "releases are not heard of; waiting goes by time");
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

    /// Changes the lines, unless there was another start: then they are no longer this one's to change.
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
    /// Ends when nobody listens, or another has taken over.
    fn if_unused(&mut self) -> bool {
        let mut running = self.task.shared.running();
        let is_last = running.starts == self.task.start;
        self.over = !is_last || self.task.shared.subscriptions.len() == 0;
        let ended = if self.over && is_last { running.task.take() } else { None };
        drop(running);
        if let Some(ended) = ended {
            // It ends by itself.
            drop(ended.handle.detach());
        }
        self.over
    }
}

impl Drop for End {
    /// With its runtime: nothing will be heard until one of those who wait, and look now, starts it again.
    fn drop(&mut self) {
        if !self.over {
            self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Refused));
        }
    }
}

impl fmt::Debug for Subscriber {
    /// Says nothing of the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber").field("channels", &self.0.subscriptions.len()).finish()
    }
}
