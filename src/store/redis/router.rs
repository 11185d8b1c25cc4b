//! Sends commands to the server, or in a cluster to the node that decides about their keys.
//!
//! While a slot of a cluster moves, its keys are spread over two nodes. The old node still owns the slot: it serves
//! the keys that it has, and replies `ASK` for those that it doesn't have. The new node serves these to a client that
//! sends `ASKING` right before. Both reply `TRYAGAIN` to a command with several keys of which they have only some.
//! Once the slot has moved, the old node replies `MOVED`.
//!
//! fred 10.1 can't follow an `ASK`. It writes `ASKING` behind the commands in flight and takes the next frame for its
//! reply, whatever that is the reply to. From then on every caller on that connection gets the reply of another. Then
//! it sends the command to the old node again. Measured on Redis 7.0 with a half-moved slot: in 10 s, 48 to 92 locks
//! that others held were granted, with the fencing tokens of other keys, and guards were told that they had lost
//! theirs; no `ASK` led to a decision, so locks with a ttl of 2 s ran out while their slot moved for 8 s. With
//! `max_redirections: 0` in its configuration fred follows nothing, but then reports only "Too many redirections.",
//! without the node. In the options of a single call, zero means the configured number, 5 by default. So:
//!
//! 1. In a cluster no command travels on fred's cluster client, which may follow an `ASK`, for us or for other code
//!    that shares it. It provides the configuration and the map of the slots, and sends nothing.
//! 2. Commands go over plain connections of our own to single nodes. fred doesn't interpret redirections there; they
//!    are read and followed here. A command that was redirected has not run.
//! 3. `ASKING` and its command are written together, and a connection for these carries nothing else. If only `ASKING`
//!    were written, the next command would run as if it had asked.
//! 4. A plain connection never reconnects. After a failure it is dropped with everything that is queued on it, so
//!    nothing is sent late or twice.
//! 5. Every call ends within its timeout. `TRYAGAIN` and too many redirections are transient errors: nothing has run.
//!    A request that gets `TRYAGAIN` is repeated until its timeout.
//! 6. Idle connections are closed, and the number of open ones is bounded.
//!
//! The new node replies `TRYAGAIN` as long as one of several keys doesn't exist, so a lock that was never taken, and
//! has no fence key yet, could not be obtained until the slot has moved. It is obtained all the same: when the old
//! node has replied `ASK` for each of the keys by itself, all of them are on the new node or nowhere, and stay so,
//! since the old node creates no key in a slot that is leaving it. Then the script runs on the new node with only its
//! first key declared; the other keys are passed as arguments.
//!
//! A decision about a key that has moved costs two round trips, and one about a new lock five: 0.6 ms and 1.2 ms on
//! loopback, in a debug build that takes 0.3 ms for one. Operations on keys of a half-moved slot are not batched: a
//! batch has keys on both nodes, so neither could run it.
//!
//! A connection for each node has a second advantage. fred reconnects to all nodes of a cluster together, so one that
//! is dead holds up the commands to all others until the cluster has replaced it. Here it holds up its own. Where its
//! slots are now is asked of the other nodes, which know before fred's map does.

mod node;
mod redirection;

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use fred::bytes_utils::Str;
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, ClusterInterface};
use fred::types::config::{Config, Options, Server};
use fred::types::{ClusterHash, CustomCommand, Value};
use fred::util::redis_keyslot;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, sleep_until};

use self::node::{Asking, InUse, Node};
use self::redirection::{Elsewhere, elsewhere};
use super::script::{EVAL, into_ours};
use crate::Error;

/// How many redirections one command follows.
const REDIRECTIONS: u32 = 5;
/// The pause before the third redirection; it doubles with each one after that. Two nodes may point at each other until
/// both know who owns the slot.
const PAUSE: Duration = Duration::from_millis(4);
/// The first pause after `TRYAGAIN`. It doubles three times.
const TRY_AGAIN: Duration = Duration::from_millis(10);
/// How long a slot counts as half moved after it was last seen to be.
const REMEMBERED: Duration = Duration::from_secs(1);
/// How long after a failure no new connection to the same node is opened.
const RECONNECT: Duration = Duration::from_millis(50);
/// How long after a failure other nodes are asked who owns the slots of a node.
const AVOIDED: Duration = Duration::from_secs(2);
/// How many connections to single nodes are kept, not counting those that only finish their calls.
const CONNECTIONS: usize = 64;

