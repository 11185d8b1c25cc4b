//! Nodes that the test plays itself, under paused time.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::advance;

use super::super::super::driver::{Calling, Ended, NodeConnection};
use super::*;

#[test]
fn keys_are_told_from_other_arguments() {
    let args = ["script", "2", "a", "b", "c"].map(Bytes::from);
    assert_eq!(keys_and_rest(&args), Some((&args[2..4], &args[4..])));
    assert_eq!(keys_and_rest(&args[..3]), None);
    assert_eq!(slot_of_first_key(&args), slot_of(b"a"));
}

/// What a node replies to every command.
#[derive(Clone)]
enum Replies {
    Ok,
    /// A refusal.
    Refuses(&'static str),
    /// A refusal after which the client closes the connection, and of which it doesn't know what was refused.
    Closes(&'static str),
}

/// Three nodes, by their ports. By the map, the first one owns all slots.
#[derive(Default)]
struct Played {
    replies: Mutex<HashMap<u16, Replies>>,
    /// Which nodes were asked, one after the other.
    asked: Mutex<Vec<u16>>,
    refreshed: AtomicUsize,
    /// The map is empty.
    is_reset: AtomicBool,
}

fn node(port: u16) -> Address {
    Address::new("node", port)
}

struct PlayedNodes(Arc<Played>);

impl Nodes for PlayedNodes {
    fn seeds(&self) -> Vec<Address> {
        vec![node(1)]
    }

    fn owner_of(&self, _: u16) -> Option<Address> {
        (!self.0.is_reset.load(Ordering::Relaxed)).then(|| node(1))
    }

    fn primaries(&self) -> Vec<Address> {
        if self.0.is_reset.load(Ordering::Relaxed) { Vec::new() } else { [1, 2, 3].map(node).into() }
    }

    fn refresh(&self) {
        self.0.refreshed.fetch_add(1, Ordering::Relaxed);
    }

    fn open(&self, node: &Address) -> Calling<'static, (Arc<dyn NodeConnection>, Ended)> {
        let (played, port, closed) = (self.0.clone(), node.port, Arc::<Notify>::default());
        let ended = closed.clone();
        let ended: Ended = Box::pin(async move { ended.notified().await });
        Box::pin(async move { Ok((Arc::new(PlayedNode { played, port, closed }) as Arc<dyn NodeConnection>, ended)) })
    }
}

struct PlayedNode {
    played: Arc<Played>,
    port: u16,
    closed: Arc<Notify>,
}

impl NodeConnection for PlayedNode {
    fn send(&self, _: &'static str, _: Vec<Bytes>, _: Instant) -> Calling<'_, Value> {
        self.played.asked.lock().unwrap().push(self.port);
        let replies = self.played.replies.lock().unwrap().get(&self.port).cloned();
        Box::pin(async move {
            match replies.unwrap_or(Replies::Ok) {
                Replies::Ok => Ok(Value::Integer(self.port.into())),
                Replies::Refuses(text) => Err(RedisError::new(RedisErrorKind::Unknown, text)),
                Replies::Closes(text) => {
                    self.closed.notify_one();
                    Err(RedisError::new(RedisErrorKind::Timeout, text))
                }
            }
        })
    }

    fn send_asking(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        self.send(command, args, until)
    }
}

struct Bench {
    played: Arc<Played>,
    cluster: Cluster,
}

impl Bench {
    fn new() -> Self {
        let played = Arc::<Played>::default();
        Self { cluster: Cluster::new(Arc::new(PlayedNodes(played.clone()))), played }
    }

    fn reply(&self, port: u16, replies: Replies) {
        self.played.replies.lock().unwrap().insert(port, replies);
    }

    /// Sends a script with this key. Returns what was replied, and which nodes were asked for it.
    async fn send(&self, key: &'static str) -> (Result<Value, Error>, Vec<u16>) {
        let sent = Sent { command: EVAL, source: None };
        let args = || ["script", "1", key].map(Bytes::from).into();
        let reply = self.cluster.send(sent, &args, Instant::now() + Duration::from_secs(1)).await;
        (reply, std::mem::take(&mut self.played.asked.lock().unwrap()))
    }

