//! Connections for subscriptions, which carry nothing else. In a cluster there is one to each node with channels.

use std::collections::{HashMap, HashSet};
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use redis::{PushInfo, PushKind};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::super::task::Home;
use super::super::{Calling, Driving, Ended, Listener, Listening, Nodes, PubSub, SUBSCRIBING};
use super::cluster::RedisNodes;
use super::convert;
use super::link::Link;
use super::origin::Origin;
use super::stream::Endpoint;
use crate::store::redis::slot::slot_of;
use crate::store::redis::url::Address;
use crate::{RedisError, RedisErrorKind};

/// How many redirections one subscription follows.
const REDIRECTIONS: u32 = 5;

pub(super) struct RedisPubSub {
    origin: Arc<Origin>,
    home: Home<()>,
    nodes: Option<Arc<RedisNodes>>,
}

impl RedisPubSub {
    pub(super) fn new(origin: Arc<Origin>, home: Home<()>, nodes: Option<Arc<RedisNodes>>) -> Self {
        Self { origin, home, nodes }
    }
}

impl PubSub for RedisPubSub {
    fn runtime(&self) -> Option<Handle> {
        self.home.runtime()
    }

    fn open(&self, listener: Arc<dyn Listener>) -> Calling<'_, (Box<dyn Listening>, Driving)> {
        Box::pin(async move {
            let (opened, to_drive) = unbounded_channel();
            let pushes = Arc::new(Pushes { listener, leaving: Mutex::default() });
            let connected = Connected {
                origin: self.origin.clone(),
                nodes: self.nodes.clone(),
                links: Mutex::default(),
                pushes,
                opened,
            };
            if self.nodes.is_none() {
                connected.link_to(None).await?;
            }
            Ok((Box::new(connected) as Box<dyn Listening>, Box::pin(drive(to_drive)) as Driving))
        })
    }
}

/// Drives the connections until one of them ends: then all are opened again, and all waiters look.
async fn drive(mut to_drive: UnboundedReceiver<Opened>) -> RedisError {
    let mut drivers = JoinSet::new();
    loop {
        select! {
            Some(Opened { link, ended }) = to_drive.recv() => {
                drivers.spawn(async move {
                    select! {
                        () = ended => {}
                        () = link.given_up() => {}
                    }
                    link.broken()
                });
            }
            Some(broken) = drivers.join_next() => return broken.unwrap_or_else(|_| closed()),
            else => return closed(),
        }
    }
}

fn closed() -> RedisError {
    RedisError::new(RedisErrorKind::Io, "the connection for subscriptions was closed")
}

/// A connection that was opened, to be driven.
struct Opened {
    link: Arc<Link>,
    ended: Ended,
}

struct Connected {
    origin: Arc<Origin>,
    nodes: Option<Arc<RedisNodes>>,
    /// The connections that were opened: to the server, or to nodes.
    links: Mutex<HashMap<Option<Address>, Arc<Link>>>,
    pushes: Arc<Pushes>,
    opened: UnboundedSender<Opened>,
}

/// Where messages go to.
struct Pushes {
    listener: Arc<dyn Listener>,
    /// The sharded channels that we are leaving. If the server says of any other that it has ended, the slot has moved.
    leaving: Mutex<HashSet<Bytes>>,
}

impl Pushes {
    /// Takes a message. Returns whether the connection is of no use any more.
    fn take(&self, push: &PushInfo) -> bool {
        let bytes = |value: Option<&redis::Value>| match value {
            Some(redis::Value::BulkString(bytes)) => bytes.clone(),
            Some(redis::Value::SimpleString(text)) => text.clone().into_bytes(),
            _ => Vec::new(),
        };
        match push.kind {
            PushKind::Message | PushKind::SMessage => match &push.data[..] {
                [redis::Value::BulkString(channel), redis::Value::BulkString(message)] => {
                    self.listener.message(channel, message);
                }
                parts => self.listener.message(&bytes(parts.first()), &bytes(parts.get(1))),
            },
            // redis-rs takes this for the reply to whatever is in flight.
            PushKind::SUnsubscribe => return !self.leaving().remove(&bytes(push.data.first())[..]),
            _ => {}
        }
        false
    }