/// Sends commands to the node that decides about their keys.
pub(super) struct Router {
    client: Client,
    /// `None` where the client doesn't connect to a cluster.
    cluster: Option<Cluster>,
}

/// How a script is sent.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a> {
    /// `EVALSHA` or `EVAL`.
    pub(super) command: &'static str,
    /// The text of the script, if it may run with its keys as arguments while their slot moves.
    pub(super) source: Option<&'a Str>,
}

impl Router {
    pub(super) fn new(client: Client) -> Self {
        let cluster = client.is_clustered().then(|| Cluster::new(client.clone()));
        Self { client, cluster }
    }

    /// Further connections to nodes live on the runtime that the client's own connections live on.
    pub(super) fn live_on(&self, runtime: impl FnOnce() -> Option<Handle>) {
        if let Some(cluster) = &self.cluster {
            cluster.state().home = runtime();
        }
    }

    /// Sends a command and returns the reply of the node that ran it. It runs at most once, and the call ends by
    /// `until`.
    ///
    /// `args` builds the arguments; it is called again only if the command has to be sent to another node. The third
    /// argument, after the script and the number of keys, must be the first key.
    ///
    /// fred is told to write the command once and to time out by itself: it would still send a command whose future
    /// was dropped while it waited for a connection.
    pub(super) async fn send(
        &self,
        sent: Sent<'_>,
        args: impl Fn() -> Vec<Value> + Sync,
        until: Instant,
    ) -> Result<Value, Error> {
        match &self.cluster {
            None => once(&self.client, sent.command, args(), until).await,
            // Boxed, so that the common path doesn't carry the size of this one.
            Some(cluster) => Box::pin(cluster.send(sent, &args, until)).await,
        }
    }

    /// Drops the connections to nodes, because one of them can't be trusted.
    pub(super) fn replace(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.state().nodes.clear();
        }
    }

    /// Whether keys may be on the move from one node to another.
    pub(super) fn is_clustered(&self) -> bool {
        self.cluster.is_some()
    }

    /// Returns whether a node has lately replied that the slot is half moved. Operations on its keys are sent one by
    /// one then: neither node could run a batch of them.
    pub(super) fn is_moving(&self, slot: u16) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.is_moving(slot))
    }
}

/// Repeats a call while its keys are on two nodes, until `timeout` is over. Most of the time they meet again after a
/// few milliseconds, as keys of a slot move in batches.
///
/// Not part of [`Router::send`]: there it would hold up what shares the way of the call.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    timeout: Duration,
    call: impl Fn(Duration) -> F,
) -> Result<T, Error> {
    let until = Instant::now() + timeout;
    // A repeat that runs out of time would have an unknown outcome, where this one is known.
    let last_repeat = until - timeout / 4;
    let mut pause = TRY_AGAIN;
    loop {
        let answer = call(until.saturating_duration_since(Instant::now())).await;
        match &answer {
            Err(error) if error.code() == Some("TRYAGAIN") && Instant::now() + pause < last_repeat => {
                sleep(pause).await;
            }
            _ => return answer,
        }
        pause = (pause * 2).min(TRY_AGAIN * 8);
    }
}

/// Runs all of the futures at once. Returns their outputs in their order.
pub(super) async fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.map(|future| (Some(Box::pin(future)), None)).collect();
    poll_fn(|context| {
        let mut is_done = true;
        for (future, output) in &mut running {
            let Some(polled) = future.as_mut().map(|future| future.as_mut().poll(context)) else { continue };
            match polled {
                Poll::Ready(ready) => (*future, *output) = (None, Some(ready)),
                Poll::Pending => is_done = false,
            }
        }
        if is_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}

impl fmt::Debug for Router {
    /// Leaves out the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.cluster.as_ref().map(|cluster| cluster.state().nodes.len());
        f.debug_struct("Router").field("client", &self.client.id()).field("nodes", &nodes).finish()
    }
}

