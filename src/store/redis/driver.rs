//! The interface between the store and the Redis client that carries its commands.
//!
//! Everything beside this folder is the same for every client: scripts and their replies, batches, the router of a
//! cluster, the subscriptions, the quorum. It knows a client only by the traits in this file, and no type of any. What
//! a client does differently from others is made up for in its own file below.
//!
//! 1. A command is written at most once, unless the client [resends](Connection::resends) it, and its call ends by the
//!    time that it is given. What the server replies comes back, a refusal as an error whose text begins with its code.
//!    A redirection is a refusal like any other.
//! 2. A call that ends without a reply may have run, or may run later. Only where the driver knows better does the
//!    error say that nothing was sent ([`NOT_SENT`]): there was, say, no connection from the call's beginning to its
//!    end.
//! 3. A driver reconnects by itself, and replaces a connection that has fallen silent while calls waited for replies.
//!    In a cluster it sends nothing by itself: it knows the nodes, and opens connections to single ones, which never
//!    reconnect ([`Nodes`]).
//! 4. What drives a connection lives on the runtime that first needed it, or on one that runs, if that one has ended or
//!    stands still.

mod demotion;
mod failure;
#[cfg(feature = "fred")]
pub(super) mod fred;
mod liveness;
#[cfg(feature = "redis")]
pub(super) mod redis;
mod task;
mod value;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::Instant;

#[cfg(any(test, fuzzing))]
pub(super) use self::failure::Peer;
pub(super) use self::liveness::Liveness;
#[cfg(feature = "redis")]
pub use self::redis::RedisConnection;
pub(super) use self::value::Value;
use super::url::{Address, Target};
use crate::error::NOT_SENT;
use crate::{Error, RedisError};

/// The Redis client under a locker; for [`LockerBuilder::driver`](crate::LockerBuilder::driver).
///
/// The promises are the same with either. What differs is cost, and what else a program uses: see the
/// [features](crate#features). Connecting with a client whose feature is not enabled is
/// [`Error::Unsupported`].
///
/// # Examples
///
/// ```no_run
/// use tenure::{Driver, Locker};
///
/// # async fn example() -> Result<(), tenure::Error> {
/// let builder = Locker::builder().driver(Driver::default());
/// let locker = builder.connect("redis://127.0.0.1:6379").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Driver {
    /// [fred](https://docs.rs/fred), with feature `fred`. The default, unless only `redis` is enabled.
    Fred,
    /// [redis-rs](https://docs.rs/redis), with feature `redis`.
    Redis,
}

impl Default for Driver {
    fn default() -> Self {
        if cfg!(all(feature = "redis", not(feature = "fred"))) { Self::Redis } else { Self::Fred }
    }
}

impl Driver {
    #[cfg(not(all(feature = "fred", feature = "redis")))]
    fn is_missing(self) -> Error {
        Error::Unsupported(match self {
            Self::Fred => "tenure was compiled without its feature `fred`; enable it, or choose another driver",
            Self::Redis => "tenure was compiled without its feature `redis`; enable it, or choose another driver",
        })
    }
}

/// A call in progress.
pub(super) type Calling<'a, T> = Pin<Box<dyn Future<Output = Result<T, RedisError>> + Send + 'a>>;

