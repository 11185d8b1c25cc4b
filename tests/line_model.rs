//! A model of the line for a lock, in which the waiters of all processes wait. Everything that can happen does: an
//! exhaustive check of the promises, and of the safeguards that keep them. A program of its own, because it needs no
//! server and uses the whole processor. The model is in `tests/model/line/`.
//!
//! | in the model                            | in the crate                                                      |
//! | --------------------------------------- | ----------------------------------------------------------------- |
//! | `State::run` and below (`server.rs`)    | `src/store/redis/scripts/`, one function per script               |
//! | `Process`, `Handing`, `State::next`     | `src/acquire/queue.rs`: two lanes, hand-overs, turns in a row     |
//! | `handed_over`, `leave_lane`             | `src/acquire/queue/`: `HandOver`, `Ticket::leave`                 |
//! | `Ask`, `Heartbeat`, `Learn`, `doubt`    | `waiter.rs`, `position.rs` and `attempt.rs` in `src/acquire/`     |
//! | `HandOverHere`, `Handing::TakenOver`    | `src/acquire/take_over.rs`: a hand-over without the server        |
//! | `Park`                                  | `src/acquire/supervisor.rs`: an unpolled request goes to the end  |
//! | `Silence`, `Expire`                     | heartbeats, reservations and locks that end by time               |
//!
//! A script is one step. So are the sending of a request, the arrival of its reply, and each decision of a waiter. The
//! requests of a process that concern the line arrive in order, unless a call times out: from then on that request may
//! arrive at any time, or never. With `in_order: false` nothing arrives in order.
//!
//! Mishaps are counted (`World::mishaps`): a death, a lost or late message, a live process that is silent for too long,
//! a reservation that isn't confirmed in time, a lock that expires while its holder lives, another library that takes
//! the free lock, a release that finds no subscription, a waiter that gives up or isn't polled. The model skips
//! behaviours with more mishaps than that; it explores those with fewer, whatever their length.
//!
//! A lock that is handed over without the server stays at the server as it is: `Lock::Held` names the token, and
//! `Waiter::took_over` the token that a waiter holds the lock by. Wherever such a hand-over is possible, the model also
//! goes through the server. So what the crate asks of the lock besides (the ttl, what is left of it, metadata, a
//! fencing token to spare) only leaves out some of the behaviours.
//!
//! These are left out, without a loss:
//! - Notifications. They only make a waiter ask, and here it may ask at any time. In the calm that ends a behaviour
//!   none arrives, so heartbeats and a rare poll find everything.
//! - Clocks. What ends by time may end at any time; `tests/model.rs` covers the order of a deadline and the end of its
//!   lock. The rule that a request isn't run after its stamp is why the calm may find nothing in flight.
//! - Metadata, fencing tokens, records of grants, tokens that are used twice.
//! - Several keys: `tests/several_model.rs` covers those who wait for them.
//! - Locks that are taken back (`TakenBack`): the same as a lock that is taken, and released at once.
//! - A waiter that comes again does so with another place; one at a time is enough to tell them apart.
//!
//! The promises: never two that believe that they hold the lock; once nothing is in flight, every place in the line,
//! and every reservation, has a waiter; the next heartbeat gives a free lock to the line; a place in the line is served
//! after no more grants than there were places before it, except for swaps within a process, and a process keeps the
//! lock only for its turns in a row; a place whose process sends heartbeats stays in the line; from any state, if
//! nothing more goes wrong, all waiters are served.
//!
//! `--nocapture` prints steps and numbers of states. Larger sizes take some minutes: `cargo test --release --test
//! line_model -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

use tenure_model::line::Kind::{Own, Shared};
use tenure_model::line::Mishap::{self, Barge, Die, Expire, GiveUp, Park, Silence, Timeout, Unconfirmed, Unheard};
use tenure_model::line::{ALL, EXCLUSION, GRANTED, KEPT, NO_GHOST, ORDER, SERVED, Safeguards, World};
use tenure_model::{line_falls, line_holds as holds};

const MISHAPS: &[Mishap] = &[Die, Timeout, GiveUp, Park, Silence, Unconfirmed, Expire, Barge, Unheard];

/// Two processes with one waiter each.
const TWO: World = World {
    safeguards: ALL,
    waiters: &[(0, Shared), (1, Shared)],
    mishaps: 2,
    can: MISHAPS,
    in_order: true,
    come_again: false,
    promises: &[EXCLUSION, NO_GHOST, GRANTED, ORDER, KEPT, SERVED],
};