async fn once(client: &Client, command: &'static str, args: Vec<Value>, until: Instant) -> Result<Value, Error> {
    let command = CustomCommand::new_static(command, ClusterHash::FirstKey, false);
    client.with_options(&options(until)?).custom(command, args).await.map_err(into_ours)
}

fn options(until: Instant) -> Result<Options, Error> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        // Not passed on: to fred, zero means no timeout.
        return Err(fred::error::Error::new(ErrorKind::Timeout, "no time left to ask the server").into());
    }
    Ok(Options {
        max_attempts: Some(1),
        timeout: Some(left),
        // Set here, because fred ignores the hash policy of a custom command unless it is a slot.
        cluster_hash: Some(ClusterHash::Offset(2)),
        ..Options::default()
    })
}

/// The nodes of a cluster, one by one.
struct Cluster {
    client: Client,
    /// The client's configuration, for connections to single nodes.
    config: Config,
    state: Mutex<State>,
    /// False while no slot is half moved, so that the common path needs no mutex.
    any_moves: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The runtime for further connections. Without one they live on the runtime of the call that needs them.
    home: Option<Handle>,
    nodes: HashMap<(Server, Asking), Arc<Node>>,
    /// The owners of the slots that were used, as far as they are known to be well.
    owners: HashMap<u16, Server>,
    /// Nodes to which no connection could be opened lately.
    failed: HashMap<Server, Failed>,
    /// Half-moved slots, and when a node last said so.
    moving: HashMap<u16, Instant>,
}

struct Failed {
    at: Instant,
    error: Error,
}

impl Cluster {
    fn new(client: Client) -> Self {
        let config = client.client_config();
        Self { client, config, state: Mutex::default(), any_moves: AtomicBool::new(false) }
    }

    async fn send<F: Fn() -> Vec<Value> + Sync>(
        &self,
        sent: Sent<'_>,
        args: &F,
        until: Instant,
    ) -> Result<Value, Error> {
        let first = args();
        let slot = slot_of(&first);
        let mut first = Some(first);
        let mut server = self.owner_of(slot)?;
        let (mut asking, mut source) = (Asking::No, None);
        for followed in 0.. {
            if let Some(doublings) = u32::checked_sub(followed, 2) {
                sleep_until(until.min(Instant::now() + PAUSE * 2u32.saturating_pow(doublings))).await;
            }
            let answer = self.ask(&server, asking, sent.command, first.take().unwrap_or_else(args), until).await;
            let Err(error) = answer else { return answer };
            match elsewhere(&error, &server) {
                Some(_) if followed >= REDIRECTIONS => return Err(error),
                Some(Elsewhere::Moved(to)) => {
                    self.learn(slot, &to);
                    self.state().moving.remove(&slot);
                    (server, asking, source) = (self.known(to), Asking::No, None);
                }
                Some(Elsewhere::Ask(to)) => {
                    let from = std::mem::replace(&mut server, self.known(to));
                    self.note_moving(slot);
                    (asking, source) = (Asking::Yes, Some(from));
                }
                None => {
                    if error.is_redirection() {
                        self.note_moving(slot);
                    }
                    return match (source, sent.source) {
                        (Some(source), Some(script)) if error.code() == Some("TRYAGAIN") => {
                            self.send_undivided((&source, &server), script, args(), until).await.unwrap_or(Err(error))
                        }
                        _ => Err(error),
                    };
                }
            }
        }
        Err(Error::timeout())
    }

    /// Runs the script on the new node if the old one has none of its keys. Returns `None` if it has not run.
    async fn send_undivided(
        &self,
        (source, target): (&Server, &Server),
        script: &Str,
        args: Vec<Value>,
        until: Instant,
    ) -> Option<Result<Value, Error>> {
        let (keys, rest) = keys_and_rest(&args)?;
        for key in keys {
            let probe = vec![Value::from_static_str("return 1"), Value::Integer(1), key.clone()];
            let answer = self.ask(source, Asking::No, EVAL, probe, until).await;
            match answer.map_err(|error| elsewhere(&error, source)) {
                Err(Some(Elsewhere::Ask(to))) if to == *target => {}
                // The old node has this key, or the whole slot has moved.
                _ => return None,
            }
        }
        let (first, others) = keys.split_first()?;
        let count = i64::try_from(keys.len()).ok()?;
        let mut args = vec![Value::from([TOLD_OF_KEYS, script].concat()), Value::Integer(1), first.clone()];
        args.extend(rest.iter().chain(others).cloned());
        args.push(Value::Integer(count));
        let answer = self.ask(target, Asking::Yes, EVAL, args, until).await;
        match answer {
            // The slot has begun to leave the new node.
            Err(error) if elsewhere(&error, target).is_some() => None,
            answer => Some(answer),
        }
    }

