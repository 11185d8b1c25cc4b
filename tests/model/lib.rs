//! The lock protocol as models that are searched exhaustively. What they are for is said in `tests/model.rs`.
//!
//! A crate of its own, as a debug build optimizes whole crates or nothing of them.

#![allow(missing_docs, reason = "it is for one test")]
#![allow(clippy::indexing_slicing, clippy::panic, reason = "as in tests")]

mod check;
mod leftovers;
mod protocol;
mod state;

pub use leftovers::{Leftovers, LeftoversState, Rules, Step, UNDONE, UNTOUCHED, Which};
pub use protocol::{
    AFTER_RELEASE, AFTER_SILENCE, ALL, Action, EXCLUSION, HEALED, OBTAINABLE, ORDER, Protocol, Safeguards,
};
pub use state::{CLIENTS, Memory, State};

/// Every promise holds in every state that can be reached, and there are more of those than `floor`.
pub fn holds(model: Protocol, floor: usize) {
    check::holds(model, floor);
}

/// The promise falls. Prints the shortest way there.
pub fn falls(promise: &'static str, model: Protocol) {
    check::falls(promise, model);
}

/// As [`holds`].
pub fn nothing_is_left(model: Leftovers, floor: usize) {
    check::holds(model, floor);
}

/// As [`falls`].
pub fn leaves_something(promise: &'static str, model: Leftovers) {
    check::falls(promise, model);
}
