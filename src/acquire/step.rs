//! The steps of a request. [`Options::obtain`](super::Options::obtain) takes one after the other.

use crate::LockGuard;
use crate::acquire::answer::Held;
use crate::hold::Grant;

/// What a request does next.
pub(crate) enum Step {
    /// Ask the server.
    Ask,
    /// Take the lock, which was handed over.
    Take(Grant),
    /// Wait.
    Wait(WaitFor),
    /// Begin as a new request: the lock was handed over, and taken back.
    StartOver,
    /// Return the guard.
    Finish(LockGuard),
    /// Return an error: the time is over.
    GiveUp,
    /// Return an error: the locker is closed.
    Close,
}

/// What a waiter waits for.
pub(crate) enum WaitFor {
    /// That another releases the lock, or its ttl ends.
    Release(Held),
    /// The end of a pause, after so many failures in a row.
    Pause { failures: u32 },
}
