//! Distributed locks on Redis and Valkey, as RAII guards that **know when they are lost**.
//!
//! Run the same service on many machines, and have one of them at a time charge the card, run the migration, rebuild
//! the index. The holder stops before another one starts, even if the network fails, the server stops replying or the
//! process stalls.
//!
//! # One at a time
//!
//! A [`Locker`] is a connection to the server that keeps the locks. [`lock`](Locker::lock) waits for its turn and
//! returns a guard. The guard holds the lock for as long as it lives, and renews it in the background:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! use tenure::Locker;
//!
//! let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
//! let guard = locker.lock("invoices:42").await?;
//! println!("nobody else works on invoice 42 now");
//! guard.release().await?; // or drop it
//! # Ok(())
//! # }
//! ```
//!
//! # And only while it has the lock
//!
//! A lock on a network can be lost: the cable is cut, the server restarts without its memory, somebody deletes the key.
//! Then another may have it soon. [`protect`](LockGuard::protect) drops your work before that:
//!
//! ```
//! # async fn rebuild_invoices() {}
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! let guard = locker.lock("invoices:42").await?;
//! guard.protect(rebuild_invoices()).await?; // or an error, if the lock was lost meanwhile
//! guard.release().await?;
//!
//! // The same in one call:
//! locker.scope("invoices:42", async |_guard| rebuild_invoices().await).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Or check yourself, with [`lost`](LockGuard::lost) in a `select!`, [`check`](LockGuard::check) between two steps,
//! or a [`cancellation_token`](LockGuard::cancellation_token) for work elsewhere. What no lock can stop is a write that
//! is on its way when the lock is lost. Against that, send the [`fencing_token`](LockGuard::fencing_token) along, and
//! let your database refuse smaller ones.
//!
//! # Or leave it to another
//!
//! Often there is nothing to wait for: if another machine does the work, fine.
//!
//! ```
//! # async fn send_reports() {}
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! use tenure::Error;
//!
//! match locker.try_lock("reports").await {
//!     Ok(guard) => guard.protect(send_reports()).await?, // and its drop releases it
//!     Err(Error::NotObtained { .. }) => println!("another machine sends them"),
//!     Err(error) => return Err(error), // nobody knows: the server can't be reached, say
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # And leave nothing behind
//!
//! Every future here may be dropped at any point. In the background, a dropped request is undone, and the lock of a
//! dropped guard is released. Both need a runtime that is still running, and at the end of `main` there is none. So end
//! a program with [`close`](Locker::close), which waits for them:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! # let locker = tenure::Locker::in_memory();
//! locker.close().await;
//! # }
//! ```
//!
//! # Where to go from here
//!
//! - [`docs::guide`]: what you need to know, in order, with a picture of a guard's life.
//! - [`docs::production`]: what to check before a lock guards something that matters.
//! - [`docs::guarantees`]: what each kind of server promises, on what that rests, and which test shows it.
//! - [`docs::readers_and_permits`]: keys that several may hold at a time.
//! - [`docs::events`]: what the crate reports through `tracing`.
//! - [`docs::migrating_from_rslock`] and [`docs::migrating_from_go`]: what you know, and what it is called here.
//! - [Recipes](https://github.com/tenure-rs/tenure/tree/main/recipes): programs to copy from.
//!
//! # The promise
//!
//! A [`LockGuard`] is *held* from the moment an attempt succeeds until its local deadline: the instant just before the
//! last confirmed request was sent, plus the ttl, less an allowance for clock drift. Only a confirmed renewal moves
//! that deadline, so every guard ends before the server frees the lock, whatever happens to the network, the server or
//! a reply. [`is_held`](LockGuard::is_held), [`check`](LockGuard::check), [`lost`](LockGuard::lost) and
//! [`protect`](LockGuard::protect) compare that deadline with the clock themselves, on whatever runtime they are used.
//! A task fires the [`cancellation_token`](LockGuard::cancellation_token), so the token is late while that task can't
//! run.
//!
//! A [`Loss`] is the reason why a lock ended. An unreachable server is not a loss: the guard retries renewals, with
//! growing pauses, until the deadline. A definite reply (another token has the key, the key is gone) ends the guard at
//! once. A request may limit the time for which its lock is held at all ([`LockRequest::hold_at_most`]).
//!
//! # Which call
//!
//! | to | use |
//! | --- | --- |
//! | wait for a lock | [`Locker::lock`] |
//! | get it now or not at all | [`Locker::try_lock`] |
//! | try for a while, with a retry strategy | [`Locker::obtain`] with a [`Retry`] |
//! | wait in strict order of arrival, across processes | [`LockRequest::fair`] |
//! | run a block of code under a lock | [`Locker::scope`] |
//! | stop work when the lock is lost | [`LockGuard::protect`], [`LockGuard::lost`], [`LockGuard::cancellation_token`] |
//! | hold several locks, all or none | [`Locker::lock_all`], [`Locker::try_lock_all`], [`Locker::obtain_all`] |
//! | let many read, and one write | [`Locker::read`] beside [`Locker::lock`]; [`LockGuard::downgrade`] |
//! | limit a key to n holders at a time | [`Locker::permit`], [`Locker::holders`] |
//! | run a job once per period in a fleet | [`LockRequest::hold_at_least`] |
//! | free a lock whose work hangs | [`LockRequest::hold_at_most`] |
//! | hand a lock to another process | [`LockGuard::into_lease`], [`Locker::adopt`] |
//! | keep many locks at once, and get their events | [`WatchDog`] |
//! | protect a store from a late writer | [`LockGuard::fencing_token`] |
//! | survive the loss of a server and its memory | [`Locker::quorum`] |
//! | end a lock, whoever holds it | [`Locker::force_release`] |
//! | find out what endangers locks on a server | [`Locker::diagnose`] |
//! | test what your code does when a lock is lost | [`testing::EmbeddedServer`] |
//!
//! # What it relies on
//!
//! - The server's clock and ours run at about the same speed: [`LockerBuilder::drift`].
//! - The server doesn't forget. A server that loses its memory (restarted without persistence, failed over to a replica
//!   that was behind, configured to evict, or flushed) may let a second holder in before the first one notices at its
//!   next renewal. Fencing tokens grow even then. [`Locker::quorum`] survives this, as long as it happens to fewer than
//!   half of the nodes.
//! - After its machine was suspended, code checks the guard before it goes on. On Linux, Android and Windows,
//!   [`LockGuard::is_held`] and [`LockGuard::check`] count the suspension at once; timers don't, so
//!   [`LockGuard::lost`] may complete only at the next check or renewal. On other systems, such as macOS, the time of
//!   a suspension isn't counted.
//!
//! # Observing
//!
//! The crate reports what it does through [`tracing`](https://docs.rs/tracing). At level `info`, nothing is reported of
//! a lock that is obtained, renewed and released as it should be, and each `warn` is worth reading: a lock is lost, or
//! will be unless the server comes back. No event and no span shows a token. [`docs::events`] lists them all.
//!
//! ```text
//!  WARN tenure.keep{key=invoices:42}: tenure.lost: lost key=invoices:42 loss=its key is gone from the server
//! ```
//!
//! With the feature `metrics`, what happens to locks is counted and timed as well.
//!
//! # Features
//!
//! | feature | adds |
//! | --- | --- |
//! | `fred` | [fred](https://docs.rs/fred) as the client, ours or yours; enabled by default |
//! | `redis` | [redis-rs](https://docs.rs/redis) as the client, ours ([`LockerBuilder::driver`]) or yours; needs Rust 1.88 |
//! | `rustls` | `rediss://` URLs, with [rustls](https://docs.rs/rustls) on ring |
//! | `native-tls` | `rediss://` URLs, with the platform's TLS library; with both features, this one is used |
//! | `metrics` | counters, gauges and histograms for the [metrics facade](https://docs.rs/metrics); see the module `metrics` |
//! | `serde` | `Serialize` and `Deserialize` for [`Lease`], `Serialize` for [`Diagnosis`] |
//!
//! With neither client, there is the embedded store of [`Locker::in_memory`].

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(any(feature = "fred", feature = "redis")),
    allow(dead_code, unused_variables, reason = "only a client calls what is for clients")
)]

// What a user sees.
mod diagnosis;
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

#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(not(feature = "metrics"))]
#[path = "metrics/none.rs"]
mod metrics;

// What it rests on.
mod acquire;
mod hold;
mod mode;
mod report;
mod store;
mod sync;

#[cfg(any(doc, doctest))]
pub mod docs;

#[cfg(test)]
mod simulation;

#[cfg(feature = "fred")]
pub use fred;
#[cfg(feature = "redis")]
pub use redis;

#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod testing;

pub use self::diagnosis::{Diagnosis, Finding, ServerReport, Severity, Topic};
pub use self::error::{Error, NodeError, RedisError, RedisErrorKind};
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
pub use self::store::redis::Driver;
#[cfg(feature = "redis")]
pub use self::store::redis::RedisConnection;
pub use self::token::Token;
pub use self::watchdog::{WatchDog, WatchDogBuilder, WatchEvent, WatchRequest, WatchStatus, Watching, WeakWatchDog};
