//! Distributed locks on Redis and Valkey, as RAII guards that **know when they are lost**.
//!
//! Run the same service on many machines, and have one of them at a time do a thing:
//!
//! ```
//! # async fn rebuild_invoices() -> std::io::Result<()> { Ok(()) }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use tenure::Locker;
//!
//! # let locker = Locker::in_memory();
//! # if false {
//! let locker = Locker::connect("redis://127.0.0.1:6379").await?;
//! # }
//! let guard = locker.lock("invoices:42").await?; // waits for its turn
//! tokio::select! {
//!     done = rebuild_invoices() => done?,
//!     loss = guard.lost() => return Err(loss.into()), // stop before anyone else starts
//! }
//! guard.release().await?; // or drop it: released in the background
//! # Ok(())
//! # }
//! ```
//!
//! A release in the background needs a runtime that runs. A guard that is dropped as `main` returns is not released:
//! its key stays until the ttl ends. [`Locker::scope`] releases before it returns, [`Locker::close`] waits for what was
//! dropped, and [`Locker::close_on_drop`] does so at the end of a scope.
//!
//! # The promise
//!
//! A [`LockGuard`] is *held* from the moment an attempt succeeded until its local deadline: the instant just before the
//! last confirmed request was sent, plus the ttl, less an allowance for clock drift. Only a confirmed renewal moves
//! that deadline, so every guard stops believing before the server lets go, whatever the network, the server or a hung
//! reply does. [`is_held`](LockGuard::is_held), [`check`](LockGuard::check), [`lost`](LockGuard::lost) and
//! [`protect`](LockGuard::protect) read that one deadline themselves, on whatever runtime they are used. The
//! [`cancellation_token`](LockGuard::cancellation_token) is fired by a task, and so is late when that task can't run.
//!
//! A [`Loss`] says how a lock ended. A server that can't be reached is no loss: renewals are tried again, with growing
//! pauses, until the deadline. A definite answer (another has it, the key is gone) ends the guard at once.
//!
//! # Which call
//!
//! | to | use |
//! | --- | --- |
//! | wait for a lock | [`Locker::lock`] |
//! | have it now or not at all | [`Locker::try_lock`] |
//! | try for a while, by a strategy | [`Locker::obtain`] with a [`Retry`] |
//! | wait in strict order of arrival, in whatever process | [`LockRequest::fair`] |
//! | run a block of code under a lock | [`Locker::scope`] |
//! | stop work when the lock is lost | [`LockGuard::protect`], [`LockGuard::lost`], [`LockGuard::cancellation_token`] |
//! | hold several locks, all or none | [`Locker::lock_all`], [`Locker::obtain_all`] |
//! | hand a lock to another process | [`LockGuard::into_lease`], [`Locker::adopt`] |
//! | keep many locks at once, and be told what becomes of them | [`WatchDog`] |
//! | protect a store from a late writer | [`LockGuard::fencing_token`] |
//! | survive the loss of a server and its memory | [`Locker::quorum`] |
//!
//! # What it rests on
//!
//! - The server's clock and ours run at about the same speed: [`LockerBuilder::drift`].
//! - The server doesn't forget. One that loses its memory (restarted without persistence, failed over to a replica that
//!   was behind, told to evict or flush) may let a second holder in before the first has noticed at its next renewal.
//!   Fencing tokens grow all the same. [`Locker::quorum`] survives it, as long as it happens to fewer than half of the
//!   nodes.
//! - The machine is not suspended: the monotonic clock stands still then, and the deadline with it.
//!
//! # Observing
//!
//! Through [`tracing`](https://docs.rs/tracing): a span `tenure.obtain` per request (`key`, `ttl`) and `tenure.keep`
//! per held lock (`key`), with the events `tenure.obtained`, `tenure.held`, `tenure.attempt_failed`, `tenure.renewed`,
//! `tenure.renew_failed`, `tenure.lost`, `tenure.released`, `tenure.release_failed`, `tenure.handed_over`,
//! `tenure.too_late`, `tenure.undone`, `tenure.undo_failed`, `tenure.no_news` where releases can't be heard of,
//! `tenure.heartbeat_failed`, `tenure.leave_failed` and `tenure.without_line` of the line for a lock,
//! `tenure.taken_back` and `tenure.taken_over` where a future or a runtime is not driven, `tenure.wait_failed` where
//! replicas can't be asked for, `tenure.callback_panicked`, `tenure.callback_delayed`; of connections,
//! `tenure.reconnect`, `tenure.revive`, `tenure.mixed_up` and, in a cluster, `tenure.node_failed`; and of a quorum,
//! `tenure.ballot`, `tenure.healed`, `tenure.node_away`, `tenure.same_node`, `tenure.node_is_replica`,
//! `tenure.node_was_promoted` and `tenure.node_may_forget`. No token is ever shown.

#![cfg_attr(docsrs, feature(doc_cfg))]

// What a user sees.
mod error;
mod guard;
mod key;
mod lease;
mod locker;
mod loss;
mod request;
mod retry;
mod token;
mod watchdog;

// What it rests on.
mod acquire;
mod hold;
mod store;

#[cfg(any(doc, doctest))]
pub mod docs;

#[cfg(test)]
mod simulation;

pub use fred;

pub use self::error::{Error, NodeError};
pub use self::guard::LockGuard;
pub use self::key::Key;
pub use self::lease::Lease;
pub use self::locker::CloseOnDrop;
pub use self::locker::Locker;
pub use self::locker::{LockerBuilder, RestartWindow};
pub use self::loss::{Loss, Lost, Protected};
pub use self::request::{LockRequest, Obtaining};
pub use self::retry::{IntoPauses, Pauses, Retry};
pub use self::store::Holder;
pub use self::token::Token;
pub use self::watchdog::{WatchDog, WatchDogBuilder, WatchEvent, WatchRequest, WatchStatus, Watching, WeakWatchDog};