/// The connection to a server, or what is known of the nodes of a cluster. Closed when it is dropped.
pub(super) trait Connection: fmt::Debug + Send + Sync + 'static {
    /// Sends a command and returns the server's reply. Not for a cluster.
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value>;

    /// Returns the address of the server, as errors show it.
    fn address(&self) -> String;

    /// Returns the nodes, if this is a cluster.
    fn nodes(&self) -> Option<Arc<dyn Nodes>>;

    fn is_cluster(&self) -> bool;

    fn is_connected(&self) -> bool;

    /// Returns whether the client sends a command again by itself when its connection breaks. Then the server may run a
    /// call twice, and the reply is that to the last run (`resent.rs`).
    fn resends(&self) -> bool {
        false
    }

    /// Returns how many connections have been made: each is counted before anything is sent on it.
    fn connections_made(&self) -> u64;

    /// Returns why it can't be asked how many replicas have acknowledged a write, if it can't.
    fn why_not_replicated(&self) -> Option<&'static str> {
        self.is_cluster().then_some(NOT_IN_A_CLUSTER)
    }

    /// Waits until a connection that was opened lazily is there.
    ///
    /// # Errors
    ///
    /// Returns why it was not made within `timeout`. It goes on trying.
    fn ready(&self, timeout: Duration) -> Calling<'_, ()>;

    /// Begins a call, which is sent at `now` or a moment later. Fails if there is no connection and calls don't wait
    /// for one.
    fn begin(&self, now: Instant) -> Result<Sent, RedisError>;

    /// Ends a call with a reply, if only a refusal.
    fn answered(&self);

    /// Ends a call that has failed, and returns what is known of the failure: why there is no connection, and whether
    /// nothing was sent.
    fn failed(&self, sent: Sent, error: RedisError) -> RedisError;

    /// Returns the state of the connection for an operation that is about to wait for a call. Cheap while there is a
    /// connection, as many operations wait.
    fn will_wait(&self, now: Instant) -> Sent;

    /// Returns the error of an operation that has waited in vain, whether it became part of a call or not.
    fn unheard(&self, sent: Sent) -> RedisError;

    /// Notes that the server is about to be sent a `WAIT`, and may reply to nothing behind it until then. Whoever waits
    /// behind it has no sign of a dead connection.
    fn blocks(&self, _until: Instant) {}

    /// Notes that the server has replied to the `WAIT` that might have lasted until then.
    fn no_longer_blocks(&self, _until: Instant) {}

    /// Replaces a connection that hands out replies to other requests. All calls in flight on it fail.
    fn replace(&self);

    /// Notes that the server has refused a call because it is a replica. A script's refusal is part of its reply, so no
    /// client sees it. The address, or the Sentinels, may lead to the new primary by now, and after many a failover
    /// nobody closes the connections to the old one: so it is [replaced](Self::replace), when that is
    /// [due](demotion::Demotion::is_due).
    ///
    /// Does nothing where the client is not ours to reconnect, or where the router asks for the owner of the slot.
    fn refused_by_replica(&self) {}

    /// Returns the runtime that the connection is driven on, if the connection is ours.
    fn runtime(&self) -> Option<Handle>;

    /// Returns what opens connections for subscriptions to the same server or cluster.
    fn pub_sub(&self) -> Arc<dyn PubSub>;
}

/// `WAIT` would have to follow its write to the same node, through every migration of its slot.
const NOT_IN_A_CLUSTER: &str = "a cluster can't be asked how many replicas have acknowledged one write";

/// What becomes of a call while there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WithoutConnection {
    /// It waits for one, until its time is over.
    CallsWait,
    /// It fails at once, so that none pile up.
    CallsFail,
}

/// The state of the connection when a call was about to be sent.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    pub(super) at: Instant,
    /// How many connections had been made before, where they are counted.
    pub(super) made: u64,
    /// There was none.
    pub(super) without: bool,
}

impl Sent {
    /// For a call that belongs to another, which has been sent before.
    pub(super) fn in_part(connection: &dyn Connection) -> Self {
        Self { made: connection.connections_made(), ..Self::with_connection(Instant::now()) }
    }

    /// For a call that is sent at once.
    pub(super) fn with_connection(at: Instant) -> Self {
        Self { at, made: 0, without: false }
    }
}

/// Ends a call, and returns its result with what is known of a failure.
///
/// It takes the result and not the call, whose future would be stored twice.
pub(super) fn heard<T>(connection: &dyn Connection, sent: Sent, answer: Result<T, Error>) -> Result<T, Error> {
    match answer {
        Err(Error::Redis(error)) => Err(connection.failed(sent, error).into()),
        answer => {
            connection.answered();
            answer
        }
    }
}

/// What a client knows of the nodes of a cluster.
pub(super) trait Nodes: Send + Sync + 'static {
    /// Returns the nodes that the user has named.
    fn seeds(&self) -> Vec<Address>;

    /// Returns the owner of a slot, as far as it is known.
    fn owner_of(&self, slot: u16) -> Option<Address>;

    /// Returns the primaries that are known.
    fn primaries(&self) -> Vec<Address>;

    /// Asks for a new map of the slots, in the background.
    fn refresh(&self);

    /// Opens a connection to one node, on the runtime that polls this.
    fn open(&self, node: &Address) -> Calling<'static, (Arc<dyn NodeConnection>, Ended)>;
}

