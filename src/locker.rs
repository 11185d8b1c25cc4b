//! A handle on a store, from which locks are requested.

pub(crate) mod builder;
pub(crate) mod cleanups;
mod close_on_drop;
mod isolated;
pub(crate) mod late_releases;
pub(crate) mod shared;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "fred")]
use fred::clients::Client;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

pub use self::builder::{LockerBuilder, RestartWindow};
pub use self::close_on_drop::CloseOnDrop;
use crate::acquire::WhenRefused;
use crate::hold::timing::Renewal;
use crate::hold::{Grant, GrantId, Hold, Owned, suspension};
use crate::locker::shared::Shared;
use crate::mode::Mode;
use crate::report::debug;
use crate::store::{Holder, Verdict, Whose};
use crate::{Diagnosis, Error, Key, Lease, LockGuard, LockRequest, Token};

/// Obtains locks on one server, on one watched by Sentinels, on a cluster, a quorum, or the embedded store.
///
/// Cheap to clone: create one at start-up and hand out clones. Its connection is closed when the last clone and the
/// last guard are gone; [`close`](Locker::close) makes sure that nothing is left half done.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use tenure::Locker;
///
/// let locker = match std::env::var("TENURE_EXAMPLE_URL") {
///     Ok(url) => Locker::connect(&url).await?,
///     Err(_) => Locker::in_memory(),
/// };
/// let guard = locker.lock("invoices:42").await?;
/// println!("fencing token: {:?}", guard.fencing_token());
/// guard.release().await
/// # }
/// ```
#[derive(Clone)]
pub struct Locker {
    shared: Arc<Shared>,
}

impl Locker {
    /// Connects to a server with the default settings.
    ///
    /// The URL's scheme names the kind of server: `redis://` or `valkey://` for one server, `rediss://` with TLS
    /// (features `rustls` or `native-tls`), `redis+unix:///path/to.sock`,
    /// `redis-sentinel://host:26379?sentinelServiceName=name` (more with `&node=host:port`),
    /// `redis-cluster://host:port?node=host:port`. `rediss-sentinel://` and `rediss-cluster://` use TLS as well, and
    /// `valkey` may stand for `redis` in each of them. Credentials and database are part of it as usual:
    /// `redis://user:password@host:6379/1`. Other schemes and parameters are refused.
    ///
    /// Behind Sentinels and in a cluster, a server that dies takes with it the locks that none of its replicas has yet;
    /// see [`min_replicas`](LockerBuilder::min_replicas) and [`quorum`](Locker::quorum). A lock that a replica has
    /// survives if its ttl is longer than a failover takes.
    ///
    /// The connection is driven by the runtime that this is called on. If that runtime ends or is no longer driven, the
    /// locker opens a new connection on the runtime of its next caller; so a locker may be a static that several
    /// runtimes use, one after the other or at the same time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`] if the URL is malformed or unsupported. [`Error::Unsupported`] for a
    /// [driver](LockerBuilder::driver) that is not compiled in, and for [`min_replicas`](LockerBuilder::min_replicas)
    /// on a cluster. [`Error::Redis`] if the server can't be reached within the [command
    /// timeout](LockerBuilder::command_timeout), or a third of the locker's ttl if that is shorter, or refuses the
    /// credentials or the database. The locker survives later interruptions: it reconnects for ever.
    /// [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what it has opened.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::connect("redis://127.0.0.1:6379").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Uses a client of your own, with the default settings. You initialise it, and you quit it, once no request is
    /// waiting any longer: a waiting request can't tell a client that has quit from one whose server is away.
    ///
    /// Give it a [reconnect policy](fred::types::Builder::set_policy): without one, fred never connects again after an
    /// interruption. Its other settings matter little, as every command sets its own timeout and is written only once.
    ///
    /// A client of a cluster only provides its configuration and its map of the slots. The locker itself opens the
    /// connections that carry its commands to the nodes, on the runtime that uses it: while a slot moves, fred gives
    /// replies to the wrong callers.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tenure::fred::prelude::*;
    ///
    /// let client = Builder::from_config(Config::from_url("redis://127.0.0.1:6379")?)
    ///     .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
    ///     .build()?;
    /// client.init().await?;
    /// let locker = tenure::Locker::new(client);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "fred")]
    #[cfg_attr(docsrs, doc(cfg(feature = "fred")))]
    pub fn new(client: Client) -> Self {
        Self::builder().client(client)
    }