    /// Sends a command to this node, and follows no redirection.
    async fn ask(
        &self,
        server: &Server,
        asking: Asking,
        command: &'static str,
        args: Vec<Value>,
        until: Instant,
    ) -> Result<Value, Error> {
        let (node, _in_use) = self.node(server, asking)?;
        let answer = node.ask(asking, command, args, until).await;
        match &answer {
            Err(error) if node.has_failed(&answer) => {
                tracing::debug!(name: "tenure.node_failed", %server, %error, "a connection to a node is dropped");
                self.forget(server, asking, &node, error);
            }
            _ => {}
        }
        answer
    }

    /// Returns the connection to the node, which may still be opening.
    fn node(&self, server: &Server, asking: Asking) -> Result<(Arc<Node>, InUse), Error> {
        let place = (server.clone(), asking);
        let mut state = self.state();
        if let Some(node) = state.nodes.get(&place) {
            if let Some(in_use) = node.usage.begin() {
                return Ok((node.clone(), in_use));
            }
        }
        // One that could not be opened a moment ago: callers share that failure, too.
        if let Some(Failed { at, error }) = state.failed.get(server) {
            if at.elapsed() < RECONNECT {
                return Err(error.clone());
            }
        }
        let runtime = state.home.clone().map_or_else(Handle::try_current, Ok).map_err(|_| Error::NoRuntime)?;
        let node = Arc::new(Node::open(&self.client, &self.config, server, asking, &runtime));
        let in_use = node.usage.begin().ok_or_else(Error::timeout)?;
        state.nodes.retain(|_, node| !node.usage.is_over());
        if state.nodes.len() >= CONNECTIONS {
            let longest_unused = state.nodes.iter().min_by_key(|(_, node)| node.usage.last_used());
            if let Some(place) = longest_unused.map(|(place, _)| place.clone()) {
                state.nodes.remove(&place);
            }
        }
        state.nodes.insert(place, node.clone());
        Ok((node, in_use))
    }

    /// Drops a connection that has failed. The next call connects again, to whichever node owns the slot by then.
    fn forget(&self, server: &Server, asking: Asking, node: &Arc<Node>, error: &Error) {
        let mut state = self.state();
        let place = (server.clone(), asking);
        if state.nodes.get(&place).is_none_or(|known| !Arc::ptr_eq(known, node)) {
            // Another call was faster.
            return;
        }
        state.nodes.remove(&place);
        state.owners.retain(|_, owner| owner != server);
        state.failed.retain(|_, failed| failed.at.elapsed() < AVOIDED);
        if !node.was_open() {
            state.failed.insert(server.clone(), Failed { at: Instant::now(), error: error.clone() });
        }
        drop(state);
        // One poll queues the request. Its result may take as long as the node is away; nobody waits for it.
        let mut request = Box::pin(self.client.sync_cluster());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let _: bool = request.as_mut().poll(&mut context).is_ready();
    }

