//! Keeps many locks in one place, by key, and reports what becomes of them.
//!
//! Each file below uses only those above it in this list:
//!
//! - `events.rs`, `status.rs`: what is reported
//! - `outbox.rs`: delivers events to the callback and to subscribers
//! - `entries.rs`, `registry.rs`: the table of watched locks; its header numbers the invariants
//! - `observer.rs`: turns what a renewer reports into events
//! - `inner.rs`, `obtaining.rs`: what can be done with the locks
//! - `builder.rs`, `request.rs`: the settings of a watchdog, and of one request (the builder also makes the `WatchDog`)

mod builder;
mod entries;
mod events;
mod inner;
mod observer;
mod obtaining;
mod outbox;
mod registry;
mod request;
mod status;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Weak};

use tokio::sync::broadcast;

pub use self::builder::WatchDogBuilder;
pub use self::events::WatchEvent;
use self::inner::{Inner, Owner};
pub use self::request::{WatchRequest, Watching};
pub use self::status::WatchStatus;
use crate::{Error, Key, Lease, LockGuard, Locker};

/// Keeps many locks at once, by key, and reports what becomes of them.
///
/// It is for programs whose locks don't belong to a scope: a worker that owns a changing set of shards, a pool of
/// connections. You give it a lock as a guard, which it owns from then on, or as a [`Lease`], and find the lock again
/// under each of its keys. Every lock is renewed on its own, as a guard's is. A lock that is lost is removed.
///
/// A watchdog keeps one guard for each key, also for those that several share: a second [reader](Locker::read) or
/// [permit](Locker::permit) for the same key is refused, or needs another watchdog.
///
/// Where a piece of code holds a lock while it works, use the [`LockGuard`] itself: it needs no watchdog.
///
/// # Events
///
/// [`on_event`](WatchDogBuilder::on_event) sets a callback, [`subscribe`](WatchDog::subscribe) returns a stream. Both
/// get the events of one key in order. The callback misses none, whatever it does. [`WatchEvent`] lists the events.
///
/// Events come from the tasks that renew the locks. While the runtime that a lock was obtained on is blocked or not
/// driven, its loss is reported late. [`status`](WatchDog::status) reads the clock, so it is right even then.
///
/// # Dropping
///
/// Clones are handles on one watchdog. Dropping the last handle stops it: locks that came as guards are released in the
/// background, those that came as leases are kept until their ttl ends. A callback must not own a handle, which would
/// then never be the last: give it a [`WeakWatchDog`]. [`shutdown`](WatchDog::shutdown) keeps all locks as leases,
/// [`release_all`](WatchDog::release_all) releases them all.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use tenure::{Locker, WatchDog, WatchEvent};
///
/// let locker = Locker::in_memory();
/// let dog = WatchDog::builder(&locker)
///     .on_event(|event| match event {
///         WatchEvent::Lost { key, loss, .. } => eprintln!("{key} is lost: {loss}"),
///         other => println!("{other:?}"),
///     })
///     .build();
/// for shard in 0..8 {
///     dog.watch(locker.lock(format!("shard:{shard}")).await?)?;
/// }
/// assert_eq!(dog.len(), 8);
/// dog.release("shard:3").await?;
/// assert!(dog.release_all().await.is_empty());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct WatchDog {
    owner: Arc<Owner>,
}

impl WatchDog {
    /// Returns a builder of a watchdog whose leases use this locker's server, prefix, drift and renewal. The watchdog
    /// keeps the locker open.
    ///
    /// ```
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// assert!(dog.is_empty());
    /// ```
    pub fn builder(locker: &Locker) -> WatchDogBuilder {
        WatchDogBuilder::new(locker)
    }

