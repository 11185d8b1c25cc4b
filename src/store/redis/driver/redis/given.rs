//! Connections of the caller's.

use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use redis::aio::{ConnectionLike, ConnectionManager, MultiplexedConnection, SendError};
use redis::cluster_async::ClusterConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ProtocolVersion, PushInfo, PushKind, RedisResult};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::{
    Calling, Connection, Driving, Listener, Listening, Nodes, PubSub, SUBSCRIBING, Sent, Value, not_sent,
};
use super::convert;
use crate::{RedisError, RedisErrorKind};

/// A connection of redis-rs that you have opened, for [`Locker::with_redis`](crate::Locker::with_redis).
///
/// It is made of any of redis-rs' asynchronous connections, which you may use for other commands as well:
///
/// - A [`ConnectionManager`] connects again after an interruption. While it does, calls wait, up to their timeout.
/// - A [`MultiplexedConnection`] never does. Once it has broken, every operation fails.
/// - A [`ClusterConnection`] follows its cluster. Give it a response timeout. While slots move, some calls fail, and
///   are tried again; a [URL](crate::Locker::connect) of the cluster serves better there. If a connection breaks before
///   the reply, redis-rs sends the call again, and the server may run it twice. So a release first asks whether the
///   lock is held, which takes another round trip, and [`force_release`](crate::Locker::force_release) is
///   [unsupported](crate::Error::Unsupported): its second run could end the next holder's lock. For the same reason,
///   [`release`](crate::LockGuard::release) of a lock by a [token](crate::LockRequest::token) of yours may end what
///   another guard has obtained by the same token at that moment.
///
/// None of them can be asked for a connection that subscribes to channels. So waiters are not notified of releases by
/// other processes: they check the lock every [`poll_every`](crate::LockerBuilder::poll_every), and when its ttl ends.
/// With a client of the same server they are notified: [`subscribing_by`](RedisConnection::subscribing_by).
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = tenure::redis::Client::open("redis://127.0.0.1:6379")?;
/// let connection = tenure::RedisConnection::from(client.get_connection_manager().await?);
/// let locker = tenure::Locker::with_redis(connection.subscribing_by(client));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RedisConnection {
    given: Given,
    /// Opens connections for subscriptions.
    client: Option<Client>,
}

#[derive(Clone)]
enum Given {
    Multiplexed(MultiplexedConnection),
    Manager(ConnectionManager),
    Cluster(ClusterConnection),
}

impl From<MultiplexedConnection> for RedisConnection {
    fn from(connection: MultiplexedConnection) -> Self {
        Self { given: Given::Multiplexed(connection), client: None }
    }
}

impl From<ConnectionManager> for RedisConnection {
    fn from(manager: ConnectionManager) -> Self {
        Self { given: Given::Manager(manager), client: None }
    }
}

impl From<ClusterConnection> for RedisConnection {
    fn from(cluster: ClusterConnection) -> Self {
        Self { given: Given::Cluster(cluster), client: None }
    }
}

impl fmt::Debug for RedisConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.given {
            Given::Multiplexed(_) => "RedisConnection(MultiplexedConnection)",
            Given::Manager(_) => "RedisConnection(ConnectionManager)",
            Given::Cluster(_) => "RedisConnection(ClusterConnection)",
        })
    }
}

/// Uses the caller's connection.
pub(in super::super::super) fn borrowed(connection: RedisConnection) -> Arc<dyn Connection> {
    Arc::new(Borrowed { connection, is_broken: AtomicBool::new(false) })
}

#[derive(Debug)]
struct Borrowed {
    connection: RedisConnection,
    /// It has broken, and will never be connected again.
    is_broken: AtomicBool,
}

impl Borrowed {
    async fn call(&self, command: &'static str, args: &[Bytes], until: Instant) -> Result<Value, RedisError> {
        if until <= Instant::now() {
            return Err(not_sent(convert::late()));
        }
        let command = convert::command(command, args);
        match timeout_at(until, self.connection.send(&command)).await {
            Ok(Ok(value)) => convert::reply(value),
            Ok(Err(error)) => {
                if error.is_unrecoverable_error() && matches!(self.connection.given, Given::Multiplexed(_)) {
                    self.is_broken.store(true, Ordering::Relaxed);
                }
                Err(convert::failed(error))
            }
            Err(_) => Err(convert::late()),
        }
    }
}

impl RedisConnection {
    /// Notifies waiters of releases by other processes, over a connection that this client opens for the first waiter.
    /// It must lead to the same server. The connection uses RESP3, whatever the client says. A cluster ignores it.
    ///
    /// See [`RedisConnection`] for an example.
    pub fn subscribing_by(self, client: Client) -> Self {
        Self { client: Some(client), ..self }
    }

    async fn send(&self, command: &Cmd) -> RedisResult<redis::Value> {
        match &self.given {
            Given::Multiplexed(connection) => connection.clone().send_packed_command(command).await,
            Given::Manager(manager) => manager.clone().send_packed_command(command).await,
            Given::Cluster(cluster) => cluster.clone().req_packed_command(command).await,
        }
    }
}

