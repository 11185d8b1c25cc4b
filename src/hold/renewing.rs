//! A renewal that is on its way.

use std::time::Duration;

use tokio::time::Instant;

use crate::store::Extending;

/// A renewal that was sent, and what its confirmation means for the deadline.
#[derive(Clone, Copy)]
pub(crate) struct Renewing {
    pub(crate) sent: Instant,
    /// What the server is asked for.
    pub(crate) ttl: Duration,
    /// What it would be asked for if the lock were held without a limit.
    pub(super) unlimited: Duration,
    /// Whether it sets the ttl to exactly this; otherwise to at least this.
    pub(super) exact: bool,
    /// How many requests had set the ttl before it was sent, and with it.
    pub(super) epoch: u32,
}

impl Renewing {
    pub(crate) fn how(self) -> Extending {
        if self.exact { Extending::Exactly } else { Extending::AtLeast }
    }
}
