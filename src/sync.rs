//! The mutexes of the parts that are tested under random schedules: those of std. With `--cfg shuttle`, the unit tests
//! have those of [shuttle](https://docs.rs/shuttle) in their place, which decide at each lock who goes on.

#[cfg(not(all(test, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard};

#[cfg(all(test, shuttle))]
pub(crate) use self::shuttled::{Mutex, MutexGuard, turn};

/// Shuttle leaves out the points after an unlock, as the next step on one of its own types is another one. Here, a
/// wake-up by a type of tokio's may come next.
#[cfg(all(test, shuttle))]
mod shuttled {
    use std::fmt::{self, Debug, Formatter};
    use std::ops::{Deref, DerefMut};
    use std::sync::{LockResult, PoisonError};
    use std::thread::panicking;
    use std::time::Duration;

    use shuttle::sync;
    use shuttle::thread;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    pub(crate) struct MutexGuard<'a, T>(Option<sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            match self.0.lock() {
                Ok(guard) => Ok(MutexGuard(Some(guard))),
                Err(poisoned) => Err(PoisonError::new(MutexGuard(Some(poisoned.into_inner())))),
            }
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().unwrap()
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().unwrap()
        }
    }

    impl<T: Debug> Debug for MutexGuard<'_, T> {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            (**self).fmt(f)
        }
    }

    impl<T> Drop for MutexGuard<'_, T> {
        fn drop(&mut self) {
            self.0 = None;
            if !panicking() {
                turn();
            }
        }
    }

    /// Lets another thread go on, or the same. Shuttle has no time.
    pub(crate) fn turn() {
        thread::sleep(Duration::ZERO);
    }
}
