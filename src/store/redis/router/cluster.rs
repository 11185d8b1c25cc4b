//! Connections to the single nodes of a cluster, and which of them owns a slot.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

use super::super::args::decimal;
use super::super::driver::{Nodes, Value};
use super::super::script::EVAL;
use super::super::slot::slot_of;
use super::super::url::Address;
use super::Sent;
use super::node::{Asking, InUse, Node};
use super::redirection::{Elsewhere, elsewhere};
use crate::{Error, RedisError, RedisErrorKind};

/// How many redirections one command follows.
const REDIRECTIONS: u32 = 5;
/// The pause before the third redirection; it doubles with each one after that. Two nodes may point at each other until
/// both know who owns the slot.
const PAUSE: Duration = Duration::from_millis(4);
/// How long a slot counts as half moved after it was last seen to be.
const REMEMBERED: Duration = Duration::from_secs(1);
/// How long after a failure no new connection to the same node is opened.
const RECONNECT: Duration = Duration::from_millis(50);
/// How long after a failure other nodes are asked who owns the slots of a node.
const AVOIDED: Duration = Duration::from_secs(2);
/// The refusal of a node that serves no slots, or not this one.
const CLUSTERDOWN: &str = "CLUSTERDOWN";
/// How many connections to single nodes are kept, not counting those that only finish their calls.
const CONNECTIONS: usize = 64;

/// The nodes of a cluster, one by one.
pub(super) struct Cluster {
    known: Arc<dyn Nodes>,
    state: Mutex<State>,
    /// False while no slot is half moved, so that the common path needs no mutex.
    any_moves: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The runtime for further connections. Without one they live on the runtime of the call that needs them.
    home: Option<Handle>,
    nodes: HashMap<(Address, Asking), Arc<Node>>,
    /// The owners of the slots that were used, as far as they are known to be well.
    owners: HashMap<u16, Address>,
    /// The primaries by the last map that had any. A node that has begun anew knows no other, and where the client
    /// takes that for the map, it knows only the nodes that the user has named, which may be this one.
    primaries: Vec<Address>,
    /// Nodes to which no connection could be opened lately, or which did not serve a slot.
    failed: HashMap<Address, Failed>,
    /// Half-moved slots, and when a node last said so.
    moving: HashMap<u16, Instant>,
}

struct Failed {
    at: Instant,
    how: Failure,
}

enum Failure {
    /// No connection could be opened.
    Unreachable(Error),
    /// It did not serve a slot. It may serve others.
    Refused,
}

impl Cluster {
    pub(super) fn new(known: Arc<dyn Nodes>) -> Self {
        Self { known, state: Mutex::default(), any_moves: AtomicBool::new(false) }
    }

    /// Further connections live on this runtime.
    pub(super) fn live_on(&self, runtime: Option<Handle>) {
        self.state().home = runtime;
    }

    /// Drops all connections.
    pub(super) fn replace(&self) {
        self.state().nodes.clear();
    }

    /// Returns how many connections there are.
    pub(super) fn len(&self) -> usize {
        self.state().nodes.len()
    }

