//! Readers, writers and permits of one key on one server, as a model in which everything that can happen does: an
//! exhaustive check of the promises, and of the safeguards that keep them. A program of its own, because it needs no
//! server and uses the whole processor.
//!
//! | in the model                          | in the crate                                                         |
//! | ------------------------------------- | -------------------------------------------------------------------- |
//! | `SharedState::acquire`, `renew`, ...  | `src/store/redis/scripts/`, one function per script                  |
//! | `Member`, `rests`                     | the set of those who share a key, and what stays for its least time  |
//! | `Lock::Marker`                        | what the lock key holds meanwhile                                    |
//! | `Client::left`, `believes`            | `src/hold.rs`: the deadline                                          |
//! | `Action::Release`, `is_last`          | `src/hold/release.rs` and `undo.rs`: what is taken back, until when  |
//! | `Action::Downgrade`                   | `src/hold/downgrade.rs`                                              |
//! | `heartbeat`, `head`                   | `line.lua` and `heartbeat.lua`                                       |
//!
//! A script is one step. A request may run as long as the server doesn't refuse it as late: once, several times, in any
//! order, or never; its reply may be lost. Clients give up, die, and ask again; each has a process of its own. Time
//! passes for all alike, in ticks: between any two steps, any number of them. So heartbeats come late, reservations are
//! not confirmed, and holders expire without a mishap that would have to be counted.
//!
//! The promises: no writer beside anybody, and no reader beside a permit, what stays for its least time included; never
//! more permits than the limit; whoever believes to hold the key holds it at the server for as long; the key is taken
//! for no longer than somebody alive has asked for; nobody shares it while a waiter before it lives; whoever waits is
//! served, from any state, if nothing more goes wrong; nobody is held back by a dead waiter for longer than a process
//! counts as alive, nor by a dead share that was not swept; nothing is left of whoever has ended; nobody is told of a
//! loss of what it holds.
//!
//! These are left out, without a loss:
//! - Notifications. They only make a waiter ask, and here it may ask at any time. In the calm that ends a behaviour
//!   none arrives, and nobody polls: heartbeats find everything.
//! - A reply that comes late is one that the client does nothing about for a while.
//! - The queue within a process, and places that stay in the line for the next waiter of their process:
//!   `tests/line_model.rs` has the queue.
//! - Fencing tokens, metadata, grants that are claimed, ttls that are set exactly: random histories have them
//!   (`src/simulation/universe.rs`).
//!
//! `--nocapture` prints steps and numbers of states. Larger sizes: `cargo test --test shared_model -- --ignored
//! --nocapture`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

use tenure_model::shared::{
    AT_ONCE, EXCLUSION, GO_ON, HELD, IN_ORDER, LIMIT, NOT_LOST, NOT_STALE, OWN_TIME, RULES, Role, Rules, SERVED,
    Shares, UNDONE,
};
use tenure_model::{shares_fall, shares_hold};

/// A writer and two readers.
const READERS: Shares = Shares {
    rules: RULES,
    clients: &[Role::writer(0), Role::reader(1), Role::reader(2)],
    limit: 1,
    life: 1,
    confirm: 1,
    alive: 2,
    renews: false,
    gives_up: false,
    sweeps: false,
    deaths: 0,
    deletions: 0,
    promises: &[EXCLUSION, LIMIT, HELD, OWN_TIME, IN_ORDER, NOT_STALE, UNDONE, SERVED, GO_ON, NOT_LOST, AT_ONCE],
};

const SHORT_READER: Role = Role { ttl: 1, ..Role::reader(2) };

/// The same with a reader that holds the key for a shorter time, and all renew.
const RENEWING: Shares = Shares { clients: &[Role::writer(0), Role::reader(1), SHORT_READER], renews: true, ..READERS };

/// Three that share two permits.
const PERMITS: Shares = Shares { clients: &[Role::permit(0), Role::permit(1), Role::permit(2)], limit: 2, ..READERS };

/// Two guards by the same token, and a writer.
const TWINS: Shares = Shares { clients: &[Role::writer(0), Role::reader(1), Role::reader(1)], ..READERS };

/// Two permits by the same token, and another one.
const TWIN_PERMITS: Shares = Shares { clients: &[Role::permit(1), Role::permit(1), Role::permit(2)], ..PERMITS };

/// The same, and each release ends all that the token has.
const ENDS_ALL: Role = Role { ends_all: true, ..Role::permit(1) };
const EXPLICIT_TWINS: Shares = Shares { clients: &[ENDS_ALL, ENDS_ALL, Role::permit(2)], ..PERMITS };

/// A writer that may become a reader, another writer and a reader.
const DOWNGRADE: Shares =
    Shares { clients: &[Role { downgrades: true, ..Role::writer(0) }, Role::writer(1), Role::reader(2)], ..READERS };