/// Drives a connection; ready when the connection has ended, which is closed when this is dropped.
pub(super) type Ended = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection to one node. It never reconnects: what is queued on it when it breaks is never sent.
pub(super) trait NodeConnection: Send + Sync {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value>;

    /// Sends `ASKING` and the command, with nothing in between.
    fn send_asking(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value>;
}

/// Opens connections for subscriptions. Keeps no other connection open.
pub(super) trait PubSub: Send + Sync + 'static {
    /// Returns the runtime that the connection for commands is driven on, if that one is ours and still exists.
    fn runtime(&self) -> Option<Handle>;

    /// Opens a connection, on the runtime that polls this. The second value drives it and passes its messages on.
    fn open(&self, listener: Arc<dyn Listener>) -> Calling<'_, (Box<dyn Listening>, Driving)>;
}

/// Drives a connection for subscriptions; ready when it has ended, and closes it when dropped.
pub(super) type Driving = Pin<Box<dyn Future<Output = RedisError> + Send>>;

/// A connection for subscriptions. In a cluster, its channels are sharded.
///
/// Its calls end within [`SUBSCRIBING`] for each channel, without a reply at the latest.
pub(super) trait Listening: Send + Sync {
    /// Subscribes to the channels. Ready once the server has confirmed it.
    fn subscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()>;

    fn unsubscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()>;

    /// Makes sure that the server still replies; on a cluster, every node with subscriptions. Returns whether the
    /// subscriptions to these channels are as they were.
    fn check(&self, channels: Vec<Bytes>) -> Calling<'_, bool>;

    /// Waits until the connection breaks, or was replaced by one without subscriptions.
    fn disturbed(&mut self) -> Calling<'_, ()>;

    /// Returns whether neither has happened since [`disturbed`](Self::disturbed) was last ready.
    fn is_undisturbed(&self) -> bool;
}

/// How long a server may take to reply to what concerns subscriptions. No lock depends on it.
pub(super) const SUBSCRIBING: Duration = Duration::from_secs(2);

/// Receives messages.
pub(super) trait Listener: Send + Sync {
    fn message(&self, channel: &[u8], message: &[u8]);

    /// Messages may have been missed.
    #[cfg_attr(not(feature = "fred"), expect(dead_code, reason = "redis-rs keeps all messages"))]
    fn missed(&self);
}

/// Connects to a server, or learns what the nodes of a cluster are.
///
/// # Errors
///
/// Whatever keeps the first connection from being made: nothing is retried here. A client that is not compiled in.
pub(super) async fn open(driver: Driver, target: &Target, timeout: Duration) -> Result<Arc<dyn Connection>, Error> {
    match driver {
        #[cfg(feature = "fred")]
        Driver::Fred => fred::open(target, timeout).await,
        #[cfg(feature = "redis")]
        Driver::Redis => redis::open(target, timeout).await,
        #[cfg(not(all(feature = "fred", feature = "redis")))]
        missing => Err(missing.is_missing()),
    }
}

/// Connects in the background, now or when the server comes up.
///
/// # Errors
///
/// Fails for a client that is not compiled in, never because of the server or the network.
pub(super) fn open_lazily(
    driver: Driver,
    target: &Target,
    timeout: Duration,
    without: WithoutConnection,
) -> Result<Arc<dyn Connection>, Error> {
    match driver {
        #[cfg(feature = "fred")]
        Driver::Fred => fred::open_lazily(target, timeout, without),
        #[cfg(feature = "redis")]
        Driver::Redis => redis::open_lazily(target, timeout, without),
        #[cfg(not(all(feature = "fred", feature = "redis")))]
        missing => Err(missing.is_missing()),
    }
}

/// Opens a connection for a test.
#[cfg(test)]
pub(super) async fn connection_to(url: &str) -> Arc<dyn Connection> {
    open(Driver::default(), &super::url::parse(url).unwrap(), Duration::from_secs(10)).await.unwrap()
}

