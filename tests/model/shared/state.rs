//! The state: the keys at the server, and what each client knows and has sent.

use super::{Role, Shares, What};

/// How many clients there may be.
pub const MOST: usize = 4;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    #[default]
    Write,
    Read,
    Permit,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SharedState {
    pub(super) lock: Lock,
    /// The set: the share of each client.
    pub(super) members: [Option<Member>; MOST],
    /// What stays for a while although nobody holds it.
    pub(super) rests: Vec<i8>,
    /// The places in the line: clients, each with a process of its own; and for how long each counts as alive.
    pub(super) line: Vec<u8>,
    pub(super) alive: [i8; MOST],
    pub(super) clients: [Client; MOST],
    pub(super) deaths: u8,
    pub(super) deletions: u8,
    pub(super) broken: Broken,
}

/// The content of the lock key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Lock {
    #[default]
    Free,
    Held {
        token: u8,
        left: i8,
    },
    /// For a place at the head of the line.
    Reserved {
        place: u8,
        left: i8,
    },
    /// It is shared.
    Marker {
        mode: Mode,
        left: i8,
    },
    /// It stays for a while although nobody holds it.
    Nobody {
        left: i8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Member {
    /// 0: it is dead, and not yet swept.
    pub(super) left: i8,
    /// The marker with which it came is gone.
    pub(super) is_stale: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Broken {
    pub(super) order: bool,
    pub(super) stale: bool,
    pub(super) lost: bool,
    pub(super) again: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Client {
    pub(super) phase: Phase,
    /// A writer that becomes a reader changes it.
    pub(super) mode: Mode,
    /// Until its deadline; while it waits, until the one that a grant would set.
    pub(super) left: i8,
    /// For how long a request may still run.
    pub(super) acquire: i8,
    pub(super) renew: i8,
    pub(super) downgrade: i8,
    pub(super) release: i8,
    /// An earlier attempt may run after the one that was granted.
    pub(super) is_doubtful: bool,
    /// What a confirmed renewal would be worth.
    pub(super) renewal: i8,
    /// What is left of the least time, and of it when the release was sent.
    pub(super) least: i8,
    pub(super) rest: i8,
    pub(super) ends_all: bool,
    /// Nothing can run after this release.
    pub(super) is_last: bool,
    /// Another client has ended the share on purpose.
    pub(super) is_excused: bool,
    /// For how long it has asked for the key, as far as the server has run that.
    pub(super) asked: i8,
    /// For how long the key has to stay taken after its release.
    pub(super) kept: i8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    #[default]
    Away,
    Waiting,
    Holding,
    /// A writer that has asked to become a reader.
    Downgrading,
    /// It releases what it had, or undoes what may come.
    Ending,
    Over,
    Dead,
}

impl Lock {
    /// Returns for how long somebody has the key.
    pub(super) fn left(self) -> Option<i8> {
        match self {
            Self::Held { left, .. } | Self::Marker { left, .. } | Self::Nobody { left } => Some(left),
            Self::Free | Self::Reserved { .. } => None,
        }
    }
}

impl Client {
    pub(super) fn believes(&self) -> bool {
        matches!(self.phase, Phase::Holding | Phase::Downgrading) && self.left > 0
    }

    /// Returns whether nobody else may take what it has, or had and stays taken.
    pub(super) fn holds(&self) -> bool {
        self.believes() && !self.is_excused || self.kept > 0
    }

    pub(super) fn believed_mode(&self, shares: &Shares) -> Mode {
        let is_less = self.phase == Phase::Downgrading && shares.rules.downgrade_believes_less;
        if is_less { Mode::Read } else { self.mode }
    }

    /// Returns whether the server may have made a reader of it, or may do so.
    pub(super) fn is_either(&self, role: &Role, shares: &Shares) -> bool {
        role.downgrades && shares.rules.downgrade_is_either
    }
}

impl SharedState {
    pub(super) fn tick(&mut self, shares: &Shares) {
        let less = |left: &mut i8| *left = (*left - 1).max(0);
        match &mut self.lock {
            Lock::Free => {}
            Lock::Held { left, .. }
            | Lock::Reserved { left, .. }
            | Lock::Marker { left, .. }
            | Lock::Nobody { left } => {
                less(left);
                if *left == 0 {
                    self.free();
                }
            }
        }
        self.members.iter_mut().flatten().for_each(|member| less(&mut member.left));
        self.rests.iter_mut().for_each(less);
        self.rests.retain(|left| *left > 0);
        if shares.rules.silent_places_end {
            self.alive.iter_mut().for_each(less);
        }
        for client in &mut self.clients {
            for left in [
                &mut client.left,
                &mut client.acquire,
                &mut client.renew,
                &mut client.downgrade,
                &mut client.release,
                &mut client.renewal,
                &mut client.least,
                &mut client.asked,
                &mut client.kept,
            ] {
                less(left);
            }
            if client.acquire == 0 {
                client.is_doubtful = false;
            }
            if client.phase == Phase::Over {
                let Client { mode, asked, kept, .. } = *client;
                *client = Client { phase: Phase::Over, mode, asked, kept, ..Client::default() };
            }
        }
    }

    /// The key expires, or is deleted.
    pub(super) fn free(&mut self) {
        self.lock = Lock::Free;
        self.members.iter_mut().flatten().for_each(|member| member.is_stale = true);
    }

    /// The reply to the last request of a kind arrives.
    pub(super) fn learn(&mut self, shares: &Shares, client: usize, what: What, done: bool) {
        let (role, known) = (&shares.clients[client], &mut self.clients[client]);
        match what {
            What::Acquire if known.phase == Phase::Waiting => {
                // No network sends a request again that has a reply.
                if !known.is_doubtful {
                    known.acquire = 0;
                }
                if done && known.left > 0 {
                    (known.phase, known.least) = (Phase::Holding, role.least);
                }
            }
            What::Renew if known.renewal > 0 && known.believes() => {
                if done {
                    known.left = known.left.max(known.renewal);
                } else {
                    known.lose();
                }
                known.renewal = 0;
            }
            What::Downgrade if known.phase == Phase::Downgrading && known.believes() => {
                if done {
                    (known.phase, known.mode) = (Phase::Holding, Mode::Read);
                } else {
                    known.lose();
                }
            }
            What::Release if known.phase == Phase::Ending => {
                known.release = 0;
                if known.is_last {
                    known.phase = Phase::Over;
                }
            }
            _ => {}
        }
    }

    /// Returns the tokens that have a share at the server.
    pub(super) fn live_tokens(&self, shares: &Shares) -> Vec<u8> {
        let mut tokens = Vec::new();
        for (member, role) in self.members.iter().zip(shares.clients) {
            if member.is_some_and(|member| member.left > 0) && !tokens.contains(&role.token) {
                tokens.push(role.token);
            }
        }
        tokens
    }

    /// Returns for how long a client holds the key at the server.
    pub(super) fn held_for(&self, shares: &Shares, client: usize) -> Option<i8> {
        let (role, known) = (&shares.clients[client], &self.clients[client]);
        let share = |left: i8| {
            let member = self.members[client].filter(|member| member.left > 0 && !member.is_stale);
            member.map(|member| member.left.min(left))
        };
        match self.lock {
            Lock::Held { token, left } if token == role.token && known.mode == Mode::Write => Some(left),
            Lock::Marker { mode, left } if mode == known.mode => share(left),
            Lock::Marker { mode: Mode::Read, left } if role.downgrades => share(left),
            _ => None,
        }
    }
}

impl Client {
    /// The server has told that it doesn't hold the key.
    fn lose(&mut self) {
        (self.left, self.renewal) = (0, 0);
        self.phase = Phase::Ending;
    }
}
