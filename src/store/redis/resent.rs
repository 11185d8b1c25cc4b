//! The end of a lock over a client that may send a call again by itself ([`Connection::resends`]).
//!
//! If the connection breaks before the reply, redis-rs' client of a cluster sends the call again, as it is. The stamp
//! (`scripts/stamp.lua`) ends that with the time of the call. Within this time the server may run the call twice, and
//! the reply is that to the last run:
//!
//! 1. Acquires, renewals, claims and what gives them back, downgrades, undoes, and all that concerns the line: a second
//!    run finds what the first has left, and returns the same. If something else has happened in between, it does and
//!    returns what a later call would have.
//! 2. Releases: a second run finds nothing of ours, and would report a lock as lost that its guard has held throughout.
//!    So the server is asked first whether the lock is held. If it is, whatever comes after has released it.
//! 3. Hand-overs: a second run finds the next owner's token. So "not ours" is an unknown outcome for the next owner,
//!    which asks, and for the releaser.
//! 4. A release by a user of a token that others use ends the lock, whichever grant has it. Its second run may end what
//!    the token has obtained since the first. Nothing prevents that here; `RedisConnection` documents it. A release in
//!    the background only ends its own grant.
//! 5. [`force_release`](Store::force_release): a second run would end the next holder's lock. It is refused.
//! 6. A refusal is that of the last run. It doesn't mean that nothing has run, so what it may have left is undone.
//!
//! [`Connection::resends`]: super::driver::Connection::resends

use std::time::Duration;

use tokio::time::Instant;

use super::RedisStore;
use crate::Error;
use crate::hold::Owned;
use crate::store::{Ending, HandedOver, Next, Store, Verdict, Wanted};

/// Why a lock can't be ended whoever holds it.
pub(super) const MAY_END_THE_NEXT: &str = "the client of a cluster that you have given may send a command twice, and \
                                           so end the lock of the next holder; connect by URL instead";

impl RedisStore {
    /// Releases the lock, or leaves its keys to nobody for the rest of their time.
    pub(super) async fn end_resent(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Option<Duration>,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let until = Instant::now() + timeout;
        let may_be_held = self.may_be_held(owned, ending, timeout).await?;
        let left = until.saturating_duration_since(Instant::now());
        let verdict = match (rest, owned.mode.is_shared()) {
            (rest, true) => self.release_shared(owned, ending, rest.unwrap_or_default(), left).await?,
            (Some(rest), false) => self.linger(owned, ending, rest, left).await?,
            (None, false) => self.release(owned, ending, left).await?,
        };
        Ok(if may_be_held { Verdict::Done } else { verdict })
    }

    pub(super) async fn hand_over_resent(
        &self,
        from: &Owned,
        ending: Ending,
        to: &Wanted,
        next: &Next,
        timeout: Duration,
    ) -> Result<HandedOver, Error> {
        let until = Instant::now() + timeout;
        let may_be_held = self.may_be_held(from, ending, timeout).await?;
        let left = until.saturating_duration_since(Instant::now());
        match self.hand_over(from, ending, to, next, left).await? {
            // As if the reply to the first run had been lost, which may be so.
            HandedOver::NotOurs(_) if may_be_held => Err(Error::timeout()),
            handed_over => Ok(handed_over),
        }
    }

    /// Returns whether the lock is held before it ends. Of a release in the background, nobody needs to know.
    async fn may_be_held(&self, owned: &Owned, ending: Ending, timeout: Duration) -> Result<bool, Error> {
        match ending {
            Ending::Grant => Ok(true),
            Ending::Lock => Store::remaining(self, owned, timeout).await.map(|remaining| remaining.is_some()),
        }
    }
}
