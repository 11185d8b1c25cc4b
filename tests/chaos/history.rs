//! What happened, by whom and when: one event per line, written by each worker process to a file of its own.
//!
//! All instants are readings of `CLOCK_MONOTONIC` in nanoseconds, which all processes of a machine share. They are read
//! before or after the call that an event is about, as its fields say, and never when the event is written: a process
//! may be frozen in between.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) type Nanos = u64;

/// Names a guard in all histories: the number of its worker, times a billion, plus a counter.
pub(crate) type GuardId = u64;

/// The guards of one worker are those from its number times this on.
pub(crate) const GUARDS_PER_WORKER: u64 = 1_000_000_000;

pub(crate) fn now() -> Nanos {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    nanos(Duration::from(time))
}

pub(crate) fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).expect("584 years")
}

/// How a lock is shared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// Alone.
    Exclusive,
    /// With other readers.
    Read,
    /// With other permits, of which there are at most `limit`.
    Permit { limit: usize },
}

impl Mode {
    /// Returns whether two holders may have a key in these modes at the same time.
    pub(crate) fn admits(self, other: Self) -> bool {
        matches!((self, other), (Self::Read, Self::Read) | (Self::Permit { .. }, Self::Permit { .. }))
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    /// A request begins.
    Attempt {
        /// Before the request.
        at: Nanos,
        guard: GuardId,
        mode: Mode,
        /// Guards of one holder don't exclude each other: they share a token, or one continues another's lease.
        holder: String,
        keys: Vec<String>,
        /// It waits without limit.
        patient: bool,
    },
    /// It has returned a guard.
    Granted {
        /// After the request.
        at: Nanos,
        guard: GuardId,
        fence: u64,
    },
    /// It has returned an error, or was given up.
    Failed { at: Nanos, guard: GuardId, reason: String },
    /// The guard has said that it is held, in a call that was made between these instants.
    Held {
        before: Nanos,
        after: Nanos,
        guard: GuardId,
        /// Its deadline, no later than it is.
        deadline: Nanos,
    },
    /// The guard has said that it is lost.
    Lost {
        /// After the call.
        at: Nanos,
        guard: GuardId,
        /// `Expired`, `Missing`, …
        loss: String,
        /// The deadline that it had in the end, no later than it was.
        deadline: Nanos,
    },
    /// The worker ends the guard, which says nothing more.
    Ending {
        /// Before the call.
        at: Nanos,
        guard: GuardId,
        how: String,
    },
    /// The call has returned.
    Ended { at: Nanos, guard: GuardId },
    /// The holder has written to the register, with its fencing token.
    Wrote { before: Nanos, after: Nanos, guard: GuardId, key: String, accepted: bool },
}

impl Event {
    /// Returns when it was, for whoever reads it.
    pub(crate) fn at(&self) -> Nanos {
        match *self {
            Self::Attempt { at, .. }
            | Self::Granted { at, .. }
            | Self::Failed { at, .. }
            | Self::Lost { at, .. }
            | Self::Ending { at, .. }
            | Self::Ended { at, .. }
            | Self::Held { before: at, .. }
            | Self::Wrote { before: at, .. } => at,
        }
    }

    pub(crate) fn guard(&self) -> GuardId {
        match *self {
            Self::Attempt { guard, .. }
            | Self::Granted { guard, .. }
            | Self::Failed { guard, .. }
            | Self::Held { guard, .. }
            | Self::Lost { guard, .. }
            | Self::Ending { guard, .. }
            | Self::Ended { guard, .. }
            | Self::Wrote { guard, .. } => guard,
        }
    }
}

/// The history of one worker process.
pub(crate) struct Recorder {
    file: File,
    clock: Calibrated,
}

impl Recorder {
    pub(crate) fn create(path: &Path) -> Self {
        let file = File::options().create(true).append(true).open(path).expect("a file for the history");
        Self { file, clock: Calibrated::new() }
    }

    /// Writes an event, in one call: after a SIGKILL, at most the last line is torn.
    pub(crate) fn write(&self, event: &Event) {
        let mut line = serde_json::to_vec(event).expect("an event is plain data");
        line.push(b'\n');
        (&self.file).write_all(&line).expect("room for the history");
    }

    /// Returns when this instant is or was, on the clock that all processes share: no later, and by far less than a
    /// millisecond earlier.
    pub(crate) fn nanos(&self, instant: Instant) -> Nanos {
        self.clock.nanos(instant)
    }
}

/// One instant on both clocks: that of `Instant`, which has no zero that others know, and the shared one.
struct Calibrated {
    instant: Instant,
    nanos: Nanos,
}

impl Calibrated {
    fn new() -> Self {
        // The process may be frozen between the readings, so the closest of many counts.
        let readings = (0..100).map(|_| {
            let (before, instant) = (now(), Instant::now());
            (now() - before, Self { instant, nanos: before })
        });
        readings.min_by_key(|(apart, _)| *apart).expect("a hundred").1
    }

    /// An instant in the past stays there, however long ago it is.
    fn nanos(&self, instant: Instant) -> Nanos {
        match instant.checked_duration_since(self.instant) {
            Some(later) => self.nanos + nanos(later),
            None => self.nanos.saturating_sub(nanos(self.instant - instant)),
        }
    }
}

/// Reads what a worker has written. The last line may be torn.
pub(crate) fn read(path: &Path) -> Vec<Event> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).expect("a whole line is an event")).collect()
}
