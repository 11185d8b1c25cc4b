//! The settings of a locker, and the stores it can be built on.

use std::time::Duration;

#[cfg(feature = "fred")]
use fred::clients::Client;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::shared::{Settings, Shared};
#[cfg(feature = "metrics")]
use crate::Key;
use crate::acquire::queue::Queues;
use crate::acquire::supervisor::Supervisor;
use crate::hold::scheduler::Schedulers;
use crate::hold::suspension;
use crate::hold::timing::{Drift, MAX_TTL, Renewal};
use crate::locker::cleanups::Cleanups;
use crate::locker::isolated::{Background, Isolated};
use crate::locker::late_releases::LateReleases;
use crate::metrics::Labels;
use crate::report::debug;
use crate::store::Store;
use crate::store::embedded::EmbeddedStore;
use crate::store::memory::MemoryStore;
use crate::store::quorum::{self, QuorumStore};
#[cfg(feature = "redis")]
use crate::store::redis::RedisConnection;
use crate::store::redis::{self, Driver, RedisStore};
use crate::testing::EmbeddedServer;
use crate::{Error, Locker, Retry};

/// The settings of a [`Locker`]; created by [`Locker::builder`].
///
/// A setting that can't work is refused by the requests that use it, before they send anything.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::{Locker, Retry};
///
/// let locker = Locker::builder()
///     .ttl(Duration::from_secs(15))
///     .retry(Retry::linear(Duration::from_millis(200)).max_retries(8))
///     .command_timeout(Duration::from_millis(500))
///     .in_memory();
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is ended"]
pub struct LockerBuilder {
    settings: Settings,
    command_timeout: Duration,
    prefix: String,
    isolated: bool,
    restart_window: Duration,
    min_replicas: usize,
    driver: Driver,
    fence_ttl: Duration,
    wait_for_server: Duration,
}

/// How long a node of a quorum doesn't vote after a restart; for [`LockerBuilder::restart_window`].
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::{Locker, RestartWindow};
///
/// let usual = Locker::builder().restart_window(Duration::from_secs(120));
/// let always_on_disk = Locker::builder().restart_window(RestartWindow::NodesNeverForget);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestartWindow {
    /// For this long. A [`Duration`] converts into it.
    For(Duration),
    /// Not at all: after any restart, a node knows everything that it has granted.
    NodesNeverForget,
}

impl From<Duration> for RestartWindow {
    fn from(window: Duration) -> Self {
        Self::For(window)
    }
}

impl Default for LockerBuilder {
    fn default() -> Self {
        Self {
            settings: Settings {
                ttl: Duration::from_secs(30),
                renewal: Renewal::default(),
                retry: None,
                drift: Drift::default(),
                fenced: true,
                local_hand_over: true,
                poll_every: Duration::from_secs(1),
                metrics: Labels::default(),
            },
            command_timeout: Duration::from_secs(2),
            prefix: String::new(),
            isolated: false,
            restart_window: Duration::from_secs(60),
            min_replicas: 0,
            driver: Driver::default(),
            fence_ttl: redis::FENCE_TTL,
            wait_for_server: Duration::ZERO,
        }
    }
}

