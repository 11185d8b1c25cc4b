//! What can happen next, and what must hold whatever happens.

use std::ops::RangeInclusive;

use stateright::{Model, Property};

use crate::state::{CLIENTS, Client, Key, Memory, Owned, Phase, State, has};

pub const EXCLUSION: &str = "never two holders";
pub const ORDER: &str = "fencing tokens grow";
pub const OBTAINABLE: &str = "after a calm, the lock can be obtained";
pub const AFTER_SILENCE: &str = "held again after its holder fell silent";
pub const HEALED: &str = "held by a majority that didn't vote for it";
pub const AFTER_RELEASE: &str = "held again after its holder released it";

/// The safeguards that keep the promises. A test turns one off and shows which promise is broken.
#[derive(Clone, Copy, Debug)]
pub struct Safeguards {
    /// A node that has just started doesn't vote until a window has passed.
    pub restart_window: bool,
    /// A node grants only a number above the last proposal that it granted.
    pub ballots: bool,
    /// A node that knows no last proposal uses its own clock instead.
    pub clock_for_last: bool,
    /// It does the same if it knows a proposal from before its restart, which need not have been the last.
    pub clock_after_restart: bool,
    /// A node grants no number that is more than a window ahead of its clock.
    pub proposals_near_clock: bool,
    /// A release deletes only a key that holds its token.
    pub compare_and_delete: bool,
    /// The deadline counts from before the request was sent, not from its reply (`hold.rs`, invariant 1).
    pub deadline: bool,
    /// So does the deadline that a renewal sets.
    pub renewal_deadline: bool,
    /// A client that has sent a release asks again only with another token, so that a late release finds nothing to
    /// delete.
    pub fresh_token: bool,
    /// A key has a ttl.
    pub expiry: bool,
    /// A key is brought back only if it is free,
    pub heal_free: bool,
    /// only if the node may vote,
    pub heal_votes: bool,
    /// and only before the deadline that the confirmed renewal has set.
    pub heal_in_time: bool,
    /// Only nodes that may vote let a client adopt a lease.
    pub claim_votes: bool,
    /// If several clients share a token, a release ends only what its own client relies on.
    pub releases_by_grant: bool,
    /// A renewal records its client, or records it again, as one that relies on the lock.
    pub renewals_record: bool,
    /// A token that comes back never gets a number that the node has found on its disk.
    pub again_after_distrust: bool,
    /// A shortened ttl counts from when it is requested, and no earlier request counts.
    pub shorter_from_send: bool,
    /// A node that may still shorten the ttl confirms no longer one.
    pub shorter_blocks: bool,
    /// A node grants all keys of a set or none,
    pub whole_sets: bool,
    /// and with a number above the last of each of them.
    pub fences_of_all_keys: bool,
}

pub const ALL: Safeguards = Safeguards {
    restart_window: true,
    ballots: true,
    clock_for_last: true,
    clock_after_restart: true,
    proposals_near_clock: true,
    compare_and_delete: true,
    deadline: true,
    renewal_deadline: true,
    fresh_token: true,
    expiry: true,
    heal_free: true,
    heal_votes: true,
    heal_in_time: true,
    claim_votes: true,
    releases_by_grant: true,
    renewals_record: true,
    again_after_distrust: true,
    shorter_from_send: true,
    shorter_blocks: true,
    whole_sets: true,
    fences_of_all_keys: true,
};

