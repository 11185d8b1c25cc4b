//! The lock protocol on three nodes, as a model in which everything that can happen does: an exhaustive check of the
//! promises, and of the safeguards that keep them.
//!
//! Each message may be lost, late, overtaken and doubled; each node may restart at any time and any number of times,
//! with all of its memory, with what it had saved, or with nothing; each client may fall silent or give up at any time.
//! Time passes for all alike, in ticks.
//!
//! | in the model                       | in the crate                                                  |
//! | ---------------------------------- | ------------------------------------------------------------- |
//! | `Ask`, `Obtain`, `SendRelease`     | `src/store/quorum/round.rs`: ballots, a majority, its undoing |
//! | `Node::vote`, `renew`, `release`   | `src/store/redis/scripts/*.lua`                               |
//! | `Client::left`, `believes`         | `src/hold.rs`: the deadline, invariants 1 and 3               |
//! | `Heal`, `Node::heal`               | `src/store/quorum/heal.rs`: votes that bring the key back     |
//! | `SendClaim`                        | `Locker::adopt`, `ensure`, `WatchDog::watch` of a lease       |
//! | `SendExact`, `Shorten`             | `renew_for`; `src/store/quorum/shortened.rs`                |
//! | `Key::grants`                      | the records of grants of a token that several guards share    |
//! | `Node::again`                      | a token that comes back gets its number again (`vote.lua`)    |
//! | `Client::wants`                    | `lock_all`: several keys as one lock                          |
//! | `Leftovers`                        | what is taken back, node by node: `round.rs`, `heal.rs`       |
//!
//! These are left out, without a loss:
//! - Refusals. They change nothing at a node, and clients do unasked whatever a refusal could lead to.
//! - Lost messages, nodes that are down, and clients that crash. A lost message is never delivered, nothing arrives at
//!   a node that is down, and a crashed client does nothing more. So none of these needs an action.
//! - Drift. The crate subtracts it from the deadline; here clocks run alike and nothing is subtracted.
//!
//! These are in the code and not in the model:
//!
//! | not in the model                     | why, and what checks it instead                                        |
//! | ------------------------------------ | ---------------------------------------------------------------------- |
//! | a release that ends others' grants   | it ends the lock for all guards of its token, as documented            |
//! | a token that comes back to 3 nodes   | each node replies on its own; `quorum/restarted.rs` has 3              |
//! | a request for an exact, longer ttl   | it allows what a renewal for the longer ttl does, which is here        |
//! | an exact ttl that arrives twice      | its call is sent once; simulated quorums                               |
//! | sets of more than two keys           | a script does the same to all of them, or nothing                      |
//! | several locks of one client          | they share nothing at a node but its uptime                            |
//! | more than three nodes                | the argument only needs that two majorities share a node               |
//! | a claim that is given back           | it changes nothing that a renewal does not                             |
//! | which nodes are healed               | those that report the key as gone; here any, which is more             |
//! | what is left where others hold too   | `Leftovers` is one grant; simulated quorums                            |
//! | a release that is sent and not noted | `Leftovers` takes both as one step: there is no await between them     |
//!
//! - A lease that is adopted while its release is still in flight. The release ends the lock for all guards of its
//!   token, and they learn of it at their next renewal, as on one server. With a ttl of 2 the model would find that (14
//!   steps); with a ttl of 1, as here, there is no time for it.
//! - Renewals may arrive for ever, except where leases are adopted: there for one tick, as servers refuse late
//!   requests. With leases, a renewal from before the release could otherwise keep alive what a node has found on its
//!   disk.
//! - Without `proposals`, nodes grant whatever a fenced request would be granted, and more. If two holders are
//!   impossible there, they are impossible with fencing too.
//!
//! Sizes are bounded, lengths are not: see `State`. `--nocapture` shows steps, numbers of states and seconds. The model
//! is a crate of its own (`tests/model/`), which debug builds optimize. CI explores up to 0.7 million states (three
//! clients that renew), and the model without each safeguard: half a minute on one core. Larger sizes, up to 4.6
//! million states, take a minute and a half: `cargo test --test model -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

use tenure_model::{
    AFTER_RELEASE, AFTER_SILENCE, ALL, CLIENTS, EXCLUSION, HEALED, Leftovers, OBTAINABLE, ORDER, Protocol, Rules,
    Safeguards, UNDONE, holds, leaves_something, nothing_is_left,
};

