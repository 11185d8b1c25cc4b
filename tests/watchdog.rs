//! The watchdog on real servers: through restarts, and with ten thousand locks. A program of its own, as those take
//! the whole machine, and tests beside them would run late.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenure::{Error, Key, Lease, Locker, Loss, Token, WatchDog, WatchEvent};
use tenure_test_support::{Server, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Every event that the callback got.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<WatchEvent>>>);

impl Log {
    fn watchdog(&self, locker: &Locker) -> WatchDog {
        let log = self.clone();
        WatchDog::builder(locker).on_event(move |event| log.0.lock().unwrap().push(event.clone())).build()
    }

    fn count(&self, wanted: impl Fn(&WatchEvent) -> bool) -> usize {
        self.0.lock().unwrap().iter().filter(|event| wanted(event)).count()
    }
}

fn is_loss(event: &WatchEvent) -> bool {
    matches!(event, WatchEvent::Lost { .. })
}

/// As a fleet that starts does: many at a time.
async fn watch_many(dog: &WatchDog, locker: &Locker, count: usize, ttl: Duration) {
    let mut obtained = JoinSet::new();
    for n in 0..count {
        if obtained.len() == 64 {
            obtained.join_next().await.unwrap().unwrap();
        }
        let (dog, locker) = (dog.clone(), locker.clone());
        obtained.spawn(async move {
            // One try may be too late for a short timeout.
            let guard = locker.lock(format!("k:{n}")).ttl(ttl).await.unwrap();
            if n % 2 == 0 {
                return dog.watch(guard).unwrap();
            }
            let lease = guard.into_lease();
            eventually("it is watched", async || dog.watch_lease(lease.clone()).await.ok()).await;
        });
    }
    obtained.join_all().await;
}