/// Two waiters share a place, and one of another process waits.
const PAIR: World = World { waiters: &[(0, Shared), (0, Shared), (1, Shared)], mishaps: 1, ..TWO };

/// Three waiters share a place, so that the second may take a lock over which the first has taken over.
const TRIO: World = World { waiters: &[(0, Shared), (0, Shared), (0, Shared), (1, Shared)], ..PAIR };

/// All waiters have their own places.
const OWN: World = World { waiters: &[(0, Own), (0, Own), (1, Own)], mishaps: 1, ..TWO };

/// One process has waiters of both kinds.
const MIXED: World = World { waiters: &[(0, Own), (0, Shared), (1, Own)], mishaps: 1, ..TWO };

/// Three processes.
const THREE: World = World { waiters: &[(0, Shared), (1, Shared), (2, Own)], mishaps: 1, ..TWO };

/// Asserts that the promise is broken.
fn falls(promise: &'static [&'static str; 1], model: World) {
    let [name] = *promise;
    line_falls(name, World { promises: promise, ..model });
}

mod nothing_breaks {
    use super::*;

    #[test]
    fn two_processes_and_two_mishaps() {
        holds(TWO, 70_000);
    }

    #[test]
    fn two_that_come_again() {
        holds(World { mishaps: 0, come_again: true, ..TWO }, 25_000);
    }

    #[test]
    fn two_that_share_a_place() {
        holds(World { can: &[Die, Expire], ..PAIR }, 100_000);
    }

    #[test]
    fn three_that_take_the_lock_over_and_one_elsewhere() {
        let promises = &[EXCLUSION, NO_GHOST, GRANTED, ORDER, KEPT];
        holds(World { mishaps: 0, promises, ..TRIO }, 900_000);
    }

    #[test]
    fn two_that_take_the_lock_over_and_leave() {
        holds(World { can: &[GiveUp, Park], ..PAIR }, 50_000);
    }

    /// The larger searches check that all waiters are served.
    #[test]
    fn two_that_take_the_lock_over_and_whose_requests_are_late() {
        holds(World { can: &[Timeout], promises: &[EXCLUSION, NO_GHOST, ORDER, KEPT], ..PAIR }, 450_000);
    }

    #[test]
    fn places_of_their_own() {
        holds(World { can: &[Park, Unconfirmed], ..OWN }, 20_000);
    }

    /// The larger searches check that all waiters are served.
    #[test]
    fn places_of_their_own_whose_requests_are_late() {
        holds(World { can: &[Timeout], promises: &[EXCLUSION, NO_GHOST, ORDER, KEPT], ..OWN }, 200_000);
    }

    #[test]
    fn places_of_both_kinds() {
        holds(World { can: &[GiveUp], ..MIXED }, 25_000);
    }

    #[test]
    fn three_processes() {
        holds(World { can: &[Die, Unheard], ..THREE }, 35_000);
    }

    #[test]
    fn requests_in_any_order() {
        holds(World { in_order: false, ..TWO }, 50_000);
    }
}

mod each_safeguard_is_needed {
    use super::*;

    #[test]
    fn without_compare_and_delete_a_late_release_frees_anothers_lock() {
        falls(&[EXCLUSION], World { safeguards: Safeguards { compare_and_delete: false, ..ALL }, ..TWO });
    }

    #[test]
    fn a_sign_of_life_that_enters_brings_back_a_place_that_was_granted() {
        falls(&[NO_GHOST], World { safeguards: Safeguards { heartbeat_enters_nobody: false, ..ALL }, ..PAIR });
    }

    #[test]
    fn a_sign_of_life_that_looks_at_no_lock_leaves_it_free() {
        falls(&[GRANTED], World { safeguards: Safeguards { heartbeat_passes_on: false, ..ALL }, ..TWO });
    }

    #[test]
    fn who_leaves_and_passes_nothing_on_leaves_a_reservation() {
        falls(&[NO_GHOST], World { safeguards: Safeguards { leave_passes_on: false, ..ALL }, ..TWO });
    }

    #[test]
    fn a_release_that_looks_at_no_line_lets_anyone_in_between() {
        let safeguards = Safeguards { release_looks_at_line: false, ..ALL };
        falls(&[ORDER], World { safeguards, mishaps: 0, ..THREE });
    }

    #[test]
    fn a_reservation_that_lasts_is_kept_by_the_dead() {
        falls(&[SERVED], World { safeguards: Safeguards { reservation_expires: false, ..ALL }, ..TWO });
    }