impl LockerBuilder {
    /// Sets the [ttl](crate::LockRequest::ttl) of requests that set none. Default: 30 s.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let locker = tenure::Locker::builder().ttl(Duration::from_secs(10)).in_memory();
    /// ```
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.settings.ttl = ttl;
        self
    }

    /// Sets the time between [renewals](crate::LockRequest::renew_every): at most half of the ttl. Default: a third of
    /// the ttl.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let locker = tenure::Locker::builder().renew_every(Duration::from_secs(3)).in_memory();
    /// ```
    pub fn renew_every(mut self, interval: Duration) -> Self {
        self.settings.renewal = Renewal::Every(interval);
        self
    }

    /// Sets the pauses of [`Locker::obtain`] for requests that set none. Default: one attempt.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let retry = tenure::Retry::linear(Duration::from_millis(100)).max_retries(9);
    /// let locker = tenure::Locker::builder().retry(retry).in_memory();
    /// ```
    pub fn retry(mut self, retry: Retry) -> Self {
        self.settings.retry = Some(retry);
        self
    }

    /// Sets how often a waiter that has received no notification checks the lock: at least 10 ms, at most 365 days.
    /// Default: 1 s.
    ///
    /// Tenure notifies waiters of a release at once, and waiters know when a dead holder's ttl ends. This setting is
    /// for locks that other libraries release, which send no notification, and for servers on which subscriptions don't
    /// work.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::builder().poll_every(Duration::from_millis(200)).in_memory();
    /// ```
    pub fn poll_every(mut self, interval: Duration) -> Self {
        self.settings.poll_every = interval.clamp(Duration::from_millis(10), MAX_TTL);
        self
    }

    /// Sets how far the server's clock may run ahead of ours during one ttl: a fraction of the ttl, and a fixed margin.
    /// A guard's deadline is earlier by that much. Default: 0.01 and 2 ms.
    ///
    /// A factor outside `0.0..1.0` leaves nothing of any ttl: every request is refused.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let locker = tenure::Locker::builder().drift(0.02, Duration::from_millis(5)).in_memory();
    /// ```
    pub fn drift(mut self, factor: f64, margin: Duration) -> Self {
        self.settings.drift = Drift { factor, margin };
        self
    }

    /// Sets a prefix for every key at the server. Guards and errors show keys without it. Default: none.
    ///
    /// ```
    /// let locker = tenure::Locker::builder().prefix("billing:").in_memory();
    /// ```
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets how long to wait for the server's reply to one command, and for a connection. Default: 2 s.
    ///
    /// A call ends sooner when its reply would come too late to be of use. For a connection, the limit is a third of
    /// the locker's [ttl](Self::ttl) if that is shorter, so that no lock is lost while it is opened. Zero counts as a
    /// millisecond, and anything longer than 365 days as 365 days.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let builder = tenure::Locker::builder().command_timeout(Duration::from_millis(500));
    /// let locker = builder.in_memory();
    /// ```
    pub fn command_timeout(mut self, timeout: Duration) -> Self {
        self.command_timeout = timeout.clamp(Duration::from_millis(1), MAX_TTL);
        self
    }

    /// Sets whether guards have a [fencing token](crate::LockGuard::fencing_token). Default: true.
    ///
    /// ```
    /// let locker = tenure::Locker::builder().fenced(false).in_memory();
    /// ```
    pub fn fenced(mut self, fenced: bool) -> Self {
        self.settings.fenced = fenced;
        self
    }

    /// Sets whether a released lock that other tasks of this locker wait for may go to the next of them without asking
    /// the server. Default: true.
    ///
    /// The successor gets the lock as the server has it, under the previous holder's token and deadline, but with a
    /// fencing token of its own. The lock goes through the server again after 16 turns in a row or 100 ms, so other
    /// processes wait for it no longer than without this ([turns](Locker::lock)).
    ///
    /// Locks are handed over like this only between plain requests: [`lock`](Locker::lock) for one key, with the same
    /// ttl, without [metadata](crate::LockRequest::metadata), a [token](crate::LockRequest::token) of their own or
    /// [`fair`](crate::LockRequest::fair). The successor must renew its lock, and the previous holder must not have
    /// read its [token](crate::LockGuard::token) nor given the guard to a [`WatchDog`](crate::WatchDog). At least half
    /// of the ttl must be left. On a quorum, and with [`min_replicas`](Self::min_replicas), every lock goes through the
    /// servers.
    ///
    /// The price: not every [`release`](crate::LockGuard::release) asks the server, so a lock that it has lost
    /// (deleted, evicted, failed over) is noticed by the next renewal, or by the next release that asks. And
    /// [`Locker::inspect`] shows the token of an earlier holder, and a fencing token that may be
    /// [greater](crate::Holder::fencing_token) than the holder's.
    ///
    /// ```
    /// let locker = tenure::Locker::builder().local_hand_over(false).in_memory();
    /// ```
    pub fn local_hand_over(mut self, on: bool) -> Self {
        self.settings.local_hand_over = on;
        self
    }

    /// Adds a label `lock` to the [metrics](crate::metrics) of this locker's requests, locks and renewals, with what
    /// the function returns for the key (for several keys, for the first). Default: no such label.
    ///
    /// Return few different labels, such as the kind of a key: a recorder keeps what it measures for each of them, for
    /// as long as the program runs. The function is called with each request, so it should be fast.
    ///
    /// ```
    /// let locker = tenure::Locker::builder()
    ///     .metrics_label(|key| key.to_string().split(':').next().unwrap_or_default().to_owned())
    ///     .in_memory(); // `invoices:42` counts as `invoices`
    /// ```
    #[cfg(feature = "metrics")]
    #[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
    pub fn metrics_label(mut self, label: impl Fn(&Key) -> String + Send + Sync + 'static) -> Self {
        self.settings.metrics = Labels::new(label);
        self
    }

    /// Runs the connection and the renewals on a thread and a runtime of their own, so that a blocked worker of the
    /// application can't hold them up. This costs each request a hop between threads. Default: false.
    ///
    /// If the system has no thread left for it, [`connect`](Self::connect) and [`quorum`](Self::quorum) fail with
    /// [`Error::NoRuntime`], and so does every request of a locker on a connection of yours or on the embedded store.
    ///
    /// ```
    /// let locker = tenure::Locker::builder().isolated(true).in_memory();
    /// ```
    pub fn isolated(mut self, isolated: bool) -> Self {
        self.isolated = isolated;
        self
    }

    /// Sets how many replicas of the server must acknowledge a lock before it is held, and each of its renewals before
    /// it counts. Default: 0.
    ///
    /// If too few do, a request releases what it got and fails with [`Error::NotReplicated`] (one that waits goes on);
    /// a renewal is retried, and the guard is lost by its deadline as if the server were away. So a failover to any of
    /// those replicas finds the lock, and a primary that is cut off from all of them keeps no lock alive.
    ///
    /// This is not consensus: if there are more replicas than this number, the promoted one may be another, which knows
    /// nothing of the lock. The guard detects what a failover forgot at its next renewal, and [fencing
    /// tokens](crate::LockGuard::fencing_token) keep it from doing harm. If all replicas must acknowledge, nothing
    /// is forgotten, and nothing can be locked while one of them is away.
    ///
    /// Each request and renewal asks the server to `WAIT`. This takes another round trip and, while replicas are
    /// behind, a wait of most of the [command timeout](LockerBuilder::command_timeout), or of the ttl if that is
    /// shorter. Everything that this locker sends meanwhile waits behind it, on the same connection; so does everything
    /// that others send with a [client](LockerBuilder::client) of your own, so give the locker one for itself.
    ///
    /// It is for one server, with Sentinels or without. A cluster refuses it with [`Error::Unsupported`], and so does a
    /// [quorum](Locker::quorum), whose nodes have no replicas. The embedded store has none either, and ignores it.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let sentinels = "redis-sentinel://10.0.0.1:26379?sentinelServiceName=locks";
    /// let locker = tenure::Locker::builder().min_replicas(1).connect(sentinels).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn min_replicas(mut self, replicas: usize) -> Self {
        self.min_replicas = replicas;
        self
    }

    /// Sets how long a node of a quorum doesn't vote after a restart, as it may have forgotten what it had granted.
    /// Rounded up to whole seconds, at most 365 days. Default: 60 s.
    ///
    /// No ttl may be longer; otherwise a forgotten lock could still be held when the node votes again. All clients that
    /// share locks must set the same window.
    ///
    /// [`RestartWindow::NodesNeverForget`] is for nodes that write every change to disk before they reply (`appendfsync
    /// always`), and for tests: nodes then vote at once, and any ttl will do. But a node that does forget can give a
    /// lock to a second holder. If the nodes can be asked, the locker logs a warning, `tenure.node_may_forget`, for
    /// each one that can forget. A duration of zero means the same, but less clearly.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let nodes = ["redis://10.0.0.1", "redis://10.0.0.2", "redis://10.0.0.3"];
    /// let builder = tenure::Locker::builder().restart_window(Duration::from_secs(120));
    /// let locker = builder.quorum(nodes).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn restart_window(mut self, window: impl Into<RestartWindow>) -> Self {
        self.restart_window = match window.into() {
            RestartWindow::For(window) => window.min(MAX_TTL),
            RestartWindow::NodesNeverForget => Duration::ZERO,
        };
        self
    }

    /// Sets the client that [`connect`](LockerBuilder::connect) and [`quorum`](LockerBuilder::quorum) use. Default:
    /// fred, if its feature is enabled.
    ///
    /// ```
    /// use tenure::{Driver, Locker};
    ///
    /// let builder = Locker::builder().driver(Driver::default());
    /// ```
    pub fn driver(mut self, driver: Driver) -> Self {
        self.driver = driver;
        self
    }

    /// Sets how long the server remembers the last fencing token of a key after the key was last locked, at most 365
    /// days. Default: 24 h.
    ///
    /// For that time, each key that was locked with a fencing token leaves a key beside it, `{key}:fence`. On Redis 7.0
    /// it takes 133 bytes (measured with 100,000 keys of 15 bytes): a million different keys a day take 133 MB by
    /// default, and 6 MB with one hour.
    ///
    /// A fencing token is the server's time, or one more than the last token if that is greater. So tokens grow even if
    /// nothing is remembered, unless the clock was set back, or a replica whose clock is behind took over. Choose a
    /// time longer than either difference. The server remembers a token for at least 60 s, for twice the lock's
    /// [ttl](crate::LockRequest::ttl), and on a quorum for twice the [restart window](Self::restart_window).
    ///
    /// The embedded store ignores it: it has one counter for all keys.
    ///
    /// ```
    /// # use std::time::Duration;
    /// let locker = tenure::Locker::builder().fence_ttl(Duration::from_secs(3600)).in_memory();
    /// ```
    pub fn fence_ttl(mut self, ttl: Duration) -> Self {
        self.fence_ttl = ttl.min(MAX_TTL);
        self
    }

    /// Sets how long [`connect`](Self::connect) and [`quorum`](Self::quorum) go on trying while the server can't be
    /// reached, is loading, or the like. Default: no time, so that one failure is final.
    ///
    /// For a program that may start before its server does. They try again after pauses of 50 ms to 1 s. Errors that
    /// waiting can't fix are returned at once: a malformed URL, a wrong password, a certificate that isn't accepted.
    /// When the time is up, they return the last error. In all, that takes at most this time plus twice the [command
    /// timeout](Self::command_timeout).
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let builder = tenure::Locker::builder().wait_for_server(Duration::from_secs(30));
    /// let locker = builder.connect("redis://127.0.0.1:6379").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_for_server(mut self, limit: Duration) -> Self {
        self.wait_for_server = limit;
        self
    }

    /// Connects to the server at the URL; see [`Locker::connect`].
    ///
    /// # Errors
    ///
    /// Those of [`Locker::connect`].
    ///
    /// # Cancel safety
    ///
    /// The same as for [`Locker::connect`].
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let builder = tenure::Locker::builder().prefix("billing:");
    /// let locker = builder.connect("redis://127.0.0.1:6379").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(self, url: &str) -> Result<Locker, Error> {
        redis::url::parse(url)?;
        Shared::check_runtime()?;
        let isolated = self.isolated.then(Isolated::start).transpose()?;
        let (url, prefix, timeout) = (url.to_owned(), self.prefix.clone(), self.connection_timeout());
        let (driver, replicas, wait_for_server) = (self.driver, self.min_replicas, self.wait_for_server);
        let connect = move || {
            let (url, prefix) = (url.clone(), prefix.clone());
            async move { RedisStore::connect(driver, &url, prefix, timeout, replicas).await }
        };
        let connecting = patiently(wait_for_server, connect);
        let store = match &isolated {
            Some(isolated) => isolated.handle().spawn(connecting).await.unwrap_or(Err(Error::NoRuntime))?,
            None => connecting.await?,
        };
        let store = store.with_fence_ttl(self.fence_ttl);
        Ok(self.build(Box::new(store), isolated))
    }

    /// Returns a locker at once, and connects to the server at the URL in the background, now or when the server comes
    /// up. The URL is that of [`Locker::connect`].
    ///
    /// For a program that has to start, and serve what needs no lock, while the server is away. Until there is a
    /// connection, each operation waits for it, up to the [command timeout](Self::command_timeout), and then fails with
    /// the reason why there is none; [`lock`](Locker::lock) waits on. A wrong password fails each operation rather than
    /// this call.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`] if the URL is malformed or unsupported. [`Error::Unsupported`] for a
    /// [driver](Self::driver) that is not compiled in, and [`min_replicas`](Self::min_replicas) on a cluster.
    /// [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::Locker;
    ///
    /// # if cfg!(any(feature = "fred", feature = "redis")) {
    /// // Nothing listens there.
    /// let builder = Locker::builder().command_timeout(Duration::from_millis(100));
    /// let locker = builder.connect_lazily("redis://127.0.0.1:1")?;
    /// let error = locker.try_lock("k").await.unwrap_err();
    /// assert!(error.is_transient());
    /// # }
    /// # Ok(())
    /// # }
    /// ```
    pub fn connect_lazily(self, url: &str) -> Result<Locker, Error> {
        redis::url::parse(url)?;
        Shared::check_runtime()?;
        let isolated = self.isolated.then(Isolated::start).transpose()?;
        let (prefix, timeout) = (self.prefix.clone(), self.connection_timeout());
        let store = {
            // The connection lives on the runtime that is entered here.
            let _entered = isolated.as_ref().map(|isolated| isolated.handle().enter());
            RedisStore::connect_lazily(self.driver, url, prefix, timeout, self.min_replicas)?
        };
        let store = store.with_fence_ttl(self.fence_ttl);
        Ok(self.build(Box::new(store), isolated))
    }

    /// Connects to a majority of independent servers; see [`Locker::quorum`].
    ///
    /// # Errors
    ///
    /// Those of [`Locker::quorum`].
    ///
    /// # Cancel safety
    ///
    /// The same as for [`Locker::quorum`].
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let nodes = ["redis://10.0.0.1", "redis://10.0.0.2", "redis://10.0.0.3"];
    /// let locker = tenure::Locker::builder().ttl(Duration::from_secs(10)).quorum(nodes).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn quorum<I: IntoIterator<Item: AsRef<str>>>(self, urls: I) -> Result<Locker, Error> {
        let urls: Vec<String> = urls.into_iter().map(|url| url.as_ref().to_owned()).collect();
        self.connect_quorum(urls).await
    }

    async fn connect_quorum(self, urls: Vec<String>) -> Result<Locker, Error> {
        if self.min_replicas > 0 {
            return Err(Error::Unsupported("the nodes of a quorum have no replicas; use more nodes instead"));
        }
        quorum::check_ttl(self.settings.ttl, self.restart_window)?;
        Shared::check_runtime()?;
        let isolated = self.isolated.then(Isolated::start).transpose()?;
        let (prefix, timeout) = (self.prefix.clone(), self.connection_timeout());
        let (driver, never_forget, fence_ttl) = (self.driver, self.restart_window.is_zero(), self.fence_ttl);
        let wait_for_server = self.wait_for_server;
        let connect = move || {
            let (urls, prefix) = (urls.clone(), prefix.clone());
            async move { quorum::connect(driver, &urls, &prefix, timeout, never_forget, fence_ttl).await }
        };
        let connecting = patiently(wait_for_server, connect);
        let nodes = match &isolated {
            Some(isolated) => isolated.handle().spawn(connecting).await.unwrap_or(Err(Error::NoRuntime))?,
            None => connecting.await?,
        };
        let releases = TaskTracker::new();
        let store = QuorumStore::new(nodes, self.restart_window, releases.clone());
        Ok(self.build_with(Box::new(store), isolated.map(Ok), releases))
    }

    /// Limits the time for a connection, so that no lock is lost while it is opened.
    fn connection_timeout(&self) -> Duration {
        self.command_timeout.min(self.settings.ttl / 3).max(Duration::from_millis(1))
    }

    /// Uses a client of your own; see [`Locker::new`].
    ///
    /// An [`isolated`](LockerBuilder::isolated) locker renews on its own thread, but the client's connection stays on
    /// the runtime that it was initialised on.
    ///
    /// ```no_run
    /// # fn example(client: tenure::fred::clients::Client) {
    /// let locker = tenure::Locker::builder().prefix("billing:").client(client);
    /// # }
    /// ```
    #[cfg(feature = "fred")]
    #[cfg_attr(docsrs, doc(cfg(feature = "fred")))]
    pub fn client(self, client: Client) -> Locker {
        let store = RedisStore::with_client(client, self.prefix.clone(), self.min_replicas);
        let store = store.with_fence_ttl(self.fence_ttl);
        self.on_own_thread_if_wanted(Box::new(store))
    }

    /// Uses a connection of redis-rs that you have opened; see [`Locker::with_redis`].
    ///
    /// ```no_run
    /// # fn example(connection: tenure::redis::aio::MultiplexedConnection) {
    /// let locker = tenure::Locker::builder().prefix("billing:").with_redis(connection);
    /// # }
    /// ```
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    pub fn with_redis(self, connection: impl Into<RedisConnection>) -> Locker {
        let store = RedisStore::with_redis(connection.into(), self.prefix.clone(), self.min_replicas);
        let store = store.with_fence_ttl(self.fence_ttl);
        self.on_own_thread_if_wanted(Box::new(store))
    }

    /// Uses the embedded store; see [`Locker::in_memory`].
    ///
    /// ```
    /// let locker = tenure::Locker::builder().fenced(false).in_memory();
    /// ```
    pub fn in_memory(self) -> Locker {
        self.on_own_thread_if_wanted(Box::new(MemoryStore::new()))
    }

    /// Uses an embedded server that others may use as well, and that a test can take away: see
    /// [`testing`](crate::testing).
    ///
    /// Its lockers are like processes. They take turns at a key that several of them wait for, as [`Locker::lock`]
    /// says, and a writer that waits in one of them holds back new readers of all. But a release gives the lock to
    /// nobody: the first in the line takes it when it asks, and a request that doesn't wait may come before it.
    ///
    /// ```
    /// use tenure::Locker;
    /// use tenure::testing::EmbeddedServer;
    ///
    /// let server = EmbeddedServer::new();
    /// let [here, there] = [(); 2].map(|()| Locker::builder().in_memory_with(&server));
    /// ```
    pub fn in_memory_with(self, server: &EmbeddedServer) -> Locker {
        self.on_own_thread_if_wanted(Box::new(EmbeddedStore::new(server.embedded().clone())))
    }

    /// Isolates the locker if that is set. If the system has no thread left for it, its requests fail.
    fn on_own_thread_if_wanted(self, store: Box<dyn Store>) -> Locker {
        let started = self.isolated.then(Isolated::start);
        self.build_with(store, started, TaskTracker::new())
    }

    pub(crate) fn build(self, store: Box<dyn Store>, isolated: Option<Isolated>) -> Locker {
        self.build_with(store, isolated.map(Ok), TaskTracker::new())
    }

    pub(crate) fn build_with(
        self,
        store: Box<dyn Store>,
        started: Option<Result<Isolated, Error>>,
        releases: TaskTracker,
    ) -> Locker {
        // What is found later counts from here on.
        suspension::total();
        let (command_timeout, origin) = (self.command_timeout, Instant::now());
        let (queues, schedulers) = (Queues::default(), Schedulers::new());
        Locker::from_shared(Shared {
            store,
            command_timeout,
            cleanups: Cleanups::new(releases.clone()),
            late_releases: LateReleases::default(),
            releases,
            queues,
            supervisor: Supervisor::default(),
            origin,
            schedulers,
            background: Background::after(started),
            settings: self.settings,
            closed: CancellationToken::new(),
        })
    }
}

