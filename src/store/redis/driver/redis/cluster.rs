//! The nodes of a cluster: a map of the slots of our own, and connections to single nodes.
//!
//! redis-rs' cluster client is not used. It runs commands again whose replies were lost, and where slots move it
//! neither follows an `ASK` beside other traffic nor always comes back.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::super::task::{DriverTask, Home};
use super::super::{Calling, Connection, Ended, NodeConnection, Nodes, PubSub, Sent, Value};
use super::convert;
use super::link::Link;
use super::origin::Origin;
use super::pub_sub::RedisPubSub;
use super::stream::Endpoint;
use crate::error::NOT_SENT;
use crate::store::redis::url::Address;
use crate::{Error, RedisError, RedisErrorKind};

/// The longest that connecting to a node may take.
const CONNECTING: Duration = Duration::from_secs(2);
/// The shortest time between two maps of the slots.
const REFRESH: Duration = Duration::from_millis(250);

/// Knows the nodes of a cluster. Sends nothing but the question for the map of the slots.
pub(super) struct ClusterConnection {
    nodes: Arc<RedisNodes>,
    /// Keeps the map of the slots.
    task: Arc<DriverTask<()>>,
}

pub(super) struct RedisNodes {
    origin: Arc<Origin>,
    map: Mutex<Map>,
    is_stale: Notify,
}

/// Who owns which slots: the first and the last one of each range.
#[derive(Default)]
struct Map(Vec<(u16, u16, Address)>);

impl ClusterConnection {
    /// # Errors
    ///
    /// If none of the nodes tells of the others.
    pub(super) async fn open(origin: Origin) -> Result<Self, Error> {
        let nodes = Arc::new(RedisNodes::new(origin));
        nodes.load().await.map_err(|error| nodes.origin.peer.unreachable(error, None))?;
        Self::on(nodes)
    }

    /// Learns of the nodes in the background. Until then, those that the user has named redirect to the others.
    pub(super) fn open_lazily(origin: Origin) -> Result<Self, Error> {
        let nodes = Arc::new(RedisNodes::new(origin));
        nodes.refresh();
        Self::on(nodes)
    }

    fn on(nodes: Arc<RedisNodes>) -> Result<Self, Error> {
        let here = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let task = AbortOnDropHandle::new(here.spawn(nodes.clone().keep()));
        let again = nodes.clone();
        let task = Arc::new(DriverTask::new(task, move || tokio::spawn(again.clone().keep()))?);
        Ok(Self { nodes, task })
    }

    fn go_on_if_stalled(&self) {
        self.task.go_on_here_if_stalled(self.nodes.origin.timeout / 2);
    }
}

impl Connection for ClusterConnection {
    fn send(&self, _: &'static str, _: Vec<Bytes>, _: Instant) -> Calling<'_, Value> {
        let several = || RedisError::new(RedisErrorKind::Routing, "a cluster has several servers");
        Box::pin(async move { Err(several()) })
    }

    fn address(&self) -> String {
        self.nodes.origin.peer.address().to_owned()
    }

    fn nodes(&self) -> Option<Arc<dyn Nodes>> {
        Some(self.nodes.clone())
    }

    fn is_cluster(&self) -> bool {
        true
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn connections_made(&self) -> u64 {
        0
    }

    fn ready(&self, _: Duration) -> Calling<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
        // The runtime of the nodes' connections may have ended.
        self.task.go_on();
        Ok(Sent::with_connection(now))
    }

    fn answered(&self) {}

    fn failed(&self, _: Sent, error: RedisError) -> RedisError {
        if error.kind() == RedisErrorKind::Timeout {
            self.go_on_if_stalled();
        }
        match error.details().ends_with(NOT_SENT) {
            true => error,
            false => self.nodes.origin.peer.unanswered(error),
        }
    }

    fn will_wait(&self, now: Instant) -> Sent {
        Sent::with_connection(now)
    }

    fn unheard(&self, _: Sent) -> RedisError {
        self.go_on_if_stalled();
        self.nodes.origin.peer.silent()
    }

    /// The router replaces the connections to nodes.
    fn replace(&self) {}

    fn runtime(&self) -> Option<Handle> {
        Some(self.task.go_on())
    }

    fn pub_sub(&self) -> Arc<dyn PubSub> {
        Arc::new(RedisPubSub::new(self.nodes.origin.clone(), Home::of(Some(&self.task)), Some(self.nodes.clone())))
    }
}

impl RedisNodes {
    fn new(origin: Origin) -> Self {
        Self { origin: Arc::new(origin), map: Mutex::default(), is_stale: Notify::new() }
    }

