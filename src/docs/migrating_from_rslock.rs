//! For users of [rslock](https://docs.rs/rslock/0.10.0) 0.10: its first example, and the same in tenure.
//!
//! A lock of one excludes the other's: both set the same key if nobody holds it. So services can move one by one, as
//! long as they use the same keys and servers.
//!
//! # A lock
//!
//! ```text
//! let rl = LockManager::new(vec!["redis://127.0.0.1:6379/"]);
//! let guard = rl.acquire("my_mutex", Duration::from_secs(1)).await?;
//! // Before the second is over:
//! rl.extend(&guard.lock, Duration::from_secs(1)).await?;
//! guard.release().await;
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! use tenure::Locker;
//!
//! # let locker = Locker::in_memory();
//! # if false {
//! let locker = Locker::connect("redis://127.0.0.1:6379").await?;
//! # }
//! let guard = locker.lock("my_mutex").await?;
//! // It is renewed for as long as it lives.
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Four things differ:
//!
//! - A guard that is dropped, by an early return, a panic or a cancelled future, releases its lock. There, the key
//!   stays until the ttl ends.
//! - The ttl is how long others wait when this machine dies. It need not be as long as the work.
//! - [`release`](crate::LockGuard::release) fails with [`NotHeld`](crate::Error::NotHeld) if the lock was lost before.
//! - Waiters are notified of a release and served in turn. There, they ask again after up to 200 ms, and whoever asks
//!   first gets the lock.
//!
//! # A lock that is busy
//!
//! ```text
//! match rl.lock("my_mutex", Duration::from_secs(1)).await { // three tries, up to 200 ms apart
//!     Ok(lock) => rl.unlock(&lock).await,
//!     Err(LockError::Unavailable) => { /* it is held, or no server was reached */ }
//!     Err(error) => return Err(error),
//! }
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! use std::time::Duration;
//! use tenure::Error;
//!
//! match locker.obtain("my_mutex").wait_at_most(Duration::from_millis(400)).await {
//!     Ok(guard) => guard.release().await?,
//!     Err(Error::NotObtained { .. }) => {} // it is held
//!     Err(error) => return Err(error),     // the server was not reached, for example
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # A block under a lock
//!
//! ```text
//! rl.using(b"my_mutex", Duration::from_secs(10), async || work().await).await?;
//! ```
//!
//! ```
//! # async fn work() {}
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! locker.scope("my_mutex", async |_guard| work().await).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Both renew the lock meanwhile, and drop the block if that fails. There, the block stands still while the lock is
//! extended, and an extension that gets no majority gives the lock up, although its ttl may have time left. Here, the
//! block goes on meanwhile, renewals are tried again until the deadline, and it is dropped then at the latest.
//!
//! # Several servers
//!
//! ```text
//! let nodes = vec!["redis://10.0.0.1/", "redis://10.0.0.2/", "redis://10.0.0.3/"];
//! let rl = LockManager::new(nodes);
//! ```
//!
//! ```no_run
//! # async fn example() -> Result<(), tenure::Error> {
//! use tenure::Locker;
//!
//! let nodes = ["redis://10.0.0.1", "redis://10.0.0.2", "redis://10.0.0.3"];
//! let locker = Locker::quorum(nodes).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A server that was started less than a [restart window](crate::LockerBuilder::restart_window) ago doesn't vote here,
//! as it may have forgotten what it granted. So a set of new servers grants its first lock after 60 s.
//!
//! # By name
//!
//! | there | here |
//! | --- | --- |
//! | `LockManager` | [`Locker`](crate::Locker) |
//! | `LockManager::new(uris)` | [`connect`](crate::Locker::connect), [`quorum`](crate::Locker::quorum) |
//! | `from_clients` | `with_redis`, with the feature `redis` |
//! | `new_cluster`, `from_cluster_client` | [`connect`](crate::Locker::connect) with `redis-cluster://`, or `with_redis` |
//! | `set_retry(count, delay)` | [`retry`](crate::LockRequest::retry) with a [`Retry`](crate::Retry) |
//! | `lock`, `acquire` | [`obtain`](crate::Locker::obtain), [`lock`](crate::Locker::lock) |
//! | `Lock::validity_time` | [`remaining`](crate::LockGuard::remaining), which knows what time it is |
//! | `extend` | by itself; or [`renew`](crate::LockGuard::renew), [`renew_for`](crate::LockGuard::renew_for) |
//! | `is_freed` | [`is_held`](crate::LockGuard::is_held) without asking, [`server_ttl`](crate::LockGuard::server_ttl) |
//! | `using` | [`scope`](crate::Locker::scope), [`protect`](crate::LockGuard::protect) |
//! | `acquire_no_guard`, `Lock` passed on | [`into_lease`](crate::LockGuard::into_lease), [`adopt`](crate::Locker::adopt) |
//! | `LockError::Unavailable` | [`NotObtained`](crate::Error::NotObtained); other errors if no server was reached |
//! | `LockError::TtlExceeded` | [`ValidityExpired`](crate::Error::ValidityExpired) |
//!
//! It also runs on smol; tenure needs tokio.
