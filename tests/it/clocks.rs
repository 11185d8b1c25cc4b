//! Servers' clocks are set back and forward.

use std::sync::Arc;
use std::time::Duration;

use tenure::{Error, Locker, Loss};
use tenure_test_support::{Clock, Server, soon};

/// Much longer than a test takes.
const TTL: Duration = Duration::from_secs(60);

fn server_with_a_clock() -> Server {
    Server::start_with_clock(&[], Some(&Arc::new(Clock::new())))
}

fn step(server: &Server, ms: i64) {
    server.step_clock(ms);
    // A server reads its clock when it wakes up, and what it finds to do then is done at that time.
    server.cli(&["PING"]);
}

#[tokio::test]
async fn a_server_whose_clock_is_set_forward_lets_a_second_holder_in_whose_fencing_token_is_greater() {
    let server = server_with_a_clock();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").ttl(TTL).no_renewal().await.unwrap();
    step(&server, 61_000);
    let second = soon(locker.try_lock("k")).await.unwrap();
    assert!(guard.is_held() && second.is_held());
    assert!(second.fencing_token() > guard.fencing_token());
    assert!(matches!(guard.refresh().await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    assert!(second.is_held());
}

#[tokio::test]
async fn a_server_whose_clock_is_set_back_keeps_a_lock_that_is_held_and_its_fencing_tokens_grow_on() {
    let server = server_with_a_clock();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").ttl(TTL).await.unwrap();
    let before = guard.fencing_token();
    step(&server, -3_600_000);
    guard.refresh().await.unwrap();
    assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
    guard.release().await.unwrap();
    let next = soon(locker.lock("k").ttl(TTL)).await.unwrap();
    assert!(next.fencing_token() > before);
}
