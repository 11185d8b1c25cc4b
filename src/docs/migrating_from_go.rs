//! For those who know one of the Go libraries that tenure learned from: their first page, and the same thing here.
//!
//! Only what is different in kind is commented on. What all of them leave to the caller and tenure does by itself: the
//! lock is renewed in the background, work learns of its loss, a lock that is forgotten about is released, and a server
//! that can't be asked is told apart from one that says no.
//!
//! # bsm/redislock
//!
//! ```text
//! locker := redislock.New(client)
//! lock, err := locker.Obtain(ctx, "my-key", 100*time.Millisecond, nil)
//! if err == redislock.ErrNotObtained { /* busy */ }
//! defer lock.Release(ctx)
//! ttl, err := lock.TTL(ctx)
//! err = lock.Refresh(ctx, 100*time.Millisecond, nil)
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! use std::time::Duration;
//! use tenure::{Error, Locker};
//!
//! # let locker = Locker::in_memory();
//! # if false {
//! let locker = Locker::connect("redis://127.0.0.1:6379").await?; // or Locker::new(client)
//! # }
//! let guard = match locker.obtain("my-key").ttl(Duration::from_millis(100)).await {
//!     Err(Error::NotObtained { .. }) => return Ok(()), // busy
//!     guard => guard?,
//! };
//! let ttl = guard.server_ttl().await?;
//! guard.renew_for(Duration::from_millis(200)).await?;
//! // Released when dropped; or now, to learn how it went.
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Its README's watchdog (a ticker, a refresh, a cancelled context) is what every guard does. Work that must stop goes
//! under [`protect`](crate::LockGuard::protect), or is handed a
//! [`cancellation_token`](crate::LockGuard::cancellation_token).
//!
//! | there | here |
//! | --- | --- |
//! | `RetryStrategy`: `LinearBackoff`, `ExponentialBackoff`, `LimitRetry`, `NoRetry` | [`Retry`](crate::Retry): `linear`, `exponential`, `limit`, `none`, or any iterator |
//! | the context's deadline | [`wait_at_most`](crate::LockRequest::wait_at_most) |
//! | `Options.Token`, `Options.Metadata` | [`token`](crate::LockRequest::token), [`metadata`](crate::LockRequest::metadata) |
//! | `ObtainMulti` | [`obtain_all`](crate::Locker::obtain_all) |
//! | `Options.FenceKey`, `FenceToken()` | [`fencing_token`](crate::LockGuard::fencing_token), on by default |
//! | `ErrNotObtained`, `ErrLockNotHeld` | [`NotObtained`](crate::Error::NotObtained), [`NotHeld`](crate::Error::NotHeld) |
//!
//! # amyangfei/redlock-go, on one server
//!
//! ```text
//! lockMgr, err := redlock.NewRedLock(ctx, []string{"tcp://127.0.0.1:6379"})
//! expirity, err := lockMgr.Lock(ctx, "resource_name", 200*time.Millisecond)
//! err = lockMgr.UnLock(ctx, "resource_name")
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! use tenure::WatchDog;
//! # use tenure::Locker;
//!
//! # let locker = Locker::in_memory();
//! let held = WatchDog::builder(&locker).build();
//! let guard = locker.lock("resource_name").ttl(Duration::from_millis(200)).await?;
//! let validity = guard.remaining();
//! held.watch(guard)?;
//! // elsewhere
//! held.release("resource_name").await?;
//! # Ok(())
//! # }
//! ```
//!
//! A manager that remembers by name what it holds is a [`WatchDog`](crate::WatchDog). It needs no cache to be chosen,
//! sized or swept: a lock that is lost leaves it at once, and its name then releases no successor's.
//!
//! # redislock (AttemptLock)
//!
//! ```text
//! lock := redislock.New(client, redislock.WithKey("migrations"), redislock.WithTTL(time.Minute))
//! ok, err := lock.AttemptLock(ctx)
//! if ok { defer lock.Unlock(ctx) }
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! # use tenure::{Error, Locker};
//! # async fn migrate(_fence: Option<u64>) {}
//! # let locker = Locker::in_memory();
//! match locker.try_lock("migrations").ttl(Duration::from_secs(60)).await {
//!     Ok(guard) => {
//!         guard.protect(migrate(guard.fencing_token())).await?;
//!         guard.release().await?;
//!     }
//!     Err(Error::NotObtained { .. }) => println!("another runs them"),
//!     Err(error) => return Err(error),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! That library warns of races that it accepts. What is left of them here is what the server forgets, and what a
//! process does that stands still in the middle of a write; a store that refuses lower fencing tokens closes both.
//!
//! # trviph/redlock, on one server
//!
//! ```text
//! lock := redlock.NewLock(rdb, redlock.WithMinRetryDelay(0), redlock.WithJitterDuration(300*time.Millisecond))
//! fencing, err := lock.Acquire(ctx, "my-resource", 10*time.Second)
//! defer lock.Release(ctx, "my-resource", fencing)
//! err = lock.TryExtend(ctx, "my-resource", fencing, 20*time.Second)
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! # use tenure::Locker;
//! # let locker = Locker::in_memory();
//! let guard = locker.lock("my-resource").ttl(Duration::from_secs(10)).await?;
//! guard.renew_for(Duration::from_secs(20)).await?;
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Its watchdog is for locks that are known by key and token, and here also for guards:
//!
//! ```text
//! wd := redlock.NewWatchDog(locker,
//!     redlock.WithCallbacks(cbCtx, func(ctx context.Context, item *redlock.WatchItem, err error) {
//!         if err == context.Canceled { log.Printf("stopped for key %s", item.Key); return }
//!         log.Printf("error for key %s: %v", item.Key, err)
//!     }),
//!     redlock.WithItem("resource-1", "token-1", 10*time.Second, 2*time.Second),
//! )
//! go wd.Run(ctx)
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! # use tenure::{Lease, Locker};
//! use tenure::{WatchDog, WatchEvent};
//!
//! # let locker = Locker::in_memory();
//! let dog = WatchDog::builder(&locker)
//!     .on_event(|event| match event {
//!         WatchEvent::Stopped { key, .. } => println!("stopped for key {key}"),
//!         WatchEvent::RenewFailed { key, error, .. } => println!("error for key {key}: {error}"),
//!         WatchEvent::Lost { key, loss, .. } => println!("key {key} is lost: {loss}"),
//!         _ => {}
//!     })
//!     .build();
//! let lease = Lease::new("resource-1", "token-1".parse()?, Duration::from_secs(10));
//! dog.watch_lease(lease).renew_every(Duration::from_secs(2)).obtain_when_free(true).await?;
//! # Ok(())
//! # }
//! ```
//!
//! There it may start before the lock is obtained, and in return never ends by itself. Here
//! [`obtain_when_free`](crate::WatchRequest::obtain_when_free) says so, failures that pass are survived until the
//! deadline, and a lock that is lost is told once and watched no more.
//!
//! What it calls fencing is the owner's [`token`](crate::LockGuard::token), random and good for nothing but ownership.
//! A [`fencing_token`](crate::LockGuard::fencing_token) is a number that grows.
//!
//! | there | here |
//! | --- | --- |
//! | `Acquire`, `TryAcquire` | [`lock`](crate::Locker::lock), [`try_lock`](crate::Locker::try_lock) |
//! | `AcquireWithFencing`, `AcquireOrExtend` | [`obtain`](crate::Locker::obtain) with [`token`](crate::LockRequest::token) |
//! | `Watch`, `WatchWithInterval` | every guard; [`renew_every`](crate::LockRequest::renew_every) |
//! | `NewWatchDog`, `WithItem` | [`WatchDog`](crate::WatchDog), [`watch_lease`](crate::WatchDog::watch_lease) |
//! | `WithErrorCallbacks`, `WithExtensionCallbacks` | [`WatchEvent`](crate::WatchEvent): `RenewFailed`, `Renewed` |
//! | `ErrMaxRetryExceeded` | [`NotObtained`](crate::Error::NotObtained), which says how many attempts |
//!
//! # trviph/redlock, on several servers
//!
//! ```text
//! dl := redlock.NewDistributedLock([]*redlock.Lock{redlock.NewLock(redis1), redlock.NewLock(redis2),
//! redlock.NewLock(redis3)},
//!     redlock.WithClockDriftFactor(0.01), redlock.WithClockDriftBuffer(2*time.Millisecond),
//!     redlock.WithReleaseTimeout(5*time.Second))
//! fencing, err := dl.Acquire(ctx, "my-resource", 30*time.Second)
//! defer dl.Release(ctx, "my-resource", fencing)
//! ```
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! use tenure::{Error, Locker};
//!
//! let locker = Locker::builder()
//!     .drift(0.01, Duration::from_millis(2))
//!     .command_timeout(Duration::from_secs(5))
//!     .quorum(["redis://redis1", "redis://redis2", "redis://redis3"])
//!     .await?;
//! let guard = locker.lock("my-resource").ttl(Duration::from_secs(30)).await?; // the same guard as ever
//! match guard.release().await {
//!     Err(Error::Quorum { needed, granted, nodes }) => {
//!         // Too few nodes could be asked; it goes on in the background.
//!         eprintln!("{granted} of {needed} nodes have released it");
//!         for node in nodes {
//!             eprintln!("{}: {}", node.address, node.error);
//!         }
//!     }
//!     released => released?,
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | there | here |
//! | --- | --- |
//! | `Lock` and `DistributedLock`, with like methods | one [`Locker`](crate::Locker), one [`LockGuard`](crate::LockGuard) |
//! | `WithDistMaxRetry`, `WithDistMaxJitterDuration` | [`Retry`](crate::Retry); split votes are jittered anyway |
//! | joined errors, to be unwrapped | [`Error::Quorum`](crate::Error::Quorum), with an error and an address per node |
//! | `ReleaseWithCount` | `Ok`: a majority; otherwise `needed` and `granted` of [`Error::Quorum`](crate::Error::Quorum) |
//! | fencing tokens of your own making | [`fencing_token`](crate::LockGuard::fencing_token), agreed on by the nodes |
//!
//! # amyangfei/redlock-go
//!
//! ```text
//! lockMgr, err := redlock.NewRedLock(ctx, []string{"tcp://127.0.0.1:6379", "tcp://127.0.0.1:6380",
//! "tcp://127.0.0.1:6381"}) expiry, err := lockMgr.Lock(ctx, "resource_name", 200*time.Millisecond)
//! err = lockMgr.UnLock(ctx, "resource_name")
//! ```
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! use tenure::Locker;
//!
//! let nodes = ["redis://127.0.0.1:6379", "redis://127.0.0.1:6380", "redis://127.0.0.1:6381"];
//! let locker = Locker::quorum(nodes).await?;
//! let guard = locker.lock("resource_name").ttl(Duration::from_millis(200)).await?;
//! let expiry = guard.remaining();
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! As there, an even number of servers is refused. A server that was restarted does not vote for a minute
//! ([`restart_window`](crate::LockerBuilder::restart_window)), as it may have forgotten what it granted.
//!
//! # distlock
//!
//! ```text
//! lock, err := distlock.Obtain(ctx, client, "my-key", time.Second)
//! job.Payload = string(lock)
//! // elsewhere
//! err = distlock.Ensure(ctx, client, distlock.Lock(job.Payload), time.Minute)
//! err = distlock.Release(ctx, client, distlock.Lock(job.Payload))
//! ```
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # use std::time::Duration;
//! # use tenure::{Lease, Locker};
//! # let locker = Locker::in_memory();
//! let lease: Lease = locker.obtain("my-key").await?.into_lease();
//! let payload = lease.to_string();
//! // elsewhere
//! let lease: Lease = payload.parse()?;
//! locker.ensure(&lease, Duration::from_secs(60)).await?;
//! let guard = locker.adopt(lease).await?; // renewed from here on
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Its minimal client interface, with which tests do without a server, is
//! [`Locker::in_memory`](crate::Locker::in_memory).
