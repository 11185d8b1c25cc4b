//! Bringing a lock back to nodes that have lost it, or never had it.
//!
//! Without this, each node that was away for a moment, one after the other and however far apart, would be one less
//! that knows of the lock, until a majority had forgotten it.
//!
//! When a majority has confirmed a guard's renewal, each node that says that the key is gone is asked for its vote,
//! without a ballot. It grants where the key is free and the node has been up for longer than the restart window. The
//! vote counts for nothing by itself: the node confirms later renewals as any other does.
//!
//! Why there is still one holder at a time: until the deadline that the renewal has set, nobody else holds the lock,
//! and the vote can't be run later (2). So it takes no node from a holder. Nor from one who is about to be: a vote that
//! another has been granted there, and counts on, keeps the key from being free (1); and if the node has forgotten that
//! vote, the other has given up by the time that the node may vote again (3).
//!
//! Why tokens grow: no number is written, and a majority that granted a number is needed for each, as before. What a
//! node last granted stays what a later number must be greater than. A node that holds the key by such a vote may tell
//! an old number to who comes back by the same token; but for that to be a majority's number, nodes that granted the
//! later one would have to have forgotten it, and those trust no number from before their restart.
//!
//! `tests/model.rs` shows that it takes all of these:
//!
//! 1. The key is brought back only where it is free.
//! 2. Only by a renewal that a majority has confirmed, and before the deadline that this has set.
//! 3. Only on nodes that vote.
//! 4. What comes to pass after a release is undone. The renewal is an open round from before it is sent.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::calls::{Calls, may_run_until};
use super::catch_up::Undo;
use super::rounds::OpenRound;
use super::{Member, Quorum, node_timeout};
use crate::Loss;
use crate::hold::Owned;
use crate::store::node::{Ballot, Vote};
use crate::store::{Extending, Latest, Queueing, Verdict, Wanted};

/// A renewal of a guard, which heals once a majority has confirmed it.
pub(super) struct Healing {
    quorum: Arc<Quorum>,
    open: OpenRound,
    owned: Owned,
    ttl: Duration,
    /// The deadline that it sets, or a little earlier.
    until: Instant,
    /// A node that has confirmed it.
    confirmed: Option<usize>,
    missing: Vec<usize>,
}

impl Healing {
    /// To be called before the renewal is sent. `None` for what is no renewal of a lock that a guard holds.
    pub(super) fn begin(quorum: &Arc<Quorum>, owned: &Owned, ttl: Duration, how: Extending) -> Option<Self> {
        matches!(how, Extending::AtLeast | Extending::KeepRecord).then(|| Self {
            quorum: quorum.clone(),
            open: quorum.rounds.open(owned),
            owned: owned.clone(),
            ttl,
            // More than drift takes off, and what our idea of the node's clock may be wrong by.
            until: Instant::now() + ttl.mul_f64(0.9),
            confirmed: None,
            missing: Vec::new(),
        })
    }

    pub(super) fn note(&mut self, place: usize, renewed: Verdict) {
        match renewed {
            Verdict::Done => self.confirmed = self.confirmed.or(Some(place)),
            Verdict::NotOurs(Loss::Missing) => self.missing.push(place),
            Verdict::NotOurs(_) => {}
        }
    }

    /// A majority has confirmed it: heals in the background, also those nodes that have yet to answer.
    pub(super) fn confirmed(mut self, mut answers: Calls<usize, Verdict>) {
        if self.missing.is_empty() && answers.have_ended() {
            return;
        }
        let (calls, runtime) = (self.quorum.calls.clone(), answers.runtime().clone());
        let rest = async move {
            loop {
                while let Some(place) = self.missing.pop() {
                    self.heal(place).await;
                }
                let Some((place, answer)) = answers.next().await else { break };
                if let Ok(renewed) = answer {
                    self.note(place, renewed);
                }
            }
        };
        calls.spawn_on(rest, &runtime);
    }

    async fn heal(&self, place: usize) {
        let Some(member) = self.quorum.members.get(place).filter(|member| !member.is_silent()) else { return };
        if !self.is_wanted() {
            return;
        }
        // Closing waits for it: it may have to be undone.
        let _owed = self.quorum.releases.token();
        let Some(metadata) = self.metadata().await.filter(|_| self.is_wanted()) else { return };
        let (sent, timeout, latest) = (Instant::now(), self.timeout(), Arc::<Latest>::default());
        let wanted = Wanted {
            owned: self.owned.clone(),
            metadata,
            ttl: self.ttl,
            fenced: false,
            queueing: Queueing::None,
            latest: latest.clone(),
        };
        let (window, ahead) = (self.quorum.window, self.quorum.ahead());
        let ballot = Ballot { number: None, exactly: false, window, ahead };
        let node = member.node.clone();
        let call = Box::pin(async move { node.vote(&wanted, &ballot, timeout).await });
        let Ok(mut calls) = Calls::new(&self.quorum) else { return };
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
        if self.open.was_released() {
            let latest = is_doubtful.then_some(latest);
            drop(self.quorum.undo(place, Undo { owned: self.owned.clone(), latest, ttl: self.ttl }));
        }
    }

    /// Not after the deadline, nor after a release; nor where the ttl is to be another.
    fn is_wanted(&self) -> bool {
        let is_late = Instant::now() >= self.until;
        !is_late && !self.open.was_released() && !self.quorum.shortened.concerns(&self.owned)
    }

    fn timeout(&self) -> Duration {
        node_timeout(self.ttl, self.until.saturating_duration_since(Instant::now()))
    }

    /// What the holder has put beside its token, by a node that has it.
    async fn metadata(&self) -> Option<Box<[u8]>> {
        let node = &self.quorum.members.get(self.confirmed?)?.node;
        let holder = node.inspect(&self.owned.key(), self.timeout()).await.ok()??;
        (holder.token == self.owned.token).then(|| holder.metadata.into())
    }
}

impl Member {
    /// It was restarted lately, and has said so.
    fn is_silent(&self) -> bool {
        let until = self.silent_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn is_silent_for(&self, remaining: Duration) {
        *self.silent_until.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now().checked_add(remaining);
    }
}
