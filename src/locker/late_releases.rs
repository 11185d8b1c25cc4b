//! Releases that were given up on while the server may still run them.
//!
//! An explicit release of a token that others may use ends the lock for all of them. If its future is dropped, what it
//! has sent may be on its way for some more time, and would end what the token obtains meanwhile. So a request by that
//! token is sent only when the server can no longer run it.
//!
//! A lock is handed over only to requests that made their tokens, so no other way leads to such a token.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use tokio::time::Instant;

use crate::hold::Owned;
use crate::sync::{Mutex, MutexGuard};
use crate::{Key, Token};

/// Maps each token to its releases: the keys, and until when the server may run the release.
#[derive(Clone, Debug, Default)]
pub(crate) struct LateReleases(Arc<Mutex<Entries>>);

type Entries = HashMap<Token, Vec<(Box<[Key]>, Instant)>>;

/// A release that is under way. If this is dropped before [`end`](Self::end), it is late.
pub(crate) struct Releasing {
    late: LateReleases,
    owned: Option<Owned>,
    may_run_until: Instant,
}

impl LateReleases {
    /// Notes that a release is about to be sent, which the server may run until then.
    pub(crate) fn begin(&self, owned: &Owned, may_run_until: Instant) -> Releasing {
        Releasing { late: self.clone(), owned: Some(owned.clone()), may_run_until }
    }

    /// Returns until when the server may run a release that nobody waits for, and that would end one of these keys.
    pub(crate) fn until(&self, owned: &Owned) -> Option<Instant> {
        let now = Instant::now();
        let entries = self.entries();
        let of_token = entries.get(&owned.token)?.iter();
        let ends = of_token.filter(|(keys, until)| *until > now && keys.iter().any(|key| owned.keys.contains(key)));
        ends.map(|(_, until)| *until).max()
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Releasing {
    /// Notes that the release has a reply, or that the server can't run it any longer.
    pub(crate) fn end(mut self) {
        self.owned = None;
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        let Some(Owned { token, keys, .. }) = self.owned.take() else { return };
        let now = Instant::now();
        let mut entries = self.late.entries();
        entries.retain(|_, releases| {
            releases.retain(|(_, until)| *until > now);
            !releases.is_empty()
        });
        entries.entry(token).or_default().push((keys, self.may_run_until));
    }
}