    /// Takes ownership of a guard, and keeps it until it is released, unwatched or lost. The guard may come from any
    /// locker, and is renewed as before. May be called on any thread, and never waits.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyWatched`]: one of its keys is watched.
    /// - [`Error::NotHeld`]: the lock is lost. No event reports that, as the lock was never watched.
    /// - [`Error::ShutDown`]: the watchdog was shut down.
    ///
    /// A guard that is refused is dropped, and so released in the background. That doesn't end a lock that is already
    /// watched under the same token.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock_all(["account:1", "account:2"]).await?)?;
    /// assert!(dog.contains("account:2"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch(&self, guard: LockGuard) -> Result<(), Error> {
        self.inner().watch(guard)
    }

    /// Returns a request to watch the lock of a lease: one that is held, or one to be
    /// [obtained](WatchRequest::obtain_when_free) as soon as it is free.
    ///
    /// See [`WatchRequest`] for options, errors and cancel safety.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// let lease = locker.lock("k").await?.into_lease();
    /// dog.watch_lease(lease).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch_lease(&self, lease: Lease) -> WatchRequest {
        WatchRequest::new(self.owner.clone(), lease, self.inner().renewal)
    }

    /// Stops the renewal and keeps the lock, as [`LockGuard::into_lease`] does. Returns `None` if the key isn't watched
    /// or the lock isn't held. If the lock is waited for, this ends the wait, and the lease is the one that you gave.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// let lease = dog.unwatch("k").expect("it is held");
    /// assert!(locker.adopt(lease).await.is_ok());
    /// # Ok(())
    /// # }
    /// ```
    pub fn unwatch(&self, key: impl Into<Key>) -> Option<Lease> {
        self.inner().unwatch(&key.into())
    }

    /// Releases a lock and waits for the server's reply, as [`LockGuard::release`] does. Any of the lock's keys will
    /// do: they are released together. Until the reply, the key counts as watched, but not as held.
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`]: the lock was found to be lost. Or the key isn't watched (it never was, or its end was
    ///   reported before), and then the loss is [`Released`].
    /// - [`Error::Redis`]: the server could not be reached within the command timeout. The release is retried in the
    ///   background until the ttl has freed the lock.
    ///
    /// If the lock is waited for, this ends the wait. That is no error, and is reported as
    /// [`Stopped`](WatchEvent::Stopped).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the lock is released in the background.
    ///
    /// [`Released`]: crate::Loss::Released
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// dog.release("k").await?;
    /// assert_eq!(locker.inspect("k").await?, None);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn release(&self, key: impl Into<Key>) -> Result<(), Error> {
        self.inner().release(&key.into()).await
    }

    /// Releases every lock that is watched now, many at a time, and returns the errors. A lock of several keys is named
    /// by the first. The watchdog stays open: locks that are added meanwhile stay.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, locks whose release has not begun stay watched.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("a").await?)?;
    /// dog.watch(locker.lock("b").await?)?;
    /// for (key, error) in dog.release_all().await {
    ///     eprintln!("{key}: {error}");
    /// }
    /// assert!(dog.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn release_all(&self) -> Vec<(Key, Error)> {
        self.inner().release_all().await
    }

    /// Stops renewing and keeps the locks: returns a lease for each lock that is held, to be adopted elsewhere before
    /// its ttl ends. Other handles see an empty watchdog, and [`Error::ShutDown`] from [`watch`](WatchDog::watch).
    ///
    /// # Cancel safety
    ///
    /// The future first waits for cancelled tasks, which end at once, or no longer than the [command
    /// timeout](crate::LockerBuilder::command_timeout) if their runtime stands still. Then it stops everything in one
    /// step. If it is dropped before, the watchdog is closed, and locks that are held stay with the other handles.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// for lease in dog.shutdown().await {
    ///     println!("{} is free in {:?}, unless it is taken up", lease.key(), lease.ttl());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(self) -> Vec<Lease> {
        self.inner().shut_down().await
    }

    /// Returns a stream of all events from now on. It buffers the latest 1,024. A receiver that is further behind gets
    /// [`Lagged`](broadcast::error::RecvError::Lagged) with the number of events that it has missed, which may include
    /// a loss. Only the [callback](WatchDogBuilder::on_event) misses none. Events are not merged: every `Renewed` has a
    /// count of one.
    ///
    /// The stream ends when the last handle is dropped.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// let mut events = dog.subscribe();
    /// dog.watch(locker.lock("k").await?)?;
    /// dog.release("k").await?;
    /// assert!(matches!(events.recv().await?, tenure::WatchEvent::Released { .. }));
    /// # Ok(())
    /// # }
    /// ```
    pub fn subscribe(&self) -> broadcast::Receiver<WatchEvent> {
        self.inner().registry.outbox.subscribe()
    }

    /// Waits until the callback has returned from every event up to now. For the end of a program, and for tests.
    /// Called from the callback, it would wait for itself.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU32, Ordering};
    ///
    /// let locker = tenure::Locker::in_memory();
    /// let events = Arc::new(AtomicU32::new(0));
    /// let counter = events.clone();
    /// let count = move |_: &tenure::WatchEvent| drop(counter.fetch_add(1, Ordering::Relaxed));
    /// let dog = tenure::WatchDog::builder(&locker).on_event(count).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// dog.release("k").await?;
    /// dog.delivered().await;
    /// assert_eq!(events.load(Ordering::Relaxed), 1);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delivered(&self) {
        self.inner().registry.outbox.delivered().await;
    }

    /// Returns whether the key is watched: its lock is held, or waited for, or being released.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// assert!(dog.contains("k") && !dog.contains("other"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn contains(&self, key: impl Into<Key>) -> bool {
        self.inner().contains(&key.into())
    }

    /// Returns how many locks are watched. A lock of several keys counts once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock_all(["a", "b"]).await?)?;
    /// assert_eq!(dog.len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn len(&self) -> usize {
        self.inner().len()
    }

    /// Returns whether no lock is watched. See [`len`](WatchDog::len) for an example.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the state of a lock, or `None` if the key isn't watched. Whether the lock is held is read from the
    /// clock, so it is right even if the runtime has been blocked.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// dog.watch(locker.lock("k").await?)?;
    /// let status = dog.status("k").expect("it is watched");
    /// assert!(status.held && status.last_error.is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn status(&self, key: impl Into<Key>) -> Option<WatchStatus> {
        self.inner().status(&key.into())
    }

    /// Returns a handle that doesn't keep the watchdog alive, for the callback. See [`WeakWatchDog`] for an example.
    pub fn downgrade(&self) -> WeakWatchDog {
        WeakWatchDog { owner: Arc::downgrade(&self.owner) }
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.owner.inner
    }
}

