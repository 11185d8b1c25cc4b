//! The state of the model: the server's side of one lock, the queues of the processes, and what is in flight.

use super::server::Entry;

pub(super) const PROCESSES: usize = 3;
/// Places from this number on are shared by the waiters of one process; each place below it belongs to one waiter.
pub(super) const SHARED: u8 = 16;
/// How many shared places a process may have one after another.
pub(super) const PLACES: u8 = 4;

/// A state of the model. It has no clock: what ends by time may end at any time, and it is a mishap when that is too
/// soon for a live process (see [`World::mishaps`](super::world::World)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub(super) lock: Lock,
    pub(super) line: Vec<Entry>,
    /// The processes that count as alive, as bits; and those that live but were silent for too long.
    pub(super) alive: u8,
    pub(super) excused: u8,
    /// Places that count as dead on their own, if heartbeats are not those of a process.
    pub(super) silent_places: Vec<u8>,
    /// In the calm at the end (`calm.rs`): the processes that have sent a heartbeat in this round.
    pub(super) is_calm: bool,
    pub(super) fresh: u8,
    pub(super) processes: [Process; PROCESSES],
    pub(super) waiters: Vec<Waiter>,
    /// Requests that nobody waits for. They may arrive at any time and in any order, or never.
    pub(super) late: Vec<Request>,
    /// The number of mishaps so far.
    pub(super) mishaps: u8,
    /// For how many turns in a row a process has kept the lock from the line.
    pub(super) kept: u8,
    pub(super) broken: Broken,
}

/// The promises that were broken on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Broken {
    pub(super) order: bool,
    pub(super) kept: bool,
}

/// The content of the lock key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Lock {
    #[default]
    Free,
    /// A waiter's token, which another waiter of its process may have taken over.
    Held(u8),
    /// A reservation.
    Reserved(Entry),
    /// The token of a holder that is not in the line.
    Stranger,
}

/// `Queue` in `src/acquire/queue.rs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) up: bool,
    /// The lanes, first in, first out.
    pub(super) shared: Vec<u8>,
    pub(super) own: Vec<u8>,
    /// How many shared places the process has had.
    pub(super) places: u8,
    /// Whether the shared place may be in the line.
    pub(super) in_line: bool,
    /// Whether a request with the shared place has an unknown outcome, and may still run.
    pub(super) doubt: bool,
    pub(super) in_a_row: u8,
    /// The requests in flight that concern the line, in order.
    pub(super) sent: Vec<Sent>,
}

/// A request in flight from a process to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sent {
    /// The call of this waiter.
    Call(u8),
    /// Leaves a place, in the background.
    Leave(u8),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Waiter {
    pub(super) phase: Phase,
    pub(super) call: Call,
    pub(super) handing: Handing,
    /// Whether the server has replied that the lock is held.
    pub(super) was_refused: bool,
    /// Whether a request with its own place has an unknown outcome, and may still run.
    pub(super) doubt: bool,
    /// Whether a request that gives the lock to its token has an unknown outcome, and may still run.
    pub(super) is_unsure: bool,
    /// The token by which it holds the lock, if that is not its own.
    pub(super) took_over: Option<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// Not there yet.
    #[default]
    Away,
    Waiting,
    Holding,
    /// It no longer believes that it holds the lock, and releases it.
    Releasing,
    Over,
}

/// The one call that a waiter awaits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Call {
    #[default]
    None,
    Sent(Request),
    /// It has run; the reply is in flight.
    Answered(Request, super::world::Answer),
}

/// `HandOverState` in `src/acquire/queue/hand_over.rs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Handing {
    #[default]
    No,
    Asked,
    /// `late`: its deadline has passed.
    Done {
        late: bool,
    },
    Failed {
        settled: bool,
    },
    /// The lock is there as it is at the server, held by this token.
    TakenOver {
        token: u8,
        late: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Request {
    /// `acquire_one.lua`, or, with a place, `acquire_in_line.lua`.
    Acquire {
        waiter: u8,
        place: Option<u8>,
    },
    Enter {
        place: u8,
    },
    Heartbeat {
        place: u8,
    },
    Leave {
        place: u8,
    },
    /// `heard`: the server knows a subscription.
    Release {
        token: u8,
        heard: bool,
    },
    HandOver {
        /// A token.
        from: u8,
        to: u8,
        place: u8,
        may_keep: bool,
        in_line: bool,
    },
}

impl Process {
    pub(super) fn shared_place(&self, process: usize) -> u8 {
        SHARED + process as u8 * PLACES + self.places % PLACES
    }
}
