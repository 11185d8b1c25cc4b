//! What the model remembers, and what a node does with a message.

use std::array;
use std::hash::{Hash, Hasher};

use crate::protocol::Protocol;

pub(crate) const NODES: usize = 3;
pub(crate) const MAJORITY: usize = 2;
pub(crate) const CLIENTS: usize = 3;

/// There is no clock in it: every time is kept as its distance from now. So the model has no horizon: what has run out
/// is like what never was, the states repeat, and behaviours of any length are covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) nodes: [Node; NODES],
    pub(crate) clients: [Client; CLIENTS],
    /// The fencing token of the client that was the last to begin to hold.
    pub(crate) latest: Option<i8>,
    /// Whether each of those was above the one before.
    pub(crate) in_order: bool,
}

/// A server, and its answers that are under way. Only a yes matters: a refusal changes nothing, and a client may give
/// up or propose again whether it was refused or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Node {
    /// Its own `TIME`, ahead of the others' by so much. Never changes.
    pub(crate) clock: i8,
    /// The time until it votes.
    pub(crate) votes_in: i8,
    pub(crate) keys: Keys,
    /// What it has on disk.
    pub(crate) saved: Keys,
    /// The clients that it said yes to: to the latest acquire, and to the renewal under way.
    pub(crate) granted: u8,
    pub(crate) extended: u8,
    /// The clients whose release has arrived.
    pub(crate) released: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Keys {
    /// The client whose token the lock key holds, and for how long.
    pub(crate) holder: Option<u8>,
    pub(crate) ttl: i8,
    /// The last proposal that was granted, and for how long that is known.
    pub(crate) last: Option<i8>,
    pub(crate) last_ttl: i8,
}

/// What a node knows after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    All,
    /// What it had on disk: a snapshot, or a log without its end.
    Saved,
    Nothing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Client {
    pub(crate) phase: Phase,
    /// Asking: the time in which an answer would make it the holder. Holding: the time to its deadline.
    pub(crate) left: i8,
    pub(crate) proposal: i8,
    /// What it proposed in a round before.
    pub(crate) earlier: Option<i8>,
    /// The time to the deadline that a confirmation of the renewal under way would set.
    pub(crate) renewal: i8,
    /// Once sent, these may arrive at any time and any number of times.
    pub(crate) renewal_sent: bool,
    pub(crate) release_sent: bool,
    /// For how long these renewals may arrive.
    pub(crate) renewal_life: i8,
    /// The renewal under way takes the client's lease up.
    pub(crate) claims: bool,
    /// For how long votes that heal may arrive, and whether any was sent.
    pub(crate) healing: i8,
    pub(crate) heal_sent: bool,
    /// All its calls have ended, and what they left is undone.
    pub(crate) settled: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Phase {
    #[default]
    Idle,
    Asking,
    /// Until the deadline; what follows, without a release, is a client that has fallen silent.
    Holding,
    Released,
    /// The attempt came to nothing, or what it obtained was lost before it was released.
    Over,
}

impl State {
    pub(crate) fn new(skew: i8) -> Self {
        let mut nodes = [Node::default(); NODES];
        nodes[0].clock = skew;
        Self { nodes, clients: [Client::default(); CLIENTS], latest: None, in_order: true }
    }

    /// Whether the grants of a majority are under way to the client. One answer after the other means nothing to it, so
    /// that it hears them all at once is no loss; and it need not hear them, ever.
    pub(crate) fn granted(&self, client: usize) -> bool {
        self.nodes.iter().filter(|node| node.granted >> client & 1 == 1).count() >= MAJORITY
    }

    /// The same for the renewal under way.
    pub(crate) fn extended(&self, client: usize) -> bool {
        self.nodes.iter().filter(|node| node.extended >> client & 1 == 1).count() >= MAJORITY
    }

    /// What is under way to the client is no longer waited for.
    pub(crate) fn forget_answers(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.granted &= !(1 << client);
        }
        self.forget_extensions(client);
    }

    pub(crate) fn forget_extensions(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.extended &= !(1 << client);
        }
    }
}

impl Client {
    /// `Hold::check`: the clock decides, whether or not any task of the client's has run.
    pub(crate) fn believes(&self) -> bool {
        self.phase == Phase::Holding && self.left > 0
    }
}

impl Keys {
    /// What time does to them, whether the node is up or down, and on its disk too.
    fn tick(&mut self, model: &Protocol) {
        if model.safeguards.expiry && self.holder.is_some() {
            self.ttl -= 1;
            if self.ttl == 0 {
                self.holder = None;
            }
        }
        if let Some(last) = &mut self.last {
            *last -= 1;
            self.last_ttl -= 1;
            if self.last_ttl == 0 {
                self.last = None;
            }
        }
    }
}

