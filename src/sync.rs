//! The mutexes of the parts whose interleavings are searched: those of std. With `--cfg shuttle`, the unit tests have
//! those of [shuttle](https://docs.rs/shuttle) in their place, which decide at each lock who goes on.

#[cfg(not(all(test, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard};

#[cfg(all(test, shuttle))]
pub(crate) use shuttle::sync::{Mutex, MutexGuard};