    /// Loads the map whenever it turns out to be stale.
    async fn keep(self: Arc<Self>) {
        loop {
            self.is_stale.notified().await;
            if let Err(error) = self.load().await {
                crate::report::debug!(name: "tenure.slots_failed", %error, "no node tells who owns the slots");
                self.is_stale.notify_one();
            }
            sleep(REFRESH).await;
        }
    }

    /// Asks the nodes, one after the other, who owns the slots: those that are known, then those that the user has
    /// named.
    async fn load(&self) -> Result<(), RedisError> {
        let mut nodes = self.primaries();
        fastrand::shuffle(&mut nodes);
        nodes.extend(self.origin.seeds().iter().cloned());
        let limit = self.origin.timeout.min(CONNECTING);
        let asking = async {
            let mut failure = None;
            for node in &nodes {
                // A node that is away must not take the time of the others.
                match timeout(limit / 2, self.ask(node, limit)).await.unwrap_or_else(|_| Err(convert::late())) {
                    Ok(map) => {
                        *self.map() = map;
                        return Ok(());
                    }
                    Err(error) => failure = Some(error),
                }
            }
            Err(failure.unwrap_or_else(|| RedisError::new(RedisErrorKind::Cluster, "no node of the cluster is known")))
        };
        timeout(limit * 2, asking).await.unwrap_or_else(|_| Err(convert::late()))
    }

    async fn ask(&self, node: &Address, limit: Duration) -> Result<Map, RedisError> {
        let until = Instant::now() + limit;
        let (link, mut driver) = self.link_to(node).await?;
        let args = ["SLOTS".into()];
        let slots = select! {
            biased;
            slots = link.call("CLUSTER", &args, until) => slots.map_err(|(error, _)| error)?,
            () = &mut driver => return Err(link.broken()),
        };
        let Value::Array(ranges) = slots else { return Err(unexpected()) };
        let map: Vec<_> = ranges.iter().filter_map(|range| owned_range(range, node)).collect();
        if map.is_empty() && !ranges.is_empty() {
            return Err(unexpected());
        }
        // A node that has begun anew knows no other. Taken for the map, that would leave only the nodes that the user
        // has named, which may be this one.
        if map.is_empty() && !self.map().0.is_empty() {
            return Err(RedisError::new(RedisErrorKind::Cluster, "the node knows of no slots"));
        }
        Ok(Map(map))
    }

    pub(super) async fn link_to(&self, node: &Address) -> Result<(Arc<Link>, Ended), RedisError> {
        let limit = self.origin.timeout.min(CONNECTING);
        Link::open(&Endpoint::Tcp(node.clone()), &self.origin.tls, &self.origin.login, limit).await
    }

