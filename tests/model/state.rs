//! The state of the model, and what a node does with a message.

use std::array;
use std::hash::{Hash, Hasher};

use crate::protocol::Protocol;

pub(crate) const NODES: usize = 3;
pub const CLIENTS: usize = 3;
pub(crate) const KEYS: usize = 2;

/// Tokens from this number on are shared by several clients.
const SHARED: u8 = 16;

/// A state of the model. It has no clock: every time is stored as its distance from now. So the model has no horizon:
/// an expired time is like one that never was, the states repeat, and behaviours of any length are covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub(crate) nodes: [Node; NODES],
    pub(crate) clients: [Client; CLIENTS],
    /// For each key, the fencing token of the last client that began to hold it; and the token, if it is shared.
    pub(crate) latest: [Option<(i8, u8)>; KEYS],
    /// Whether each of those was above the one before.
    pub(crate) in_order: bool,
}

/// A server, and its replies in flight. Only a yes matters: a refusal changes nothing, and a client may give up or
/// propose again whether or not it was refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// How far its own `TIME` is ahead of the others'. Never changes.
    pub(crate) clock: i8,
    /// The time until the node votes.
    pub(crate) votes_in: i8,
    pub(crate) keys: [Key; KEYS],
    /// The node's data on disk.
    pub(crate) saved: [Key; KEYS],
    /// The clients that it granted: for the latest acquire,
    pub(crate) granted: u8,
    /// with this number, if that is not the client's proposal,
    pub(crate) told: [Option<i8>; CLIENTS],
    /// for the renewal in flight, and for the request for an exact ttl.
    pub(crate) extended: u8,
    pub(crate) shortened: u8,
    /// The clients whose request for an exact ttl may still arrive.
    pub(crate) due: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Key {
    /// The token that the lock key holds, and for how long.
    pub(crate) holder: Option<u8>,
    pub(crate) ttl: i8,
    /// The clients that rely on it, by its record of grants, if they share their token.
    pub(crate) grants: u8,
    /// The last granted proposal, and how long the node knows it.
    pub(crate) last: Option<i8>,
    pub(crate) last_ttl: i8,
    /// The last granted number, among those that the node has found on its disk. Known only if that makes a difference.
    pub(crate) found: Option<i8>,
}

/// What a node knows after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    All,
    /// What it had on disk: a snapshot, or a log without its end.
    Saved,
    Nothing,
}

/// The identity of a lock at the nodes, as in `hold.rs`: its keys, the token, and the client that relies on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owned {
    keys: u8,
    token: u8,
    client: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Client {
    /// The token it shares with others, or 0 if it has its own; and the set of keys that it wants. Neither ever
    /// changes.
    pub(crate) shares: u8,
    pub(crate) wants: u8,
    pub(crate) phase: Phase,
    /// Asking: the time in which a reply would make it the holder. Holding: the time to its deadline.
    pub(crate) left: i8,
    pub(crate) proposal: i8,
    /// Its proposal of an earlier round.
    pub(crate) earlier: Option<i8>,
    /// The time to the deadline that a confirmation of the renewal in flight would set.
    pub(crate) renewal: i8,
    /// Whether renewals were sent; they may then arrive at any time and any number of times.
    pub(crate) renewal_sent: bool,
    pub(crate) release_sent: bool,
    /// How long these renewals may arrive.
    pub(crate) renewal_life: i8,
    /// Whether the renewal in flight adopts the client's lease.
    pub(crate) claims: bool,
    /// How long votes that heal may arrive, and whether any was sent.
    pub(crate) healing: i8,
    pub(crate) heal_sent: bool,
    /// How long its request for an exact ttl may arrive, and whether its outcome is unknown.
    pub(crate) exact: i8,
    pub(crate) is_unresolved: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Idle,
    Asking,
    /// Until the deadline; after that, without a release, the client has fallen silent.
    Holding,
    Released,
    /// The attempt failed, or what it obtained was lost before it was released.
    Over,
}

impl Owned {
    /// A client that asks for all keys, and has never asked before.
    pub(crate) const NOBODY: Self = Self { keys: (1 << KEYS) - 1, token: SHARED - 1, client: SHARED - 1 };
}

impl State {
    pub(crate) fn new(model: &Protocol) -> Self {
        let mut nodes = [Node::default(); NODES];
        nodes[0].clock = model.skew;
        let clients = array::from_fn(|client| Client {
            shares: model.shares[client],
            wants: model.wants[client],
            ..Client::default()
        });
        Self { nodes, clients, latest: [None; KEYS], in_order: true }
    }

