//! What the targets in `fuzz/` call that is private otherwise. Only with `--cfg fuzzing`, which `cargo fuzz` sets.

pub use crate::store::redis::untrusted::fuzz::{script_reply, server_error};
