//! Ten thousand requests that are dropped at random points, hundreds of thousands that wait, hundreds of clients that
//! reconnect at once. A program of its own, as they take the whole machine, and tests beside them would run late.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::fs;
use std::future::{Future, IntoFuture, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tenure::{LockGuard, Locker};
use tenure_test_support::{Server, eventually, soon};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// They would all be late beside each other.
static ALONE: Mutex<()> = Mutex::const_new(());

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_dropped_at_random_points_leave_no_key_and_no_task() {
    let _alone = ALONE.lock().await;
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let before = tasks();
    let seed = fastrand::u64(..);
    fastrand::seed(seed);
    println!("seed {seed}");
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
    // Long before the ttl ends. Of what may still be run, the server is asked again when its time, the command timeout
    // of 2 s, is over.
    eventually("no key is left", async || {
        let count = "local n = 0 for _, key in ipairs(redis.call('KEYS', 'k:*')) do n = n + 1 end return n";
        (server.cli(&["EVAL", count, "0"]) == "0").then_some(())
    })
    .await;
    // The line for messages is kept for some seconds.
    eventually("no task is left", async || (tasks() == before).then_some(())).await;
}

/// Returns the memory of this process, in bytes. Zero where the system doesn't tell, as on macOS.
fn memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<usize> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.unwrap_or_default() * 1024
}

/// Waits for one lock in so many tasks, and returns how many bytes each of them takes, its task included.
async fn bytes_per_waiter(locker: &Locker, waiters: usize) -> usize {
    let held = soon(locker.lock("k")).await.unwrap();
    let waiting = Arc::new(AtomicUsize::new(0));
    let before = memory();
    let mut requests = JoinSet::new();
    for _ in 0..waiters {
        let (request, waiting) = (locker.lock("k"), waiting.clone());
        requests.spawn(async move {
            let mut request = pin!(request.into_future());
            let mut is_new = true;
            let guard = poll_fn(|cx| {
                let polled = request.as_mut().poll(cx);
                waiting.fetch_add(usize::from(std::mem::take(&mut is_new)), Ordering::Relaxed);
                polled
            });
            guard.await.unwrap().release().await.unwrap();
        });
    }
    let all_wait = async || (waiting.load(Ordering::Relaxed) == waiters).then_some(());
    eventually("all wait", all_wait).await;
    let bytes = memory().saturating_sub(before) / waiters;
    soon(held.release()).await.unwrap();
    // Some have their turn, and the others are dropped.
    for _ in 0..100 {
        soon(requests.join_next()).await.unwrap().unwrap();
    }
    requests.shutdown().await;
    soon(soon(locker.lock("k")).await.unwrap().release()).await.unwrap();
    bytes
}

async fn waiters_take_little_memory(waiters: usize) {
    let _alone = ALONE.lock().await;
    let server = Server::start();
    for locker in [Locker::in_memory(), soon(Locker::connect(&server.url())).await.unwrap()] {
        let bytes = bytes_per_waiter(&locker, waiters).await;
        println!("{waiters} waiters take {bytes} bytes each");
        // With its task, its future and its place in the queue. In release builds it is about half of that.
        assert!(bytes < 6_000, "{bytes} bytes for each of {waiters} waiters");
        soon(locker.close()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_among_a_hundred_thousand_takes_little_memory() {
    waiters_take_little_memory(100_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes gigabytes"]
async fn a_waiter_among_a_million_takes_little_memory() {
    waiters_take_little_memory(1_000_000).await;
}

async fn clients_reconnect_at_once(clients: usize) {
    let _alone = ALONE.lock().await;
    let mut server = Server::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let mut connecting = JoinSet::new();
    for n in 0..clients {
        let url = server.url();
        connecting.spawn(async move {
            let connect = async || Locker::builder().ttl(ms(20_000)).connect(&url).await.ok();
            let locker = eventually("it is connected", connect).await;
            let guard = eventually("it is held", async || locker.try_lock(format!("k:{n}")).await.ok()).await;
            (locker, guard)
        });
    }
    let held: Vec<(Locker, LockGuard)> = connecting.join_all().await;
    let all_are_renewed = async || {
        for (_, guard) in &held {
            eventually("it is renewed", async || guard.renew().await.ok()).await;
        }
    };
    for interrupt in ["CLIENT KILL", "SHUTDOWN"] {
        match interrupt {
            "CLIENT KILL" => drop(server.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"])),
            _ => {
                server.kill();
                server.restart();
            }
        }
        let began = Instant::now();
        all_are_renewed().await;
        println!("{clients} clients are back {:?} after {interrupt}", began.elapsed());
        for (_, guard) in &held {
            assert_eq!(guard.check(), Ok(()), "{interrupt}");
        }
    }
    for (locker, guard) in held {
        soon(guard.release()).await.unwrap();
        soon(locker.close()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_clients_that_reconnect_at_once_lose_no_lock() {
    clients_reconnect_at_once(200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two thousand file descriptors"]
async fn a_thousand_clients_that_reconnect_at_once_lose_no_lock() {
    clients_reconnect_at_once(1_000).await;
}