/// A reader whose share stays for a least time, a writer and another reader.
const LEAST_READER: Role = Role { least: 2, ttl: 1, ..Role::reader(1) };
const LEAST: Shares = Shares { clients: &[Role::writer(0), LEAST_READER, Role::reader(2)], ..READERS };

/// A permit that stays for a least time, and two others.
const LEAST_PERMIT: Role = Role { least: 2, ttl: 1, ..Role::permit(0) };
const LEAST_PERMITS: Shares =
    Shares { clients: &[LEAST_PERMIT, Role::permit(1), Role::permit(2)], limit: 2, ..READERS };

/// One of each kind.
const MIXED: Shares = Shares { clients: &[Role::writer(0), Role::reader(1), Role::permit(2)], ..READERS };

/// Some don't wait.
const BARGING: Shares = Shares {
    clients: &[Role { waits: false, ..Role::writer(0) }, Role { waits: false, ..Role::reader(1) }, Role::reader(2)],
    ..READERS
};

/// The lock key alone is deleted by hand.
const DELETED: Shares = Shares {
    clients: &[Role::reader(1), Role::reader(2)],
    deletions: 1,
    renews: true,
    promises: &[NOT_STALE, OWN_TIME, SERVED, GO_ON],
    ..READERS
};

/// Asserts that the promise is broken without some of the rules.
fn falls(promise: &'static [&'static str; 1], model: Shares, without: fn(&mut Rules)) {
    let [name] = *promise;
    let mut rules = RULES;
    without(&mut rules);
    shares_fall(name, Shares { promises: promise, rules, ..model });
}

mod nothing_breaks {
    use super::*;

    #[test]
    fn readers_and_a_writer() {
        shares_hold(READERS, 50_000);
    }

    #[test]
    fn readers_and_a_writer_that_die() {
        shares_hold(Shares { deaths: 1, promises: &[SERVED, GO_ON, OWN_TIME], ..READERS }, 100_000);
    }

    #[test]
    fn readers_of_which_one_gives_up() {
        const ONE: &[Role] = &[Role::writer(0), Role::reader(1)];
        shares_hold(Shares { clients: ONE, gives_up: true, ..READERS }, 5_000);
    }

    #[test]
    fn readers_that_renew() {
        shares_hold(RENEWING, 100_000);
    }

    #[test]
    fn permits() {
        shares_hold(Shares { sweeps: true, ..PERMITS }, 100_000);
    }

    #[test]
    fn permits_whose_requests_are_late() {
        shares_hold(Shares { life: 2, ..PERMITS }, 200_000);
    }

    #[test]
    fn permits_that_renew() {
        const ONE_PERMIT: &[Role] = &[Role::permit(0), Role::permit(1)];
        shares_hold(Shares { clients: ONE_PERMIT, limit: 1, renews: true, life: 2, ..PERMITS }, 5_000);
    }

    #[test]
    fn guards_by_one_token() {
        shares_hold(TWINS, 50_000);
        shares_hold(TWIN_PERMITS, 10_000);
        shares_hold(EXPLICIT_TWINS, 10_000);
    }

    #[test]
    fn writers_that_become_readers() {
        shares_hold(DOWNGRADE, 100_000);
    }

    #[test]
    fn shares_that_stay_for_a_least_time() {
        shares_hold(LEAST, 50_000);
        shares_hold(LEAST_PERMITS, 50_000);
    }

    #[test]
    fn one_of_each_kind() {
        shares_hold(MIXED, 40_000);
    }

    #[test]
    fn requests_that_do_not_wait() {
        shares_hold(BARGING, 9_000);
    }

    #[test]
    fn a_marker_that_is_deleted() {
        shares_hold(DELETED, 4_000);
    }
}

mod each_safeguard_is_needed {
    use super::*;

    #[test]
    fn a_marker_that_does_not_grow_ends_before_who_came_last() {
        falls(&[HELD], READERS, |rules| rules.marker_grows = false);
    }

    #[test]
    fn a_marker_that_is_not_cut_outlives_all_who_are_in() {
        falls(&[OWN_TIME], READERS, |rules| rules.marker_is_cut = false);
    }

    #[test]
    fn a_set_that_is_not_emptied_brings_back_whose_marker_is_gone() {
        falls(&[NOT_STALE], DELETED, |rules| rules.free_is_empty = false);
    }

    #[test]
    fn readers_that_ignore_the_line_hold_a_writer_back() {
        falls(&[IN_ORDER], READERS, |rules| rules.shares_wait = false);
    }

    #[test]
    fn permits_of_the_dead_that_count_keep_others_out() {
        falls(&[GO_ON], PERMITS, |rules| rules.dead_do_not_count = false);
    }