/// The size of the model. Times are in ticks.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub safeguards: Safeguards,
    /// The number of clients. Each makes one attempt: another attempt, with a new token, is another client.
    pub clients: usize,
    /// The number of nodes: three at most.
    pub nodes: usize,
    pub ttl: i8,
    /// How long a node doesn't vote after a restart, and how far a proposal may be ahead of its clock.
    pub window: i8,
    /// How long a node knows the last proposal that it granted.
    pub last_ttl: i8,
    /// Whether nodes are restarted.
    pub restarts: bool,
    /// Whether nodes write to disk, now and then.
    pub saves: bool,
    /// By how much the uptime that a node reports is too long.
    pub uptime_error: i8,
    /// By how much one node's clock is ahead.
    pub skew: i8,
    pub renewals: bool,
    /// Whether confirmed renewals bring back a key that is gone.
    pub heals: bool,
    /// Whether leases are adopted, of locks whose holder fell silent or released them.
    pub adopts: bool,
    /// How long a renewal may arrive if leases are adopted; otherwise for ever.
    pub renewal_life: i8,
    /// The token that each client shares with others; 0 if it has its own.
    pub shares: [u8; CLIENTS],
    /// The set of keys that each client wants, as one lock.
    pub wants: [u8; CLIENTS],
    /// The ttl that a holder may shorten to; 0 if none does.
    pub shorter: i8,
    /// How long a request for that may arrive.
    pub exact_life: i8,
    /// What clients propose, as the distance from now: any of it at any time, whatever their clocks and the replies.
    /// `None`: they ask for no fencing token, and the nodes grant more freely.
    pub proposals: Option<RangeInclusive<i8>>,
    /// Whether a client may propose twice with the same token.
    pub second_round: bool,
    /// A proposal that lies this far in the past no longer arrives anywhere. No attempt that can still succeed is so
    /// old.
    pub oldest: i8,
    /// The promises to check.
    pub promises: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Time passes, for all alike.
    Tick,
    /// A client sends its request to all nodes.
    Ask {
        client: usize,
        proposal: i8,
    },
    /// A request arrives: for the first time or again, soon or late.
    Acquire {
        client: usize,
        node: usize,
    },
    /// A request of the round before arrives.
    AcquireEarlier {
        client: usize,
        node: usize,
    },
    /// A majority's grants arrive.
    Obtain {
        client: usize,
    },
    SendRenewal {
        client: usize,
    },
    Renew {
        client: usize,
        node: usize,
    },
    /// A majority's confirmations arrive.
    Confirm {
        client: usize,
    },
    /// A vote that brings the key back arrives.
    Heal {
        client: usize,
        node: usize,
    },
    /// A client adopts the lease of a lock that is not held.
    SendClaim {
        client: usize,
    },
    /// A holder requests a shorter ttl, exactly this one.
    SendExact {
        client: usize,
    },
    /// The request arrives, once.
    Shorten {
        client: usize,
        node: usize,
    },
    /// A majority's confirmations of it arrive.
    ConfirmExact {
        client: usize,
    },
    /// A client gives up, or releases, or undoes what its attempt may have left.
    SendRelease {
        client: usize,
    },
    Release {
        client: usize,
        node: usize,
    },
    Save {
        node: usize,
    },
    Restart {
        node: usize,
        memory: Memory,
    },
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        for node in 0..if self.restarts { self.nodes } else { 0 } {
            actions.push(Action::Restart { node, memory: Memory::Nothing });
            actions.push(Action::Restart { node, memory: Memory::All });
            if self.saves {
                actions.push(Action::Save { node });
                actions.push(Action::Restart { node, memory: Memory::Saved });
            }
        }
        for (client, known) in state.clients.iter().enumerate().take(self.clients) {
            // If clients are alike, the next one to ask may as well be the first of them.
            let is_first =
                || !state.clients.iter().take(client).any(|other| other.phase == Phase::Idle && other.is_like(known));
            if self.may_ask(known) && (known.phase != Phase::Idle || is_first()) {
                let proposals = self.proposals.clone().unwrap_or(0..=0);
                actions.extend(proposals.map(|proposal| Action::Ask { client, proposal }));
            }
            if known.phase == Phase::Idle {
                continue;
            }
            if known.phase == Phase::Asking && state.granted(self, client).is_some() {
                actions.push(Action::Obtain { client });
            }
            if known.believes() && self.renewals {
                actions.push(Action::SendRenewal { client });
            }
            if (known.believes() || known.claims) && state.extended(self, client) {
                actions.push(Action::Confirm { client });
            }
            let is_over = known.phase == Phase::Released || (known.phase == Phase::Holding && !known.believes());
            if self.adopts && is_over && !known.claims {
                actions.push(Action::SendClaim { client });
            }
            if self.shorter > 0 && known.believes() && known.exact == 0 {
                actions.push(Action::SendExact { client });
            }
            if known.is_unresolved && state.shortened(self, client) {
                actions.push(Action::ConfirmExact { client });
            }
            if !known.release_sent {
                actions.push(Action::SendRelease { client });
            }
            for node in 0..self.nodes {
                if self.may_arrive(known.proposal) {
                    actions.push(Action::Acquire { client, node });
                }
                if known.earlier.is_some_and(|earlier| self.may_arrive(earlier)) {
                    actions.push(Action::AcquireEarlier { client, node });
                }
                if known.healing > 0 || (known.heal_sent && !self.safeguards.heal_in_time) {
                    actions.push(Action::Heal { client, node });
                }
                if known.renewal_sent && (known.renewal_life > 0 || !self.adopts) {
                    actions.push(Action::Renew { client, node });
                }
                if known.release_sent {
                    actions.push(Action::Release { client, node });
                }
                if has(state.nodes[node].due, client) {
                    actions.push(Action::Shorten { client, node });
                }
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        match action {
            Action::Tick => self.tick(&mut next),
            Action::Ask { client, proposal } => {
                next.forget_answers(client);
                let asking = &mut next.clients[client];
                if asking.phase == Phase::Asking && self.proposals.is_some() {
                    asking.earlier = Some(asking.proposal);
                }
                (asking.phase, asking.left, asking.proposal) = (Phase::Asking, self.ttl, proposal);
            }
            Action::Acquire { client, node } => {
                let (owned, Client { phase, proposal, .. }) = (next.owned(client), next.clients[client]);
                let granted = next.nodes[node].vote(self, owned, proposal).filter(|_| phase == Phase::Asking);
                if let Some(number) = granted {
                    next.nodes[node].granted |= 1 << client;
                    next.nodes[node].told[client] = Some(number).filter(|number| *number != proposal);
                }
            }
            Action::AcquireEarlier { client, node } => {
                // Its reply belongs to another round, which nobody waits for.
                let owned = next.owned(client);
                next.nodes[node].vote(self, owned, next.clients[client].earlier?);
            }
            Action::Obtain { client } => {
                // `Hold::new`: the deadline counts from the send, as `left` does.
                let number = next.granted(self, client)?;
                next.forget_answers(client);
                let holder = &mut next.clients[client];
                (holder.phase, holder.proposal) = (Phase::Holding, number);
                if self.proposals.is_some() {
                    next.note_order(client, number);
                }
            }
            Action::SendRenewal { client } | Action::SendClaim { client } => {
                // `Hold::renewing`. One at a time: a later renewal means that the one before was given up.
                next.forget_extensions(client);
                let holder = &mut next.clients[client];
                // If an exact ttl is not confirmed yet: `hold.rs`, invariant 5.
                holder.renewal = if holder.is_unresolved { self.shorter } else { self.ttl };
                (holder.renewal_sent, holder.claims) = (true, matches!(action, Action::SendClaim { .. }));
                holder.renewal_life = if self.adopts { self.renewal_life } else { 0 };
            }
            Action::Renew { client, node } => {
                let (owned, Client { renewal, claims, .. }) = (next.owned(client), next.clients[client]);
                let node = &mut next.nodes[node];
                // A node that may not vote refuses a claim; a renewal from before it may still arrive.
                let refuses = claims && self.safeguards.claim_votes && node.votes_in > 0;
                // `quorum/shortened.rs`
                let is_blocked = self.safeguards.shorter_blocks && has(node.due, client);
                // A message of an abandoned renewal does the same at the node as one of the current renewal.
                if node.renew(self, owned) && renewal > 0 && !refuses && !is_blocked {
                    node.extended |= 1 << client;
                }
            }
            Action::Confirm { client } => {
                // `Hold::renewed`; or, for a claim, `Hold::new`.
                next.forget_extensions(client);
                let heals = self.heals && !next.clients[client].claims;
                let holder = &mut next.clients[client];
                if holder.claims {
                    if self.proposals.is_some() {
                        let latest = next.latest.iter().flatten().map(|(latest, _)| *latest).max();
                        next.in_order &= latest.is_none_or(|latest| holder.proposal >= latest);
                    }
                    (holder.phase, holder.left, holder.claims) = (Phase::Holding, 0, false);
                }
                (holder.left, holder.renewal) = (holder.left.max(holder.renewal), 0);
                if heals {
                    (holder.healing, holder.heal_sent) = (holder.left, true);
                }
            }
            Action::Heal { client, node } => {
                let owned = next.owned(client);
                next.nodes[node].heal(self, owned);
            }
            Action::SendExact { client } => {
                // `Hold::setting_ttl`, invariant 4
                let holder = &mut next.clients[client];
                (holder.exact, holder.is_unresolved) = (self.exact_life, true);
                if self.safeguards.shorter_from_send {
                    (holder.left, holder.renewal) = (holder.left.min(self.shorter), 0);
                    next.forget_extensions(client);
                }
                next.nodes.iter_mut().for_each(|node| node.due |= 1 << client);
            }
            Action::Shorten { client, node } => {
                let owned = next.owned(client);
                let node = &mut next.nodes[node];
                node.due &= !(1 << client);
                if node.shorten(self, owned) {
                    node.shortened |= 1 << client;
                }
            }
            Action::ConfirmExact { client } => {
                let holder = &mut next.clients[client];
                holder.is_unresolved = false;
                if !self.safeguards.shorter_from_send {
                    holder.left = holder.left.min(self.shorter);
                }
                next.nodes.iter_mut().for_each(|node| node.shortened &= !(1 << client));
            }
            Action::SendRelease { client } => {
                next.forget_answers(client);
                let releasing = &mut next.clients[client];
                releasing.phase = if releasing.believes() { Phase::Released } else { Phase::Over };
                (releasing.left, releasing.renewal, releasing.release_sent) = (0, 0, true);
                releasing.claims = false;
            }
            Action::Release { client, node } => {
                let owned = next.owned(client);
                next.nodes[node].release(self, owned);
            }
            Action::Save { node } => next.nodes[node].save(self),
            Action::Restart { node, memory } => next.nodes[node].restart(self, memory),
        }
        Some(next).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(EXCLUSION, |_, state: &State| {
                let believers = || state.clients.iter().enumerate().filter(|(_, client)| client.believes());
                believers().all(|(client, one)| {
                    believers().take_while(|(other, _)| *other < client).all(|(_, other)| one.may_hold_beside(other))
                })
            }),
            Property::always(ORDER, |_, state: &State| state.in_order),
            Property::always(OBTAINABLE, Self::obtainable_after_a_calm),
            Property::sometimes(HEALED, |_, state: &State| {
                let healed = |client: usize| {
                    let holds = |key: &Key| key.holder == Some(client as u8);
                    state.nodes.iter().all(|node| node.keys.iter().any(holds) && node.votes_in == 0)
                };
                let mut clients = state.clients.iter().enumerate();
                clients.any(|(client, known)| known.heal_sent && known.believes() && healed(client))
            }),
            Property::sometimes(AFTER_SILENCE, |_, state: &State| {
                let silent = |c: &Client| c.phase == Phase::Holding && !c.believes();
                state.clients.iter().any(silent) && state.clients.iter().any(Client::believes)
            }),
            Property::sometimes(AFTER_RELEASE, |_, state: &State| {
                let released = |c: &Client| c.phase == Phase::Released;
                state.clients.iter().any(released) && state.clients.iter().any(Client::believes)
            }),
        ];
        properties.retain(|property| self.promises.contains(&property.name));
        properties
    }
}

