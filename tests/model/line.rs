//! The line for a lock on one server, in which the waiters of all processes wait. `tests/line_model.rs` explains it.

mod calm;
mod client;
mod server;
mod state;
mod world;

pub use self::state::State as LineState;
pub use self::world::{
    ALL, Action, EXCLUSION, GRANTED, KEPT, Kind, Mishap, NO_GHOST, ORDER, SERVED, Safeguards, World,
};
