//! The promises of the crate, each shown on real servers. Exact timing is shown in the crate's own tests, under paused
//! time; here, whatever waits is bounded generously.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

mod auto_traits;
mod cancellation;
mod closing;
mod conformance;
mod drops;
mod errors;
mod failover;
mod interop;
mod late;
mod line;
mod listening;
mod loss;
mod ownership;
mod parked;
mod permissions;
mod replicas;
mod runtimes;
mod servers;
mod waiting;
