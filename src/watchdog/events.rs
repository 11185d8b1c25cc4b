//! What a watchdog reports, and how events that wait for delivery are merged.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::{Error, Key, Loss};

/// What a [`WatchDog`](crate::WatchDog) reports about a lock that it watches.
///
/// Each time that a lock is watched, its events come in this order: `Obtained`, if the request was to wait for the
/// lock; any number of `Renewed` and `RenewFailed`; and at the end one of `Lost`, `Released` and `Stopped`.
///
/// # Examples
///
/// ```
/// use tenure::WatchEvent;
///
/// fn print(event: &WatchEvent) {
///     let key = event.key();
///     match event {
///         WatchEvent::Renewed { count, .. } => println!("{key}: renewed, {count} times"),
///         WatchEvent::RenewFailed { error, .. } => println!("{key}: {error}"),
///         WatchEvent::Lost { loss, .. } => println!("{key}: lost, as {loss}"),
///         other => println!("{key}: {other:?}"),
///     }
/// }
/// # print(&WatchEvent::Released { key: "k".into() });
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WatchEvent {
    /// The lock is held from now on. Reported only for requests that [wait](crate::WatchRequest::obtain_when_free).
    Obtained {
        /// The lock's key; of several, the first.
        key: Key,
        /// The lock's [`fencing_token`](crate::LockGuard::fencing_token).
        fencing_token: Option<u64>,
    },

    /// The lock was renewed.
    Renewed {
        /// The lock's key; of several, the first.
        key: Key,
        /// How many renewals this event stands for: those made while the callback was busy are reported as one.
        count: u64,
        /// Until when the lock is held, as of the latest of them.
        deadline: Instant,
    },

    /// The lock could not be renewed. It is not lost yet: the renewal is retried until the deadline.
    RenewFailed {
        /// The lock's key; of several, the first.
        key: Key,
        /// How many failures this event stands for, as with `Renewed`.
        count: u64,
        /// Why the latest of them failed.
        error: Arc<Error>,
        /// How long the lock is still held, counted from the latest failure.
        remaining: Duration,
    },

    /// The lock is lost: stop the work that it protects. It is no longer watched.
    Lost {
        /// The lock's key; of several, the first.
        key: Key,
        /// How it was lost.
        loss: Loss,
        /// Why the latest renewal failed, if the lock [expired](Loss::Expired) and no renewal has succeeded since.
        cause: Option<Arc<Error>>,
    },

    /// The lock was released: on request, or in the background after the last handle of the watchdog was dropped.
    Released {
        /// The lock's key; of several, the first.
        key: Key,
    },

    /// The lock is no longer watched, and was neither lost nor released: somebody else has to renew it now. Or it was
    /// waited for, and the wait has ended.
    Stopped {
        /// The lock's key; of several, the first.
        key: Key,
        /// Why the wait for the lock ended, unless somebody asked for that.
        reason: Option<Arc<Error>>,
    },
}

impl WatchEvent {
    /// Returns the key of the lock; of several, the first.
    ///
    /// ```
    /// use tenure::WatchEvent;
    ///
    /// assert_eq!(WatchEvent::Released { key: "k".into() }.key().as_bytes(), b"k");
    /// ```
    pub fn key(&self) -> &Key {
        match self {
            Self::Obtained { key, .. }
            | Self::Renewed { key, .. }
            | Self::RenewFailed { key, .. }
            | Self::Lost { key, .. }
            | Self::Released { key }
            | Self::Stopped { key, .. } => key,
        }
    }

    /// Adds an event to those of its lock that wait for delivery. There is never more than one of each kind, however
    /// long they wait: a later renewal replaces an earlier one and counts for both, and so does a failure.
    pub(super) fn add_to(mut self, waiting: &mut Vec<Self>) {
        let kind = std::mem::discriminant(&self);
        if let Self::Renewed { count, .. } | Self::RenewFailed { count, .. } = &mut self {
            if let Some(index) = waiting.iter().position(|earlier| std::mem::discriminant(earlier) == kind) {
                if let Self::Renewed { count: more, .. } | Self::RenewFailed { count: more, .. } = waiting.remove(index)
                {
                    *count = count.saturating_add(more);
                }
            }
        }
        waiting.push(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(events: impl IntoIterator<Item = WatchEvent>) -> String {
        let mut waiting = Vec::new();
        for event in events {
            event.add_to(&mut waiting);
        }
        let show = |event: &WatchEvent| match event {
            WatchEvent::Renewed { count, .. } => format!("renewed {count}"),
            WatchEvent::RenewFailed { count, .. } => format!("failed {count}"),
            WatchEvent::Obtained { .. } => "obtained".to_owned(),
            WatchEvent::Lost { .. } => "lost".to_owned(),
            WatchEvent::Released { .. } => "released".to_owned(),
            WatchEvent::Stopped { .. } => "stopped".to_owned(),
        };
        waiting.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    fn renewed() -> WatchEvent {
        WatchEvent::Renewed { key: "k".into(), count: 1, deadline: Instant::now() }
    }

    fn failed() -> WatchEvent {
        let error = Arc::new(Error::timeout());
        WatchEvent::RenewFailed { key: "k".into(), count: 1, error, remaining: Duration::ZERO }
    }

    fn lost() -> WatchEvent {
        WatchEvent::Lost { key: "k".into(), loss: Loss::Expired, cause: None }
    }

    #[test]
    fn renewals_in_a_row_are_one_that_says_how_many() {
        assert_eq!(told([renewed(), renewed(), renewed()]), "renewed 3");
    }

    #[test]
    fn whatever_comes_in_turns_stays_as_few_as_there_are_kinds() {
        let obtained = WatchEvent::Obtained { key: "k".into(), fencing_token: None };
        let turns = (0..1_000).flat_map(|_| [renewed(), failed()]);
        assert_eq!(
            told([obtained].into_iter().chain(turns).chain([lost()])),
            "obtained, renewed 1000, failed 1000, lost"
        );
    }

    #[test]
    fn the_latest_of_a_kind_keeps_its_place_in_time() {
        assert_eq!(told([renewed(), failed(), renewed(), lost()]), "failed 1, renewed 2, lost");
    }
}