#[tokio::test]
async fn a_server_that_is_killed_and_comes_back_with_its_data_loses_nothing() {
    let mut server = Server::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let locker =
        Locker::builder().command_timeout(ms(1_000)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    watch_many(&dog, &locker, 20, ms(12_000)).await;
    server.kill();
    let told = |event: &WatchEvent| matches!(event, WatchEvent::RenewFailed { .. });
    eventually("a failure of each", async || {
        let failed = |n| dog.status(format!("k:{n}")).is_some_and(|status| status.last_error.is_some());
        (0..20).all(failed).then_some(())
    })
    .await;
    server.restart();
    eventually("a renewal of each", async || {
        let renewed = |n| dog.status(format!("k:{n}")).is_some_and(|status| status.held && status.last_error.is_none());
        (0..20).all(renewed).then_some(())
    })
    .await;
    dog.delivered().await;
    assert!(log.count(told) >= 20);
    assert_eq!(log.count(is_loss), 0);
    assert!(soon(dog.release_all()).await.is_empty());
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"]), "0");
}

#[tokio::test]
async fn a_server_that_comes_back_empty_has_each_loss_told_once_and_the_lock_obtained_again() {
    let mut server = Server::start();
    let locker =
        Locker::builder().command_timeout(ms(300)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    watch_many(&dog, &locker, 20, ms(12_000)).await;
    server.restart_empty();
    eventually("all are lost", async || dog.is_empty().then_some(())).await;
    dog.delivered().await;
    let missing = |event: &WatchEvent| matches!(event, WatchEvent::Lost { loss: Loss::Missing, .. });
    assert_eq!((log.count(missing), log.count(is_loss)), (20, 20));
    for n in 0..20 {
        let lease = Lease::new(format!("k:{n}"), Token::random(), ms(60_000));
        soon(dog.watch_lease(lease).obtain_when_free(true)).await.unwrap();
    }
    eventually("all are held again", async || {
        (0..20).all(|n| dog.status(format!("k:{n}")).is_some_and(|status| status.held)).then_some(())
    })
    .await;
    soon(dog.release_all()).await;
}

#[tokio::test]
async fn a_lock_is_obtained_from_a_server_that_starts_later() {
    let mut server = Server::start();
    let locker =
        Locker::builder().command_timeout(ms(200)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    server.kill();
    let lease = Lease::new("k", Token::random(), ms(60_000));
    soon(dog.watch_lease(lease.clone()).obtain_when_free(true)).await.unwrap();
    assert!(dog.contains("k"));
    server.restart();
    eventually("it is obtained", async || {
        (log.count(|event| matches!(event, WatchEvent::Obtained { .. })) == 1).then_some(())
    })
    .await;
    assert_eq!(server.cli(&["GET", "k"]), lease.token().as_str());
    assert!(dog.status("k").unwrap().held);
}

#[tokio::test]
async fn a_refusal_that_no_waiting_helps_against_ends_the_waiting_with_its_reason() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all"]);
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let locker = Locker::builder().command_timeout(ms(500)).wait_for_server(ms(20_000)).connect(&url).await.unwrap();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let _other = locker.lock("k").await.unwrap();
    let lease = Lease::new("k", Token::random(), ms(2_000));
    dog.watch_lease(lease.clone()).obtain_when_free(true).await.unwrap();
    server.cli(&["ACL", "SETUSER", "app", "-evalsha", "-eval"]);
    eventually("it is given up", async || dog.is_empty().then_some(())).await;
    dog.delivered().await;
    let refused = |event: &WatchEvent| match event {
        WatchEvent::Stopped { reason: Some(reason), .. } => reason.code() == Some("NOPERM"),
        _ => false,
    };
    assert_eq!(log.count(refused), 1, "{:?}", log.0.lock().unwrap());
    // Found by the first try, it is the answer.
    assert!(matches!(dog.watch_lease(lease).obtain_when_free(true).await, Err(Error::Redis(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_locks_are_renewed_for_seconds_without_a_loss_and_then_released() {
    const LOCKS: usize = 10_000;
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let renewals: Arc<Mutex<HashMap<Key, u64>>> = Arc::default();
    let (others, late) = (Log::default(), Arc::new(Mutex::new(0)));
    let dog = WatchDog::builder(&locker)
        .on_event({
            let (renewals, others) = (renewals.clone(), others.clone());
            let (late, ended) = (late.clone(), Mutex::new(HashSet::new()));
            move |event| match event {
                WatchEvent::Renewed { key, count, .. } => {
                    *late.lock().unwrap() += u32::from(ended.lock().unwrap().contains(key));
                    *renewals.lock().unwrap().entry(key.clone()).or_default() += count;
                }
                other => {
                    ended.lock().unwrap().insert(other.key().clone());
                    others.0.lock().unwrap().push(other.clone());
                }
            }
        })
        .build();
    let started = Instant::now();
    // Renewed every four seconds.
    watch_many(&dog, &locker, LOCKS, ms(12_000)).await;
    println!("{LOCKS} locks obtained and watched in {:?}", started.elapsed());
    assert_eq!(dog.len(), LOCKS);
    let started = Instant::now();
    loop {
        let (watched, least) = {
            let renewals = renewals.lock().unwrap();
            (renewals.len(), renewals.values().copied().min().unwrap_or_default())
        };
        if watched == LOCKS && least >= 2 {
            break;
        }
        assert!(started.elapsed() < ms(60_000), "{watched} were renewed, {least} times at least");
        sleep(ms(50)).await;
    }
    let renewed = || renewals.lock().unwrap().values().sum::<u64>();
    println!("{} renewals in {:?}", renewed(), started.elapsed());
    assert_eq!(others.count(is_loss), 0);
    assert_eq!(dog.len(), LOCKS);

    let started = Instant::now();
    assert!(soon(dog.release_all()).await.is_empty());
    println!("released in {:?}", started.elapsed());
    soon(dog.delivered()).await;
    assert_eq!(others.count(|event| matches!(event, WatchEvent::Released { .. })), LOCKS);
    // No event came after the last one of a lock.
    assert_eq!(others.count(|_| true), LOCKS);
    assert_eq!(*late.lock().unwrap(), 0);
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"]), "0");
}
