//! For how long a lock is held at least and at most, where its request says so.

use std::time::Duration;

use tracing::Span;

use super::timing::{Drift, MAX_TTL, Renewal};
use crate::Error;

/// How a lock is kept once it is obtained.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) renewal: Renewal,
    pub(crate) bounds: Bounds,
    /// The span of the one who wants the lock. What is told of the lock is told in it.
    pub(crate) caller: Span,
}

impl From<Renewal> for Terms {
    /// The caller is the one who runs this.
    fn from(renewal: Renewal) -> Self {
        Self { renewal, bounds: Bounds::default(), caller: Span::current() }
    }
}

/// The bounds of the time for which a lock is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// The lock isn't renewed beyond this time, counted from before it was requested.
    pub(crate) at_most: Option<Duration>,
    /// The key stays taken for this time, counted from when the grant was known.
    pub(crate) at_least: Duration,
}

impl Bounds {
    pub(crate) fn are_set(self) -> bool {
        self != Self::default()
    }

    /// Returns the ttl of the request for a lock that would have this one, in whole milliseconds as that one. The key
    /// has to live for the minimum in any case.
    pub(crate) fn cut(self, ttl: Duration) -> Duration {
        self.at_most.map_or(ttl, |limit| ttl.min(whole_millis(limit.max(self.at_least))))
    }

    /// Returns for how much of this ttl the lock can be held.
    pub(crate) fn usable(self, ttl: Duration) -> Duration {
        self.at_most.map_or(ttl, |limit| ttl.min(limit))
    }

    /// # Errors
    ///
    /// [`Error::InvalidHold`] for bounds that can't work.
    pub(crate) fn validate(self, drift: Drift) -> Result<(), Error> {
        // Only a ttl that is too short is refused: no limit is too long.
        if self.at_most.is_some_and(|limit| drift.validate(limit.min(MAX_TTL)).is_err()) {
            return Err(Error::InvalidHold(
                "hold_at_most is too short: the allowance for clock drift leaves nothing of it",
            ));
        }
        // The rest of it becomes the key's ttl.
        if self.at_least > MAX_TTL {
            return Err(Error::InvalidHold("hold_at_least is longer than 365 days"));
        }
        Ok(())
    }
}

/// Returns the duration without the fraction of a millisecond, the unit of the server.
pub(super) fn whole_millis(duration: Duration) -> Duration {
    duration - Duration::from_nanos(u64::from(duration.subsec_nanos() % 1_000_000))
}