    /// Notes who owns a slot, as a node has said.
    pub(super) fn learn(&self, slot: u16, owner: Address) {
        self.map().0.insert(0, (slot, slot, owner));
        self.refresh();
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads one range of `CLUSTER SLOTS`: the first slot, the last one, the primary, its replicas.
fn owned_range(range: &Value, asked: &Address) -> Option<(u16, u16, Address)> {
    let Value::Array(parts) = range else { return None };
    let [first, last, Value::Array(primary), ..] = &parts[..] else { return None };
    let [host, port, ..] = &primary[..] else { return None };
    let number = |value: &Value| u16::try_from(value.as_i64()?).ok();
    let host = host.to_text().unwrap_or_default();
    let address = match &*host {
        // The address is unknown to that node.
        "?" => return None,
        // The same host as that node's.
        "" => Address { port: number(port)?, ..asked.clone() },
        host => Address::new(host, number(port)?),
    };
    Some((number(first)?, number(last)?, address))
}

fn unexpected() -> RedisError {
    RedisError::new(RedisErrorKind::Protocol, "the node tells the slots in an unknown way")
}

impl Nodes for RedisNodes {
    fn seeds(&self) -> Vec<Address> {
        self.origin.seeds().to_vec()
    }

    fn owner_of(&self, slot: u16) -> Option<Address> {
        let map = self.map();
        map.0.iter().find(|(first, last, _)| (*first..=*last).contains(&slot)).map(|(_, _, owner)| owner.clone())
    }

    fn primaries(&self) -> Vec<Address> {
        let map = self.map();
        let mut all: Vec<Address> = Vec::new();
        for (_, _, owner) in &map.0 {
            if !all.contains(owner) {
                all.push(owner.clone());
            }
        }
        all
    }

    fn refresh(&self) {
        self.is_stale.notify_one();
    }

    fn open(&self, node: &Address) -> Calling<'static, (Arc<dyn NodeConnection>, Ended)> {
        let (node, origin) = (node.clone(), self.origin.clone());
        Box::pin(async move {
            let limit = origin.timeout.min(CONNECTING);
            let (link, driver) = Link::open(&Endpoint::Tcp(node), &origin.tls, &origin.login, limit).await?;
            Ok((link as Arc<dyn NodeConnection>, driver))
        })
    }
}

#[cfg(test)]
pub(super) fn nodes_of(origin: Origin) -> Arc<dyn Nodes> {
    Arc::new(RedisNodes::new(origin))
}

impl fmt::Debug for ClusterConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterConnection").field("primaries", &self.nodes.primaries()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::redis::url::parse;

    /// Replies to `CLUSTER SLOTS` with what the test has put there.
    async fn play(node: TcpListener, slots: Arc<Mutex<String>>) {
        let mut open = Vec::new();
        loop {
            let (mut peer, _) = node.accept().await.unwrap();
            peer.read_exact(&mut [0; "*1\r\n$4\r\nPING\r\n".len()]).await.unwrap();
            peer.write_all(b"+PONG\r\n").await.unwrap();
            peer.read_exact(&mut [0; "*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n".len()]).await.unwrap();
            let slots = slots.lock().unwrap().clone();
            peer.write_all(slots.as_bytes()).await.unwrap();
            open.push(peer);
        }
    }

    #[tokio::test]
    async fn a_node_that_knows_of_no_slots_does_not_take_the_map_away() {
        let node = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let at = node.local_addr().unwrap().port();
        let target = parse(&format!("redis-cluster://127.0.0.1:{at}")).unwrap();
        let nodes = RedisNodes::new(Origin::of(&target, Duration::from_secs(20)).unwrap());
        let slots = Arc::new(Mutex::new("*0\r\n".to_owned()));
        let _node = AbortOnDropHandle::new(tokio::spawn(play(node, slots.clone())));
        // Before anything is known it may be a cluster that is being made.
        nodes.load().await.unwrap();
        assert_eq!(nodes.owner_of(7), None);
        *slots.lock().unwrap() = format!("*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$0\r\n\r\n:{at}\r\n");
        nodes.load().await.unwrap();
        let owner = Some(Address::new("127.0.0.1", at));
        assert_eq!(nodes.owner_of(7), owner);
        *slots.lock().unwrap() = "*0\r\n".to_owned();
        nodes.load().await.unwrap_err();
        assert_eq!(nodes.owner_of(7), owner);
    }

    #[test]
    fn ranges_are_read_as_nodes_write_them() {
        let text = |text: &'static str| Value::Bytes(text.into());
        let range = |host| {
            let node = Value::Array(vec![text(host), Value::Integer(7), text("id"), Value::Array(vec![])]);
            owned_range(&Value::Array(vec![Value::Integer(0), Value::Integer(5), node]), &Address::new("asked", 1))
        };
        assert_eq!(range("a"), Some((0, 5, Address::new("a", 7))));
        assert_eq!(range(""), Some((0, 5, Address::new("asked", 7))));
        assert_eq!(range("?"), None);
        assert_eq!(owned_range(&Value::Array(vec![Value::Integer(0)]), &Address::new("asked", 1)), None);
    }
}
