//! What the server's last answer says about a lock.

use tokio::time::Instant;

use crate::store::node::Refusal;
use crate::{Error, Key};

/// Another holds one of the keys.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) key: Key,
    /// When the holder's ttl ends, unless the lock is renewed or released before. `None`: it has no ttl.
    pub(crate) until: Option<Instant>,
    /// The nodes of a quorum that refused.
    pub(crate) refusal: Refusal,
}

impl Held {
    pub(crate) fn until(key: Key, until: Option<Instant>) -> Self {
        Self { key, until, refusal: Refusal::default() }
    }
}

/// What is known of a lock: the verdict of the last request that asked, or why there is none.
#[derive(Clone, Debug)]
pub(crate) enum LastAnswer {
    Held(Held),
    Failed(Error),
}
