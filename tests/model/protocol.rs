//! The protocol as a state machine: what clients, nodes and the network between them can do next.

use std::hash::{Hash, Hasher};
use std::ops::RangeInclusive;

use stateright::{Model, Property};

pub const NODES: usize = 3;
pub const MAJORITY: u32 = 2;
pub const CLIENTS: usize = 3;

pub const EXCLUSION: &str = "never two holders";
pub const ORDER: &str = "fencing tokens grow";
pub const OBTAINABLE: &str = "after a calm the lock can be obtained";
pub const AFTER_CRASH: &str = "held again after its holder fell silent";
pub const AFTER_RELEASE: &str = "held again after a release";

/// What keeps the promise. A test turns one off to see the promise broken.
#[derive(Clone, Copy, Debug)]
pub struct Safeguards {
    /// A node doesn't vote until a window has passed since it started (the acquire script, on `uptime_in_seconds`).
    pub restart_window: bool,
    /// A node grants only proposals above the last it granted.
    pub ballots: bool,
    /// A node that knows no last proposal takes its own clock for it.
    pub clock_for_last: bool,
    /// A node grants no proposal that lies more than a window ahead of its clock.
    pub ballots_near_clock: bool,
    /// `release.lua` deletes only what holds the token.
    pub compare_and_delete: bool,
    /// The deadline counts from before the request was sent (`hold.rs`, invariant 1), not from its answer.
    pub deadline: bool,
    /// The same for a renewal.
    pub renewal_deadline: bool,
    /// What was released is asked for again by another token only: no late release meets the new request.
    pub fresh_tokens: bool,
    /// Keys have a ttl.
    pub expiry: bool,
}

pub const ALL: Safeguards = Safeguards {
    restart_window: true,
    ballots: true,
    clock_for_last: true,
    ballots_near_clock: true,
    compare_and_delete: true,
    deadline: true,
    renewal_deadline: true,
    fresh_tokens: true,
    expiry: true,
};

/// What is explored.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub safeguards: Safeguards,
    /// At most [`CLIENTS`].
    pub clients: usize,
    /// In ticks, as all that follows.
    pub ttl: i8,
    pub window: i8,
    pub renewals: bool,
    /// What a client may propose, from its node's present: any clock that it may have. Without: unfenced requests.
    pub proposals: Option<RangeInclusive<i8>>,
    /// Whether a client that was refused may propose once more, by the same token.
    pub second_round: bool,
    /// A request to acquire is not delivered once its proposal lies this far in the past.
    pub message_age: i8,
    /// By how much the clock of the last node is ahead of the others'.
    pub skew: i8,
    /// The properties to check; all others are not evaluated.
    pub properties: &'static [&'static str],
}

/// Everything but the tokens of the past. There is no clock: every time is kept as the distance from now, so that the
/// model has no horizon. A state is reached again a tick later, and all behaviours of any length are covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub nodes: [Node; NODES],
    pub clients: [Client; CLIENTS],
    /// The fencing token of the last that began to hold.
    pub latest: Option<i8>,
    pub in_order: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// By how much its clock is ahead of the clients'. Never changes.
    clock: i8,
    /// Whose token the key holds, and for how many ticks.
    holder: Option<u8>,
    ttl: i8,
    /// Ticks until it votes.
    votes_in: i8,
    /// The last proposal it granted, and for how many ticks it remembers.
    last: Option<i8>,
    memory: i8,
    /// The clients to which its yes is under way: to the last acquire, to the renewal under way.
    granted: u8,
    extended: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client {
    pub phase: Phase,
    /// Asking: for how many ticks an answer would be worth something. Holding: until the deadline.
    pub left: i8,
    proposal: i8,
    /// What it proposed before, in a first round.
    earlier: Option<i8>,
    /// For how many ticks from now a confirmation of the renewal under way would be worth something.
    renewal: i8,
    /// Messages that the network may deliver, and deliver again.
    renewal_sent: bool,
    release_sent: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    #[default]
    Idle,
    Asking,
    /// Believed while `left` lasts.
    Holding,
    /// Given up, or lost.
    Over,
    /// Released while held.
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Tick,
    Ask { client: usize, proposal: i8 },
    DeliverAcquire { client: usize, node: usize },
    DeliverEarlier { client: usize, node: usize },
    HearGrants { client: usize },
    Renew { client: usize },
    DeliverRenew { client: usize, node: usize },
    HearExtensions { client: usize },
    Release { client: usize },
    DeliverRelease { client: usize, node: usize },
    RestartForgetful { node: usize },
    RestartRemembering { node: usize },
}