    pub(crate) fn owned(&self, client: usize) -> Owned {
        let Client { shares, wants, .. } = self.clients[client];
        let token = if shares > 0 { SHARED + shares } else { client as u8 };
        Owned { keys: wants, token, client: client as u8 }
    }

    /// Returns the number with which the grants of a majority are in flight to the client. Single replies mean nothing
    /// to it, so nothing is lost if it gets them all at once; and it may never get them.
    pub(crate) fn granted(&self, model: &Protocol, client: usize) -> Option<i8> {
        let proposal = self.clients[client].proposal;
        let numbers = self.nodes.map(|node| has(node.granted, client).then(|| node.told[client].unwrap_or(proposal)));
        let by_majority =
            |number: &i8| numbers.iter().filter(|other| **other == Some(*number)).count() >= model.majority();
        numbers.into_iter().flatten().find(by_majority)
    }

    /// Returns the same for the renewal in flight,
    pub(crate) fn extended(&self, model: &Protocol, client: usize) -> bool {
        self.nodes.iter().filter(|node| has(node.extended, client)).count() >= model.majority()
    }

    /// and for the request for an exact ttl.
    pub(crate) fn shortened(&self, model: &Protocol, client: usize) -> bool {
        self.nodes.iter().filter(|node| has(node.shortened, client)).count() >= model.majority()
    }

    /// Removes the replies in flight that the client no longer waits for.
    pub(crate) fn forget_answers(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.granted &= !(1 << client);
            node.told[client] = None;
        }
        self.forget_extensions(client);
    }

    pub(crate) fn forget_extensions(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.extended &= !(1 << client);
        }
    }

    /// Records that the client begins to hold its keys with this fencing token.
    pub(crate) fn note_order(&mut self, client: usize, number: i8) {
        let Owned { keys, token, .. } = self.owned(client);
        for key in wanted(keys) {
            let shared = if token < SHARED { 0 } else { token };
            let is_above = |(latest, by): (i8, u8)| number > latest || (number == latest && by == shared && shared > 0);
            self.in_order &= self.latest[key].is_none_or(is_above);
            self.latest[key] = Some((number, shared));
        }
    }
}

pub(crate) fn has(set: u8, client: usize) -> bool {
    set >> client & 1 == 1
}

fn wanted(keys: u8) -> impl Iterator<Item = usize> + Clone {
    (0..KEYS).filter(move |&key| has(keys, key))
}

impl Client {
    /// `Hold::check`: the clock decides, whether or not any task of the client has run.
    pub(crate) fn believes(&self) -> bool {
        self.phase == Phase::Holding && self.left > 0
    }

    /// Returns whether both may hold at once: they want no key in common, or share one token.
    pub(crate) fn may_hold_beside(&self, other: &Self) -> bool {
        self.wants & other.wants == 0 || (self.shares > 0 && self.shares == other.shares)
    }

    /// Returns whether this one does nothing that the other could not.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        (self.shares, self.wants) == (other.shares, other.wants)
    }
}

impl Key {
    /// Lets time pass, whether the node is up or down, and on its disk too.
    fn tick(&mut self, model: &Protocol) {
        if model.safeguards.expiry && self.holder.is_some() {
            self.ttl -= 1;
            if self.ttl == 0 {
                self.free();
            }
        }
        if let Some(last) = &mut self.last {
            *last -= 1;
            self.last_ttl -= 1;
            if self.last_ttl == 0 {
                self.last = None;
            }
        }
        self.found = self.found.map(|found| found - 1).filter(|found| *found > -model.oldest - model.ttl);
    }

    /// Lets the client's token hold the key from now on, for at least this long.
    fn take(&mut self, owned: Owned, ttl: i8) {
        let is_ours = self.is_ours(owned);
        self.ttl = if is_ours { self.ttl.max(ttl) } else { ttl };
        self.holder = Some(owned.token);
        if owned.token >= SHARED {
            self.grants = if is_ours { self.grants } else { 0 } | 1 << owned.client;
        }
    }

    fn free(&mut self) {
        (self.holder, self.ttl, self.grants) = (None, 0, 0);
    }

    fn is_ours(&self, owned: Owned) -> bool {
        self.holder == Some(owned.token)
    }

