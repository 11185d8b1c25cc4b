//! The lock protocol on three nodes, as a model in which everything that can happen does: an exhaustive check of the
//! promises, and of the safeguards that keep them.
//!
//! Each message may be lost, late, overtaken and doubled; each node may restart at any time and as often as it likes,
//! with all of its memory, with what it had saved, or with none; each client may fall silent or give up at any time.
//! Time passes for all alike, in ticks.
//!
//! | in the model                       | in the crate                                                  |
//! | ---------------------------------- | ------------------------------------------------------------- |
//! | `Ask`, `Obtain`, `SendRelease`     | `src/store/quorum/round.rs`: ballots, a majority, its undoing |
//! | `Node::vote`, `renew`, `release`   | `src/store/redis/scripts/*.lua`                               |
//! | `Client::left`, `believes`         | `src/hold.rs`: the deadline, invariants 1 and 3               |
//! | `Heal`, `Node::heal`               | `src/store/quorum/heal.rs`: votes that bring the key back     |
//! | `SendClaim`                        | `Locker::adopt`, `ensure`, `WatchDog::watch` of a lease       |
//! | `Settle`                           | all calls of a lock have ended, and what they left is undone  |
//!
//! What is left out, and why nothing is missed by that:
//! - Refusals. They change nothing at a node, and clients do unasked whatever a refusal could lead to.
//! - Losing a message is never delivering it; a node that is down is one that nothing arrives at; a client that crashes
//!   is one that does nothing more. So none of these needs an action.
//! - Drift. The crate takes it off the deadline; here clocks run alike and nothing is taken off.
//!
//! What the code does and the model does not know:
//!
//! | not in the model                    | why, and what checks it instead                                         |
//! | ----------------------------------- | ----------------------------------------------------------------------- |
//! | ttls that a request makes shorter   | `hold.rs`, invariants 4 and 5; `quorum/shortened.rs`; simulated quorums |
//! | several guards of one token         | a client here is one grant; the records of grants are each server's own |
//! | a token that comes back (`again`)   | what a node found on disk is not told again: `quorum/restarted.rs`      |
//! | several keys of one lock            | a script does to all of them what it does to one, or nothing            |
//! | several locks of one client         | they share nothing at a node but its uptime                             |
//! | more than three nodes               | all that is argued with is that two majorities share a node             |
//! | a claim that is given back          | it changes nothing that a renewal does not                              |
//! | which nodes are healed              | those that said that the key is gone; here any, which is more           |
//!
//! - A lease that is taken up while its release is still on its way: a release ends the lock for all who rely on its
//!   token, and they learn of it by their next renewal, as on one server. With a ttl of 2 the model would find that (14
//!   steps); with one of 1, as here, there is no time for it.
//! - Renewals may arrive for ever, except where leases are taken up: there for a tick, as servers refuse what is late.
//!   With leases, a renewal from before the release could else keep alive what a node has found on its disk.
//! - Without `proposals`, nodes grant whatever a fenced request would be granted, and more. What excludes there
//!   excludes with fencing too.
//!
//! Sizes are bounded, lengths are not: see [`State`](state::State). Steps and numbers of states are printed with
//! `--nocapture`. CI explores up to 0.7 million states (three clients that renew), and every safeguard that is taken away;
//! the larger searches up to 2.1 million and more (three clients that heal). Larger sizes:
//! `cargo test --release --test model -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

#[path = "model/check.rs"]
mod check;
#[path = "model/protocol.rs"]
mod protocol;
#[path = "model/state.rs"]
mod state;

use check::holds;
use protocol::{
    AFTER_RELEASE, AFTER_SILENCE, ALL, EXCLUSION, HEALED, NOTHING_LEFT, OBTAINABLE, ORDER, Protocol, Safeguards,
};

/// Requests for the lock alone.
const UNFENCED: Protocol = Protocol {
    safeguards: ALL,
    clients: 2,
    ttl: 2,
    window: 2,
    last_ttl: 0,
    saves: false,
    uptime_error: 0,
    skew: 0,
    renewals: false,
    heals: false,
    adopts: false,
    renewal_life: 0,
    settles: false,
    proposals: None,
    second_round: false,
    oldest: 0,
    promises: &[EXCLUSION, OBTAINABLE, AFTER_SILENCE, AFTER_RELEASE],
};

