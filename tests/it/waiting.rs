//! Waiting for a lock.

use std::time::Duration;

use tenure::Locker;
use tenure_test_support::{Server, soon};
use tokio::time::{Instant, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test]
async fn a_waiter_finds_the_expiry_of_a_dead_holder() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    for _ in 0..3 {
        // Another library's lock, whose holder has died.
        let started = Instant::now();
        server.cli(&["SET", "k", "dead", "PX", "1000"]);
        let guard = soon(locker.lock("k")).await.unwrap();
        assert!(started.elapsed() < ms(1_000 + 50 + 50), "after {:?}", started.elapsed());
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_waiter_survives_the_death_of_its_server() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["SET", "k", "another"]);
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    assert!(timeout(ms(100), &mut waiter).await.is_err());
    server.kill();
    assert!(timeout(ms(300), &mut waiter).await.is_err());
    server.restart();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_waiters_are_all_served_one_at_a_time() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let inside = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let (locker, inside) = (locker.clone(), inside.clone());
            tokio::spawn(async move {
                let guard = locker.lock("k").await.unwrap();
                assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                assert_eq!(inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst), 1);
                guard.release().await.unwrap();
            })
        })
        .collect();
    for waiter in waiters {
        soon(waiter).await.unwrap();
    }
}