    /// Returns the number that the node replies again with to a client that holds the key already.
    fn number_of(&self, model: &Protocol) -> Option<i8> {
        self.last.or_else(|| self.found.filter(|_| !model.safeguards.again_after_distrust))
    }

    /// Distrusts the last number. What was granted before a restart need not be the last, and counts as unknown: when
    /// the node votes, its clock has passed everything that it can have granted.
    fn distrust(&mut self, model: &Protocol) {
        if !model.safeguards.clock_after_restart {
            return;
        }
        if !model.safeguards.again_after_distrust {
            self.found = self.last.or(self.found);
        }
        (self.last, self.last_ttl) = (None, 0);
    }
}

impl Node {
    pub(crate) fn tick(&mut self, model: &Protocol) {
        self.keys.iter_mut().chain(&mut self.saved).for_each(|key| key.tick(model));
        self.votes_in = (self.votes_in - 1).max(0);
        self.told.iter_mut().flatten().for_each(|told| *told = (*told - 1).max(-model.oldest));
    }

    /// `vote.lua`. Returns the number that it grants, if it does.
    pub(crate) fn vote(&mut self, model: &Protocol, owned: Owned, proposal: i8) -> Option<i8> {
        let on = model.safeguards;
        let keys = wanted(owned.keys);
        let may_take = |key: &Key| key.holder.is_none() || key.is_ours(owned);
        // The node first checks its uptime, and the holders of the keys.
        let refuses = match on.whole_sets {
            true => !keys.clone().all(|key| may_take(&self.keys[key])),
            false => !keys.clone().any(|key| may_take(&self.keys[key])),
        };
        if self.votes_in > 0 || refuses {
            return None;
        }
        let mut number = proposal;
        if model.proposals.is_some() {
            let is_above = |key: usize| match self.keys[key].last {
                Some(last) => proposal > last,
                None => proposal > self.clock || !on.clock_for_last,
            };
            let above = match on.fences_of_all_keys {
                true => keys.clone().all(is_above),
                false => keys.clone().take(1).all(is_above),
            };
            let ahead = proposal > self.clock + model.window;
            match self.again(model, owned).filter(|again| *again == proposal || owned.token >= SHARED) {
                Some(again) => number = again,
                None if (on.ballots && !above) || (on.proposals_near_clock && ahead) => return None,
                None => {}
            }
            for key in keys.clone() {
                (self.keys[key].last, self.keys[key].last_ttl) = (Some(number), model.last_ttl);
            }
        }
        for key in keys {
            if may_take(&self.keys[key]) {
                self.keys[key].take(owned, model.ttl);
            }
        }
        Some(number)
    }

    /// Returns the number that was granted, which the node grants again: the reply may have been lost, or the token
    /// comes back.
    fn again(&self, model: &Protocol, owned: Owned) -> Option<i8> {
        let mut keys = wanted(owned.keys).map(|key| &self.keys[key]);
        let first = self.keys[wanted(owned.keys).next()?].number_of(model)?;
        keys.all(|key| key.is_ours(owned) && key.number_of(model) == Some(first)).then_some(first)
    }

    /// `renew.lua` and `renew_grant.lua`: only a key that holds the token lives on. Returns whether it did.
    pub(crate) fn renew(&mut self, model: &Protocol, owned: Owned) -> bool {
        let is_ours = self.is_ours(owned);
        if is_ours {
            for key in wanted(owned.keys) {
                let key = &mut self.keys[key];
                key.ttl = key.ttl.max(model.ttl);
                if owned.token >= SHARED && model.safeguards.renewals_record {
                    key.grants |= 1 << owned.client;
                }
            }
        }
        is_ours
    }

    /// The same, for an exact ttl. It may be shorter.
    pub(crate) fn shorten(&mut self, model: &Protocol, owned: Owned) -> bool {
        let is_ours = self.is_ours(owned);
        if is_ours {
            wanted(owned.keys).for_each(|key| self.keys[key].ttl = model.shorter);
        }
        is_ours
    }

    fn is_ours(&self, owned: Owned) -> bool {
        wanted(owned.keys).all(|key| self.keys[key].is_ours(owned))
    }

    /// `vote.lua` without a ballot, sent to bring back the keys of a client that holds the lock.
    pub(crate) fn heal(&mut self, model: &Protocol, owned: Owned) {
        let on = model.safeguards;
        let may_take = |key: &Key| key.holder.is_none() || key.is_ours(owned);
        let is_free = !on.heal_free || wanted(owned.keys).all(|key| may_take(&self.keys[key]));
        if is_free && (self.votes_in == 0 || !on.heal_votes) {
            wanted(owned.keys).for_each(|key| self.keys[key].take(owned, model.ttl));
        }
    }

