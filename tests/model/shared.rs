//! Readers, writers and permits of one key on one server, with the line in which they wait.
//!
//! Time passes in ticks, for all alike. A request that was sent may run at any time until the server refuses it as
//! late, once, several times or never; its reply may be lost. A reply that comes late is one that the client does
//! nothing about for a while: its deadline counts from when it sent the request. `tests/shared_model.rs` explains the
//! purpose.

mod calm;
mod server;
mod state;

use stateright::{Model, Property};

use self::state::{Client, Lock, Phase};
pub use self::state::{MOST, Mode, SharedState};

pub const EXCLUSION: &str = "no writer beside anybody, and no reader beside a permit";
pub const LIMIT: &str = "never more permits than the limit";
pub const HELD: &str = "whoever believes to hold the key holds it at the server for as long";
pub const OWN_TIME: &str = "the key is taken for no longer than somebody has asked for";
pub const IN_ORDER: &str = "nobody shares the key while another waits for it before";
pub const NOT_STALE: &str = "no share outlives the marker that it came with";
pub const UNDONE: &str = "nothing is left of whoever has ended";
pub const SERVED: &str = "all who wait are served";
pub const GO_ON: &str = "a waiter that died, or a share of the dead, holds nobody back for long";
pub const NOT_LOST: &str = "nobody is told of a loss of what it holds";
pub const AT_ONCE: &str = "whoever holds a share gets another one at once";

/// The safeguards that keep the promises. A test turns one off and shows which promise is broken.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The marker lives for as long as the longest of the shares: whoever comes or renews makes it longer,
    pub marker_grows: bool,
    /// and when the longest leaves, it is cut.
    pub marker_is_cut: bool,
    /// Whoever enters a free key empties the set first.
    pub free_is_empty: bool,
    /// A request for a share is refused while others wait.
    pub shares_wait: bool,
    /// What has expired doesn't count, whether it was swept or not,
    pub dead_do_not_count: bool,
    /// and isn't renewed.
    pub dead_are_missing: bool,
    /// A permit counts the tokens, not the shares.
    pub tokens_count: bool,
    /// Whoever holds a share gets another one by the same token, whoever waits.
    pub again_at_once: bool,
    /// The markers of readers and permits differ.
    pub kinds_differ: bool,
    /// A release in the background ends its own share only.
    pub ends_own_share: bool,
    /// A renewal brings no share back,
    pub renewal_adds_none: bool,
    /// and looks at the lock key.
    pub renewal_looks_at_key: bool,
    /// A writer becomes a reader in one step,
    pub downgrade_is_one_step: bool,
    /// keeps the time that it has,
    pub downgrade_keeps_time: bool,
    /// no longer believes to be alone from when it asks for that,
    pub downgrade_believes_less: bool,
    /// and what it holds is renewed and released whether the server has done it or not.
    pub downgrade_is_either: bool,
    /// What stays for its least time is nobody's: a repeat of its release doesn't find it,
    pub rest_is_nobodys: bool,
    /// and it stays for no longer than asked.
    pub rest_ends: bool,
    /// Writers look at the marker like at any holder.
    pub writers_see_shares: bool,
    /// An attempt of unknown outcome is undone until it can't run any longer.
    pub undo_until_latest: bool,
    /// A place in the line ends when its process is silent.
    pub silent_places_end: bool,
    /// A heartbeat finds out that those before have died, also while the key is shared.
    pub heartbeat_looks_ahead: bool,
}

pub const RULES: Rules = Rules {
    marker_grows: true,
    marker_is_cut: true,
    free_is_empty: true,
    shares_wait: true,
    dead_do_not_count: true,
    dead_are_missing: true,
    tokens_count: true,
    again_at_once: true,
    kinds_differ: true,
    ends_own_share: true,
    renewal_adds_none: true,
    renewal_looks_at_key: true,
    downgrade_is_one_step: true,
    downgrade_keeps_time: true,
    downgrade_believes_less: true,
    downgrade_is_either: true,
    rest_is_nobodys: true,
    rest_ends: true,
    writers_see_shares: true,
    undo_until_latest: true,
    silent_places_end: true,
    heartbeat_looks_ahead: true,
};

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    pub mode: Mode,
    /// The token. Clients with the same one are twins.
    pub token: u8,
    /// In ticks, like all times.
    pub ttl: i8,
    /// Whether it waits in the line, or asks without a place there.
    pub waits: bool,
    /// For how long at least the key stays taken from when it was obtained.
    pub least: i8,
    /// Whether a writer may become a reader.
    pub downgrades: bool,
    /// Whether its release is an explicit one, which ends all shares of the token.
    pub ends_all: bool,
}

