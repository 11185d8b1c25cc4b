//! The promises of the crate, each shown on real servers. Every test is here that needs no program of its own, as each
//! program has to be linked. The crate's own tests show exact timing, under paused time; here every wait has a generous
//! bound.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

mod abuse;
mod auto_traits;
mod bounds;
mod cancellation;
mod clocks;
mod closing;
mod conformance;
mod connecting;
mod diagnosis;
mod drops;
mod errors;
mod failover;
mod guarantees;
mod hand_over;
mod interop;
mod late;
mod line;
mod listening;
mod loss;
mod ownership;
mod parked;
mod permissions;
#[cfg(feature = "redis")]
mod redis_connections;
mod replicas;
mod runtimes;
mod secrets;
mod servers;
mod sharing_line;
mod waiting;