    fn leaving(&self) -> MutexGuard<'_, HashSet<Bytes>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connected {
    /// Returns the connection to the node, or to the only server. Opens it if there is none.
    async fn link_to(&self, node: Option<Address>) -> Result<Arc<Link>, RedisError> {
        if let Some(link) = self.links().get(&node) {
            return Ok(link.clone());
        }
        let endpoint = match &node {
            Some(node) => Endpoint::Tcp(node.clone()),
            None => self.origin.endpoint().await?,
        };
        let pushes = self.pushes.clone();
        let own: Arc<Mutex<Option<std::sync::Weak<Link>>>> = Arc::default();
        let link_of = own.clone();
        let on_push = move |push: PushInfo| {
            if pushes.take(&push) {
                let link = link_of.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|it| it.upgrade());
                link.inspect(|link| link.give_up());
            }
        };
        let opening = Link::open_for_pushes(&endpoint, &self.origin.tls, &self.origin.login, SUBSCRIBING, on_push);
        let (link, ended) = opening.await?;
        *own.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(&link));
        self.links().insert(node, link.clone());
        self.opened.send(Opened { link: link.clone(), ended }).map_err(|_| closed())?;
        Ok(link)
    }

    /// Subscribes to a sharded channel at the node that owns its slot.
    async fn subscribe_sharded(&self, nodes: &RedisNodes, channel: &Bytes) -> Result<(), RedisError> {
        let slot = slot_of(channel);
        for _ in 0..=REDIRECTIONS {
            let node = nodes.owner_of(slot).or_else(|| nodes.seeds().first().cloned()).ok_or_else(closed)?;
            match sharded(&*self.link_to(Some(node.clone())).await?, "SSUBSCRIBE", channel).await {
                Err(error) if error.code() == Some("MOVED") => {
                    let owner = crate::store::redis::router::moved_to(&error, &node);
                    nodes.learn(slot, owner.ok_or(error)?);
                }
                subscribed => return subscribed,
            }
        }
        Err(RedisError::new(RedisErrorKind::Cluster, "the nodes of the cluster point at each other"))
    }

    fn links(&self) -> MutexGuard<'_, HashMap<Option<Address>, Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listening for Connected {
    fn subscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        Box::pin(async move {
            let Some(nodes) = &self.nodes else {
                let mut connection = self.link_to(None).await?.connection();
                let channels: Vec<&[u8]> = channels.iter().map(|channel| &channel[..]).collect();
                return within(connection.subscribe(channels)).await;
            };
            for channel in channels {
                self.subscribe_sharded(nodes, channel).await?;
            }
            Ok(())
        })
    }

    fn unsubscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        Box::pin(async move {
            let Some(nodes) = &self.nodes else {
                let mut connection = self.link_to(None).await?.connection();
                let channels: Vec<&[u8]> = channels.iter().map(|channel| &channel[..]).collect();
                return within(connection.unsubscribe(channels)).await;
            };
            for channel in channels {
                let node = nodes.owner_of(slot_of(channel));
                let link = self.links().get(&node).cloned();
                if let Some(link) = link {
                    self.pushes.leaving().insert(channel.clone());
                    sharded(&link, "SUNSUBSCRIBE", channel).await?;
                }
            }
            Ok(())
        })
    }

    fn check(&self, _: Vec<Bytes>) -> Calling<'_, bool> {
        Box::pin(async move {
            let links: Vec<Arc<Link>> = self.links().values().cloned().collect();
            for link in links {
                match link.call("PING", &[], Instant::now() + SUBSCRIBING).await {
                    // Any reply is a sign that the server is alive, even a refusal of the command.
                    Err((error, _)) if error.code().is_none() => return Err(error),
                    _ => {}
                }
            }
            Ok(true)
        })
    }

    /// A connection that breaks is not replaced here: its driver ends, and with it all that was opened together.
    fn disturbed(&mut self) -> Calling<'_, ()> {
        Box::pin(pending())
    }

    fn is_undisturbed(&self) -> bool {
        self.links().values().all(|link| !link.is_over())
    }
}

/// Sends one of the commands for sharded channels, for which redis-rs has no methods. The server confirms by a push,
/// which is not one of the replies that a connection for commands has.
async fn sharded(link: &Link, command: &str, channel: &Bytes) -> Result<(), RedisError> {
    let command = convert::command(command, std::slice::from_ref(channel));
    match within(link.connection().send_packed_command(&command)).await? {
        refusal @ redis::Value::ServerError(_) => convert::reply(refusal).map(drop),
        _ => Ok(()),
    }
}

async fn within<T>(call: impl Future<Output = redis::RedisResult<T>>) -> Result<T, RedisError> {
    timeout(SUBSCRIBING, call).await.map_err(|_| convert::late())?.map_err(convert::failed)
}
