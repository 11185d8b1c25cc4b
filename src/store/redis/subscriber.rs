//! News of released locks, by message.
//!
//! Every release publishes an empty message on the channel that is called as the key, or, where the key is no text, as
//! `names.rs` says. Who waits has it subscribed to, on one connection of the store, which is opened when somebody first
//! waits and closed when nobody has for a while. On a cluster both are sharded, as its other messages go to every node.
//!
//! 1. A channel's line is open only once the server has confirmed the subscription; a waiter looks at the lock after
//!    that.
//! 2. Whenever messages may have been missed (a new connection, a full buffer), everybody is told to look.
//! 3. Where it can't be had (no permission, an old cluster) the lines are refused: waiters go by time then.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::bytes::Bytes;
use fred::bytes_utils::Str;
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::Builder;
use fred::types::config::{Config, ReconnectPolicy};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::names;
use crate::Error;
use crate::store::listen::{Line, Listeners, Listening};

/// For how long a subscription is kept when nobody listens, and the connection when there is none.
const LINGER: Duration = Duration::from_secs(5);
/// So many subscriptions that nobody needs are kept.
const UNUSED: usize = 256;
/// Messages that may wait to be looked at. More, and everybody is told.
const BACKLOG: usize = 4_096;
/// How long the server may take to answer. No lock depends on it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long after a failure it is tried again.
const RETRY: Duration = Duration::from_millis(500);

pub(super) struct Subscriber {
    shared: Arc<Shared>,
    /// What runs, or has run.
    task: Mutex<Option<AbortOnDropHandle<()>>>,
}

struct Shared {
    listeners: Listeners,
    /// There is a channel that nobody has listened to before.
    added: Notify,
    /// Somebody will see to what is added. Said under its mutex: nobody comes too late to be seen and too soon to
    /// start.
    running: Mutex<bool>,
    config: Config,
}

impl Subscriber {
    pub(super) fn new(config: Config) -> Self {
        let (listeners, added, running) = (Listeners::new(), Notify::new(), Mutex::new(false));
        Self { shared: Arc::new(Shared { listeners, added, running, config }), task: Mutex::new(None) }
    }

    /// Listens to the channel of the key. Outside a runtime nothing will be heard.
    pub(super) fn listen(&self, key: Bytes) -> Listening {
        let Ok(runtime) = Handle::try_current() else { return Listening::join([]) };
        let channel = names::channel_of(&key).unwrap_or(key);
        let mut running = self.shared.running();
        let (listening, first) = self.shared.listeners.listen(channel, Line::Opening);
        if !std::mem::replace(&mut *running, true) {
            let task = AbortOnDropHandle::new(runtime.spawn(Task::run(self.shared.clone())));
            *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        } else if first {
            self.shared.added.notify_one();
        }
        listening
    }
}

