//! The lock protocol, checked exhaustively.

#![allow(unreachable_pub, clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

#[path = "model/protocol.rs"]
mod protocol;

use std::time::Instant;
use protocol::*;
use stateright::{Checker, Model};

fn check(model: Protocol, floor: usize) {
    let started = Instant::now();
    let checker = model.checker().spawn_bfs().join();
    println!("{} {} depth {} {:?}", checker.unique_state_count(), checker.state_count(), checker.max_depth(), started.elapsed());
    checker.assert_properties();
    assert!(checker.unique_state_count() > floor);
}

#[test]
fn exclusion() {
    for (clients, ttl, renewals) in [(2, 1, false), (2, 2, false), (2, 2, true), (3, 2, false), (2, 3, false)] {
        println!("{clients} {ttl} {renewals}");
        let window = ttl;
        check(Protocol { safeguards: ALL, clients, ttl, window, renewals, proposals: None, second_round: false, message_age: 0, skew: 0, properties: &[EXCLUSION, OBTAINABLE, AFTER_CRASH, AFTER_RELEASE] }, 10);
    }
}

#[test]
fn order() {
    for (clients, ttl, window, lo, hi, second_round, age, skew, renewals) in [
       (2, 1, 1, 0, 2, true, 2, 0, false),
       (2, 1, 1, 0, 2, false, 2, 0, false),
       (2, 1, 2, 0, 3, false, 3, 0, false),
       (2, 1, 2, 0, 3, true, 3, 0, false),
       (2, 1, 2, 1, 3, true, 3, 0, false),
       (2, 2, 2, 0, 3, false, 3, 0, false),
       (2, 2, 2, 1, 3, false, 2, 0, false),
       (3, 1, 1, 0, 2, false, 2, 0, false),
       (2, 2, 2, 1, 3, false, 2, 1, false),
       (2, 2, 2, 1, 3, false, 2, 0, true),
    ] {
        println!("{clients} {ttl} {window} {lo} {hi} {second_round} {age} {skew} {renewals}");
        check(Protocol { safeguards: ALL, clients, ttl, window, renewals, proposals: Some(lo..=hi), second_round, message_age: age, skew, properties: &[EXCLUSION, ORDER, OBTAINABLE, AFTER_CRASH, AFTER_RELEASE] }, 10);
    }
}