    /// `release.lua` and `end_grant.lua`: deletes only a key that holds the token, and only if nobody else relies on
    /// it.
    pub(crate) fn release(&mut self, model: &Protocol, owned: Owned) {
        let on = model.safeguards;
        for key in wanted(owned.keys) {
            let key = &mut self.keys[key];
            if !key.is_ours(owned) && on.compare_and_delete {
                continue;
            }
            key.grants &= !(1 << owned.client);
            if key.grants == 0 || !on.releases_by_grant {
                key.free();
            }
        }
    }

    /// Restarts the server. How long it was away doesn't matter: nothing arrived until then. Its earlier replies may
    /// still arrive.
    pub(crate) fn restart(&mut self, model: &Protocol, memory: Memory) {
        match memory {
            Memory::All => {}
            Memory::Saved => self.keys = self.saved,
            Memory::Nothing => (self.keys, self.saved) = ([Key::default(); KEYS], [Key::default(); KEYS]),
        }
        if model.safeguards.restart_window {
            self.votes_in = model.window - model.uptime_error;
        }
        self.keys.iter_mut().for_each(|key| key.distrust(model));
    }

    /// Writes to disk what the node would know after a restart.
    pub(crate) fn save(&mut self, model: &Protocol) {
        self.saved = self.keys;
        self.saved.iter_mut().for_each(|key| key.distrust(model));
    }
}

/// States that differ only in the names of clients and nodes are the same to the checker, which compares them by hash:
/// that of the clients in the order of what they do, then of the nodes in the order of what they know.
///
/// Everything is hashed as plain bytes, because nine tenths of a search are spent here.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let clients = self.clients.map(Client::bytes);
        let mut order: [usize; CLIENTS] = array::from_fn(|client| client);
        order.sort_by_key(|&client| clients[client]);
        let mut names = [0; CLIENTS];
        for (name, &client) in (0..).zip(&order) {
            hasher.write(&clients[client]);
            names[client] = name;
        }
        let mut nodes = self.nodes.map(|node| node.bytes(&names, &order));
        nodes.sort_unstable();
        nodes.iter().for_each(|node| hasher.write(node));
        for latest in self.latest {
            let (number, shared) = latest.unwrap_or((i8::MIN, 0));
            hasher.write(&[number as u8, shared]);
        }
        hasher.write_u8(self.in_order.into());
    }
}

impl Client {
    /// Parts that don't change come first, so only clients that are alike change places.
    fn bytes(self) -> [u8; 15] {
        [
            self.shares,
            self.wants,
            self.phase as u8,
            self.left as u8,
            self.proposal as u8,
            self.earlier.unwrap_or(i8::MIN) as u8,
            self.renewal as u8,
            self.renewal_sent.into(),
            self.release_sent.into(),
            self.renewal_life as u8,
            self.claims.into(),
            self.healing as u8,
            self.heal_sent.into(),
            self.exact as u8,
            self.is_unresolved.into(),
        ]
    }
}

impl Node {
    fn bytes(self, names: &[u8; CLIENTS], order: &[usize; CLIENTS]) -> [u8; 33] {
        let rename = |set: u8| match set {
            0 => 0,
            _ => (0..CLIENTS).fold(0, |renamed, client| renamed | (set >> client & 1) << names[client]),
        };
        let mut bytes = [0; 33];
        let mut written = 0;
        let mut push = |byte: u8| {
            bytes[written] = byte;
            written += 1;
        };
        push(self.clock as u8);
        push(self.votes_in as u8);
        push(rename(self.granted));
        push(rename(self.extended));
        push(rename(self.shortened));
        push(rename(self.due));
        for client in order {
            push(self.told[*client].unwrap_or(i8::MIN) as u8);
        }
        for key in self.keys.iter().chain(&self.saved) {
            push(key.holder.map_or(u8::MAX, |token| names.get(usize::from(token)).copied().unwrap_or(token)));
            push(key.ttl as u8);
            push(rename(key.grants));
            push(key.last.unwrap_or(i8::MIN) as u8);
            push(key.last_ttl as u8);
            push(key.found.unwrap_or(i8::MIN) as u8);
        }
        bytes
    }
}
