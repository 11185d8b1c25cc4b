//! What can happen next, and what must hold whatever happens.

use std::ops::RangeInclusive;

use stateright::{Model, Property};

use crate::state::{Client, MAJORITY, Memory, NODES, Node, Phase, State};

pub(crate) const EXCLUSION: &str = "never two holders";
pub(crate) const ORDER: &str = "fencing tokens grow";
pub(crate) const OBTAINABLE: &str = "after a calm, the lock can be obtained";
pub(crate) const AFTER_SILENCE: &str = "held again after its holder fell silent";
pub(crate) const NOTHING_LEFT: &str = "when all its calls have ended, nothing is left of a lock that was released";
pub(crate) const HEALED: &str = "held by a majority that didn't vote for it";
pub(crate) const AFTER_RELEASE: &str = "held again after its holder released it";

/// What keeps the promises. A test turns one off and shows which promise falls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Safeguards {
    /// A node that has just started doesn't vote until a window has passed.
    pub(crate) restart_window: bool,
    /// A node grants only what is above the last proposal that it granted.
    pub(crate) ballots: bool,
    /// A node that knows no last proposal takes its own clock for it.
    pub(crate) clock_for_last: bool,
    /// And also where it knows one from before its restart, which need not have been the last.
    pub(crate) clock_after_restart: bool,
    /// A node grants nothing that is more than a window ahead of its clock.
    pub(crate) proposals_near_clock: bool,
    /// A release deletes only what holds its token.
    pub(crate) compare_and_delete: bool,
    /// The deadline counts from before the request was sent, not from its answer (`hold.rs`, invariant 1).
    pub(crate) deadline: bool,
    /// And so does the one that a renewal sets.
    pub(crate) renewal_deadline: bool,
    /// Who has sent a release asks again only by another token, so that a late release finds nothing to delete.
    pub(crate) fresh_token: bool,
    /// A key has a ttl.
    pub(crate) expiry: bool,
    /// A key is brought back only where it is free,
    pub(crate) heal_free: bool,
    /// only where the node may vote,
    pub(crate) heal_votes: bool,
    /// and only before the deadline that the confirmed renewal has set.
    pub(crate) heal_in_time: bool,
    /// What comes to pass after the release is undone.
    pub(crate) heal_undone: bool,
    /// A lease is taken up only by nodes that may vote.
    pub(crate) claim_votes: bool,
}

pub(crate) const ALL: Safeguards = Safeguards {
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
    heal_undone: true,
    claim_votes: true,
};