/// Requests for a fencing token too: some proposals are behind every clock, some too far ahead.
const FENCED: Protocol = Protocol {
    ttl: 1,
    last_ttl: 2,
    proposals: Some(0..=3),
    oldest: 3,
    promises: &[EXCLUSION, ORDER, OBTAINABLE, AFTER_SILENCE, AFTER_RELEASE],
    ..UNFENCED
};

/// And nodes that may come back with an old snapshot, in which numbers live longer than a window.
const SAVED: Protocol =
    Protocol { clients: 3, window: 1, last_ttl: 3, saves: true, proposals: Some(0..=1), oldest: 1, ..FENCED };

/// Renewals that bring keys back.
const HEALING: Protocol = Protocol { clients: 3, renewals: true, heals: true, ..UNFENCED };

/// The same, with leases that are taken up, and fencing tokens.
const ADOPTING: Protocol = Protocol {
    renewals: true,
    heals: true,
    adopts: true,
    renewal_life: 1,
    saves: true,
    window: 2,
    last_ttl: 3,
    proposals: Some(0..=1),
    oldest: 1,
    ..FENCED
};

/// The promise falls.
fn falls(promise: &'static [&'static str; 1], model: Protocol) {
    let [name] = *promise;
    check::falls(name, Protocol { promises: promise, ..model });
}

mod nothing_breaks {
    use super::*;

    #[test]
    fn three_clients_that_renew() {
        holds(Protocol { clients: 3, renewals: true, ..UNFENCED }, 600_000);
    }

    #[test]
    fn two_clients_that_heal() {
        holds(Protocol { clients: 2, promises: &[EXCLUSION, OBTAINABLE, HEALED], ..HEALING }, 160_000);
    }

    #[test]
    fn a_ttl_with_a_middle() {
        holds(Protocol { ttl: 3, window: 3, ..UNFENCED }, 80_000);
    }

    #[test]
    fn fencing_tokens() {
        holds(FENCED, 20_000);
    }

    #[test]
    fn fencing_tokens_of_three_clients() {
        holds(Protocol { clients: 3, window: 1, last_ttl: 1, proposals: Some(0..=2), oldest: 2, ..FENCED }, 40_000);
    }

    #[test]
    fn fencing_tokens_proposed_twice() {
        let model =
            Protocol { second_round: true, window: 1, last_ttl: 1, proposals: Some(0..=2), oldest: 2, ..FENCED };
        holds(model, 100_000);
    }

    #[test]
    fn fencing_tokens_where_a_clock_is_ahead() {
        holds(Protocol { skew: 1, ..FENCED }, 40_000);
    }

    #[test]
    fn fencing_tokens_of_nodes_that_save() {
        holds(SAVED, 150_000);
    }

    #[test]
    fn fencing_tokens_of_locks_that_last() {
        holds(Protocol { ttl: 2, proposals: Some(1..=3), oldest: 2, ..FENCED }, 150_000);
    }
}

mod each_safeguard_is_needed {
    use super::*;

