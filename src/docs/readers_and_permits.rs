//! A guide to keys that several hold at a time: readers beside readers, and a limited number of permits. With a table
//! for users of Redisson (Java) and of DistributedLock (.NET), where these come from.
//!
//! # Readers and writers
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! let one = locker.read("prices").await?;
//! let other = locker.read("prices").await?; // at the same time
//! one.release().await?;
//! other.release().await?;
//! let writer = locker.lock("prices").await?; // alone
//! // ... write ...
//! let reader = writer.downgrade().await?; // nobody else has written since
//! # drop(reader);
//! # Ok(())
//! # }
//! ```
//!
//! The writer is whoever holds the [`lock`]. It excludes readers, and is excluded by them, as by any holder: also by
//! those of other libraries that set the same key.
//!
//! - **Writers come first.** While a `lock` of the key waits, readers that come later wait behind it, however many
//!   there are. If that waiter dies, they go on after at most two seconds. All wait in one line, so readers get their
//!   turns among writers, those that have waited together at once; [`try_read`](crate::Locker::try_read) is refused for
//!   as long as anybody waits. A quorum has no line: there, writers without end starve readers.
//! - **Each reader has its own ttl.** A reader that dies holds writers up until its own ttl ends, whatever the others
//!   renew, and no reader's ttl shortens or prolongs another's.
//! - **A reader is a guard like any other**: renewed, lost, released when dropped, with a fencing token that is greater
//!   than those before.
//! - **No upgrade.** Two readers that both waited to become the writer would wait for each other. Release, [`lock`],
//!   and read again: another writer may have come first.
//!
//! # Permits
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tenure::Error> {
//! # let locker = tenure::Locker::in_memory();
//! let licence = locker.permit("licences", 3).await?; // one of three
//! assert_eq!(locker.holders("licences").await?.len(), 1);
//! # drop(licence);
//! # Ok(())
//! # }
//! ```
//!
//! - **The permit of a holder that dies comes back** when its ttl ends. Nothing has to be set up, reset or cleaned up.
//! - **The caller brings the limit.** Nothing is stored but the holders. A smaller limit than the number of holders
//!   admits nobody until enough have gone; callers with different limits each keep to their own.
//! - **A token counts once**, however many guards it has.
//! - Those who hold a permit exclude the [`lock`] and readers of the same key.
//!
//! # Coming from Redisson
//!
//! | there | here |
//! | --- | --- |
//! | `RLock`, its watchdog | [`lock`]; every guard is renewed by itself, and knows when it is lost |
//! | `RReadWriteLock.readLock()`, `writeLock()` | [`read`], [`lock`] |
//! | unlocking the write lock while holding the read lock | [`downgrade`], in one step |
//! | `RSemaphore.acquire()` | [`permit`]; there, a permit of a process that dies never comes back |
//! | `RPermitExpirableSemaphore.acquire(leaseTime, …)` | [`permit`] with [`ttl`]; it is renewed while its guard lives |
//! | `trySetPermits(n)` | the limit of each call of [`permit`] |
//! | `availablePermits()` | the limit, less the number of [`holders`] |
//! | `RFairLock` | [`fair`]; all others wait in turns, too |
//! | `RLock.lock(leaseTime, …)`, without the watchdog | [`ttl`] and [`no_renewal`]; or [`hold_at_most`] |
//! | `tryLock(waitTime, leaseTime, …)` | [`lock`] with [`wait_at_most`], and with the line above for `leaseTime` |
//! | `isLocked()` | [`inspect`](crate::Locker::inspect), which also returns the holder |
//! | `isHeldByCurrentThread()` | [`is_held`](crate::LockGuard::is_held) of the guard |
//! | `forceUnlock()` | [`force_release`](crate::Locker::force_release) |
//! | `lockWatchdogTimeout`, 30 s | the locker's [`ttl`](crate::LockerBuilder::ttl), 30 s |
//! | reentrant by thread id | several guards by one [`token`](crate::LockRequest::token) |
//! | `RedissonMultiLock` | [`lock_all`](crate::Locker::lock_all), on one server |
//! | `RFencedLock` | [`fencing_token`](crate::LockGuard::fencing_token), of every guard |
//!
//! # Coming from DistributedLock
//!
//! | there | here |
//! | --- | --- |
//! | `RedisDistributedLock.AcquireAsync()`, `TryAcquireAsync()` | [`lock`], [`try_lock`](crate::Locker::try_lock) |
//! | `TryAcquireAsync(timeout)` | [`lock`] with [`wait_at_most`] |
//! | `AcquireReadLockAsync()`, `AcquireWriteLockAsync()` | [`read`], [`lock`] |
//! | `AcquireUpgradeableReadLockAsync()` | none, as [`downgrade`] says |
//! | `RedisDistributedSemaphore(key, maxCount, …)` | [`permit`] |
//! | `HandleLostToken` | [`lost`](crate::LockGuard::lost), [`cancellation_token`](crate::LockGuard::cancellation_token) |
//! | `Expiry`, `ExtensionCadence` | [`ttl`], [`renew_every`](crate::LockRequest::renew_every) |
//! | `BusyWaitSleepTime` | nothing: waiters are notified, in the order in which they came |
//! | several databases | [`quorum`](crate::Locker::quorum); permits are refused there, as they are there too |
//!
//! # Quorum
//!
//! Readers and writers work on a [`quorum`](crate::Locker::quorum), since any two majorities share a node. Permits
//! don't, and are [`Error::Unsupported`](crate::Error::Unsupported): each of two majorities can count fewer holders
//! than there are.
//!
//! [`downgrade`]: crate::LockGuard::downgrade
//! [`fair`]: crate::LockRequest::fair
//! [`hold_at_most`]: crate::LockRequest::hold_at_most
//! [`holders`]: crate::Locker::holders
//! [`lock`]: crate::Locker::lock
//! [`no_renewal`]: crate::LockRequest::no_renewal
//! [`permit`]: crate::Locker::permit
//! [`read`]: crate::Locker::read
//! [`ttl`]: crate::LockRequest::ttl
//! [`wait_at_most`]: crate::LockRequest::wait_at_most