impl Role {
    const fn new(mode: Mode, token: u8) -> Self {
        Self { mode, token, ttl: 2, waits: true, least: 0, downgrades: false, ends_all: false }
    }

    pub const fn writer(token: u8) -> Self {
        Self::new(Mode::Write, token)
    }

    pub const fn reader(token: u8) -> Self {
        Self::new(Mode::Read, token)
    }

    pub const fn permit(token: u8) -> Self {
        Self::new(Mode::Permit, token)
    }

    /// Whether two clients differ in their tokens only.
    fn is_like(&self, other: &Self) -> bool {
        Self { token: 0, ..*self } == Self { token: 0, ..*other }
    }
}

/// The size of the model.
#[derive(Clone, Debug)]
pub struct Shares {
    pub rules: Rules,
    pub clients: &'static [Role],
    /// How many may hold a permit.
    pub limit: usize,
    /// For how long a request may arrive.
    pub life: i8,
    /// For how long a reservation waits, and a silent process counts as alive.
    pub confirm: i8,
    pub alive: i8,
    pub renews: bool,
    /// Whether waiters give up, and ask again before they know of the attempt before.
    pub gives_up: bool,
    /// Whether the dead are swept.
    pub sweeps: bool,
    /// How many clients may die.
    pub deaths: u8,
    /// How often the lock key alone is deleted by hand, or evicted.
    pub deletions: u8,
    pub promises: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Time passes, for all alike.
    Tick,
    /// A client asks: for the first time, or again.
    Ask(usize),
    Renew(usize),
    Downgrade(usize),
    /// A holder releases what it holds; a waiter gives up; whoever has ended undoes what may still come.
    Release(usize),
    /// The server runs a request, and the reply arrives.
    Run(usize, What),
    /// The same, and the reply is lost.
    RunUnheard(usize, What),
    /// The dead share of a client is removed from the set.
    Sweep(usize),
    Die(usize),
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Acquire,
    Renew,
    Downgrade,
    Release,
}

impl Model for Shares {
    type State = SharedState;
    type Action = Action;

    fn init_states(&self) -> Vec<SharedState> {
        let mut state = SharedState::default();
        for (client, role) in state.clients.iter_mut().zip(self.clients) {
            client.mode = role.mode;
        }
        vec![state]
    }

    fn actions(&self, state: &SharedState, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        if state.lock != Lock::Free && state.deletions < self.deletions {
            actions.push(Action::Delete);
        }
        for (client, role) in self.clients.iter().enumerate() {
            let known = &state.clients[client];
            let is_first = || {
                let before = self.clients.iter().zip(&state.clients).take(client);
                !before.into_iter().any(|(other, known)| known.phase == Phase::Away && other.is_like(role))
            };
            match known.phase {
                Phase::Away if is_first() || self.has_twin(client) => actions.push(Action::Ask(client)),
                Phase::Waiting => {
                    if known.acquire == 0 && role.waits || known.acquire > 0 && self.gives_up {
                        actions.push(Action::Ask(client));
                    }
                    if self.gives_up || known.acquire == 0 && !role.waits {
                        actions.push(Action::Release(client));
                    }
                }
                Phase::Holding | Phase::Downgrading => {
                    if self.renews && known.believes() && !known.is_excused {
                        actions.push(Action::Renew(client));
                    }
                    if role.downgrades && known.mode == Mode::Write && known.believes() {
                        actions.push(Action::Downgrade(client));
                    }
                    actions.push(Action::Release(client));
                }
                Phase::Ending if known.release == 0 => actions.push(Action::Release(client)),
                Phase::Away | Phase::Ending | Phase::Over | Phase::Dead => {}
            }
            if matches!(known.phase, Phase::Waiting | Phase::Holding | Phase::Downgrading) && state.deaths < self.deaths
            {
                actions.push(Action::Die(client));
            }
            let requests = [
                (What::Acquire, known.acquire),
                (What::Renew, known.renew),
                (What::Downgrade, known.downgrade),
                (What::Release, known.release),
            ];
            for (what, _) in requests.into_iter().filter(|(_, life)| *life > 0) {
                actions.extend([Action::Run(client, what), Action::RunUnheard(client, what)]);
            }
            if self.sweeps && state.members[client].is_some_and(|member| member.left == 0) {
                actions.push(Action::Sweep(client));
            }
        }
    }

