//! A guide for users of the Go libraries that tenure learned from: their first example, and the same in tenure. At the
//! end are tables for users of redsync and of etcd's package `concurrency`.
//!
//! Only differences in kind are explained. What all of them leave to the caller, tenure does by itself: it renews the
//! lock in the background, stops the work on a loss, releases a lock that the caller forgot, and distinguishes a server
//! that can't be reached from one that refuses.
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
//! // A drop releases it; `release` also returns the outcome.
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The watchdog of its README (a ticker, a refresh, a cancelled context) is built into every guard. Work that must stop
//! runs under [`protect`](crate::LockGuard::protect), or gets a
//! [`cancellation_token`](crate::LockGuard::cancellation_token).
//!
//! | there | here |
//! | --- | --- |
//! | `RetryStrategy` | [`Retry`] |
//! | `LinearBackoff`, `ExponentialBackoff` | `linear`, `exponential`, or any iterator |
//! | `LimitRetry`, `NoRetry` | `max_retries`, `none` |
//! | the context's deadline | [`wait_at_most`] |
//! | `Options.Token`, `Options.Metadata` | [`token`], [`metadata`] |
//! | `ObtainMulti` | [`obtain_all`] |
//! | `Options.FenceKey`, `FenceToken()` | [`fencing_token`], on by default |
//! | `ErrNotObtained`, `ErrLockNotHeld` | [`NotObtained`], [`NotHeld`] |
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
//! A manager that remembers its locks by name is a [`WatchDog`]. It needs no cache to be chosen, sized or swept: it
//! drops a lost lock at once, and a release by that name then doesn't release a successor's lock.
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
//!     Err(Error::NotObtained { .. }) => println!("another process runs them"),
//!     Err(error) => return Err(error),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! That library warns of races that it accepts. Two remain here: a server may forget, and a process may pause in the
//! middle of a write. A store that refuses lower fencing tokens closes both.
//!
//! # trviph/redlock, on one server
//!
//! ```text
//! lock := redlock.NewLock(rdb,
//!     redlock.WithMinRetryDelay(0), redlock.WithJitterDuration(300*time.Millisecond))
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
//! Its watchdog is for locks that are known by key and token; here it also takes guards:
//!
//! ```text
//! wd := redlock.NewWatchDog(locker,
//!     redlock.WithCallbacks(cbCtx, func(_ context.Context, item *redlock.WatchItem, err error) {
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
//!         WatchEvent::RenewFailed { key, error, .. } => println!("error for {key}: {error}"),
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
//! There a watchdog may start before the lock is obtained, but never ends by itself. Here
//! [`obtain_when_free`](crate::WatchRequest::obtain_when_free) asks for that, transient failures are retried until the
//! deadline, and a lost lock is reported once and no longer watched.
//!
//! What it calls fencing is the owner's [`token`](crate::LockGuard::token), which is random and only proves ownership.
//! A [`fencing_token`] is a number that grows.
//!
//! | there | here |
//! | --- | --- |
//! | `Acquire`, `TryAcquire` | [`lock`](crate::Locker::lock), [`try_lock`](crate::Locker::try_lock) |
//! | `AcquireWithFencing`, `AcquireOrExtend` | [`obtain`](crate::Locker::obtain) with [`token`] |
//! | `Watch`, `WatchWithInterval` | every guard; [`renew_every`](crate::LockRequest::renew_every) |
//! | `NewWatchDog`, `WithItem` | [`WatchDog`], [`watch_lease`](crate::WatchDog::watch_lease) |
//! | `WithErrorCallbacks`, `WithExtensionCallbacks` | [`WatchEvent`](crate::WatchEvent): `RenewFailed`, `Renewed` |
//! | `ErrMaxRetryExceeded` | [`NotObtained`], which contains the number of attempts |
//!
//! # trviph/redlock, on several servers
//!
//! ```text
//! dl := redlock.NewDistributedLock(
//!     []*redlock.Lock{
//!         redlock.NewLock(redis1), redlock.NewLock(redis2), redlock.NewLock(redis3),
//!     },
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
//! let guard = locker.lock("my-resource").ttl(Duration::from_secs(30)).await?; // the same guard
//! match guard.release().await {
//!     Err(Error::Quorum { needed, granted, nodes }) => {
//!         // Too few nodes were reached; the release goes on in the background.
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
//! | `Lock` and `DistributedLock`, with similar methods | one [`Locker`], one [`LockGuard`] |
//! | `WithDistMaxRetry`, `WithDistMaxJitterDuration` | [`Retry`]; split votes are always jittered |
//! | joined errors, to be unwrapped | [`Error::Quorum`], with an error and an address per node |
//! | `ReleaseWithCount` | `Ok`: a majority; otherwise `needed` and `granted` of [`Error::Quorum`] |
//! | fencing tokens that you make yourself | [`fencing_token`], which the nodes agree on |
//!
//! # amyangfei/redlock-go
//!
//! ```text
//! lockMgr, err := redlock.NewRedLock(ctx,
//!     []string{"tcp://127.0.0.1:6379", "tcp://127.0.0.1:6380", "tcp://127.0.0.1:6381"})
//! expiry, err := lockMgr.Lock(ctx, "resource_name", 200*time.Millisecond)
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
//! As there, an even number of servers is refused. A restarted server doesn't vote for a minute
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
//! For tests without a server, where that library has a minimal client interface, use
//! [`Locker::in_memory`](crate::Locker::in_memory).
//!
//! # redsync
//!
//! On one server, its locks and tenure's exclude each other if both use the same key.
//!
//! | there | here |
//! | --- | --- |
//! | `redsync.New(pool)`, `redsync.New(pools...)` | [`connect`](crate::Locker::connect), [`quorum`](crate::Locker::quorum) |
//! | `NewMutex(name, WithExpiry(…))`, 8 s by default | [`lock`](crate::Locker::lock) with [`ttl`](crate::LockRequest::ttl), 30 s by default |
//! | `LockContext(ctx)`, with `WithTries` and `WithRetryDelay` | [`obtain`](crate::Locker::obtain) with a [`Retry`]; or [`lock`](crate::Locker::lock) with [`wait_at_most`], which is notified |
//! | `TryLockContext(ctx)` | [`try_lock`](crate::Locker::try_lock) |
//! | `UnlockContext(ctx)` | [`release`](crate::LockGuard::release), or a drop |
//! | `ExtendContext(ctx)`, which the caller repeats | every guard renews itself; or [`renew`](crate::LockGuard::renew) |
//! | `Until()` | [`deadline`](crate::LockGuard::deadline), [`remaining`](crate::LockGuard::remaining) |
//! | `WithValue`, `WithGenValueFunc`, `Value()` | [`token`], [`LockGuard::token`](crate::LockGuard::token) |
//! | `WithDriftFactor` | [`drift`](crate::LockerBuilder::drift) |
//! | `WithTimeoutFactor` | [`command_timeout`](crate::LockerBuilder::command_timeout) |
//! | `ErrFailed`, `*ErrTaken` | [`NotObtained`] if another holds the lock; [`Error::Quorum`] if too few nodes replied |
//!
//! # etcd's concurrency.Mutex
//!
//! etcd decides by consensus, and keeps its locks while a majority of its servers is there. A Redis server may forget
//! one in a restart or a failover: [`guarantees`](crate::docs::guarantees) says what remains then.
//! [`quorum`](crate::Locker::quorum) needs as many servers as etcd does.
//!
//! | there | here |
//! | --- | --- |
//! | `NewSession(client, WithTTL(60))`, one lease for all of its locks | a [`Locker`]; each guard has its own [`ttl`](crate::LockRequest::ttl) |
//! | `NewMutex(session, prefix)`, `Lock(ctx)` | [`lock`](crate::Locker::lock); in strict order of arrival with [`fair`](crate::LockRequest::fair) |
//! | `TryLock(ctx)`, `ErrLocked` | [`try_lock`](crate::Locker::try_lock), [`NotObtained`] |
//! | `Unlock(ctx)` | [`release`](crate::LockGuard::release), or a drop |
//! | `session.Done()` | [`lost`](crate::LockGuard::lost), [`cancellation_token`](crate::LockGuard::cancellation_token) |
//! | `IsOwner()`, compared in each transaction | [`fencing_token`], compared by the store that is written to |
//! | `session.Orphan()`, `WithLease(id)` | [`into_lease`](crate::LockGuard::into_lease), [`adopt`](crate::Locker::adopt) |
//! | `session.Close()` | [`close`](crate::Locker::close), after the guards are dropped |
//!
//! [`Error::Quorum`]: crate::Error::Quorum
//! [`LockGuard`]: crate::LockGuard
//! [`Locker`]: crate::Locker
//! [`NotHeld`]: crate::Error::NotHeld
//! [`NotObtained`]: crate::Error::NotObtained
//! [`Retry`]: crate::Retry
//! [`WatchDog`]: crate::WatchDog
//! [`fencing_token`]: crate::LockGuard::fencing_token
//! [`metadata`]: crate::LockRequest::metadata
//! [`obtain_all`]: crate::Locker::obtain_all
//! [`token`]: crate::LockRequest::token
//! [`wait_at_most`]: crate::LockRequest::wait_at_most
