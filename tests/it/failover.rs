//! A primary dies, and Sentinel promotes its replica.

use std::time::Duration;

use tenure::{Error, Locker, Loss};
use tenure_test_support::{Sentinel, elected, eventually, soon, within};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test]
async fn a_lock_that_was_replicated_outlives_its_primary() {
    let mut watched = Sentinel::start();
    let locker =
        Locker::builder().command_timeout(ms(500)).wait_for_server(ms(20_000)).connect(&watched.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(500)).await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    eventually("replicated", async || (watched.replica.cli(&["EXISTS", "k"]) == "1").then_some(())).await;
    watched.primary.kill();
    let before = guard.deadline();
    elected("promoted", async || watched.replica.cli(&["ROLE"]).starts_with("master").then_some(())).await;
    eventually("renewed there", async || (guard.deadline() > before + ms(500)).then_some(())).await;
    assert_eq!(guard.check(), Ok(()));
    assert!(!waiter.is_finished());
    let fence = guard.fencing_token();
    guard.release().await.unwrap();
    let successor = soon(waiter).await.unwrap().unwrap();
    assert!(successor.fencing_token() > fence);
    successor.release().await.unwrap();
}

#[tokio::test]
async fn a_lock_that_was_not_replicated_is_missing_and_fencing_tokens_grow_on() {
    let mut watched = Sentinel::start();
    let locker =
        Locker::builder().command_timeout(ms(500)).wait_for_server(ms(20_000)).connect(&watched.url()).await.unwrap();
    locker.lock("k").await.unwrap().release().await.unwrap();
    eventually("replicated", async || {
        let known = ["{k}:fence", "k"].map(|key| watched.replica.cli(&["EXISTS", key]));
        (known == ["1", "0"]).then_some(())
    })
    .await;
    // From now on the replica is one in name only: it can't log in to the primary.
    watched.replica.cli(&["CONFIG", "SET", "masterauth", "wrong"]);
    watched.primary.cli(&["CLIENT", "KILL", "TYPE", "replica"]);
    let guard = soon(locker.lock("k").ttl(ms(60_000)).renew_every(ms(500))).await.unwrap();
    assert_eq!(watched.replica.cli(&["EXISTS", "k"]), "0");
    watched.primary.kill();
    assert_eq!(within(ms(59_000), guard.lost()).await, Loss::Missing);
    let successor = soon(locker.lock("k")).await.unwrap();
    assert!(successor.fencing_token() > guard.fencing_token());
    assert!(matches!(guard.release().await, Err(Error::NotHeld { .. })));
    successor.release().await.unwrap();
}
