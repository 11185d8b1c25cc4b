//! What the model remembers: the server's side of one lock, the queues of the processes, and what is under way.

use crate::server::Entry;

pub(crate) const PROCESSES: usize = 3;
/// Places from here on are those that the waiters of one process share; below it, each is that of one waiter.
pub(crate) const SHARED: u8 = 16;
/// So many places a process may share one after another.
pub(crate) const PLACES: u8 = 4;

/// There is no clock in it. What ends by time may end at any time, and what ends too soon for a live process is a
/// mishap (see [`World::mishaps`](crate::world::World)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) lock: Lock,
    pub(crate) line: Vec<Entry>,
    /// The processes that count as alive, as bits; and those that were silent for too long although they live.
    pub(crate) alive: u8,
    pub(crate) excused: u8,
    /// Places that count as dead by themselves, where signs of life are not those of a process.
    pub(crate) silent_places: Vec<u8>,
    /// In the calm at the end (`calm.rs`): which processes have given a sign of life in this round.
    pub(crate) is_calm: bool,
    pub(crate) fresh: u8,
    pub(crate) processes: [Process; PROCESSES],
    pub(crate) waiters: Vec<Waiter>,
    /// Requests that nobody waits for, and that may arrive, at any time and in any order, or never.
    pub(crate) late: Vec<Request>,
    /// How much has gone wrong.
    pub(crate) mishaps: u8,
    /// So many turns in a row a process has kept the lock from those in the line.
    pub(crate) kept: u8,
    pub(crate) broken: Broken,
}

/// The promises that have been broken on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken {
    pub(crate) order: bool,
    pub(crate) kept: bool,
}

/// What the lock key holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Lock {
    #[default]
    Free,
    /// A waiter's token.
    Held(u8),
    /// A reservation.
    Reserved(Entry),
    /// The token of somebody who is in no line.
    Stranger,
}

/// `Queue` in `src/acquire/queue.rs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Process {
    pub(crate) up: bool,
    /// The lanes, first in, first out.
    pub(crate) shared: Vec<u8>,
    pub(crate) own: Vec<u8>,
    /// How many shared places it has had.
    pub(crate) places: u8,
    /// The shared place may be in the line.
    pub(crate) in_line: bool,
    /// A request with the shared place has an unknown outcome, and may still be run.
    pub(crate) doubt: bool,
    pub(crate) in_a_row: u8,
    /// What has to do with the line travels in order.
    pub(crate) sent: Vec<Sent>,
}

/// Something on the way from a process to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sent {
    /// The call of this waiter.
    Call(u8),
    /// A place is given up, in the background.
    Leave(u8),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Waiter {
    pub(crate) phase: Phase,
    pub(crate) call: Call,
    pub(crate) handing: Handing,
    /// The server has said that the lock is held.
    pub(crate) was_refused: bool,
    /// A request with its own place has an unknown outcome, and may still be run.
    pub(crate) doubt: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    /// Not there yet.
    #[default]
    Away,
    Waiting,
    Holding,
    /// It believes no more that it holds, and sees to the release.
    Releasing,
    Over,
}

/// The one call that a waiter awaits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    #[default]
    None,
    Sent(Request),
    /// It was run; the answer is under way.
    Answered(Request, crate::world::Answer),
}

/// `HandOverState` in `src/acquire/queue/hand_over.rs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Handing {
    #[default]
    No,
    Asked,
    /// Late: its deadline has passed.
    Done {
        late: bool,
    },
    Failed {
        settled: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Request {
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
    /// Heard: the server knows somebody who listens.
    Release {
        waiter: u8,
        heard: bool,
    },
    HandOver {
        from: u8,
        to: u8,
        place: u8,
        may_keep: bool,
        in_line: bool,
    },
}

impl Process {
    pub(crate) fn shared_place(&self, process: usize) -> u8 {
        SHARED + process as u8 * PLACES + self.places % PLACES
    }
}
