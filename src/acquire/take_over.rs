//! Hands a lock over to the next waiter of this process without asking the server.
//!
//! Nothing changes at the server: the key still holds the token of the holder before, and the successor goes on with
//! that token, with what is left of its ttl, and with its renewals. So a hand-over costs no round trip. A lock is
//! handed over like this if all of the following is true. Otherwise it goes through the server (`hand_over.rs`).
//!
//! - The locker has not switched it off and is not being closed, and the store hands locks over at all: a quorum does
//!   not, nor does a server whose replicas have to acknowledge each grant.
//! - The lock is no share of a key. It has one key, no metadata, and a random token that was made for its one request
//!   and that no user has read: not from the guard, not in a lease. No watchdog observes it, and no attempt of its
//!   request has an unknown outcome. ([`Hold::can_be_taken_over`], [`Hold::take_over`].)
//! - The lock is held, at least half of its ttl is left, and no request that sets another ttl may still be run.
//! - The next waiter is not a fair one, has the same ttl, no metadata, no token of its own, and renews its lock
//!   ([`Wanted::takes_over`]). If it wants a fencing token, the lock has one to spare.
//! - It is still the turn of this process, and the place of its waiters is not in the server's line
//!   ([`Queues::next_to_take_over`](super::queue::Queues::next_to_take_over)).
//!
//! What makes this safe:
//!
//! 1. **One holder at a time.** The hold before is over, for everybody who looks at it, before the successor learns of
//!    the lock.
//! 2. **The deadline is the same.** It counts from the last request that the server has confirmed, whoever sent it. A
//!    lock that the server has lost is found out as late as it would be if the holder before had kept it: by the next
//!    renewal, or the next release that asks. Until then, fencing tokens protect what the lock protects, as ever.
//! 3. **Nothing of the holder before ends the lock.** It has sent no release. A renewal that is run late, or whose
//!    reply is lost, extends a key that holds the same token, or finds that this token has gone; it never creates a
//!    key. So the key may live longer than its new holder knows, which the time for its release takes into account
//!    ([`Grant::kept_until`](crate::hold::Grant::kept_until)), but never shorter.
//! 4. **Nobody else uses the token.** A user who reads it from the server while the lock is held
//!    ([`Locker::inspect`](crate::Locker::inspect)), and adopts it, shares the lock with the successor, as they would
//!    have with the holder before.
//! 5. **Fencing tokens grow.** A hand-over by the server takes as many of them as turns may follow, and stores the
//!    last: the next one that the server grants is greater than all of them, whatever has become of the lock meanwhile,
//!    and also if the reply was lost. A server that has lost its memory starts again from its clock. That is later than
//!    all of the block, unless the memory was lost within 16 us of the hand-over.
//! 6. **The line is not skipped.** Other processes wait for as many turns as if each went through the server: 16 in a
//!    row, or 100 ms.
//! 7. **Nothing is left behind.** From before the successor learns of the lock until a guard has it, its release is
//!    registered as a pending cleanup. A successor that leaves without having learned of the lock releases it. One that
//!    is not polled has it taken back, as after a hand-over by the server. One that comes when too little of the ttl is
//!    left releases it, and goes on waiting with a token of its own.
//!
//! `tests/line_model.rs` knows these hand-overs; `simulation/universe.rs` plays random histories of them.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::hold::{FinalStep, Hold};
use crate::locker::cleanups::Cleanup;
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::Wanted;

impl Shared {
    /// Ends the hold and hands its lock over to the next waiter of this process, if that is possible without the
    /// server. Otherwise returns false. The hold may have ended in that case too, and the lock has to be released.
    pub(crate) fn hand_over_here(self: &Arc<Self>, hold: &Hold) -> bool {
        let is_on = self.settings.local_hand_over && self.store.capabilities().hands_over;
        if !is_on || self.closed.is_cancelled() || !hold.can_be_taken_over() {
            return false;
        }
        // The supervisor has to find out if the successor isn't polled.
        let Ok(runtime) = self.runtime() else { return false };
        let Some(hand_over) = self.queues.next_to_take_over(&hold.owned) else { return false };
        let Some(grant) = hold.take_over(hand_over.wanted()) else {
            hand_over.not_tried();
            return false;
        };
        let wanted = Wanted { owned: hold.owned.clone(), latest: Arc::default(), ..Wanted::clone(hand_over.wanted()) };
        let wanted = Arc::new(wanted);
        let pending = self.cleanups.register(Cleanup::Undo(wanted.clone()));
        if !hand_over.taken_over(grant, wanted, pending) {
            return false;
        }
        hold.set_final_step(FinalStep::Nothing);
        self.supervise_queues(&runtime);
        let key = hold.owned.key();
        debug!(name: "tenure.handed_over", %key, "handed over");
        debug!(name: "tenure.released", %key, "released");
        true
    }
}