    /// Uses a connection of redis-rs that you have opened, with the default settings: a
    /// [`ConnectionManager`](redis::aio::ConnectionManager), a
    /// [`MultiplexedConnection`](redis::aio::MultiplexedConnection) or a
    /// [`ClusterConnection`](redis::cluster_async::ClusterConnection). See [`RedisConnection`](crate::RedisConnection)
    /// for what each of them can do.
    ///
    /// Each operation has its own timeout. If the connection has a shorter one, that one wins. And the connection is
    /// yours to replace: if it leads to a primary that has become a replica, requests wait until it leads to a primary
    /// again.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let client = tenure::redis::Client::open("redis://127.0.0.1:6379")?;
    /// let locker = tenure::Locker::with_redis(client.get_connection_manager().await?);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "redis")]
    #[cfg_attr(docsrs, doc(cfg(feature = "redis")))]
    pub fn with_redis(connection: impl Into<crate::RedisConnection>) -> Self {
        Self::builder().with_redis(connection)
    }

    /// Uses the embedded store, with the default settings: locks within this process, under the same contract, on
    /// tokio's clock. It is for tests (also under `tokio::time::pause`), and for running without a server.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").await?;
    /// assert!(locker.try_lock("k").await.is_err());
    /// # Ok(())
    /// # }
    /// ```
    pub fn in_memory() -> Self {
        Self::builder().in_memory()
    }