/// The size of the model. Times are in ticks.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) safeguards: Safeguards,
    /// Each makes one attempt: another one, by a fresh token, is another client.
    pub(crate) clients: usize,
    pub(crate) ttl: i8,
    /// For how long a node doesn't vote after a restart, and by how much a proposal may be ahead of its clock.
    pub(crate) window: i8,
    /// For how long a node knows the last proposal that it granted.
    pub(crate) last_ttl: i8,
    /// Whether nodes write to disk, now and then.
    pub(crate) saves: bool,
    /// By how much the uptime that a node tells is too long.
    pub(crate) uptime_error: i8,
    /// By how much one node's clock is ahead.
    pub(crate) skew: i8,
    pub(crate) renewals: bool,
    /// Whether confirmed renewals bring the key back where it is gone.
    pub(crate) heals: bool,
    /// Whether leases are taken up, of locks whose holder fell silent or released them.
    pub(crate) adopts: bool,
    /// For how long a renewal may arrive, where leases are taken up; elsewhere for ever.
    pub(crate) renewal_life: i8,
    /// Whether the calls of a client come to an end.
    pub(crate) settles: bool,
    /// What clients propose, as the distance from now: any of it at any time, whatever clocks they have and whatever
    /// they were told. None: they ask for no fencing token, and the nodes grant more freely.
    pub(crate) proposals: Option<RangeInclusive<i8>>,
    /// Whether a client may propose twice by the same token.
    pub(crate) second_round: bool,
    /// A proposal that lies so far in the past arrives nowhere any more. No attempt that can still succeed is so old.
    pub(crate) oldest: i8,
    /// The promises to check.
    pub(crate) promises: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
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
    /// So does one of the round before.
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
    /// Somebody takes up the lease of a lock that is not held.
    SendClaim {
        client: usize,
    },
    /// The last call of a client that released its lock ends.
    Settle {
        client: usize,
    },
    /// A client gives up, or gives back, or undoes what its attempt may have left.
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
        vec![State::new(self.skew)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        for node in 0..NODES {
            actions.push(Action::Restart { node, memory: Memory::Nothing });
            actions.push(Action::Restart { node, memory: Memory::All });
            if self.saves {
                actions.push(Action::Save { node });
                actions.push(Action::Restart { node, memory: Memory::Saved });
            }
        }
        for (client, known) in state.clients.iter().enumerate().take(self.clients) {
            if self.may_ask(known) {
                let proposals = self.proposals.clone().unwrap_or(0..=0);
                actions.extend(proposals.map(|proposal| Action::Ask { client, proposal }));
            }
            if known.phase == Phase::Idle {
                // Clients are alike: the next one to ask may as well be this one.
                break;
            }
            if known.settled {
                continue;
            }
            if known.phase == Phase::Asking && state.granted(client) {
                actions.push(Action::Obtain { client });
            }
            if known.believes() && self.renewals {
                actions.push(Action::SendRenewal { client });
            }
            if (known.believes() || known.claims) && state.extended(client) {
                actions.push(Action::Confirm { client });
            }
            let is_over = known.phase == Phase::Released || (known.phase == Phase::Holding && !known.believes());
            if self.adopts && is_over && !known.claims {
                actions.push(Action::SendClaim { client });
            }
            if self.settles && known.release_sent && state.nodes.iter().all(|node| node.released >> client & 1 == 1) {
                actions.push(Action::Settle { client });
            }
            if !known.release_sent {
                actions.push(Action::SendRelease { client });
            }
            for node in 0..NODES {
                // What an attempt leaves is undone by itself, and is not what is asked here.
                let is_undone = self.settles && known.release_sent;
                if self.may_arrive(known.proposal) && !is_undone {
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
                let Client { phase, proposal, .. } = next.clients[client];
                if next.nodes[node].vote(self, client as u8, proposal) && phase == Phase::Asking {
                    next.nodes[node].granted |= 1 << client;
                }
            }
            Action::AcquireEarlier { client, node } => {
                // Its answer is that to another round, which nobody waits for.
                next.nodes[node].vote(self, client as u8, next.clients[client].earlier?);
            }
            Action::Obtain { client } => {
                // `Hold::new`: the deadline counts from the send, as `left` does.
                next.forget_answers(client);
                let holder = &mut next.clients[client];
                holder.phase = Phase::Holding;
                if self.proposals.is_some() {
                    next.in_order &= next.latest.is_none_or(|latest| holder.proposal > latest);
                    next.latest = Some(holder.proposal);
                }
            }
            Action::SendRenewal { client } => {
                // `Hold::renewing`. One at a time: a later one means that the one before is given up.
                next.forget_extensions(client);
                let holder = &mut next.clients[client];
                (holder.renewal, holder.renewal_sent, holder.claims) = (self.ttl, true, false);
                holder.renewal_life = if self.adopts { self.renewal_life } else { 0 };
            }
            Action::SendClaim { client } => {
                next.forget_extensions(client);
                let holder = &mut next.clients[client];
                (holder.renewal, holder.renewal_sent, holder.claims) = (self.ttl, true, true);
                holder.renewal_life = self.renewal_life;
            }
            Action::Renew { client, node } => {
                let Client { renewal, claims, .. } = next.clients[client];
                // A node that may not vote refuses a claim; a renewal from before it may still arrive.
                let counts = renewal > 0 && !(claims && self.safeguards.claim_votes && next.nodes[node].votes_in > 0);
                // A message of a renewal that was given up does at the node what one of the present renewal does.
                if next.nodes[node].renew(self, client as u8) && counts {
                    next.nodes[node].extended |= 1 << client;
                }
            }
            Action::Confirm { client } => {
                // `Hold::renewed`; or, of a claim, `Hold::new`.
                next.forget_extensions(client);
                let heals = self.heals && !next.clients[client].claims;
                let holder = &mut next.clients[client];
                if holder.claims {
                    if self.proposals.is_some() {
                        next.in_order &= next.latest.is_none_or(|latest| holder.proposal >= latest);
                    }
                    (holder.phase, holder.left, holder.claims) = (Phase::Holding, 0, false);
                }
                (holder.left, holder.renewal) = (holder.left.max(holder.renewal), 0);
                if heals {
                    (holder.healing, holder.heal_sent) = (holder.left, true);
                }
            }
            Action::Heal { client, node } => next.nodes[node].heal(self, client as u8),
            Action::Settle { client } => {
                next.clients[client].settled = true;
                let alive = next.clients[client].heal_sent && !self.safeguards.heal_undone;
                for node in &mut next.nodes {
                    if !alive {
                        node.release(self, client as u8);
                    }
                    node.released &= !(1 << client);
                }
            }
            Action::SendRelease { client } => {
                next.forget_answers(client);
                let releasing = &mut next.clients[client];
                releasing.phase = if releasing.believes() { Phase::Released } else { Phase::Over };
                (releasing.left, releasing.renewal, releasing.release_sent) = (0, 0, true);
                releasing.claims = false;
            }
            Action::Release { client, node } => {
                next.nodes[node].release(self, client as u8);
                if self.settles {
                    next.nodes[node].released |= 1 << client;
                }
            }
            Action::Save { node } => next.nodes[node].save(self),
            Action::Restart { node, memory } => next.nodes[node].restart(self, memory),
        }
        Some(next).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(EXCLUSION, |_, state: &State| state.clients.iter().filter(|c| c.believes()).count() <= 1),
            Property::always(ORDER, |_, state: &State| state.in_order),
            Property::always(OBTAINABLE, Self::obtainable_after_a_calm),
            Property::always(NOTHING_LEFT, |_, state: &State| {
                let left = |client: usize| state.nodes.iter().any(|node| node.keys.holder == Some(client as u8));
                !state.clients.iter().enumerate().any(|(client, known)| known.settled && left(client))
            }),
            Property::sometimes(HEALED, |_, state: &State| {
                let healed = |client: usize| {
                    let of = |node: &&Node| node.keys.holder == Some(client as u8) && node.votes_in == 0;
                    state.nodes.iter().filter(of).count() == NODES
                };
                state
                    .clients
                    .iter()
                    .enumerate()
                    .any(|(client, known)| known.heal_sent && known.believes() && healed(client))
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
        // Below all that can still be granted, one is as good as another.
        next.latest = next.latest.map(|latest| (latest - 1).max(-self.oldest - self.ttl));
    }

    /// For as long as keys and windows last, nothing happens; what was under way is lost. Then a new client asks. Where
    /// its proposal is behind, it proposes above the highest that the nodes answer.
    fn obtainable_after_a_calm(&self, state: &State) -> bool {
        let mut nodes = state.nodes;
        for node in &mut nodes {
            (0..self.ttl.max(self.window)).for_each(|_| node.tick(self));
        }
        let highest = nodes.iter().map(|node| node.keys.last.unwrap_or(node.clock)).max().unwrap_or(0);
        nodes.iter_mut().filter_map(|node| node.vote(self, u8::MAX, highest + 1).then_some(())).count() >= MAJORITY
    }
}