impl Protocol {
    pub(crate) fn majority(&self) -> usize {
        self.nodes / 2 + 1
    }

    fn may_ask(&self, client: &Client) -> bool {
        let once_more = match client.phase {
            Phase::Idle => true,
            Phase::Asking if self.proposals.is_none() => true,
            Phase::Asking => self.second_round && client.earlier.is_none(),
            Phase::Holding | Phase::Released | Phase::Over => false,
        };
        once_more || (!self.safeguards.fresh_token && matches!(client.phase, Phase::Released | Phase::Over))
    }

    fn may_arrive(&self, proposal: i8) -> bool {
        self.proposals.is_none() || proposal > -self.oldest
    }

    fn tick(&self, next: &mut State) {
        for node in &mut next.nodes {
            node.tick(self);
        }
        for client in 0..self.clients {
            let waiting = &mut next.clients[client];
            if waiting.exact > 0 {
                waiting.exact -= 1;
                if waiting.exact == 0 {
                    // From now on the nodes refuse to run it.
                    waiting.is_unresolved = false;
                    for node in &mut next.nodes {
                        (node.due, node.shortened) = (node.due & !(1 << client), node.shortened & !(1 << client));
                    }
                }
            }
            let waiting = &mut next.clients[client];
            if waiting.phase == Phase::Holding || self.safeguards.deadline {
                waiting.left = (waiting.left - 1).max(0);
            }
            waiting.renewal_life = (waiting.renewal_life - 1).max(0);
            waiting.healing = (waiting.healing - 1).max(0);
            if self.safeguards.renewal_deadline {
                waiting.renewal = (waiting.renewal - 1).max(0);
            }
            if self.proposals.is_some() && waiting.phase != Phase::Idle {
                waiting.proposal = (waiting.proposal - 1).max(-self.oldest);
                waiting.earlier = waiting.earlier.map(|earlier| (earlier - 1).max(-self.oldest));
            }
            let (too_late, renewal_too_late) = (waiting.left == 0, waiting.renewal == 0);
            if too_late && waiting.phase == Phase::Asking {
                // `Error::ValidityExpired`
                waiting.phase = Phase::Over;
            }
            if too_late && !(waiting.claims && waiting.renewal > 0) {
                (waiting.renewal, waiting.claims) = (0, false);
                next.forget_answers(client);
            }
            if renewal_too_late {
                next.forget_extensions(client);
            }
        }
        // Below every number that can still be granted, all are the same.
        for (latest, _) in next.latest.iter_mut().flatten() {
            *latest = (*latest - 1).max(-self.oldest - self.ttl);
        }
    }

    /// Nothing happens for as long as keys and windows last, and messages in flight are lost. Then a new client asks.
    /// If its proposal is behind, it proposes a number above the highest that the nodes reply with.
    fn obtainable_after_a_calm(&self, state: &State) -> bool {
        let mut nodes = state.nodes;
        let nodes = &mut nodes[..self.nodes];
        for node in &mut *nodes {
            (0..self.ttl.max(self.window)).for_each(|_| node.tick(self));
        }
        let numbers = nodes.iter().flat_map(|node| node.keys.map(|key| key.last.unwrap_or(node.clock)));
        let proposal = numbers.max().unwrap_or(0) + 1;
        nodes.iter_mut().filter_map(|node| node.vote(self, Owned::NOBODY, proposal)).count() >= self.majority()
    }
}
