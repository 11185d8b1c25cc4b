//! What a watchdog reports: the events, and how many that wait become few.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::{Error, Key, Loss};

/// What a [`WatchDog`](crate::WatchDog) reports of a lock that it watches.
///
/// For each time that a lock is watched they come in one order: `Obtained`, if the lock was to be waited for; any
/// number of `Renewed` and `RenewFailed`; and one of `Lost`, `Released` and `Stopped`, after which there is nothing
/// more.
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
///         WatchEvent::RenewFailed { error, remaining, .. } => println!("{key}: {error}; {remaining:?} left"),
///         WatchEvent::Lost { loss, .. } => println!("{key}: lost, as {loss}"),
///         other => println!("{key}: {other:?}"),
///     }
/// }
/// # print(&WatchEvent::Released { key: "k".into() });
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WatchEvent {
    /// The lock is held from now on. Only where it was to be [waited for](crate::WatchRequest::obtain_when_free).
    Obtained {
        /// The lock's key; of several, the first.
        key: Key,
        /// What the lock's [`fencing_token`](crate::LockGuard::fencing_token) is.
        fencing_token: Option<u64>,
    },

    /// The lock was renewed.
    Renewed {
        /// The lock's key; of several, the first.
        key: Key,
        /// How many renewals this event stands for: those that came while the callback was busy are told together.
        count: u64,
        /// Until when the lock is surely held, by the latest of them.
        deadline: Instant,
    },

    /// The lock could not be renewed. That is no loss yet, and is tried again until the deadline.
    RenewFailed {
        /// The lock's key; of several, the first.
        key: Key,
        /// How many failures this event stands for, as with `Renewed`.
        count: u64,
        /// Why the latest of them failed.
        error: Arc<Error>,
        /// How long the lock was surely held from then on.
        remaining: Duration,
    },

    /// The lock is lost: stop what it protects. It is watched no more.
    Lost {
        /// The lock's key; of several, the first.
        key: Key,
        /// How it was lost.
        loss: Loss,
        /// Why the latest renewal failed, where the lock [expired](Loss::Expired) and none had succeeded since.
        cause: Option<Arc<Error>>,
    },

    /// The lock was released: by name, or in the background, as the last handle of the watchdog was dropped.
    Released {
        /// The lock's key; of several, the first.
        key: Key,
    },

    /// The lock is watched no more, and was neither lost nor released: somebody else has to renew it now. Or it was
    /// only waited for, and is so no more.
    Stopped {
        /// The lock's key; of several, the first.
        key: Key,
        /// Why waiting for the lock came to an end, where nobody asked for that.
        reason: Option<Arc<Error>>,
    },
}

impl WatchEvent {
    /// The key of the lock that this is about; of several, the first.
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

    /// Adds an event to those of its lock that nobody has been told of yet. There is never more than one of each kind,
    /// however long nobody is told: a later renewal takes the place of an earlier one and counts for both, and so does
    /// a failure.
    pub(super) fn add_to(mut self, waiting: &mut Vec<Self>) {
        let kind = std::mem::discriminant(&self);
        if let Self::Renewed { count, .. } | Self::RenewFailed { count, .. } = &mut self {
            if let Some(place) = waiting.iter().position(|earlier| std::mem::discriminant(earlier) == kind) {
                if let Self::Renewed { count: more, .. } | Self::RenewFailed { count: more, .. } = waiting.remove(place)
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