    fn next_state(&self, state: &SharedState, action: Action) -> Option<SharedState> {
        let mut next = state.clone();
        match action {
            Action::Tick => next.tick(self),
            Action::Ask(client) => {
                let (role, asking) = (&self.clients[client], &mut next.clients[client]);
                asking.is_doubtful |= asking.acquire > 0;
                asking.phase = Phase::Waiting;
                (asking.acquire, asking.left) = (self.life, role.ttl);
            }
            Action::Renew(client) => {
                let holder = &mut next.clients[client];
                (holder.renew, holder.renewal) = (self.life, self.clients[client].ttl);
            }
            Action::Downgrade(client) => {
                let holder = &mut next.clients[client];
                (holder.phase, holder.downgrade) = (Phase::Downgrading, self.life);
            }
            Action::Release(client) => {
                let (role, ending) = (&self.clients[client], &mut next.clients[client]);
                // Whoever has never had it has nothing to keep it for.
                let has_held = ending.phase == Phase::Holding || ending.phase == Phase::Downgrading;
                if ending.phase != Phase::Ending {
                    ending.rest = if has_held { ending.least } else { 0 };
                    ending.ends_all = has_held && role.ends_all && ending.rest == 0;
                }
                ending.is_last = !self.rules.undo_until_latest || ending.acquire == 0 && ending.downgrade == 0;
                (ending.phase, ending.left, ending.renewal) = (Phase::Ending, 0, 0);
                ending.release = self.life;
            }
            Action::Run(client, what) => {
                let done = next.run(self, client, what);
                next.learn(self, client, what, done);
            }
            Action::RunUnheard(client, what) => drop(next.run(self, client, what)),
            Action::Sweep(client) => next.members[client] = None,
            Action::Die(client) => {
                next.deaths += 1;
                let dead = &mut next.clients[client];
                (dead.phase, dead.left, dead.renewal) = (Phase::Dead, 0, 0);
            }
            Action::Delete => {
                next.deletions += 1;
                next.free();
            }
        }
        Some(next).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(EXCLUSION, Self::excludes),
            Property::always(LIMIT, Self::is_within_limit),
            Property::always(HELD, Self::is_held),
            Property::always(OWN_TIME, |_, state: &SharedState| {
                let longest = state.clients.iter().map(|client| client.asked).max();
                state.lock.left().is_none_or(|left| longest.is_some_and(|longest| left <= longest))
            }),
            Property::always(IN_ORDER, |_, state: &SharedState| !state.broken.order),
            Property::always(NOT_STALE, |_, state: &SharedState| !state.broken.stale),
            Property::always(NOT_LOST, |_, state: &SharedState| !state.broken.lost),
            Property::always(AT_ONCE, |_, state: &SharedState| !state.broken.again),
            Property::always(UNDONE, Self::is_undone),
            Property::always(SERVED, Self::are_served),
            Property::always(GO_ON, Self::shares_go_on),
        ];
        properties.retain(|property| self.promises.contains(&property.name));
        properties
    }
}

impl Shares {
    fn has_twin(&self, client: usize) -> bool {
        self.clients.iter().filter(|other| other.token == self.clients[client].token).count() > 1
    }

    fn excludes(&self, state: &SharedState) -> bool {
        let holders = || state.clients.iter().filter(|client| client.holds());
        let has = |mode| holders().any(|client| client.believed_mode(self) == mode);
        let is_alone = !has(Mode::Write) || holders().count() == 1;
        is_alone && !(has(Mode::Read) && has(Mode::Permit))
    }

    fn is_within_limit(&self, state: &SharedState) -> bool {
        let mut tokens: Vec<u8> = Vec::new();
        for (client, role) in state.clients.iter().zip(self.clients) {
            // What stays for its least time is a holder beside another one by the same token.
            if client.kept > 0 && client.mode == Mode::Permit {
                tokens.push(u8::MAX);
            } else if client.holds() && client.mode == Mode::Permit && !tokens.contains(&role.token) {
                tokens.push(role.token);
            }
        }
        let at_server = state.live_tokens(self).len() + state.rests.len();
        let is_permits = matches!(state.lock, Lock::Marker { mode: Mode::Permit, .. });
        tokens.len() <= self.limit && !(is_permits && at_server > self.limit)
    }

    fn is_held(&self, state: &SharedState) -> bool {
        let is_there = |(client, known): (usize, &Client)| {
            !known.believes() || known.is_excused || state.held_for(self, client).is_some_and(|left| left >= known.left)
        };
        state.clients.iter().enumerate().all(is_there)
    }

    fn is_undone(&self, state: &SharedState) -> bool {
        let is_gone = |(client, known): (usize, &Client)| {
            let is_over = known.phase == Phase::Over && known.acquire == 0;
            let has_lock = matches!(state.lock, Lock::Held { token, .. } if token == self.clients[client].token)
                && !self.has_twin(client);
            let has_share = state.members[client].is_some_and(|member| member.left > 0 && !member.is_stale);
            let is_there = has_share || has_lock || state.line.contains(&(client as u8));
            !is_over || !is_there
        };
        state.clients.iter().enumerate().take(self.clients.len()).all(is_gone)
    }
}