impl Shared {
    fn refuse_all(&self) {
        self.listeners.set_line(&self.listeners.keys(), Line::Refused);
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn running(&self) -> MutexGuard<'_, bool> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection, and what it is subscribed to.
struct Task {
    shared: Arc<Shared>,
    client: Client,
    subscribed: HashSet<Bytes>,
}

impl Task {
    async fn run(shared: Arc<Shared>) {
        let mut end = End { shared, over: false };
        let mut warned = false;
        while !end.if_unused() {
            let Err(error) = Self::serve(end.shared.clone()).await else { continue };
            if warned {
                debug!(name: "tenure.no_news", %error, "releases are not heard of");
            } else {
                warn!(name: "tenure.no_news", %error, "releases are not heard of; waiting goes by time");
                warned = true;
            }
            let again = Instant::now() + if error.is_transient() { RETRY } else { LINGER };
            loop {
                end.shared.refuse_all();
                select! {
                    () = end.shared.added.notified() => {}
                    () = sleep_until(again) => break,
                }
            }
        }
    }

    /// Until nobody has listened for a while.
    async fn serve(shared: Arc<Shared>) -> Result<(), Error> {
        let client = Builder::from_config(shared.config.clone())
            .with_connection_config(|config| {
                config.connection_timeout = TIMEOUT;
                config.internal_command_timeout = TIMEOUT;
                config.max_command_attempts = 1;
            })
            .with_performance_config(|config| {
                config.default_command_timeout = TIMEOUT;
                config.broadcast_channel_capacity = BACKLOG;
            })
            .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
            .build()?;
        let (mut messages, mut reconnects) = (client.message_rx(), client.reconnect_rx());
        let _driver = AbortOnDropHandle::new(client.connect());
        within(client.wait_for_connect()).await?;
        let mut task = Self { shared, client, subscribed: HashSet::new() };
        let mut last_used = Instant::now();
        let mut changed = true;
        loop {
            if changed {
                if task.settle().await? {
                    last_used = Instant::now();
                } else if last_used.elapsed() >= LINGER {
                    return Ok(());
                }
            }
            changed = true;
            select! {
                message = messages.recv() => match message {
                    Ok(message) => {
                        task.shared.listeners.tell(message.channel.as_bytes());
                        changed = false;
                    }
                    Err(RecvError::Lagged(_)) => task.shared.listeners.tell_all(),
                    Err(RecvError::Closed) => return Err(Error::timeout()),
                },
                // What was subscribed to is so no more, and messages may have been missed.
                _ = reconnects.recv() => task.subscribed.clear(),
                () = task.shared.added.notified() => {}
                () = sleep(LINGER) => {}
            }
        }
    }

    /// Subscribes to what is listened to. Answers whether anything is.
    async fn settle(&mut self) -> Result<bool, Error> {
        let wanted: HashSet<Bytes> = self.shared.listeners.keys().into_iter().collect();
        let added: Vec<Bytes> = wanted.difference(&self.subscribed).cloned().collect();
        if !added.is_empty() {
            self.subscribe(&added).await?;
        }
        // Those that were subscribed to for others before, too.
        self.shared.listeners.open(&wanted, &added);
        self.subscribed.extend(added);
        // Not at once: who obtains lock after lock would subscribe again and again.
        let unused: Vec<Bytes> = self.subscribed.difference(&wanted).cloned().collect();
        if unused.len() > wanted.len().max(UNUSED) {
            self.unsubscribe(&unused).await?;
            self.subscribed = wanted.clone();
        }
        Ok(!wanted.is_empty())
    }

    async fn subscribe(&self, channels: &[Bytes]) -> Result<(), Error> {
        if self.client.is_clustered() {
            for channel in texts(channels) {
                within(self.client.ssubscribe(channel)).await?;
            }
            return Ok(());
        }
        within(self.client.subscribe(texts(channels))).await?;
        // fred says so before the server has. What comes behind it on the same connection is answered after it.
        within(self.client.ping::<()>(None)).await
    }

    async fn unsubscribe(&self, channels: &[Bytes]) -> Result<(), Error> {
        if self.client.is_clustered() {
            for channel in texts(channels) {
                within(self.client.sunsubscribe(channel)).await?;
            }
            return Ok(());
        }
        within(self.client.unsubscribe(texts(channels))).await
    }
}

/// As fred wants them. They are text, all of them.
fn texts(channels: &[Bytes]) -> Vec<Str> {
    channels.iter().filter_map(|channel| Str::from_inner(channel.clone()).ok()).collect()
}

async fn within<T>(call: impl Future<Output = Result<T, fred::error::Error>>) -> Result<T, Error> {
    let late = |_| Err(fred::error::Error::new(ErrorKind::Timeout, "the server did not answer in time"));
    timeout(TIMEOUT, call).await.unwrap_or_else(late).map_err(Error::Redis)
}

/// The end of the task.
struct End {
    shared: Arc<Shared>,
    over: bool,
}

impl End {
    /// Ends when nobody listens.
    fn if_unused(&mut self) -> bool {
        let mut running = self.shared.running();
        self.over = self.shared.listeners.len() == 0;
        *running = !self.over;
        self.over
    }
}

impl Drop for End {
    /// With its runtime: nobody is left who would hear anything.
    fn drop(&mut self) {
        if !self.over {
            *self.shared.running() = false;
            self.shared.refuse_all();
        }
    }
}

impl fmt::Debug for Subscriber {
    /// Says nothing of the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber").field("channels", &self.shared.listeners.len()).finish()
    }
}