impl Node {
    pub(crate) fn tick(&mut self, model: &Protocol) {
        self.keys.tick(model);
        self.saved.tick(model);
        self.votes_in = (self.votes_in - 1).max(0);
    }

    /// `vote.lua`. Says whether it grants.
    pub(crate) fn vote(&mut self, model: &Protocol, token: u8, proposal: i8) -> bool {
        let on = model.safeguards;
        let ours = self.keys.holder == Some(token);
        // Where it looks first: at its uptime, and at who holds the key.
        if self.votes_in > 0 || !(ours || self.keys.holder.is_none()) {
            return false;
        }
        if model.proposals.is_some() {
            let above = match self.keys.last {
                Some(last) => proposal > last,
                None => proposal > self.clock || !on.clock_for_last,
            };
            let ahead = proposal > self.clock + model.window;
            // What it granted, it grants again: the answer may have been lost.
            let again = ours && self.keys.last == Some(proposal);
            if !again && ((on.ballots && !above) || (on.proposals_near_clock && ahead)) {
                return false;
            }
            (self.keys.last, self.keys.last_ttl) = (Some(proposal), model.last_ttl);
        }
        (self.keys.holder, self.keys.ttl) = (Some(token), model.ttl);
        true
    }

    /// `renew.lua`: only what holds the token lives on. Says whether it did.
    pub(crate) fn renew(&mut self, model: &Protocol, token: u8) -> bool {
        let ours = self.keys.holder == Some(token);
        if ours {
            self.keys.ttl = model.ttl;
        }
        ours
    }

    /// `vote.lua` without a ballot, sent to bring back the key of a client that holds the lock.
    pub(crate) fn heal(&mut self, model: &Protocol, token: u8) {
        let on = model.safeguards;
        let is_free = self.keys.holder.is_none() || !on.heal_free;
        if is_free && (self.votes_in == 0 || !on.heal_votes) {
            (self.keys.holder, self.keys.ttl) = (Some(token), model.ttl);
        }
    }

    /// `release.lua`: only what holds the token is deleted.
    pub(crate) fn release(&mut self, model: &Protocol, token: u8) {
        if self.keys.holder == Some(token) || !model.safeguards.compare_and_delete {
            (self.keys.holder, self.keys.ttl) = (None, 0);
        }
    }

    /// The server is there again after a restart. How long it was away needs no word: until then, nothing arrived. What
    /// it answered before may still arrive.
    pub(crate) fn restart(&mut self, model: &Protocol, memory: Memory) {
        match memory {
            Memory::All => {}
            Memory::Saved => self.keys = self.saved,
            Memory::Nothing => (self.keys, self.saved) = (Keys::default(), Keys::default()),
        }
        if model.safeguards.restart_window {
            self.votes_in = model.window - model.uptime_error;
        }
        if model.safeguards.clock_after_restart {
            // Not trusted is as good as not known: when it votes, its clock has passed all that it can have granted.
            (self.keys.last, self.keys.last_ttl) = (None, 0);
        }
    }

    /// What it would know after a restart is on disk from now on.
    pub(crate) fn save(&mut self, model: &Protocol) {
        self.saved = self.keys;
        if model.safeguards.clock_after_restart {
            (self.saved.last, self.saved.last_ttl) = (None, 0);
        }
    }
}

/// States that differ only in the names of clients and nodes are one to the checker, which tells states by their hash:
/// that of the clients in the order of what they do, then of the nodes in the order of what they know.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut order: [usize; CLIENTS] = array::from_fn(|client| client);
        order.sort_by_key(|&client| self.clients[client]);
        let mut names = [0; CLIENTS];
        for (name, &client) in (0..).zip(&order) {
            self.clients[client].hash(hasher);
            names[client] = name;
        }
        let rename = |set: u8| names.iter().enumerate().map(|(client, name)| (set >> client & 1) << name).sum::<u8>();
        let rename_holder = |keys: Keys| Keys { holder: keys.holder.map(|client| names[usize::from(client)]), ..keys };
        let mut nodes = self.nodes.map(|node| Node {
            keys: rename_holder(node.keys),
            saved: rename_holder(node.saved),
            granted: rename(node.granted),
            extended: rename(node.extended),
            released: rename(node.released),
            ..node
        });
        nodes.sort_unstable();
        (nodes, self.latest, self.in_order).hash(hasher);
    }
}
