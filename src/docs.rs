//! Guides: from the first lock to a fleet in production, and for those who come from another library.
//!
//! - [`guide`]: locks from the first line of code to production, in the order in which you need to know things.
//! - [`guarantees`]: what each kind of server promises, on what that rests, and which test shows it.
//! - [`production`]: what to check before a lock guards something that matters.
//! - [`readers_and_permits`]: sharing a key, for users of Redisson and of DistributedLock.
//! - [`events`]: what the crate reports through `tracing`.
//! - [`migrating_from_rslock`] and [`migrating_from_go`]: what you know, and what it is called here.

pub mod events;
pub mod guarantees;
pub mod guide;
pub mod migrating_from_go;
pub mod migrating_from_rslock;
pub mod production;
pub mod readers_and_permits;