    /// Waiters behind the first of their lane send no heartbeats, and a line that moves fast reaches them.
    #[test]
    fn signs_of_life_of_each_wait_prune_the_living() {
        falls(&[KEPT], World { safeguards: Safeguards { sign_of_process: false, ..ALL }, ..OWN });
    }

    #[test]
    fn who_takes_a_free_lock_without_a_look_at_the_line_overtakes() {
        falls(&[ORDER], World { safeguards: Safeguards { free_is_for_the_head: false, ..ALL }, ..TWO });
    }

    #[test]
    fn who_takes_the_turn_of_another_and_gives_it_no_place_behind_has_a_turn_too_many() {
        falls(&[ORDER], World { safeguards: Safeguards { places_are_swapped: false, ..ALL }, ..OWN });
    }

    #[test]
    fn a_lane_that_forgets_too_soon_that_it_is_in_the_line_leaves_a_place_there() {
        let safeguards = Safeguards { in_line_until_out: false, ..ALL };
        falls(&[NO_GHOST], World { safeguards, ..PAIR });
    }

    #[test]
    fn a_late_request_enters_a_place_that_was_left() {
        falls(&[NO_GHOST], World { safeguards: Safeguards { doubt_leaves_again: false, ..ALL }, ..TWO });
    }

    #[test]
    fn a_hand_over_enters_a_waiter_that_has_left() {
        let safeguards = Safeguards { gone_leaves_again: false, ..ALL };
        falls(&[NO_GHOST], World { safeguards, in_order: false, ..OWN });
    }

    #[test]
    fn a_process_without_an_end_of_its_turns_keeps_the_lock() {
        let safeguards = Safeguards { turns_end: false, ..ALL };
        falls(&[ORDER], World { safeguards, mishaps: 0, come_again: true, ..PAIR });
    }

    #[test]
    fn a_hand_over_whose_outcome_comes_late_takes_another_waiter_out_of_the_line() {
        let safeguards = Safeguards { late_outcomes_are_old: false, ..ALL };
        falls(&[NO_GHOST], World { safeguards, can: &[GiveUp], ..TRIO });
    }

    #[test]
    fn a_request_without_the_place_that_is_granted_leaves_it_in_the_line() {
        let safeguards = Safeguards { in_line_until_asked_out: false, ..ALL };
        falls(&[NO_GHOST], World { safeguards, can: &[Expire], ..TRIO });
    }

    #[test]
    fn a_hand_over_that_is_learned_of_by_asking_begins_another_turn() {
        let safeguards = Safeguards { unheard_turns_count: false, ..ALL };
        falls(&[ORDER], World { safeguards, mishaps: 0, ..TRIO });
    }

    #[test]
    fn turns_without_the_server_that_count_for_nothing_keep_the_lock() {
        let safeguards = Safeguards { local_turns_end: false, ..ALL };
        falls(&[ORDER], World { safeguards, mishaps: 0, come_again: true, ..PAIR });
    }

    #[test]
    fn a_holder_that_releases_what_it_has_handed_over_frees_it_for_a_second_one() {
        falls(&[EXCLUSION], World { safeguards: Safeguards { nobody_else_releases: false, ..ALL }, ..PAIR });
    }

    #[test]
    fn whoever_undoes_a_request_of_unknown_outcome_frees_a_lock_that_was_taken_over() {
        falls(&[EXCLUSION], World { safeguards: Safeguards { sure_tokens_go_on: false, ..ALL }, ..PAIR });
    }

    /// It asks with the place just before it has the lock without the server.
    #[test]
    fn whoever_takes_a_lock_over_and_forgets_the_line_leaves_a_place_there() {
        falls(&[NO_GHOST], World { safeguards: Safeguards { take_over_leaves_line_alone: false, ..ALL }, ..PAIR });
    }
}

mod larger {
    use super::*;

    #[test]
    #[ignore = "takes minutes"]
    fn two_processes_and_three_mishaps() {
        holds(World { mishaps: 3, ..TWO }, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn two_that_share_a_place() {
        holds(PAIR, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn two_that_share_a_place_and_come_again() {
        holds(World { mishaps: 0, come_again: true, ..PAIR }, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn three_that_share_a_place() {
        holds(World { can: &[GiveUp, Park, Expire], ..TRIO }, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn places_of_their_own() {
        holds(OWN, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn places_of_both_kinds() {
        holds(MIXED, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn three_processes() {
        holds(THREE, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn places_of_their_own_that_come_again() {
        holds(World { mishaps: 0, come_again: true, ..OWN }, 0);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn requests_in_any_order() {
        holds(World { in_order: false, ..OWN }, 0);
    }
}