impl Connection for Borrowed {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(async move { self.call(command, &args, until).await })
    }

    /// A cluster's client sends to the nodes by itself.
    fn address(&self) -> String {
        // The connection doesn't tell.
        "the server of the given connection".to_owned()
    }

    fn nodes(&self) -> Option<Arc<dyn Nodes>> {
        None
    }

    fn is_cluster(&self) -> bool {
        matches!(self.connection.given, Given::Cluster(_))
    }

    fn is_connected(&self) -> bool {
        !self.is_broken.load(Ordering::Relaxed)
    }

    /// The client of a cluster does, up to 16 times by default. No setting of a single call keeps it from that, and the
    /// number that was set when it was built can't be read. The others return the error.
    fn resends(&self) -> bool {
        matches!(self.connection.given, Given::Cluster(_))
    }

    fn connections_made(&self) -> u64 {
        0
    }

    fn why_not_replicated(&self) -> Option<&'static str> {
        match self.connection.given {
            Given::Multiplexed(_) => None,
            Given::Manager(_) => {
                Some("a ConnectionManager doesn't tell which connection a write went to; connect by URL instead")
            }
            Given::Cluster(_) => Some(super::super::NOT_IN_A_CLUSTER),
        }
    }

    fn ready(&self, _: Duration) -> Calling<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
        match self.is_broken.load(Ordering::Relaxed) {
            true => Err(not_sent(RedisError::new(RedisErrorKind::Config, BROKEN))),
            false => Ok(Sent::with_connection(now)),
        }
    }

    fn answered(&self) {}

    fn failed(&self, _: Sent, error: RedisError) -> RedisError {
        error
    }

    fn will_wait(&self, now: Instant) -> Sent {
        Sent::with_connection(now)
    }

    fn unheard(&self, _: Sent) -> RedisError {
        convert::late()
    }

    /// It can't be replaced from here.
    fn replace(&self) {}

    fn runtime(&self) -> Option<Handle> {
        None
    }

    fn pub_sub(&self) -> Arc<dyn PubSub> {
        Arc::new(GivenPubSub(self.connection.client.clone().filter(|_| !self.is_cluster())))
    }
}

/// The error of a connection that has broken.
const BROKEN: &str = "the connection has broken, and redis-rs doesn't connect it again: give the locker a \
                      `ConnectionManager` or a URL";

/// Opens connections for subscriptions by the caller's client, if there is one.
struct GivenPubSub(Option<Client>);

impl PubSub for GivenPubSub {
    fn runtime(&self) -> Option<Handle> {
        None
    }

    fn open(&self, listener: Arc<dyn Listener>) -> Calling<'_, (Box<dyn Listening>, Driving)> {
        Box::pin(async move {
            let why = "a connection of your own can't subscribe to releases; give it a client that can, or a URL";
            let client = self.0.as_ref().ok_or_else(|| RedisError::new(RedisErrorKind::Config, why))?;
            let info = client.get_connection_info().clone();
            let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
            let client = Client::open(info.set_redis_settings(settings)).map_err(convert::failed)?;
            let ended = Arc::new(Ended::default());
            let end = ended.clone();
            let on_push = move |push: PushInfo| {
                match (push.kind, &push.data[..]) {
                    (PushKind::Message, [redis::Value::BulkString(channel), redis::Value::BulkString(message)]) => {
                        listener.message(channel, message);
                    }
                    (PushKind::Disconnection, _) => {
                        end.is_over.store(true, Ordering::Release);
                        end.changed.notify_one();
                    }
                    _ => {}
                }
                Ok::<(), SendError>(())
            };
            let config = AsyncConnectionConfig::new().set_push_sender(on_push).set_response_timeout(None);
            let connection = within(client.get_multiplexed_async_connection_with_config(&config)).await?;
            let over = ended.clone();
            let driving: Driving = Box::pin(async move {
                over.changed.notified().await;
                RedisError::new(RedisErrorKind::Io, "the connection for subscriptions was closed")
            });
            Ok((Box::new(Subscribed { connection, ended }) as Box<dyn Listening>, driving))
        })
    }
}

/// The end of a connection, of which redis-rs sends a message.
#[derive(Default)]
struct Ended {
    is_over: AtomicBool,
    changed: Notify,
}

struct Subscribed {
    connection: MultiplexedConnection,
    ended: Arc<Ended>,
}

impl Listening for Subscribed {
    fn subscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        let channels: Vec<&[u8]> = channels.iter().map(|channel| &channel[..]).collect();
        Box::pin(async move { within(self.connection.clone().subscribe(channels)).await })
    }

    fn unsubscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        let channels: Vec<&[u8]> = channels.iter().map(|channel| &channel[..]).collect();
        Box::pin(async move { within(self.connection.clone().unsubscribe(channels)).await })
    }

    fn check(&self, _: Vec<Bytes>) -> Calling<'_, bool> {
        Box::pin(async move {
            // Any reply is a sign that the server is alive, even a refusal of the command.
            within(self.connection.clone().send_packed_command(&convert::command("PING", &[]))).await.map(|_| true)
        })
    }

    /// A connection that breaks is not replaced here: its driving ends.
    fn disturbed(&mut self) -> Calling<'_, ()> {
        Box::pin(pending())
    }

    fn is_undisturbed(&self) -> bool {
        !self.ended.is_over.load(Ordering::Acquire)
    }
}

async fn within<T>(call: impl Future<Output = RedisResult<T>>) -> Result<T, RedisError> {
    timeout(SUBSCRIBING, call).await.map_err(|_| convert::late())?.map_err(convert::failed)
}