/// Opens connections to single nodes for a test, whether they form a cluster or not.
#[cfg(test)]
pub(super) fn nodes_of(url: &str) -> Arc<dyn Nodes> {
    let target = super::url::parse(url).unwrap();
    match Driver::default() {
        #[cfg(feature = "fred")]
        Driver::Fred => fred::nodes_of(&target),
        #[cfg(feature = "redis")]
        Driver::Redis => redis::nodes_of(&target),
        #[cfg(not(all(feature = "fred", feature = "redis")))]
        missing => panic!("{}", missing.is_missing()),
    }
}

/// Opens connections for subscriptions for a test, on the caller's runtime.
#[cfg(test)]
pub(super) fn pub_sub_of(url: &str) -> Arc<dyn PubSub> {
    let target = super::url::parse(url).unwrap();
    match Driver::default() {
        #[cfg(feature = "fred")]
        Driver::Fred => fred::pub_sub_of(&target),
        #[cfg(feature = "redis")]
        Driver::Redis => redis::pub_sub_of(&target),
        #[cfg(not(all(feature = "fred", feature = "redis")))]
        missing => panic!("{}", missing.is_missing()),
    }
}

fn not_sent(error: RedisError) -> RedisError {
    let text = format!("{}{NOT_SENT}", error.details());
    error.with_text(text)
}

#[cfg(test)]
mod tests {
    use tenure_test_support::StandsStill;
    use tokio::time::advance;

    use super::*;
    use crate::store::redis::url;

    const TIMEOUT: Duration = Duration::from_secs(1);
    const SERVER: &str = "redis://127.0.0.1:1";
    const CLUSTER: &str = "redis-cluster://127.0.0.1:1";

    /// Opens connections on a runtime that stands still.
    fn stalled(urls: &[&str], without: WithoutConnection) -> (StandsStill, Vec<Arc<dyn Connection>>) {
        let still = StandsStill::new();
        let entered = still.handle().enter();
        let mut connections = Vec::new();
        for url in urls {
            for driver in [Driver::Fred, Driver::Redis] {
                match open_lazily(driver, &url::parse(url).unwrap(), TIMEOUT, without) {
                    Ok(connection) => connections.push(connection),
                    Err(error) => assert!(matches!(error, Error::Unsupported(_)), "{error}"),
                }
            }
        }
        drop(entered);
        (still, connections)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_whose_runtime_stands_still_goes_on_with_those_who_have_waited_in_vain() {
        let (still, connections) = stalled(&[SERVER, CLUSTER], WithoutConnection::CallsWait);
        for connection in connections {
            assert_eq!(connection.runtime().unwrap().id(), still.handle().id());
            for _ in 0..2 {
                let waits = connection.will_wait(Instant::now());
                advance(TIMEOUT).await;
                assert_eq!(connection.unheard(waits).kind(), crate::RedisErrorKind::Timeout);
            }
            assert_eq!(connection.runtime().unwrap().id(), Handle::current().id(), "{connection:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_was_never_made_as_its_runtime_stands_still_is_made_by_those_who_need_it() {
        let (_still, connections) = stalled(&[SERVER], WithoutConnection::CallsFail);
        for connection in connections {
            for _ in 0..2 {
                assert!(Error::from(connection.begin(Instant::now()).err().unwrap()).was_not_sent());
                advance(TIMEOUT).await;
            }
            assert_eq!(connection.runtime().unwrap().id(), Handle::current().id(), "{connection:?}");
        }
    }

    #[cfg(not(all(feature = "fred", feature = "redis")))]
    #[tokio::test]
    async fn a_client_that_is_not_compiled_in_is_named() {
        use crate::Locker;
        let missing = if cfg!(feature = "fred") { Driver::Redis } else { Driver::Fred };
        let builder = Locker::builder().driver(missing);
        let error = builder.clone().connect("redis://127.0.0.1:1").await.unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        let feature = if cfg!(feature = "fred") { "feature `redis`" } else { "feature `fred`" };
        assert!(error.to_string().contains(feature), "{error}");
        let error = builder.quorum(["redis://127.0.0.1:1"]).await.unwrap_err();
        assert!(error.to_string().contains(feature), "{error}");
    }
}