    /// Connects to a majority of independent servers, with the default settings: for locks that must survive the loss
    /// of a server and its memory.
    ///
    /// One server, alone or under Sentinels, is enough for most uses: a lock is lost now and then, and its guard
    /// reports it. A quorum needs as many servers as it has nodes, and one call to each of them per lock, renewal and
    /// release; in return a lock stays held, and stays exclusive, while fewer than half of the nodes are away or have
    /// lost their memory. The guard is the same: a majority renews it, and its own deadline ends it at the latest.
    ///
    /// The URLs are those of plain servers ([`connect`](Locker::connect)): not replicas of each other, not a cluster,
    /// not under Sentinels. Their number is odd: 3 or 5, or 1 if you will add more one day. Nodes that are away when
    /// this is called join when they come back, as long as a majority is there now.
    ///
    /// # How it works, and what it relies on
    ///
    /// It is [Redlock](https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/): a lock is held when
    /// more than half of the nodes have granted it, within a time that is small compared to the ttl. On top of it:
    ///
    /// - **Restart window.** A node that has been up for less than the [restart window](LockerBuilder::restart_window)
    ///   (60 s) may have forgotten what it granted, and doesn't vote: [`Error::NotVoting`]. No [ttl](LockRequest::ttl)
    ///   can be longer. So a new quorum grants its first lock once its nodes have been up for a window;
    ///   [`lock`](Locker::lock) waits through that. In tests, and on nodes that write everything to disk before they
    ///   reply, [`RestartWindow::NodesNeverForget`](crate::RestartWindow) removes this wait.
    /// - **Healing.** A node that was away, or lost its memory, gets the held locks back with their next renewals, once
    ///   it votes. So a guard survives any number of nodes that are away one after another, as long as each is back
    ///   before a majority is away. After a restart that takes a window, up to 2 s more because servers report their
    ///   uptime in whole seconds, and a renewal.
    /// - **Fencing tokens** ([why](https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html)) are
    ///   agreed on by ballot: the client proposes one number to all nodes. Each node grants only a number that is
    ///   greater than the last one it knows, or than its own clock if it knows none, and no further ahead than the
    ///   restart window. Two majorities share a node. Either that node remembers the earlier number, and has granted a
    ///   greater one; or it has forgotten it, and its clock had passed the earlier number before it voted again. So
    ///   tokens grow from holder to holder. A number that a node has from before a restart, from an old dump or a
    ///   truncated file, counts for no more than its clock. This relies on three things: a node's clock is not set back
    ///   by more than the time it was away, nor put forward right after a restart; a node forgets only in a restart,
    ///   not by a flush or an eviction; and all clients that share locks have set the same window. Clients' clocks may
    ///   be wrong by hours: that costs their first request another round trip.
    ///
    /// As with any lock, nodes' clocks must run at about the same speed as ours ([`drift`](LockerBuilder::drift)).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidNodes`] for no nodes, an even number of them (it tolerates no more failures than one node
    /// fewer), the same node twice (whatever its addresses, as far as it reports which server it is), a cluster or
    /// Sentinels. [`Error::InvalidUrl`] for a URL that is malformed or unsupported. [`Error::InvalidTtl`] if the
    /// locker's ttl is longer than the restart window. [`Error::Unsupported`] for a [driver](LockerBuilder::driver)
    /// that is not compiled in, and for [`min_replicas`](LockerBuilder::min_replicas). [`Error::Quorum`] if no majority
    /// could be reached in the time for a [connection](LockerBuilder::command_timeout), with each node's own error.
    /// Later, wherever [`Error::Redis`] is documented, [`Error::Quorum`] reports the failed nodes instead.
    /// [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what it has opened.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), tenure::Error> {
    /// let nodes = ["redis://10.0.0.1", "redis://10.0.0.2", "redis://10.0.0.3"];
    /// let locker = tenure::Locker::quorum(nodes).await?;
    /// let guard = locker.lock("k").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn quorum<I: IntoIterator<Item: AsRef<str>>>(urls: I) -> Result<Self, Error> {
        Self::builder().quorum(urls).await
    }

    /// Returns a builder with the default settings; end it with [`connect`](LockerBuilder::connect),
    /// [`connect_lazily`](LockerBuilder::connect_lazily), [`quorum`](LockerBuilder::quorum), `client`, `with_redis`,
    /// [`in_memory`](LockerBuilder::in_memory) or [`in_memory_with`](LockerBuilder::in_memory_with).
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let builder = tenure::Locker::builder().ttl(Duration::from_secs(10)).prefix("billing:");
    /// let locker = builder.in_memory();
    /// ```
    pub fn builder() -> LockerBuilder {
        LockerBuilder::default()
    }

    /// Requests a lock and waits for it, without limit unless one is [set](LockRequest::wait_at_most).
    ///
    /// # Turns
    ///
    /// Waiters are notified of releases. As a fallback, the first waiter for a key in each process also checks the lock
    /// about once a second ([`poll_every`](LockerBuilder::poll_every)), since other libraries send no notification.
    /// Within a process, waiters are served first in, first out. Between processes, the server keeps a second queue,
    /// called the *line* here, in which each waiting process has one place, in order of arrival. A release gives the
    /// lock to the head of the line in the same step, so no newcomer overtakes a waiter, with these exceptions:
    ///
    /// - A process that has the lock serves its own waiters for up to 16 turns or 100 ms in a row, whichever is over
    ///   first, before it goes to the end of the line ([`fair`](LockRequest::fair) requests have one turn each).
    /// - When a lock expires, or another library releases it, the next process that asks may get it.
    /// - When a request for [several keys](Locker::lock_all) gets its turn at one of them, it may also take keys that
    ///   were just reserved for other waiters. Each waiter can be overtaken like this once and is then next.
    /// - On a quorum there is no line: the process that asks at the right moment gets the lock.
    ///
    /// A process that dies in the line, or doesn't poll its request, costs the others 1.5 s when its turn comes, once;
    /// up to 3 s if it had several places. Another library sees an ordinary key all the while, also in the moment
    /// between the release and the next holder's confirmation.
    ///
    /// The request keeps waiting through lost connections, failovers and servers that are loading. See [`LockRequest`]
    /// for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn lock(&self, key: impl Into<Key>) -> LockRequest {
        LockRequest::new(self.shared.clone(), vec![key.into()], WhenRefused::Wait)
    }

    /// Requests a lock once, and fails with [`Error::NotObtained`] if another holds it.
    ///
    /// See [`LockRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let guard = locker.try_lock("k").await?;
    /// assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_lock(&self, key: impl Into<Key>) -> LockRequest {
        LockRequest::new(self.shared.clone(), vec![key.into()], WhenRefused::GiveUp)
    }

    /// Requests a lock as configured: with the builder's [`retry`](LockerBuilder::retry), or once. The request can
    /// override this with [`retry`](LockRequest::retry) or [`wait_at_most`](LockRequest::wait_at_most).
    ///
    /// See [`LockRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    /// use tenure::{Locker, Retry};
    ///
    /// let locker = Locker::in_memory();
    /// let four_attempts = Retry::linear(Duration::from_millis(100)).max_retries(3);
    /// let guard = locker.obtain("k").retry(four_attempts).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn obtain(&self, key: impl Into<Key>) -> LockRequest {
        LockRequest::new(self.shared.clone(), vec![key.into()], self.obtains())
    }

    /// Requests several locks at once, all or none, and waits for them: one guard, one renewal and one loss for the
    /// whole set.
    ///
    /// The server takes them in one step, so requests for overlapping sets can't deadlock, in whatever order they name
    /// their keys. A request waits in the line for one of its keys that another holds, and holds none meanwhile. When
    /// it is its turn there, and another of its keys is held, it goes to the end of that key's line. So it may be
    /// overtaken by those who want fewer keys.
    ///
    /// Readers that come later wait behind it only at the key in whose line it is. So it gets in however many read one
    /// of its keys. Where two of its keys have readers at any time, it may wait for as long as they go on.
    ///
    /// On the embedded store, a request for several keys holds back only readers and permits. It takes its keys when
    /// all are free, in no order with those who wait for one key, so either side may starve.
    ///
    /// On a cluster, all keys must lie in one slot; a common hash tag ensures that: `{invoices}:1`, `{invoices}:2`. See
    /// [`LockRequest`] for options, errors and cancel safety; no keys, or the same key twice, is [`Error::InvalidKey`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock_all(["account:1", "account:2"]).await?;
    /// assert_eq!(guard.keys().len(), 2);
    /// assert!(locker.try_lock("account:2").await.is_err());
    /// # Ok(())
    /// # }
    /// ```
    pub fn lock_all<I: IntoIterator<Item: Into<Key>>>(&self, keys: I) -> LockRequest {
        LockRequest::new(self.shared.clone(), keys.into_iter().map(Into::into).collect(), WhenRefused::Wait)
    }

    /// Requests several locks once, all or none, and fails with [`Error::NotObtained`] if another holds one of them.
    ///
    /// See [`lock_all`](Locker::lock_all), and [`LockRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let held = locker.lock("b").await?;
    /// assert!(matches!(locker.try_lock_all(["a", "b"]).await, Err(Error::NotObtained { .. })));
    /// assert!(locker.try_lock("a").await?.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_lock_all<I: IntoIterator<Item: Into<Key>>>(&self, keys: I) -> LockRequest {
        LockRequest::new(self.shared.clone(), keys.into_iter().map(Into::into).collect(), WhenRefused::GiveUp)
    }

    /// Requests several locks like [`lock_all`](Locker::lock_all), and waits as [`obtain`](Locker::obtain) does.
    ///
    /// See [`LockRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let held = locker.lock("b").await?;
    /// let refused = locker.obtain_all(["a", "b", "c"]).await;
    /// assert!(matches!(refused, Err(Error::NotObtained { key, .. }) if key == "b".into()));
    /// assert_eq!(locker.inspect("a").await?, None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn obtain_all<I: IntoIterator<Item: Into<Key>>>(&self, keys: I) -> LockRequest {
        LockRequest::new(self.shared.clone(), keys.into_iter().map(Into::into).collect(), self.obtains())
    }

    /// Requests a share of the key as a reader, and waits for it: any number of readers hold a key together, and no
    /// writer holds it meanwhile. A writer is whoever [locks](Locker::lock) the key, through this or another library.
    ///
    /// Each reader has a guard with a ttl and renewals of its own, so a reader that dies keeps writers waiting until
    /// its own ttl ends, and for no longer. All else is as for a lock: [options, errors and cancel
    /// safety](LockRequest).
    ///
    /// # Who comes first
    ///
    /// **Writers come first**: while a writer waits, readers that come later wait behind it. It gets the key when the
    /// readers that hold it have left. A writer that dies while it waits holds readers back for up to 2 s. A
    /// [`try_lock`](Locker::try_lock) doesn't wait, and holds nobody back. A request for
    /// [several keys](Locker::lock_all) holds readers back at one of them at a time.
    ///
    /// **Nobody who waits starves**: readers and writers wait in one line, except for requests for [several
    /// keys](Locker::lock_all) on the embedded store. However many writers come, the readers in the line get their
    /// turn, and those that wait there one after another enter together. A [`try_read`](Locker::try_read) takes no
    /// place in the line. It is refused for as long as others wait.
    ///
    /// **A [quorum](Locker::quorum) has no line**, and readers can starve there. A writer that waits announces itself
    /// to the nodes, which admit no reader until it has had the key, or has died. So readers get the key only when no
    /// writer of another process waits.
    ///
    /// A [token](LockRequest::token) that is a reader already is admitted at once, as it would wait for itself
    /// otherwise. Its guards end one by one when they are dropped or expire; an explicit
    /// [`release`](LockGuard::release) of any of them ends all.
    ///
    /// A writer becomes a reader by [`downgrade`](LockGuard::downgrade). Readers of other libraries are not known here,
    /// nor are these to them: to another library, the key is taken by one holder.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let (one, another) = (locker.read("prices").await?, locker.read("prices").await?);
    /// assert!(locker.try_lock("prices").await.is_err());
    /// one.release().await?;
    /// another.release().await?;
    /// let writer = locker.lock("prices").await?;
    /// # writer.release().await
    /// # }
    /// ```
    pub fn read(&self, key: impl Into<Key>) -> LockRequest {
        self.lock(key).sharing(Mode::Read, 0)
    }

    /// Requests a share of the key as a [reader](Locker::read) once, and fails with [`Error::NotObtained`] if a writer
    /// holds the key, or others wait for it.
    ///
    /// See [`LockRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let writer = locker.lock("prices").await?;
    /// assert!(matches!(locker.try_read("prices").await, Err(Error::NotObtained { .. })));
    /// # writer.release().await
    /// # }
    /// ```
    pub fn try_read(&self, key: impl Into<Key>) -> LockRequest {
        self.try_lock(key).sharing(Mode::Read, 0)
    }

    /// Requests one of `limit` permits for the key, and waits for it: at most `limit` holders have the key at a time,
    /// each with a guard of its own. The permit of a holder that dies comes back when its ttl ends.
    ///
    /// The caller brings the limit; the server stores none. A request counts those who hold a permit, whatever limit
    /// they came with, and is admitted if there are fewer than its own limit. So a limit can be changed at any time: a
    /// smaller one admits nobody until enough have gone, and ends no permit. [`holders`](Locker::holders) lists who has
    /// one.
    ///
    /// Nobody who [locks](Locker::lock) or [reads](Locker::read) the key holds it at the same time. Waiters stand in
    /// one line, as for a lock. A [token](LockRequest::token) that has a permit gets it again at once; its guards count
    /// as one holder.
    ///
    /// A [quorum](Locker::quorum) has no permits: counting doesn't compose, as each of two majorities of its nodes may
    /// count fewer holders than there are.
    ///
    /// # Errors
    ///
    /// Those of any [`LockRequest`], and [`Error::InvalidLimit`] for a limit of 0; [`Error::Unsupported`] on a quorum.
    /// In either case, nothing was sent.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let licences = 2;
    /// let one = locker.permit("cad", licences).await?;
    /// let another = locker.permit("cad", licences).await?;
    /// assert!(locker.try_permit("cad", licences).await.is_err());
    /// one.release().await?;
    /// let third = locker.permit("cad", licences).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn permit(&self, key: impl Into<Key>, limit: usize) -> LockRequest {
        self.lock(key).sharing(Mode::Permit, limit)
    }

    /// Requests one of `limit` [permits](Locker::permit) once, and fails with [`Error::NotObtained`] if none is free,
    /// or others wait for one.
    ///
    /// See [`LockRequest`] for options, errors and cancel safety; [`Error::InvalidLimit`] and [`Error::Unsupported`] as
    /// for [`permit`](Locker::permit).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Error, Locker};
    ///
    /// let locker = Locker::in_memory();
    /// let permit = locker.try_permit("cad", 1).await?;
    /// assert!(matches!(locker.try_permit("cad", 1).await, Err(Error::NotObtained { .. })));
    /// # permit.release().await
    /// # }
    /// ```
    pub fn try_permit(&self, key: impl Into<Key>, limit: usize) -> LockRequest {
        self.try_lock(key).sharing(Mode::Permit, limit)
    }

    /// Turns a lease back into a guard: renews the lock at once, and from then on like any other guard.
    ///
    /// The guard has no metadata, and no bounds ([`hold_at_least`](LockRequest::hold_at_least),
    /// [`hold_at_most`](LockRequest::hold_at_most)). It is renewed at the [locker's
    /// interval](LockerBuilder::renew_every). When it is dropped, the lock is released in the background, unless
    /// another guard relies on it by the same token, or the lease was [created from a token](Lease::new) rather than
    /// from a guard: then only an explicit release ends it.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if the lease no longer holds the lock. `adopt` does not obtain it again; for that, use
    /// [`obtain`](Locker::obtain) with the lease's [`token`](LockRequest::token). [`Error::InvalidTtl`] and the like if
    /// the lease can't work; [`Error::ValidityExpired`] if too little of the ttl was left when the reply came;
    /// [`Error::Redis`] if the server could not be reached, or failed; [`Error::NotReplicated`] if too few
    /// [replicas](LockerBuilder::min_replicas) acknowledged the renewal in time; [`Error::Closed`];
    /// [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the lock to the lease, as a failure does; it may have been renewed once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let lease = locker.lock("k").await?.into_lease();
    /// let guard = locker.adopt(lease).await?;
    /// guard.release().await
    /// # }
    /// ```
    pub async fn adopt(&self, lease: Lease) -> Result<LockGuard, Error> {
        self.adopt_and_renew(&lease, self.shared.settings.renewal).await
    }

    /// Adopts a lease like [`adopt`](Locker::adopt), with the given renewal.
    pub(crate) async fn adopt_and_renew(&self, lease: &Lease, renewal: Renewal) -> Result<LockGuard, Error> {
        let drift = self.shared.settings.drift;
        let ttl = self.validate(lease, lease.ttl())?;
        renewal.validate(ttl, drift)?;
        let shared = &self.shared;
        Shared::check_runtime()?;
        let runtime = shared.runtime()?;
        shared.await_late_releases(lease.owned()).await?;
        let sent = Instant::now();
        let owned = Owned { grant: Some(GrantId::random()), ..lease.owned().clone() };
        let claim = shared.claim(owned.clone(), lease.owned().grant, ttl, &runtime).await?;
        let taken = suspension::read(sent);
        if !drift.suffices(drift.deadline(taken.real, ttl).saturating_duration_since(taken.now), ttl) {
            return Err(Error::ValidityExpired);
        }
        let grant = Grant { taken: Some(taken), ..Grant::new(sent, ttl, lease.fencing_token()) };
        let is_voted_on = shared.store.capabilities().undoes_attempts;
        let hold = Hold::new(owned, Box::default(), &grant, drift, renewal.into(), shared.origin, is_voted_on);
        if !claim.keep() {
            return Err(Error::Closed);
        }
        Ok(LockGuard::start(hold, shared, &runtime))
    }

    /// Makes sure that the server keeps a lease's lock for at least this long from now; never shortens it.
    ///
    /// To extend the lock or obtain it again in one call, use [`obtain`](Locker::obtain) with the lease's
    /// [`token`](LockRequest::token).
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if the lease no longer holds the lock; otherwise those of [`adopt`](Locker::adopt), except
    /// [`Error::ValidityExpired`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the lock held; its ttl may be longer.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let lease = locker.lock("k").await?.into_lease();
    /// locker.ensure(&lease, Duration::from_secs(300)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn ensure(&self, lease: &Lease, at_least: Duration) -> Result<(), Error> {
        let at_least = self.validate(lease, at_least)?;
        self.shared.extend(lease.owned(), at_least).await
    }

    /// Runs `body` under a lock: waits for the lock, runs the body for as long as it is held, and releases it. For
    /// other requests, [`LockRequest::scope`] does the same.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the lock is lost while the body runs; the body is then dropped, wherever it was. Also if the
    /// release finds that the lock was lost; then the body has finished, and its output is discarded. Any error of the
    /// request for the lock ([`LockRequest`]). If the body is done and only the release could not be confirmed, `scope`
    /// returns its output: the release goes on in the background.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the body and releases the lock in the background.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let sum = locker.scope("k", async |guard| {
    ///     assert!(guard.is_held());
    ///     40 + 2
    /// });
    /// assert_eq!(sum.await?, 42);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn scope<T>(&self, key: impl Into<Key>, body: impl AsyncFnOnce(&LockGuard) -> T) -> Result<T, Error> {
        self.lock(key).scope(body).await
    }

    /// Returns the current holder of a lock, if there is one: through this or another library. Of several who share the
    /// key, the one whose ttl ends last. A key that only stays taken for [some time](LockRequest::hold_at_least) has no
    /// holder.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`]; [`Error::Redis`] if the server could not be reached, or failed; [`Error::Closed`];
    /// [`Error::NoRuntime`] outside a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// It only reads.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("k").metadata("host-3").await?;
    /// let holder = locker.inspect("k").await?.expect("it is held");
    /// assert_eq!(holder.metadata, b"host-3");
    /// assert_eq!(holder.token, *guard.token());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn inspect(&self, key: impl Into<Key>) -> Result<Option<Holder>, Error> {
        let (key, shared) = (self.readable(key)?, &self.shared);
        shared.store.inspect(&key, shared.command_timeout).await
    }

    /// Returns all current holders of a key: the one who has locked it, all of its [readers](Locker::read), or all who
    /// have a [permit](Locker::permit); those first whose ttl ends last. A token that holds it by several guards is
    /// listed once.
    ///
    /// A long list is read in parts, so that the server serves others in between: a holder that comes or goes meanwhile
    /// may be in the list or not.
    ///
    /// # Errors
    ///
    /// Those of [`inspect`](Locker::inspect), and [`Error::Unsupported`] on a store that shares no keys.
    ///
    /// # Cancel safety
    ///
    /// It only reads.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let one = locker.permit("cad", 3).metadata("host-1").await?;
    /// let another = locker.permit("cad", 3).metadata("host-2").await?;
    /// assert_eq!(locker.holders("cad").await?.len(), 2);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn holders(&self, key: impl Into<Key>) -> Result<Vec<Holder>, Error> {
        let (key, shared) = (self.readable(key)?, &self.shared);
        shared.store.holders(&key, shared.command_timeout).await
    }

    /// Returns the key, if the server can be asked about it.
    fn readable(&self, key: impl Into<Key>) -> Result<Key, Error> {
        let key = key.into();
        key.validate()?;
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Shared::check_runtime()?;
        Ok(key)
    }

    /// Returns the locks whose keys begin with this, with their holders, in the order of their keys; at most `at_most`
    /// of them.
    ///
    /// It is for people and their tools: it looks at every key of every server, by `SCAN`, in steps between which the
    /// server serves others. A key is taken for a lock if it holds a string with a ttl, and has a fencing token beside
    /// it or begins with a [random](Token::random) token. So most locks of other libraries are left out, as are locks
    /// without fencing tokens whose token was [chosen](LockRequest::token).
    ///
    /// What is obtained or released meanwhile may be there or not.
    ///
    /// # Errors
    ///
    /// [`Error::Redis`] if a server could not be reached, or failed: then no locks are returned, rather than some of
    /// them. On a quorum a majority is enough. [`Error::Unsupported`] through a [connection](Locker::with_redis) of
    /// your own to a cluster, which doesn't list its nodes. [`Error::Closed`]. [`Error::NoRuntime`] outside a tokio
    /// runtime.
    ///
    /// # Cancel safety
    ///
    /// It only reads. Each step takes no longer than the [command timeout](LockerBuilder::command_timeout).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let guard = locker.lock("invoices:42").metadata("host-3").await?;
    /// for (key, holder) in locker.list("invoices:", 100).await? {
    ///     println!("{key}: {}", holder.metadata.escape_ascii());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn list(&self, prefix: impl AsRef<[u8]>, at_most: usize) -> Result<Vec<(Key, Holder)>, Error> {
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Shared::check_runtime()?;
        let (store, timeout) = (&self.shared.store, self.shared.command_timeout);
        let mut locks = Vec::new();
        for key in store.find_keys(prefix.as_ref(), timeout).await? {
            if locks.len() >= at_most {
                break;
            }
            let holder = match store.inspect(&key, timeout).await {
                // It holds something else by now.
                Err(error) if error.refusal() == Some("WRONGTYPE") => None,
                holder => holder?,
            };
            if let Some(holder) = holder.filter(Holder::is_of_a_lock) {
                locks.push((key, holder));
            }
        }
        Ok(locks)
    }

    /// Looks for what endangers locks on the servers behind this locker: a policy that evicts keys, no persistence,
    /// replicas that locks don't wait for, a clock that is far off, missing permissions, a version that was never
    /// tested.
    ///
    /// Run it when a service starts, or by hand with the command `tenure doctor`. A command that the user may not run
    /// is a finding as well. Whether the user may subscribe to notifications can't be checked. It looks at each primary
    /// of a cluster and at each node of a quorum. Those that can't be reached are among the findings. On the embedded
    /// store it finds nothing.
    ///
    /// To find out what the user may do, it writes keys that begin with the locker's prefix and `tenure-probe-`, and
    /// deletes them; should that fail, they expire within a second. It takes no longer than the
    /// [command timeout](LockerBuilder::command_timeout).
    ///
    /// # Errors
    ///
    /// [`Error::Redis`] if the server can't be reached, or failed; [`Error::Unsupported`] through a
    /// [connection](Locker::with_redis) of your own to a cluster; [`Error::Closed`]; [`Error::NoRuntime`] outside a
    /// tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves at most probe keys, which expire within a second.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(locker: tenure::Locker) -> Result<(), tenure::Error> {
    /// for finding in locker.diagnose().await?.findings {
    ///     eprintln!("{}: {}; {}", finding.severity, finding.what, finding.advice);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn diagnose(&self) -> Result<Diagnosis, Error> {
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Shared::check_runtime()?;
        self.shared.store.diagnose(None, self.shared.command_timeout).await
    }

    /// Ends the lock of this key, whoever holds it: a holder that hangs, say, or one of another library. Returns
    /// whether there was anything to end.
    ///
    /// All [readers](Locker::read), or all who have a [permit](Locker::permit), lose the key together.
    ///
    /// The lock goes to the first waiter in the line, as after any release. So does a key that stays taken for [some
    /// time](LockRequest::hold_at_least) although nobody holds it. Fencing tokens go on growing. A key of another type
    /// is no lock: the error has the code `WRONGTYPE`, and nothing is deleted.
    ///
    /// The holder isn't asked, and goes on working until its next renewal, up to a third of the ttl by default: then
    /// its guard reports [`Loss::Missing`](crate::Loss::Missing), or [`Loss::Taken`](crate::Loss::Taken) if another has
    /// the lock by then. In the meantime there may be two holders. A store that checks [fencing
    /// tokens](LockGuard::fencing_token) refuses the earlier one as soon as it has seen the later one.
    ///
    /// A waiter that has just been given the lock and hasn't confirmed it yet keeps its turn, and this returns false:
    /// call it again if that one is to lose the lock too.
    ///
    /// On a [quorum](Locker::quorum), all nodes are asked. It succeeds when a majority has no lock any longer: then no
    /// renewal succeeds, and a node that was away frees its key when the ttl ends. It returns when every node has
    /// replied, or can no longer run the request, so that it ends no lock that is obtained later. If a node is silent,
    /// that takes about 1.8 s with the default [command timeout](LockerBuilder::command_timeout).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidKey`]; [`Error::Redis`] if the server could not be reached, or failed; [`Error::Unsupported`]
    /// through a [`ClusterConnection`](Locker::with_redis) of redis-rs, which may send a command twice;
    /// [`Error::Closed`]; [`Error::NoRuntime`] outside a tokio runtime. After a timeout or a lost connection the lock
    /// may have ended all the same, and a repeat would end the next holder's: look with [`inspect`](Locker::inspect)
    /// first.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the lock may or may not end.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use tenure::{Locker, Loss};
    ///
    /// let locker = Locker::in_memory();
    /// let hangs = locker.lock("import").await?;
    /// assert!(locker.force_release("import").await?);
    /// assert!(!locker.force_release("import").await?);
    /// assert_eq!(hangs.lost().await, Loss::Missing); // by its next renewal
    /// # Ok(())
    /// # }
    /// ```
    pub async fn force_release(&self, key: impl Into<Key>) -> Result<bool, Error> {
        self.end_lock_of(key.into(), Whose::All).await
    }

    /// Ends the lock of this key like [`force_release`](Locker::force_release), but only if every holder's token is in
    /// `tokens`; otherwise returns false, and nothing has changed. The server compares the tokens in the step that ends
    /// the lock.
    ///
    /// For tools that show [who holds](Locker::holders) a lock before they end it: a holder that has come since then
    /// keeps its lock. Without tokens, it ends only the time for which a key stays taken although nobody holds it.
    ///
    /// # Errors
    ///
    /// Those of [`force_release`](Locker::force_release).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the lock may or may not end.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let hangs = locker.lock("import").await?;
    /// let shown = [hangs.token().clone()];
    /// hangs.release().await?;
    /// let next = locker.lock("import").await?; // after the holder was shown
    /// assert!(!locker.force_release_of("import", &shown).await?);
    /// next.renew().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn force_release_of(&self, key: impl Into<Key>, tokens: &[Token]) -> Result<bool, Error> {
        self.end_lock_of(key.into(), Whose::Only(tokens.into())).await
    }

    async fn end_lock_of(&self, key: Key, whose: Whose) -> Result<bool, Error> {
        let key = self.readable(key)?;
        let ended = self.shared.store.force_release(&key, &whose, self.shared.command_timeout).await?;
        let ended = ended == Verdict::Done;
        debug!(name: "tenure.force_released", %key, ended, "ended the lock of whoever held it");
        Ok(ended)
    }

    /// Refuses all new requests, ends waiting ones with [`Error::Closed`], and waits for the releases in flight: those
    /// of dropped guards, and of abandoned attempts.
    ///
    /// It doesn't depend on stalled tasks: if a release is left to a future that nobody polls, or to a runtime that is
    /// not driven, `close` does it itself.
    ///
    /// Call it at the end of a program: it finishes what the runtime's shutdown would cut off. Guards that are still
    /// held stay held and are still renewed, those of a [`WatchDog`](crate::WatchDog) too. If the server no longer
    /// replies, this waits until the ttls have freed the locks; [`close_within`](Locker::close_within) doesn't.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting; the locker stays closed, and the releases go on.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// drop(locker.lock("k").await?);
    /// locker.close().await;
    /// assert!(matches!(locker.lock("k").await, Err(tenure::Error::Closed)));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(&self) {
        self.refuse_new_requests();
        self.shared.finish_cleanups().await;
    }

    /// Closes like [`close`](Locker::close), and waits no longer than `limit`. Returns how many releases are not done
    /// yet; zero when all are done.
    ///
    /// The remaining releases go on in the background for as long as the runtime lives; after that the ttls free the
    /// locks. Outside a tokio runtime there is no clock to wait by, so it doesn't wait at all.
    ///
    /// # Cancel safety
    ///
    /// The same as for [`close`](Locker::close).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// drop(locker.lock("k").await?);
    /// let left = locker.close_within(Duration::from_secs(5)).await;
    /// if left > 0 {
    ///     eprintln!("{left} locks stay until their ttl ends");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close_within(&self, limit: Duration) -> usize {
        let releases = self.refuse_new_requests();
        if Shared::check_runtime().is_ok() {
            // The return value counts what is left when the time is up.
            drop(tokio::time::timeout(limit, self.shared.finish_cleanups()).await);
        }
        releases.len()
    }

    /// Closes the locker when the returned value is dropped, and waits for the releases in flight, up to `limit`.
    ///
    /// For programs that hold a guard until `main` returns; [`CloseOnDrop`] lists its limits.
    ///
    /// ```
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::time::Duration;
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let closes = locker.close_on_drop(Duration::from_secs(2));
    /// drop(locker.lock("k").await?);
    /// drop(closes); // the key is free now
    /// assert!(matches!(locker.lock("k").await, Err(tenure::Error::Closed)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn close_on_drop(&self, limit: Duration) -> CloseOnDrop {
        CloseOnDrop::new(self.clone(), limit)
    }

    /// Ends waiting requests, and refuses new ones. Returns the tracker that counts the releases still in flight.
    pub(crate) fn refuse_new_requests(&self) -> &TaskTracker {
        self.shared.closed.cancel();
        let releases = &self.shared.releases;
        releases.close();
        releases
    }

    /// Returns what a request of `obtain` does when it is refused.
    fn obtains(&self) -> WhenRefused {
        self.shared.settings.retry.clone().map_or(WhenRefused::GiveUp, WhenRefused::Retry)
    }

    /// Refuses a lease that can't work. Returns the ttl in the server's unit.
    fn validate(&self, lease: &Lease, ttl: Duration) -> Result<Duration, Error> {
        if self.shared.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        Key::validate_all(lease.keys())?;
        self.shared.settings.drift.validate(ttl)
    }

    pub(crate) fn from_shared(shared: Shared) -> Self {
        Self { shared: Arc::new(shared) }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Locker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locker")
            .field("store", &self.shared.store)
            .field("settings", &self.shared.settings)
            .field("closed", &self.shared.closed.is_cancelled())
            .finish()
    }
}
