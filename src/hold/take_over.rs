//! Ends a hold for the next waiter of this process, which takes its lock over as it is at the server
//! (`acquire/take_over.rs`).

use std::borrow::Cow;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::{Grant, Hold, Owned};
use crate::store::Wanted;
use crate::{Loss, Token};

impl Hold {
    /// Returns the token to a user, who may use it for another grant of the lock from now on.
    pub(crate) fn token(&self) -> &Token {
        self.is_token_known.store(true, Ordering::Relaxed);
        &self.owned.token
    }

    /// Returns the owner for an explicit release or a renewal. A token that was read may be another guard's as well.
    pub(crate) fn owned_by_all(&self) -> Cow<'_, Owned> {
        match self.may_share_token() {
            true => Cow::Owned(Owned { own_token: false, ..self.owned.clone() }),
            false => Cow::Borrowed(&self.owned),
        }
    }

    /// Returns whether the token was made for this hold, and was read by a user since.
    pub(crate) fn may_share_token(&self) -> bool {
        self.owned.own_token && self.is_token_known.load(Ordering::Relaxed)
    }

    /// Returns whether a waiter could take the lock over, whoever it is. [`take_over`](Self::take_over) knows the rest.
    pub(crate) fn can_be_taken_over(&self) -> bool {
        let is_plain =
            self.owned.own_token && !self.owned.mode.is_shared() && !self.has_parts && self.metadata.is_empty();
        // What its requests have asked for, the limit may have cut.
        let is_unlimited = self.bounds.at_most.is_none();
        is_plain
            && is_unlimited
            && self.stays_until().is_none()
            && self.doubt.is_none()
            && self.state().loss.is_none()
            && !self.is_token_known.load(Ordering::Relaxed)
            && (self.fencing_token.is_none() || self.spare_tokens > 0)
    }

    /// Ends the hold for a request of this process, and returns what that request has then: what is left of the ttl,
    /// and a fencing token of its own. Returns `None`, and changes nothing, if the request can't take the lock over.
    ///
    /// The caller either gives the grant to the request and sets [`FinalStep::Nothing`](super::FinalStep::Nothing), or
    /// releases the lock.
    pub(crate) fn take_over(&self, wanted: &Wanted) -> Option<Grant> {
        if !self.can_be_taken_over() {
            return None;
        }
        let fencing_token = match wanted.fenced {
            true => Some(self.fencing_token.filter(|_| self.spare_tokens > 0)? + 1),
            false => None,
        };
        let mut state = self.current();
        let now = Instant::now();
        state.verdict(now).ok()?;
        // A deadline that was promised for a longer ttl doesn't count: renewals don't keep it.
        let deadline = self.drift.deadline(state.sent, state.ttl).min(state.deadline);
        let is_fresh = deadline.saturating_duration_since(now) * 2 >= state.ttl;
        let has_same_ttl = state.ttl == wanted.ttl && state.worth == state.ttl;
        // A request that sets another ttl may still be run (invariant 5).
        let is_resolved = state.unresolved.iter().all(|request| request.until <= now);
        let is_free = state.final_step.is_none() && state.observer.is_none();
        if !is_fresh || !has_same_ttl || !is_resolved || !is_free {
            return None;
        }
        state.loss = Some(Loss::Released);
        let grant = Grant {
            spare_tokens: self.spare_tokens.saturating_sub(1),
            kept_until: Some(state.kept_until),
            ..Grant::new(state.sent, state.ttl, fencing_token)
        };
        self.has_ended(state, Loss::Released);
        Some(grant)
    }
}