    #[test]
    fn without_the_restart_window_a_node_votes_twice() {
        let safeguards = Safeguards { restart_window: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, ..UNFENCED });
        falls(&[ORDER], Protocol { safeguards, ..FENCED });
    }

    #[test]
    fn without_ballots_a_token_falls() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { ballots: false, ..ALL }, ..FENCED });
    }

    #[test]
    fn a_node_that_forgot_the_last_ballot_and_asks_no_clock_grants_a_lower_one() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { clock_for_last: false, ..ALL }, ..FENCED });
    }

    /// Older than the one that the node forgot, and known for long enough to be taken for the last.
    #[test]
    fn an_old_ballot_found_on_disk_hides_a_later_one() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { clock_after_restart: false, ..ALL }, ..SAVED });
    }

    #[test]
    fn a_proposal_far_ahead_is_forgotten_before_the_clock_has_passed_it() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { proposals_near_clock: false, ..ALL }, ..FENCED });
    }

    /// To a third client, as who released doesn't hold.
    #[test]
    fn without_compare_and_delete_a_late_release_frees_anothers_lock() {
        let safeguards = Safeguards { compare_and_delete: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, clients: 3, ..UNFENCED });
    }

    #[test]
    fn a_deadline_counted_from_the_answer_is_too_late() {
        falls(&[EXCLUSION], Protocol { safeguards: Safeguards { deadline: false, ..ALL }, ..UNFENCED });
    }

    #[test]
    fn so_is_one_counted_from_the_confirmation_of_a_renewal() {
        let safeguards = Safeguards { renewal_deadline: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, renewals: true, ..UNFENCED });
    }

    #[test]
    fn a_token_asked_for_again_after_its_release_is_met_by_that_release() {
        falls(&[EXCLUSION], Protocol { safeguards: Safeguards { fresh_token: false, ..ALL }, ..UNFENCED });
    }

    #[test]
    fn without_a_ttl_a_silent_holder_keeps_the_lock() {
        falls(&[OBTAINABLE], Protocol { safeguards: Safeguards { expiry: false, ..ALL }, ..UNFENCED });
    }

    #[test]
    fn what_heals_over_anothers_vote_takes_a_node_from_it() {
        falls(&[EXCLUSION], Protocol { safeguards: Safeguards { heal_free: false, ..ALL }, clients: 2, ..HEALING });
    }

    #[test]
    fn what_heals_a_node_that_forgot_a_vote_undoes_that_vote() {
        falls(&[EXCLUSION], Protocol { safeguards: Safeguards { heal_votes: false, ..ALL }, clients: 2, ..HEALING });
    }

    #[test]
    fn what_heals_after_the_deadline_lets_a_lease_come_back_below_its_successor() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { heal_in_time: false, ..ALL }, ..ADOPTING });
    }

    #[test]
    fn what_heals_after_the_release_is_left_behind() {
        let safeguards = Safeguards { heal_undone: false, ..ALL };
        falls(&[NOTHING_LEFT], Protocol { safeguards, clients: 2, settles: true, ..HEALING });
    }

    #[test]
    fn a_lease_that_nodes_find_on_disk_is_taken_up_beside_its_successor() {
        let safeguards = Safeguards { claim_votes: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, proposals: None, ..ADOPTING });
    }
}

mod each_bound_is_tight {
    use super::*;

    #[test]
    fn a_restart_window_below_the_ttl_is_too_short() {
        falls(&[EXCLUSION], Protocol { window: 1, ..UNFENCED });
    }

    #[test]
    fn the_last_ballot_known_for_less_than_a_window_is_forgotten_too_soon() {
        falls(&[ORDER], Protocol { last_ttl: 1, ..FENCED });
    }

    /// `uptime_in_seconds` is the difference of two times in whole seconds: by up to a second too much.
    #[test]
    fn an_uptime_that_is_too_long_makes_a_node_vote_too_soon() {
        falls(&[EXCLUSION], Protocol { uptime_error: 1, ..UNFENCED });
        falls(&[ORDER], Protocol { uptime_error: 1, ..FENCED });
    }

    /// Above the highest clock is then too far ahead of the others.
    #[test]
    fn clocks_a_window_apart_are_too_far_apart() {
        falls(&[OBTAINABLE], Protocol { skew: 2, ..FENCED });
    }
}

mod larger {
    use super::*;

    #[test]
    #[ignore = "takes minutes"]
    fn leases_that_are_taken_up() {
        holds(ADOPTING, 800_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn releases_of_locks_that_heal() {
        holds(Protocol { clients: 2, settles: true, promises: &[EXCLUSION, NOTHING_LEFT], ..HEALING }, 900_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn three_clients_that_heal() {
        holds(HEALING, 2_000_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn fencing_tokens_proposed_twice() {
        holds(Protocol { second_round: true, ..FENCED }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn fencing_tokens_of_locks_that_are_renewed() {
        holds(Protocol { renewals: true, ttl: 2, proposals: Some(1..=3), oldest: 2, ..FENCED }, 500_000);
    }
}