    /// Returns the owner of the slot, or any other node if that is unknown or has failed lately. Such a node redirects
    /// to the owner; after a failover it knows the new one before the client does.
    fn owner_of(&self, slot: u16) -> Result<Server, Error> {
        if let Some(owner) = self.state().owners.get(&slot) {
            return Ok(owner.clone());
        }
        let routing = self.client.cached_cluster_state();
        let owner = routing.as_ref().and_then(|routing| routing.get_server(slot));
        let ranges = routing.iter().flat_map(|routing| routing.slots());
        let seeds = self.config.server.hosts();
        let others: Vec<&Server> = ranges.map(|range| &range.primary).chain(&seeds).collect();
        let state = self.state();
        let is_well = |server: &&Server| state.failed.get(server).is_none_or(|failed| failed.at.elapsed() >= AVOIDED);
        if let Some(owner) = owner.filter(is_well) {
            let owner = owner.clone();
            drop(state);
            self.learn(slot, &owner);
            return Ok(owner);
        }
        let well: Vec<&Server> = others.iter().copied().filter(is_well).collect();
        let any = fastrand::choice(well).or(owner).or_else(|| others.first().copied());
        let unknown = || fred::error::Error::new(ErrorKind::Cluster, "no node of the cluster is known");
        any.cloned().ok_or_else(|| unknown().into())
    }

    fn learn(&self, slot: u16, owner: &Server) {
        self.state().owners.insert(slot, owner.clone());
    }

    fn note_moving(&self, slot: u16) {
        self.state().moving.insert(slot, Instant::now());
        self.any_moves.store(true, Ordering::Relaxed);
    }

    fn is_moving(&self, slot: u16) -> bool {
        if !self.any_moves.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.state();
        state.moving.retain(|_, seen| seen.elapsed() < REMEMBERED);
        self.any_moves.store(!state.moving.is_empty(), Ordering::Relaxed);
        state.moving.contains_key(&slot)
    }

    /// Returns the server as the client's map has it, with the name in its certificate.
    fn known(&self, server: Server) -> Server {
        let routing = self.client.cached_cluster_state();
        let same = |routing: &fred::types::cluster::ClusterRouting| {
            routing.slots().iter().map(|range| &range.primary).find(|known| **known == server).cloned()
        };
        routing.as_ref().and_then(same).unwrap_or(server)
    }

    /// Nothing panics while it holds this mutex, so a poisoned one is still valid.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the slot of the first key. Every script has one.
fn slot_of(args: &[Value]) -> u16 {
    args.get(2).and_then(Value::as_bytes).map_or(0, redis_keyslot)
}

/// Splits the arguments of a script into its keys and the rest.
fn keys_and_rest(args: &[Value]) -> Option<(&[Value], &[Value])> {
    let count = usize::try_from(args.get(1)?.as_i64()?).ok()?;
    args.get(2..)?.split_at_checked(count)
}

/// Prepended to a script that runs with only its first key declared. Takes the other keys, and behind them the number
/// of all keys, off the end of the arguments.
const TOLD_OF_KEYS: &str = "for i = tonumber(table.remove(ARGV)), 2, -1 do KEYS[i] = table.remove(ARGV) end\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_run_at_once_and_return_in_their_order() {
        let began = Instant::now();
        let futures = [3, 1, 2].map(|n| async move {
            sleep(Duration::from_secs(n)).await;
            n
        });
        assert_eq!(all(futures.into_iter()).await, [3, 1, 2]);
        assert_eq!(began.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn split_keys_are_asked_for_until_they_meet_or_most_of_the_time_is_over() {
        let began = Instant::now();
        let timeout = Duration::from_secs(2);
        let split = || Error::from(fred::error::Error::new(ErrorKind::Unknown, "TRYAGAIN Multiple keys"));
        let meets = |after| {
            patiently(timeout, move |_| async move { (began.elapsed() > after).then_some(()).ok_or_else(split) })
        };
        meets(Duration::from_secs(1)).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1_100));
        assert_eq!(meets(timeout * 2).await.unwrap_err().code(), Some("TRYAGAIN"));
        assert!(began.elapsed() < Duration::from_secs(3));
        let fails = patiently(timeout, |_| async { Err::<(), _>(Error::timeout()) });
        assert!(fails.await.unwrap_err().is_transient());
    }

    #[test]
    fn keys_are_told_from_other_arguments() {
        let args: Vec<Value> = vec!["script".into(), Value::Integer(2), "a".into(), "b".into(), "c".into()];
        assert_eq!(keys_and_rest(&args), Some((&args[2..4], &args[4..])));
        assert_eq!(keys_and_rest(&args[..3]), None);
        assert_eq!(slot_of(&args), redis_keyslot(b"a"));
    }
}