impl fmt::Debug for WatchDog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchDog").field("inner", self.inner()).finish()
    }
}

/// A handle on a [`WatchDog`] that doesn't keep it alive; made by [`WatchDog::downgrade`].
///
/// # Examples
///
/// A callback that waits for a lost lock again:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::sync::{Arc, OnceLock};
/// use std::time::Duration;
/// use tenure::{Lease, Locker, Token, WatchDog, WatchEvent, WeakWatchDog};
///
/// let locker = Locker::in_memory();
/// let this: Arc<OnceLock<WeakWatchDog>> = Arc::default();
/// let dog = WatchDog::builder(&locker)
///     .on_event({
///         let this = this.clone();
///         move |event| {
///             let Some(dog) = this.get().and_then(WeakWatchDog::upgrade) else { return };
///             if let WatchEvent::Lost { key, .. } = event {
///                 let lease = Lease::new(key, Token::random(), Duration::from_secs(10));
///                 tokio::spawn(dog.watch_lease(lease).obtain_when_free(true).into_future());
///             }
///         }
///     })
///     .build();
/// this.get_or_init(|| dog.downgrade());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct WeakWatchDog {
    owner: Weak<Owner>,
}

impl WeakWatchDog {
    /// Returns the watchdog, unless its last handle is dropped.
    ///
    /// ```
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// let weak = dog.downgrade();
    /// assert!(weak.upgrade().is_some());
    /// drop(dog);
    /// assert!(weak.upgrade().is_none());
    /// ```
    pub fn upgrade(&self) -> Option<WatchDog> {
        self.owner.upgrade().map(|owner| WatchDog { owner })
    }
}

impl fmt::Debug for WeakWatchDog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakWatchDog").finish_non_exhaustive()
    }
}