impl Client {
    /// `Hold::check`: the clock decides, no task has to run for that.
    pub fn believes(&self) -> bool {
        self.phase == Phase::Holding && self.left > 0
    }
}

impl Node {
    /// Time takes what has expired.
    fn tick(&mut self, model: &Protocol) {
        if model.safeguards.expiry && self.holder.is_some() {
            self.ttl -= 1;
            if self.ttl == 0 {
                self.holder = None;
            }
        }
        self.votes_in = (self.votes_in - 1).max(0);
        self.last = self.last.map(|last| last - 1);
        self.memory -= 1;
        if self.memory <= 0 {
            (self.last, self.memory) = (None, 0);
        }
    }

    fn acquire(&mut self, model: &Protocol, token: u8, proposal: i8) -> bool {
        let granted = self.grants(model, token, proposal);
        if granted {
            (self.holder, self.ttl) = (Some(token), model.ttl);
            if model.proposals.is_some() {
                (self.last, self.memory) = (Some(proposal), model.window);
            }
        }
        granted
    }

    /// The acquire script: whether it would grant this proposal to this token.
    fn grants(&self, model: &Protocol, token: u8, proposal: i8) -> bool {
        let on = model.safeguards;
        let ours = self.holder == Some(token);
        if self.votes_in > 0 || !(ours || self.holder.is_none()) {
            return false;
        }
        if model.proposals.is_none() {
            return true;
        }
        let above = match self.last {
            // A repeat of what it granted already is no news.
            Some(last) => proposal > last || (ours && proposal == last),
            None => !on.clock_for_last || proposal > self.clock,
        };
        (above || !on.ballots) && (!on.ballots_near_clock || proposal <= self.clock + model.window)
    }
}

impl Protocol {
    fn proposals(&self) -> RangeInclusive<i8> {
        self.proposals.clone().unwrap_or(0..=0)
    }

    /// How long a request that is sent now may be answered, as far as its sender cares.
    fn after_tick(&self, client: &mut Client) {
        let on = self.safeguards;
        match client.phase {
            // Counted from the answer, nothing runs out before it.
            Phase::Asking if !on.deadline => {}
            Phase::Asking | Phase::Holding => client.left = (client.left - 1).max(0),
            _ => {}
        }
        if on.renewal_deadline {
            client.renewal = (client.renewal - 1).max(0);
        }
        if self.proposals.is_some() && client.phase != Phase::Idle {
            client.proposal = (client.proposal - 1).max(-self.message_age);
            client.earlier = client.earlier.map(|earlier| (earlier - 1).max(-self.message_age));
        }
        if client.phase == Phase::Asking && client.left == 0 {
            // `ValidityExpired`
            client.phase = Phase::Over;
        }
    }

    /// Whether the network may still deliver a request with this proposal.
    fn may_arrive(&self, proposal: i8) -> bool {
        self.proposals.is_none() || proposal > -self.message_age
    }

    /// Nothing happens for as long as a ttl or a window lasts, what is under way is lost, then a new client asks nodes
    /// that all answer. Told how far it is behind, it proposes above that.
    fn obtainable_after_a_calm(&self, state: &State) -> bool {
        let mut nodes = state.nodes;
        for node in &mut nodes {
            for _ in 0..self.ttl.max(self.window) {
                node.tick(self);
            }
        }
        let highest = nodes.iter().map(|node| node.last.unwrap_or(node.clock)).max().unwrap_or(0);
        nodes.iter().filter(|node| node.grants(self, u8::MAX, highest + 1)).count() >= MAJORITY as usize
    }
}