    #[test]
    fn a_late_renewal_revives_a_permit_beside_those_that_came_after_it() {
        falls(&[LIMIT], Shares { renews: true, life: 2, ..PERMITS }, |rules| rules.dead_are_missing = false);
    }

    #[test]
    fn a_token_that_counts_twice_keeps_another_out() {
        falls(&[GO_ON], TWIN_PERMITS, |rules| rules.tokens_count = false);
    }

    #[test]
    fn a_holder_that_stands_in_the_line_waits_for_itself() {
        falls(&[AT_ONCE], TWINS, |rules| rules.again_at_once = false);
    }

    #[test]
    fn a_reader_that_takes_any_marker_for_its_own_enters_beside_a_permit() {
        falls(&[EXCLUSION], MIXED, |rules| rules.kinds_differ = false);
    }

    #[test]
    fn a_dropped_guard_ends_the_share_of_another_by_its_token() {
        falls(&[EXCLUSION], TWINS, |rules| rules.ends_own_share = false);
    }

    #[test]
    fn a_renewal_that_adds_what_is_missing_brings_back_what_was_released() {
        falls(&[UNDONE], RENEWING, |rules| rules.renewal_adds_none = false);
    }

    #[test]
    fn a_renewal_that_looks_at_no_marker_outlives_it() {
        falls(&[NOT_STALE], DELETED, |rules| rules.renewal_looks_at_key = false);
    }

    #[test]
    fn between_two_steps_of_a_downgrade_another_writer_enters() {
        falls(&[EXCLUSION], DOWNGRADE, |rules| rules.downgrade_is_one_step = false);
    }

    #[test]
    fn a_downgrade_that_shortens_the_time_is_not_believed() {
        falls(&[EXCLUSION], DOWNGRADE, |rules| rules.downgrade_keeps_time = false);
    }

    #[test]
    fn a_writer_that_believes_to_be_alone_while_it_becomes_a_reader_is_not() {
        falls(&[EXCLUSION], DOWNGRADE, |rules| rules.downgrade_believes_less = false);
    }

    #[test]
    fn a_writer_that_does_not_know_whether_it_is_a_reader_has_to_act_for_both() {
        falls(&[NOT_LOST], Shares { renews: true, ..DOWNGRADE }, |rules| rules.downgrade_is_either = false);
        falls(&[UNDONE], DOWNGRADE, |rules| rules.downgrade_is_either = false);
    }

    #[test]
    fn a_release_that_is_repeated_ends_the_least_time_unless_the_share_is_nobodys() {
        falls(&[EXCLUSION], LEAST, |rules| rules.rest_is_nobodys = false);
        falls(&[LIMIT], LEAST_PERMITS, |rules| rules.rest_is_nobodys = false);
    }

    #[test]
    fn a_least_time_that_is_prolonged_keeps_the_key_for_nobody() {
        falls(&[OWN_TIME], LEAST, |rules| rules.rest_ends = false);
    }

    #[test]
    fn a_writer_that_overlooks_the_marker_enters_beside_readers() {
        falls(&[EXCLUSION], READERS, |rules| rules.writers_see_shares = false);
    }

    #[test]
    fn an_attempt_that_runs_after_it_was_undone_leaves_a_share() {
        falls(&[UNDONE], Shares { gives_up: true, ..READERS }, |rules| rules.undo_until_latest = false);
    }

    #[test]
    fn a_waiter_that_died_keeps_readers_out_for_ever() {
        falls(&[GO_ON], READERS, |rules| rules.silent_places_end = false);
    }

    #[test]
    fn readers_whose_heartbeats_look_at_nothing_wait_for_the_dead() {
        falls(&[GO_ON], READERS, |rules| rules.heartbeat_looks_ahead = false);
    }
}

mod larger {
    use super::*;

    #[test]
    #[ignore = "takes minutes"]
    fn readers_that_give_up() {
        shares_hold(Shares { gives_up: true, ..READERS }, 1_000_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn readers_whose_requests_are_late() {
        shares_hold(Shares { life: 2, renews: true, ..READERS }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn writers_that_become_readers_and_renew() {
        shares_hold(Shares { renews: true, deaths: 1, ..DOWNGRADE }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn downgrades_that_are_late() {
        shares_hold(Shares { life: 2, ..DOWNGRADE }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn permits_that_renew() {
        shares_hold(Shares { renews: true, sweeps: true, ..PERMITS }, 500_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn a_marker_that_is_deleted() {
        shares_hold(Shares { clients: READERS.clients, ..DELETED }, 1_000_000);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn one_of_each_kind_and_another_writer() {
        const FOUR: &[Role] = &[Role::writer(0), Role::reader(1), Role::permit(2), Role::writer(3)];
        shares_hold(Shares { clients: FOUR, ..READERS }, 500_000);
    }
}
