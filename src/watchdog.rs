//! Many locks kept in one place, by key, and what becomes of them reported.

mod entries;
mod events;
mod obtaining;
mod outbox;
mod registry;
mod request;
#[cfg(test)]
mod tests;
mod watcher;

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::time::Instant;

pub use self::events::WatchEvent;
use self::outbox::{Callback, Outbox};
use self::registry::Registry;
pub use self::request::{WatchRequest, Watching};
use crate::hold::timing::Renewal;
use crate::{Error, Key, Lease, LockGuard, Locker};

/// Keeps many locks at once, by key, and reports what becomes of them.
///
/// For programs whose locks are no matter of a scope: a worker that owns a changing set of shards, a pool of sessions.
/// Every lock is renewed on its own, by the same loop as a guard's. It is given either as a guard, which belongs to the
/// watchdog from then on, or as a [`Lease`], and found again under each of its keys. A lock that is lost leaves by
/// itself.
///
/// Where a piece of code holds a lock while it works, use the [`LockGuard`] itself: it needs nobody to watch it.
///
/// # Events
///
/// [`on_event`](WatchDogBuilder::on_event) sets a callback, [`subscribe`](WatchDog::subscribe) gives a stream. Both get
/// the events of one key in order. The callback misses none, whatever it does: [`WatchEvent`] says what is told when.
///
/// Events come from the tasks that renew the locks. While the runtime that a lock was obtained on is blocked or not
/// driven, its loss is reported late; [`status`](WatchDog::status) reads the clock, and so is right all the same.
///
/// # Dropping
///
/// Clones are handles on one watchdog. Dropping the last stops it: what came as a guard is released in the background,
/// what came as a lease is let be. A callback must not own a handle, which would then never be the last: give it a
/// [`WeakWatchDog`]. [`shutdown`](WatchDog::shutdown) lets all be, [`release_all`](WatchDog::release_all) releases all.
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

/// What all handles share, and nobody else owns: dropped with the last of them.
struct Owner {
    registry: Arc<Registry>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.registry.stop();
    }
}

impl WatchDog {
    /// Starts from a locker, whose server, prefix, drift and renewal the watchdog's leases have. It is kept open as
    /// long as the watchdog is there.
    ///
    /// ```
    /// let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// assert!(dog.is_empty());
    /// ```
    pub fn builder(locker: &Locker) -> WatchDogBuilder {
        WatchDogBuilder { locker: locker.clone(), renewal: locker.shared().settings.renewal, callback: None }
    }

    /// Takes a guard over, to be kept until it is released, unwatched or lost. It is renewed as before, be it of this
    /// locker or another. May be called on any thread, and never waits.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyWatched`]: one of its keys is watched.
    /// - [`Error::NotHeld`]: the lock is lost. That is no event, as it was never watched.
    /// - [`Error::Closed`]: the watchdog was shut down.
    ///
    /// A guard that is refused is dropped, and so released in the background. A lock that is watched by the same token
    /// stays.
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
        self.registry().watch(guard)
    }

    /// Asks for the lock of a lease to be watched: held already, or [obtained](WatchRequest::obtain_when_free) as soon
    /// as it is free.
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
        WatchRequest::new(self.clone(), lease, self.registry().renewal)
    }

    /// Stops the renewal and keeps the lock, as [`LockGuard::into_lease`] does. `None` where the key isn't watched, or
    /// the lock isn't held: one that is waited for is so no more, and its lease is the one that you gave.
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
        self.registry().unwatch(&key.into())
    }

    /// Releases a lock and waits for the server's word on it, as [`LockGuard::release`] does. Of several keys, any will
    /// do: they are released together. Until then the key counts as watched, though not as held.
    ///
    /// # Errors
    ///
    /// - [`Error::NotHeld`]: it turned out to be lost; or the key isn't watched, which reads as [`Released`]: it never
    ///   was, or its end was reported before.
    /// - [`Error::Redis`]: the server could not be asked within the command timeout. The background goes on trying,
    ///   until the ttl has freed the lock.
    ///
    /// A lock that is waited for is so no more, which is no error, and is reported as [`Stopped`](WatchEvent::Stopped).
    ///
    /// # Cancel safety
    ///
    /// A dropped release still releases, in the background.
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
        self.registry().release(&key.into()).await
    }

    /// Releases all that are watched now, many at a time, and answers what went wrong. A lock of several keys is named
    /// by the first. The watchdog goes on: what is added meanwhile stays.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it leaves those watched whose turn has not come.
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
        self.registry().release_all().await
    }

    /// Stops renewing and keeps the locks: answers a lease for each that is held, to be taken up elsewhere before its
    /// ttl ends. Other handles see an empty watchdog, and [`Error::Closed`] from [`watch`](WatchDog::watch).
    ///
    /// # Cancel safety
    ///
    /// It waits for tasks that end at once (and no longer than the [command
    /// timeout](crate::LockerBuilder::command_timeout), should their runtime stand still), and then stops all in one
    /// step: dropped before, it has closed the watchdog, and what is held stays with the other handles.
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
        self.registry().shut_down().await
    }

    /// All events from now on, as a stream. It holds the latest 1,024: a receiver that is further behind is told by
    /// [`Lagged`](broadcast::error::RecvError::Lagged) how many it has missed, a loss maybe among them. Only the
    /// [callback](WatchDogBuilder::on_event) misses nothing. Nothing is merged: every `Renewed` counts one.
    ///
    /// It ends when the last handle is dropped.
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
        self.registry().outbox.subscribe()
    }

    /// Waits until the callback has been told, and has returned from, all that has happened up to now. For the end of a
    /// program, and for tests. In the callback it would wait for itself.
    ///
    /// # Cancel safety
    ///
    /// It only waits.
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
        self.registry().outbox.delivered().await;
    }

    /// Whether the key is watched: its lock is held, or waited for, or on its way to be released.
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
        self.registry().contains(&key.into())
    }

    /// How many locks are watched. One of several keys counts once.
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
        self.registry().len()
    }

    /// Whether no lock is watched. See [`len`](WatchDog::len) for an example.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How it stands with a lock; `None` where the key isn't watched. Whether it is held is read from the clock, and so
    /// is right even when the runtime has been blocked.
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
        self.registry().status(&key.into())
    }

    /// A handle that keeps nothing alive: for the callback. See [`WeakWatchDog`] for an example.
    pub fn downgrade(&self) -> WeakWatchDog {
        WeakWatchDog { owner: Arc::downgrade(&self.owner) }
    }

    fn registry(&self) -> &Arc<Registry> {
        &self.owner.registry
    }
}