    /// Sends it to that node at once.
    async fn assert_reaches(&self, key: &'static str, port: u16) {
        let (reply, asked) = self.send(key).await;
        assert_eq!((reply.unwrap(), asked), (Value::Integer(port.into()), vec![port]));
    }
}

/// The slot of `a` is 15495.
const MOVED: Replies = Replies::Refuses("MOVED 15495 node:2");
const DOWN: &str = "CLUSTERDOWN Hash slot not served";

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_serve_a_slot_is_left_for_its_new_owner() {
    for down in [Replies::Refuses(DOWN), Replies::Closes(DOWN)] {
        let bench = Bench::new();
        bench.assert_reaches("a", 1).await;
        bench.reply(1, down);
        bench.reply(3, MOVED);
        let (refused, asked) = bench.send("a").await;
        assert_eq!((refused.unwrap_err().code(), asked), (Some("CLUSTERDOWN"), vec![1]));
        assert_eq!(bench.played.refreshed.load(Ordering::Relaxed), 1, "the map is asked for anew");
        let (reply, asked) = bench.send("a").await;
        assert_eq!(reply.unwrap(), Value::Integer(2), "{asked:?}");
        assert!(!asked.contains(&1), "{asked:?}");
        bench.assert_reaches("a", 2).await;
        // It is asked again, once the client's map is all that is known.
        bench.reply(1, Replies::Ok);
        advance(AVOIDED).await;
        bench.assert_reaches("b", 1).await;
        bench.assert_reaches("a", 2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_without_a_slot_keeps_its_others_and_takes_none_from_another() {
    let bench = Bench::new();
    bench.assert_reaches("a", 1).await;
    bench.assert_reaches("b", 1).await;
    bench.cluster.learn(slot_of(b"c"), &node(2));
    bench.reply(1, Replies::Refuses(DOWN));
    bench.send("a").await.0.unwrap_err();
    bench.reply(1, Replies::Ok);
    bench.assert_reaches("b", 1).await;
    bench.assert_reaches("c", 2).await;
    // While all are down, any of them is asked, and each call ends.
    for port in 1..=3 {
        bench.reply(port, Replies::Refuses(DOWN));
    }
    for _ in 0..10 {
        let (refused, asked) = bench.send("a").await;
        assert_eq!((refused.unwrap_err().code(), asked.len()), (Some("CLUSTERDOWN"), 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_closed_the_connection_holds_up_no_other_slot_of_the_node() {
    let bench = Bench::new();
    bench.assert_reaches("b", 1).await;
    bench.reply(1, Replies::Closes(DOWN));
    bench.send("a").await.0.unwrap_err();
    // What drives the connection ends.
    yield_now().await;
    bench.reply(1, Replies::Ok);
    for port in 2..=3 {
        bench.reply(port, Replies::Refuses("MOVED 3300 node:1"));
    }
    let (reply, asked) = bench.send("b").await;
    assert_eq!(reply.unwrap(), Value::Integer(1), "{asked:?}");
    bench.assert_reaches("b", 1).await;
}

#[tokio::test(start_paused = true)]
async fn nodes_that_were_known_are_asked_when_the_map_has_become_empty() {
    let bench = Bench::new();
    bench.assert_reaches("a", 1).await;
    // The user has named no other node, and this one knows of none.
    bench.reply(1, Replies::Refuses(DOWN));
    bench.played.is_reset.store(true, Ordering::Relaxed);
    for port in 2..=3 {
        bench.reply(port, MOVED);
    }
    bench.send("a").await.0.unwrap_err();
    bench.reply(2, Replies::Ok);
    assert_eq!(bench.send("a").await.0.unwrap(), Value::Integer(2));
    bench.assert_reaches("a", 2).await;
}

#[tokio::test(start_paused = true)]
async fn owners_that_nodes_have_named_are_asked_when_no_map_was_ever_known() {
    let bench = Bench::new();
    bench.played.is_reset.store(true, Ordering::Relaxed);
    bench.reply(1, MOVED);
    bench.send("a").await.0.unwrap();
    // Its connection may be closed by now.
    bench.cluster.replace();
    bench.reply(1, Replies::Refuses(DOWN));
    bench.send("b").await.0.unwrap_err();
    assert_eq!(bench.send("b").await.0.unwrap(), Value::Integer(2));
}