    pub(super) async fn send<F: Fn() -> Vec<Bytes> + Sync>(
        &self,
        sent: Sent<'_>,
        args: &F,
        until: Instant,
    ) -> Result<Value, Error> {
        let first = args();
        let slot = slot_of_first_key(&first);
        let mut first = Some(first);
        let (mut server, is_known) = self.owner_of(slot)?;
        let (mut asking, mut source) = (Asking::No, None);
        for followed in 0.. {
            if let Some(doublings) = u32::checked_sub(followed, 2) {
                sleep_until(until.min(Instant::now() + PAUSE * 2u32.saturating_pow(doublings))).await;
            }
            let answer = self.ask(&server, asking, sent.command, first.take().unwrap_or_else(args), until).await;
            let Err(error) = answer else {
                if followed == 0 && !is_known {
                    // Any other node would have redirected.
                    self.learn(slot, &server);
                }
                return answer;
            };
            match elsewhere(&error, &server) {
                Some(_) if followed >= REDIRECTIONS => return Err(error),
                Some(Elsewhere::Moved(to)) => {
                    self.learn(slot, &to);
                    self.state().moving.remove(&slot);
                    (server, asking, source) = (to, Asking::No, None);
                }
                Some(Elsewhere::Ask(to)) => {
                    let from = std::mem::replace(&mut server, to);
                    self.note_moving(slot);
                    (asking, source) = (Asking::Yes, Some(from));
                }
                None => {
                    if error.is_redirection() {
                        self.note_moving(slot);
                    }
                    // Also where the client can't tell which call was refused: it is the node that says so.
                    if error.code() == Some(CLUSTERDOWN) {
                        self.is_not_served(slot, &server);
                    }
                    return match (source, sent.source) {
                        (Some(source), Some(script)) if error.refusal() == Some("TRYAGAIN") => {
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
        (source, target): (&Address, &Address),
        script: &Bytes,
        args: Vec<Bytes>,
        until: Instant,
    ) -> Option<Result<Value, Error>> {
        let (keys, rest) = keys_and_rest(&args)?;
        for key in keys {
            let probe = vec!["return 1".into(), "1".into(), key.clone()];
            let answer = self.ask(source, Asking::No, EVAL, probe, until).await;
            match answer.map_err(|error| elsewhere(&error, source)) {
                Err(Some(Elsewhere::Ask(to))) if to == *target => {}
                // The old node has this key, or the whole slot has moved.
                _ => return None,
            }
        }
        let (first, others) = keys.split_first()?;
        let count = i64::try_from(keys.len()).ok()?;
        let mut args = vec![[TOLD_OF_KEYS.as_bytes(), script].concat().into(), "1".into(), first.clone()];
        args.extend(rest.iter().chain(others).cloned());
        args.push(decimal(count));
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
        server: &Address,
        asking: Asking,
        command: &'static str,
        args: Vec<Bytes>,
        until: Instant,
    ) -> Result<Value, Error> {
        let (node, _in_use) = self.node(server, asking)?;
        let began = Instant::now();
        let answer = node.ask(asking, command, args, until).await;
        match &answer {
            Err(error) if node.has_failed(began, &answer) => {
                crate::report::debug!(name: "tenure.node_failed", %server, %error, "a connection to a node is dropped");
                self.forget(server, asking, &node, error);
            }
            _ => {}
        }
        answer
    }

    /// Returns the connection to the node, which may still be opening.
    fn node(&self, server: &Address, asking: Asking) -> Result<(Arc<Node>, InUse), Error> {
        let place = (server.clone(), asking);
        let mut state = self.state();
        if let Some(node) = state.nodes.get(&place) {
            if let Some(in_use) = node.usage.begin() {
                return Ok((node.clone(), in_use));
            }
        }
        // One that could not be opened a moment ago: callers share that failure, too.
        if let Some(Failed { at, how: Failure::Unreachable(error) }) = state.failed.get(server) {
            if at.elapsed() < RECONNECT {
                return Err(error.clone());
            }
        }
        let runtime = state.home.clone().map_or_else(Handle::try_current, Ok).map_err(|_| Error::NoRuntime)?;
        let node = Arc::new(Node::open(self.known.open(server), asking, &runtime));
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
    fn forget(&self, server: &Address, asking: Asking, node: &Arc<Node>, error: &Error) {
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
            let how = Failure::Unreachable(error.clone());
            state.failed.insert(server.clone(), Failed { at: Instant::now(), how });
        }
        drop(state);
        self.known.refresh();
    }

    /// Notes that the node does not serve the slot: it has lost the slot, or its part of the cluster has no majority.
    /// It names nobody else, so the next call asks another node.
    fn is_not_served(&self, slot: u16, server: &Address) {
        let mut state = self.state();
        if state.owners.get(&slot) == Some(server) {
            state.owners.remove(&slot);
        }
        // Many calls may be refused at the same time. And this may be the failure that callers share, which must not
        // prolong itself.
        let is_known = state.failed.get(server).is_some_and(|failed| failed.at.elapsed() < RECONNECT);
        if !is_known {
            state.failed.insert(server.clone(), Failed { at: Instant::now(), how: Failure::Refused });
            drop(state);
            self.known.refresh();
        }
    }

    /// Returns the owner of the slot and `true`, or any other node and `false` if that is unknown or has failed lately.
    /// Such a node redirects to the owner; after a failover it knows the new one before the client does.
    fn owner_of(&self, slot: u16) -> Result<(Address, bool), Error> {
        if let Some(owner) = self.state().owners.get(&slot) {
            return Ok((owner.clone(), true));
        }
        let (owner, primaries) = (self.known.owner_of(slot), self.known.primaries());
        let mut state = self.state();
        if !primaries.is_empty() {
            state.primaries = primaries;
        }
        let is_well = |server: &Address| state.failed.get(server).is_none_or(|failed| failed.at.elapsed() >= AVOIDED);
        if let Some(owner) = owner.as_ref().filter(|owner| is_well(owner)) {
            drop(state);
            self.learn(slot, owner);
            return Ok((owner.clone(), true));
        }
        let seeds = self.known.seeds();
        let connected = state.nodes.keys().map(|(server, _)| server);
        let others: Vec<&Address> = state.primaries.iter().chain(connected).chain(&seeds).collect();
        let well: Vec<&Address> = others.iter().copied().filter(|other| is_well(other)).collect();
        // There may be as many owners as slots, so they are only looked at when no other node is well.
        let any = fastrand::choice(well).or_else(|| state.owners.values().find(|owner| is_well(owner)));
        let any = any.cloned().or(owner).or_else(|| others.first().copied().cloned());
        let unknown = || RedisError::new(RedisErrorKind::Cluster, "no node of the cluster is known");
        any.map(|any| (any, false)).ok_or_else(|| unknown().into())
    }

    fn learn(&self, slot: u16, owner: &Address) {
        self.state().owners.insert(slot, owner.clone());
    }

    fn note_moving(&self, slot: u16) {
        self.state().moving.insert(slot, Instant::now());
        self.any_moves.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_moving(&self, slot: u16) -> bool {
        if !self.any_moves.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.state();
        state.moving.retain(|_, seen| seen.elapsed() < REMEMBERED);
        self.any_moves.store(!state.moving.is_empty(), Ordering::Relaxed);
        state.moving.contains_key(&slot)
    }

    /// Nothing panics while it holds this mutex, so a poisoned one is still valid.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the slot of the first key. Every script has one.
fn slot_of_first_key(args: &[Bytes]) -> u16 {
    args.get(2).map_or(0, |key| slot_of(key))
}

/// Splits the arguments of a script into its keys and the rest.
fn keys_and_rest(args: &[Bytes]) -> Option<(&[Bytes], &[Bytes])> {
    let count = std::str::from_utf8(args.get(1)?).ok()?.parse().ok()?;
    args.get(2..)?.split_at_checked(count)
}

/// Prepended to a script that runs with only its first key declared. Takes the other keys, and behind them the number
/// of all keys, off the end of the arguments.
const TOLD_OF_KEYS: &str = "for i = tonumber(table.remove(ARGV)), 2, -1 do KEYS[i] = table.remove(ARGV) end\n";
