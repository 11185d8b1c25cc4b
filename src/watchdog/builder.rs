//! The settings of a watchdog.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::WatchDog;
use super::events::WatchEvent;
use super::inner::{Inner, Owner};
use super::outbox::{Callback, Outbox};
use crate::Locker;
use crate::hold::timing::Renewal;

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
    pub(super) fn new(locker: &Locker) -> Self {
        Self { locker: locker.clone(), renewal: locker.shared().settings.renewal, callback: None }
    }

    /// Sets a function that is called with every event: one event at a time, and those of one key in order. A second
    /// call replaces the function.
    ///
    /// The function may block, panic, and call the watchdog. It runs on a thread for blocking work
    /// (`tokio::task::spawn_blocking`) of the runtime on which the watchdog was last given a lock, and no renewal waits
    /// for it. While it is busy, the renewals of a lock are merged into one event with a count, and so are its failed
    /// renewals; all other events are delivered one by one. A panic is logged, and the next event is delivered.
    ///
    /// As with all blocking work, a runtime that is dropped waits for the function to return. If there is no runtime,
    /// or it has shut down, the function runs on a thread of its own.
    ///
    /// ```
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).on_event(|event| println!("{event:?}")).build();
    /// ```
    pub fn on_event(self, callback: impl Fn(&WatchEvent) + Send + Sync + 'static) -> Self {
        Self { callback: Some(Box::new(callback)), ..self }
    }

    /// Sets the time between renewals for [leases](WatchDog::watch_lease) whose request sets none. Default: the
    /// [locker's](crate::LockerBuilder::renew_every), or a third of the ttl. Guards keep what their request set.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).renew_every(Duration::from_secs(3)).build();
    /// ```
    pub fn renew_every(self, interval: Duration) -> Self {
        Self { renewal: Renewal::Every(interval), ..self }
    }

    /// Makes the watchdog. It has nothing to do yet, so this needs no runtime.
    ///
    /// ```
    /// # let locker = tenure::Locker::in_memory();
    /// let dog = tenure::WatchDog::builder(&locker).build();
    /// ```
    pub fn build(self) -> WatchDog {
        let outbox = Outbox::new(self.callback);
        outbox.call_back_here();
        let inner = Arc::new(Inner::new(self.locker, self.renewal, outbox));
        WatchDog { owner: Arc::new(Owner { inner }) }
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
