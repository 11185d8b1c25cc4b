//! Releases that were given up on while the server may still run them.
//!
//! An explicit release of a token that others may use ends the lock for all of them. If its future is dropped, what it
//! has sent may be on its way for some more time, and would end what the token obtains meanwhile. So a request by that
//! token is sent only when the server can no longer run it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use tokio::time::Instant;

use crate::Token;
use crate::sync::{Mutex, MutexGuard};

/// Until when the server may run them, by their tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct LateReleases(Arc<Mutex<HashMap<Token, Instant>>>);

/// A release that is under way. If this is dropped before it has ended, it is late.
pub(crate) struct Releasing {
    late: LateReleases,
    token: Option<Token>,
    may_run_until: Instant,
}

impl LateReleases {
    /// Notes that a release of this token is about to be sent, which the server may run until then.
    pub(crate) fn begin(&self, token: Token, may_run_until: Instant) -> Releasing {
        Releasing { late: self.clone(), token: Some(token), may_run_until }
    }

    /// Returns until when the server may run a release of this token that nobody waits for.
    pub(crate) fn until(&self, token: &Token) -> Option<Instant> {
        self.entries().get(token).copied().filter(|until| *until > Instant::now())
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Token, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Releasing {
    /// Notes that the release has ended: it has a reply, or the server can't run it any longer.
    pub(crate) fn has_ended(mut self) {
        self.token = None;
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        let Some(token) = self.token.take() else { return };
        let now = Instant::now();
        let mut entries = self.late.entries();
        entries.retain(|_, until| *until > now);
        let until = entries.entry(token).or_insert(self.may_run_until);
        *until = self.may_run_until.max(*until);
    }
}