impl State {
    /// Whether the yes of a majority is under way to the client.
    fn majority(&self, answers: impl Fn(&Node) -> u8, client: usize) -> bool {
        self.nodes.iter().map(|node| u32::from(answers(node) >> client & 1)).sum::<u32>() >= MAJORITY
    }

    fn forget_answers(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.granted &= !(1 << client);
            node.extended &= !(1 << client);
        }
    }

    fn forget_extensions(&mut self, client: usize) {
        for node in &mut self.nodes {
            node.extended &= !(1 << client);
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut nodes = [Node::default(); NODES];
        nodes[NODES - 1].clock = self.skew;
        vec![State { nodes, clients: Default::default(), latest: None, in_order: true }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        let mut idle = false;
        for (client, c) in state.clients.iter().enumerate().take(self.clients) {
            let again = (c.phase == Phase::Asking && (self.proposals.is_none() || (self.second_round && c.earlier.is_none())))
                || (c.release_sent && c.phase != Phase::Holding && !self.safeguards.fresh_tokens);
            // Clients are alike: who asks first is the first.
            let first = c.phase == Phase::Idle && !idle;
            idle |= c.phase == Phase::Idle;
            if first || again {
                actions.extend(self.proposals().map(|proposal| Action::Ask { client, proposal }));
            }
            if c.phase == Phase::Asking && state.majority(|node| node.granted, client) {
                actions.push(Action::HearGrants { client });
            }
            if c.believes() && self.renewals {
                actions.push(Action::Renew { client });
                if c.renewal > 0 && state.majority(|node| node.extended, client) {
                    actions.push(Action::HearExtensions { client });
                }
            }
            if c.phase != Phase::Idle && !c.release_sent {
                actions.push(Action::Release { client });
            }
            for node in 0..NODES {
                if c.phase != Phase::Idle && self.may_arrive(c.proposal) {
                    actions.push(Action::DeliverAcquire { client, node });
                }
                if c.earlier.is_some_and(|earlier| self.may_arrive(earlier)) {
                    actions.push(Action::DeliverEarlier { client, node });
                }
                if c.renewal_sent {
                    actions.push(Action::DeliverRenew { client, node });
                }
                if c.release_sent {
                    actions.push(Action::DeliverRelease { client, node });
                }
            }
        }
        for node in 0..NODES {
            actions.push(Action::RestartForgetful { node });
            actions.push(Action::RestartRemembering { node });
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let on = self.safeguards;
        let mut next = *state;
        match action {
            Action::Tick => {
                for node in &mut next.nodes {
                    node.tick(self);
                }
                for client in 0..self.clients {
                    let c = &mut next.clients[client];
                    self.after_tick(c);
                    let (over, unanswered) = (c.phase == Phase::Over, c.renewal == 0);
                    if over {
                        next.forget_answers(client);
                    }
                    if unanswered {
                        next.forget_extensions(client);
                    }
                }
                let past = -self.message_age - self.ttl;
                next.latest = next.latest.map(|latest| (latest - 1).max(past));
            }
            Action::Ask { client, proposal } => {
                next.forget_answers(client);
                let c = &mut next.clients[client];
                if self.proposals.is_some() && c.phase == Phase::Asking {
                    c.earlier = Some(c.proposal);
                }
                (c.phase, c.left, c.proposal, c.renewal) = (Phase::Asking, self.ttl, proposal, 0);
            }
            Action::DeliverAcquire { client, node } => {
                let c = &next.clients[client];
                let n = &mut next.nodes[node];
                if !n.acquire(self, client as u8, c.proposal) {
                    return None;
                }
                if c.phase == Phase::Asking {
                    n.granted |= 1 << client;
                }
            }
            Action::DeliverEarlier { client, node } => {
                let proposal = next.clients[client].earlier?;
                if !next.nodes[node].acquire(self, client as u8, proposal) {
                    return None;
                }
            }
            Action::HearGrants { client } => {
                next.forget_answers(client);
                let c = &mut next.clients[client];
                c.phase = Phase::Holding;
                if self.proposals.is_some() {
                    next.in_order &= next.latest.is_none_or(|latest| c.proposal > latest);
                    next.latest = Some(c.proposal);
                }
            }
            Action::Renew { client } => {
                next.forget_extensions(client);
                let c = &mut next.clients[client];
                (c.renewal, c.renewal_sent) = (self.ttl, true);
            }
            Action::DeliverRenew { client, node } => {
                let n = &mut next.nodes[node];
                if n.holder != Some(client as u8) {
                    return None;
                }
                n.ttl = self.ttl;
                if next.clients[client].renewal > 0 {
                    n.extended |= 1 << client;
                }
            }
            Action::HearExtensions { client } => {
                next.forget_extensions(client);
                let c = &mut next.clients[client];
                (c.left, c.renewal) = (c.left.max(c.renewal), 0);
            }
            Action::Release { client } => {
                next.forget_answers(client);
                let c = &mut next.clients[client];
                c.phase = if c.believes() { Phase::Released } else { Phase::Over };
                (c.left, c.renewal, c.release_sent) = (0, 0, true);
            }
            Action::DeliverRelease { client, node } => {
                let n = &mut next.nodes[node];
                if n.holder.is_none() || (on.compare_and_delete && n.holder != Some(client as u8)) {
                    return None;
                }
                (n.holder, n.ttl) = (None, 0);
            }
            Action::RestartForgetful { node } => {
                let n = &mut next.nodes[node];
                (n.holder, n.ttl, n.last, n.memory) = (None, 0, None, 0);
                n.votes_in = if on.restart_window { self.window } else { 0 };
            }
            Action::RestartRemembering { node } => {
                next.nodes[node].votes_in = if on.restart_window { self.window } else { 0 };
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(EXCLUSION, |_, state: &State| state.clients.iter().filter(|c| c.believes()).count() <= 1),
            Property::always(ORDER, |_, state: &State| state.in_order),
            Property::always(OBTAINABLE, Self::obtainable_after_a_calm),
            Property::sometimes(AFTER_CRASH, |_, state: &State| {
                let silent = |c: &Client| c.phase == Phase::Holding && !c.believes() && !c.release_sent;
                state.clients.iter().any(silent) && state.clients.iter().any(Client::believes)
            }),
            Property::sometimes(AFTER_RELEASE, |_, state: &State| {
                let released = |c: &Client| c.phase == Phase::Released;
                state.clients.iter().any(released) && state.clients.iter().any(Client::believes)
            }),
        ];
        properties.retain(|property| self.properties.contains(&property.name));
        properties
    }
}

/// States that differ only in the names of clients and nodes are one state to the checker, which knows them by their
/// hash: of the clients in the order of what they do, then of the nodes in the order of what they know.
impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut order: [usize; CLIENTS] = std::array::from_fn(|client| client);
        order.sort_by_key(|&client| self.clients[client]);
        let mut renamed = [0; CLIENTS];
        for (name, &client) in order.iter().enumerate() {
            self.clients[client].hash(hasher);
            renamed[client] = name;
        }
        let rename = |set: u8| renamed.iter().enumerate().map(|(client, name)| (set >> client & 1) << name).sum::<u8>();
        let mut nodes = self.nodes.map(|node| Node {
            holder: node.holder.map(|client| renamed[usize::from(client)] as u8),
            granted: rename(node.granted),
            extended: rename(node.extended),
            ..node
        });
        nodes.sort_unstable();
        (nodes, self.latest, self.in_order).hash(hasher);
    }
}