/// Tries to connect for this long, as long as another attempt may succeed.
async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    limit: Duration,
    connect: impl Fn() -> F,
) -> Result<T, Error> {
    const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
    let started = Instant::now();
    let [mut pause, longest] = PAUSES;
    loop {
        // Boxed: what follows a failure is rare, and would make the future of every connection larger.
        let connected = Box::pin(connect()).await;
        let left = limit.saturating_sub(started.elapsed());
        match connected {
            Err(error) if error.is_transient() && !left.is_zero() => {
                debug!(name: "tenure.server_away", %error, ?left, "could not connect; trying again");
                // Programs that start together don't ask together.
                sleep(left.min(pause.mul_f64(0.75 + 0.25 * fastrand::f64()))).await;
                pause = longest.min(pause * 2);
            }
            connected => return connected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_locker_that_could_not_be_isolated_says_so_with_each_request() {
        let started = Some(Isolated::start_without_a_thread());
        let builder = Locker::builder().isolated(true);
        let locker = builder.build_with(Box::new(MemoryStore::new()), started, TaskTracker::new());
        for _ in 0..2 {
            assert!(matches!(locker.lock("k").await, Err(Error::NoRuntime)));
            assert!(matches!(locker.try_lock("k").await, Err(Error::NoRuntime)));
        }
        drop(locker.close_on_drop(Duration::from_secs(60)));
    }

    #[test]
    fn no_length_of_time_becomes_a_shorter_one_by_overflow() {
        let builder = Locker::builder().restart_window(Duration::MAX).poll_every(Duration::MAX);
        let builder = builder.command_timeout(Duration::MAX);
        assert_eq!([builder.restart_window, builder.settings.poll_every, builder.command_timeout], [MAX_TTL; 3]);
        let store = QuorumStore::new(Vec::new(), Duration::MAX, TaskTracker::new());
        assert!(format!("{store:?}").contains("restart_window: 18446744073709551615s"), "{store:?}");
    }
}