impl fmt::Debug for WatchDog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchDog").field("registry", self.registry()).finish()
    }
}

/// The settings of a [`WatchDog`]; made by [`WatchDog::builder`].
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::{Locker, WatchDog};
///
/// let locker = Locker::in_memory();
/// let dog = WatchDog::builder(&locker)
///     .renew_every(Duration::from_secs(2))
///     .on_event(|event| println!("{event:?}"))
///     .build();
/// ```
#[must_use = "a builder does nothing until it is ended"]
pub struct WatchDogBuilder {
    locker: Locker,
    renewal: Renewal,
    callback: Option<Callback>,
}

impl WatchDogBuilder {
    /// Called with every event, one at a time, those of one key in order. Set twice, the latter counts.
    ///
    /// It may block, panic, and call the watchdog: it runs on a thread for blocking work
    /// (`tokio::task::spawn_blocking`) of the runtime that the watchdog was last given a lock on, and no renewal waits
    /// for it. While it is busy, the renewals of a lock and its failures are each merged into one event, which says how
    /// many it stands for; all other events are told one by one. A panic is logged, and the next event is told.
    ///
    /// As with all blocking work, a runtime that is dropped waits for the callback to return. Where there is no
    /// runtime, or none any more, it runs on a thread of its own.
    ///
    /// ```
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).on_event(|event| println!("{event:?}")).build();
    /// ```
    pub fn on_event(self, callback: impl Fn(&WatchEvent) + Send + Sync + 'static) -> Self {
        Self { callback: Some(Box::new(callback)), ..self }
    }

    /// The time between the renewals of [leases](WatchDog::watch_lease) that set none. Default: the
    /// [locker's](crate::LockerBuilder::renew_every), or a third of the ttl. Guards keep what their request said.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).renew_every(Duration::from_secs(3)).build();
    /// ```
    pub fn renew_every(self, interval: Duration) -> Self {
        Self { renewal: Renewal::Every(interval), ..self }
    }

    /// Makes the watchdog. It has nothing to do yet, and needs no runtime here.
    ///
    /// ```
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// ```
    pub fn build(self) -> WatchDog {
        let outbox = Outbox::new(self.callback);
        outbox.call_back_here();
        let registry = Arc::new(Registry::new(self.locker, self.renewal, outbox));
        WatchDog { owner: Arc::new(Owner { registry }) }
    }
}

impl fmt::Debug for WatchDogBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchDogBuilder")
            .field("locker", &self.locker)
            .field("renewal", &self.renewal)
            .field("callback", &self.callback.is_some())
            .finish()
    }
}

/// How it stands with a lock that is watched; answered by [`WatchDog::status`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), tenure::Error> {
/// use std::time::Duration;
///
/// let locker = tenure::Locker::in_memory();
/// let dog = tenure::WatchDog::builder(&locker).build();
/// dog.watch(locker.lock("k").await?)?;
/// tokio::time::sleep(Duration::from_secs(25)).await;
/// assert_eq!(dog.status("k").map(|status| status.renewals), Some(2));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WatchStatus {
    /// Whether the lock is held now.
    pub held: bool,
    /// Until when it is surely held if no further renewal succeeds. `None` while it is waited for or released.
    pub deadline: Option<Instant>,
    /// How many renewals have succeeded since it is watched.
    pub renewals: u64,
    /// Why the latest renewal failed; `None` where it succeeded.
    pub last_error: Option<Arc<Error>>,
}

/// A handle on a [`WatchDog`] that doesn't keep it alive; made by [`WatchDog::downgrade`].
///
/// # Examples
///
/// A callback that gives a lost lock back to be waited for:
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
    /// The watchdog, unless its last handle is dropped.
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