/// Requests for the lock only.
const UNFENCED: Protocol = Protocol {
    safeguards: ALL,
    clients: 2,
    nodes: 3,
    ttl: 2,
    window: 2,
    last_ttl: 0,
    restarts: true,
    saves: false,
    uptime_error: 0,
    skew: 0,
    renewals: false,
    heals: false,
    adopts: false,
    renewal_life: 0,
    shares: [0; CLIENTS],
    wants: [1; CLIENTS],
    shorter: 0,
    exact_life: 0,
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

/// The same, with nodes that may come back with an old snapshot, in which numbers last longer than a window.
const SAVED: Protocol =
    Protocol { clients: 3, window: 1, last_ttl: 3, saves: true, proposals: Some(0..=1), oldest: 1, ..FENCED };

/// Renewals that bring keys back.
const HEALING: Protocol = Protocol { clients: 3, renewals: true, heals: true, ..UNFENCED };

/// The same, with leases that are adopted, and fencing tokens.
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

/// Two guards of one token, and one of another. Each is dropped, or falls silent: an explicit release would end the
/// other guard of the token, as documented.
const SHARING: Protocol = Protocol {
    clients: 3,
    shares: [1, 1, 0],
    restarts: false,
    renewals: true,
    promises: &[EXCLUSION, OBTAINABLE, AFTER_RELEASE],
    ..UNFENCED
};

/// A token that comes back to a node that comes back with an old snapshot. One node is enough for that.
const COMING_BACK: Protocol = Protocol {
    clients: 3,
    nodes: 1,
    shares: [1, 1, 0],
    renewals: true,
    saves: true,
    ttl: 2,
    proposals: Some(1..=2),
    oldest: 1,
    promises: &[EXCLUSION, ORDER, OBTAINABLE],
    ..FENCED
};

/// Holders that make their ttl shorter.
const SHORTENING: Protocol =
    Protocol { renewals: true, shorter: 1, exact_life: 1, promises: &[EXCLUSION, OBTAINABLE], ..UNFENCED };

/// One client wants two keys as one lock, the others want one of them each.
const SETS: Protocol = Protocol { clients: 3, wants: [3, 1, 2], ..FENCED };

const SMALL_SETS: Protocol = Protocol { window: 1, last_ttl: 1, proposals: Some(0..=1), oldest: 2, ..SETS };

/// Asserts that the promise is broken.
fn falls(promise: &'static [&'static str; 1], model: Protocol) {
    let [name] = *promise;
    tenure_model::falls(name, Protocol { promises: promise, ..model });
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

    #[test]
    fn tokens_that_several_share() {
        holds(SHARING, 200_000);
    }

    #[test]
    fn ttls_that_are_made_shorter() {
        holds(Protocol { ttl: 3, restarts: false, ..SHORTENING }, 100_000);
    }

    #[test]
    fn sets_of_keys() {
        holds(SMALL_SETS, 200_000);
    }

    #[test]
    fn what_the_calls_of_one_client_leave() {
        nothing_is_left(Leftovers { rules: Rules::ALL }, 900);
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

    /// The number is older than the one that the node forgot, and is known for long enough to be taken for the last.
    #[test]
    fn an_old_ballot_found_on_disk_hides_a_later_one() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { clock_after_restart: false, ..ALL }, ..SAVED });
    }

    #[test]
    fn a_proposal_far_ahead_is_forgotten_before_the_clock_has_passed_it() {
        falls(&[ORDER], Protocol { safeguards: Safeguards { proposals_near_clock: false, ..ALL }, ..FENCED });
    }

    /// The lock goes to a third client, as the one that released it doesn't hold it.
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
    fn what_is_dropped_frees_the_lock_of_another_guard_by_the_same_token() {
        let safeguards = Safeguards { releases_by_grant: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, ..SHARING });
    }

    /// A node may have granted the lock only to another guard of the token.
    #[test]
    fn a_renewal_that_is_not_put_down_is_ended_with_another_guard_of_the_same_token() {
        let safeguards = Safeguards { renewals_record: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, ..SHARING });
    }

    #[test]
    fn a_token_that_comes_back_is_told_a_number_that_the_node_found_on_disk() {
        let safeguards = Safeguards { again_after_distrust: false, ..ALL };
        falls(&[ORDER], Protocol { safeguards, ..COMING_BACK });
    }

    #[test]
    fn a_shorter_ttl_that_counts_from_its_confirmation_is_too_late() {
        let safeguards = Safeguards { shorter_from_send: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, ..SHORTENING });
    }

    #[test]
    fn a_shorter_ttl_that_a_node_sets_late_cuts_off_what_it_has_confirmed() {
        let safeguards = Safeguards { shorter_blocks: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, restarts: false, ..SHORTENING });
    }

    #[test]
    fn part_of_a_set_is_no_lock() {
        let safeguards = Safeguards { whole_sets: false, ..ALL };
        falls(&[EXCLUSION], Protocol { safeguards, ..SETS });
    }

    #[test]
    fn a_number_above_the_last_of_one_key_is_behind_that_of_another() {
        let safeguards = Safeguards { fences_of_all_keys: false, ..ALL };
        falls(&[ORDER], Protocol { safeguards, ..SMALL_SETS });
    }

    #[test]
    fn what_comes_late_is_left_behind_unless_it_is_taken_back() {
        let without: [fn(&mut Rules); 6] = [
            |rules| rules.undo_after_call = false,
            |rules| rules.undo_until_latest = false,
            |rules| rules.late_vote_undone = false,
            |rules| rules.doubt_outlives_call = false,
            |rules| rules.heal_undone = false,
            |rules| rules.heal_doubt_outlives_call = false,
        ];
        for without in without {
            let mut rules = Rules::ALL;
            without(&mut rules);
            leaves_something(UNDONE, Leftovers { rules });
        }
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

    /// `uptime_in_seconds` is the difference of two times in whole seconds, so it may be up to a second too large.
    #[test]
    fn an_uptime_that_is_too_long_makes_a_node_vote_too_soon() {
        falls(&[EXCLUSION], Protocol { uptime_error: 1, ..UNFENCED });
        falls(&[ORDER], Protocol { uptime_error: 1, ..FENCED });
    }

    /// A number above the highest clock is then too far ahead of the others.
    #[test]
    fn clocks_a_window_apart_are_too_far_apart() {
        falls(&[OBTAINABLE], Protocol { skew: 2, ..FENCED });
    }
}

mod larger {
    use super::*;

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

    #[test]
    #[ignore = "takes minutes"]
    fn tokens_that_several_share_on_nodes_that_restart() {
        holds(Protocol { restarts: true, renewals: false, ..SHARING }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn ttls_that_are_made_shorter_on_nodes_that_restart() {
        holds(SHORTENING, 1_500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn sets_of_keys() {
        holds(SETS, 4_000_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn leases_that_are_taken_up() {
        holds(ADOPTING, 800_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn tokens_that_come_back() {
        holds(COMING_BACK, 2_000_000);
    }
}
