//! The lock protocol as models that are searched exhaustively. `tests/model.rs` explains their purpose.
//!
//! A crate of its own, because a debug build optimizes whole crates or nothing of them.

#![allow(missing_docs, reason = "it is for one test")]
#![allow(clippy::indexing_slicing, clippy::panic, reason = "as in tests")]

mod check;
mod leftovers;
pub mod line;
mod protocol;
pub mod shared;
mod state;

pub use leftovers::{Leftovers, LeftoversState, Rules, Step, UNDONE, UNTOUCHED, Which};
pub use protocol::{
    AFTER_RELEASE, AFTER_SILENCE, ALL, Action, EXCLUSION, HEALED, OBTAINABLE, ORDER, Protocol, Safeguards,
};
pub use state::{CLIENTS, Memory, State};

/// Asserts that every promise holds in every reachable state, and that there are more states than `floor`.
pub fn holds(model: Protocol, floor: usize) {
    check::holds(model, floor);
}

/// Asserts that the promise is broken, and prints the shortest way there.
pub fn falls(promise: &'static str, model: Protocol) {
    check::falls(promise, model);
}

/// The same as [`holds`], for leftovers.
pub fn nothing_is_left(model: Leftovers, floor: usize) {
    check::holds(model, floor);
}

/// The same as [`falls`], for leftovers.
pub fn leaves_something(promise: &'static str, model: Leftovers) {
    check::falls(promise, model);
}

/// The same as [`holds`], for the line.
pub fn line_holds(model: line::World, floor: usize) {
    check::holds(model, floor);
}

/// The same as [`falls`], for the line.
pub fn line_falls(promise: &'static str, model: line::World) {
    check::falls(promise, model);
}

/// The same as [`holds`], for shares.
pub fn shares_hold(model: shared::Shares, floor: usize) {
    check::holds(model, floor);
}

/// The same as [`falls`], for shares.
pub fn shares_fall(promise: &'static str, model: shared::Shares) {
    check::falls(promise, model);
}
