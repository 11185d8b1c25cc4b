//! Ten thousand requests, dropped at random points. A program of its own, as they take the whole machine, and tests
//! beside them would run late.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, reason = "this is a test")]

use std::time::Duration;

use tenure::Locker;
use tenure_test_support::{Server, eventually};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_dropped_at_random_points_leave_no_key_and_no_task() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let before = tasks();
    let seed = fastrand::u64(..);
    fastrand::seed(seed);
    for round in 0..20 {
        let mut requests = JoinSet::new();
        for n in 0..500 {
            // Some keys are contended, so that some are dropped while they wait.
            let request = locker.lock(format!("k:{round}:{}", n / 2)).ttl(ms(60_000));
            let patience = Duration::from_micros(fastrand::u64(..40_000));
            requests.spawn(async move { timeout(patience, request).await.is_ok_and(|guard| guard.is_ok()) });
        }
        requests.join_all().await;
    }
    let started = Instant::now();
    eventually("no key is left", async || {
        let count = "local n = 0 for _, key in ipairs(redis.call('KEYS', 'k:*')) do n = n + 1 end return n";
        (server.cli(&["EVAL", count, "0"]) == "0").then_some(())
    })
    .await;
    // Of what may still be run, the server is asked again when its time, the command timeout of 2 s, is over.
    assert!(started.elapsed() < ms(5_000), "after {:?}, seed {seed}", started.elapsed());
    // The line for messages is kept for some seconds.
    eventually("no task is left", async || (tasks() == before).then_some(())).await;
}
