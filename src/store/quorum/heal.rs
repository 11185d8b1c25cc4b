//! Bringing a lock back to nodes that have lost it, or never had it.
//!
//! Without this, every node that was away for a moment, one after the other and however far apart, would lose the lock,
//! until a majority had lost it.
//!
//! When a majority has confirmed a guard's renewal, each node without the key is asked for its vote, without a number.
//! It grants if the key is free and the node has been up for longer than the restart window. The vote itself counts for
//! nothing: it makes the node confirm later renewals like any other.
//!
//! Why there is still one holder at a time: until the deadline that the renewal has set, no other holds the lock, and
//! the node can't run the vote later (2). So healing takes no node from a holder. Nor does it take a node from a
//! request that is about to become the holder. If the node has granted it a vote, the key is not free (1). If the node
//! has forgotten that vote, the request has given up by the time that the node may vote again (3).
//!
//! A reader's share is brought back where the key is free, and also where other readers share it: that takes nothing
//! from them, and the key is no writer's. It doesn't wait for writers that wait, as it is held.
//!
//! Why tokens grow: healing writes no number, and each number still needs a majority that granted it. The number that a
//! node granted last remains the one that a later number must exceed. A node that holds the key by such a vote may
//! return an old number to a request with the same token. But it could only be a majority's number if nodes had
//! forgotten the later one, and those trust no number from before their restart.
//!
//! `tests/model.rs` shows that all of these are needed:
//!
//! 1. The key is brought back only where it is free, or readers share it and it is a reader's.
//! 2. Only by a renewal that a majority has confirmed, and before the deadline that this has set.
//! 3. Only on nodes that vote.
//! 4. What takes effect after a release is undone. To know of releases, the renewal is an open round from before it is
//!    sent.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::calls::{Calls, may_run_until};
use super::renewal::Renewal;
use super::{Member, node_timeout};
use crate::report::debug;
use crate::store::node::{Ballot, Vote};
use crate::store::{Latest, Queueing, Wanted};

impl Renewal {
    /// Brings the lock back to a node that has lost it, after a majority has confirmed this renewal of a guard.
    pub(super) async fn heal(&self, place: usize) {
        let quorum = &self.quorum;
        let Some(member) = quorum.members.get(place).filter(|member| !member.is_silent()) else { return };
        if !self.is_wanted() {
            return;
        }
        // Closing the locker waits for this, as it may have to be undone.
        let _pending = quorum.releases.token();
        let Some(metadata) = self.metadata().await.filter(|_| self.is_wanted()) else { return };
        let (sent, timeout, latest) = (Instant::now(), self.timeout(), Arc::<Latest>::default());
        let wanted = Wanted {
            owned: self.owned.clone(),
            metadata,
            ttl: self.ttl,
            fenced: false,
            queueing: Queueing::None,
            takes_over: false,
            latest: latest.clone(),
            limit: 0,
            since: Instant::now(),
        };
        let (window, ahead) = (quorum.window, quorum.ahead());
        let ballot = Ballot { number: None, exactly: false, window, ahead, place: None, heals: true };
        let node = member.node.clone();
        let call = Box::pin(async move { node.vote(&wanted, &ballot, timeout).await });
        let Ok(mut calls) = Calls::new(quorum) else { return };
        quorum.rounds.ask_again(&self.owned, place);
        calls.send((), member, timeout, call);
        let Some(((), answer)) = calls.next().await else { return };
        let is_doubtful = match answer {
            Ok(reply) => match reply.vote {
                Vote::Granted { .. } => false,
                Vote::Silent { remaining } => return member.is_silent_for(remaining),
                Vote::Held { .. } | Vote::Behind | Vote::Ahead => return,
            },
            Err(error) if error.has_not_run() => return,
            Err(_) => true,
        };
        if is_doubtful {
            sleep_until(may_run_until(sent, timeout)).await;
        } else {
            debug!(name: "tenure.healed", key = %self.owned.key(), node = %member.address, "a node has the lock again");
        }
        if self.open.is_released() {
            self.undo(place, if is_doubtful { latest } else { Arc::default() }).await;
        }
    }

    /// Returns false after the deadline or a release, and while the ttl is about to be changed.
    fn is_wanted(&self) -> bool {
        let is_late = Instant::now() >= self.until;
        !is_late && !self.open.is_released() && !self.quorum.shortened.concerns(&self.owned)
    }

    fn timeout(&self) -> Duration {
        node_timeout(self.ttl, self.until.saturating_duration_since(Instant::now()))
    }

    /// Returns what the holder has stored beside its token, from a node that has it.
    async fn metadata(&self) -> Option<Box<[u8]>> {
        let node = &self.quorum.members.get(self.confirmed?)?.node;
        if self.owned.mode.is_shared() {
            return node.metadata(&self.owned, self.timeout()).await.ok()?;
        }
        let holder = node.inspect(&self.owned.key(), self.timeout()).await.ok()??;
        (holder.token == self.owned.token).then(|| holder.metadata.into())
    }
}

impl Member {
    /// Returns whether it has replied that it was restarted lately.
    fn is_silent(&self) -> bool {
        let until = self.silent_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn is_silent_for(&self, remaining: Duration) {
        *self.silent_until.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now().checked_add(remaining);
    }
}
