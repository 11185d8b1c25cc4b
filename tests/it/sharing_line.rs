//! Readers and permits of several processes: they wait in one line, are notified when it is their turn, and cost the
//! server no more the more they are.

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use tenure::{Error, LockGuard, Locker};
use tenure_test_support::{Server, Stalls, eventually, soon};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::sleep;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Returns a locker that doesn't poll within the time of a test.
async fn patient(url: &str) -> Locker {
    Locker::builder().poll_every(Duration::from_secs(60)).connect(url).await.unwrap()
}

async fn wait_for_places(server: &Server, count: usize) {
    let count = count.to_string();
    eventually("so many are in line", async || (server.cli(&["ZCARD", "{k}:queue"]) == count).then_some(())).await;
}

async fn all<T: Send + std::fmt::Debug + 'static>(tasks: JoinSet<Result<T, Error>>) -> Vec<T> {
    soon(tasks.join_all()).await.into_iter().map(|ended| ended.unwrap()).collect()
}

async fn release_all(guards: Vec<LockGuard>) {
    for guard in guards {
        guard.release().await.unwrap();
    }
}

/// Starts a process with a writer that waits, and ends it as a kill would: it leaves nothing, and says nothing.
async fn writer_waits_and_dies(server: &Server, key: &'static str) {
    let (runtime, url) = (Runtime::new().unwrap(), server.url());
    runtime.spawn(async move {
        let locker = patient(&url).await;
        drop(locker.lock(key).await);
    });
    wait_for_places(server, 1).await;
    runtime.shutdown_background();
    assert_eq!(server.cli(&["ZCARD", "{k}:queue"]), "1");
}

#[tokio::test]
async fn a_writer_that_waits_and_dies_holds_readers_back_for_two_seconds_at_most() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let reading = here.read("k").await.unwrap();
    writer_waits_and_dies(&server, "k").await;
    let (died, stalls) = (Instant::now(), Stalls::watch());
    let mut waiters = JoinSet::new();
    for locker in [&here, &there, &here, &there] {
        waiters.spawn(locker.read("k").into_future());
    }
    let readers = all(waiters).await;
    // And what a busy machine takes for it.
    assert!(died.elapsed() < stalls.added_to(ms(4_000)), "{:?}", died.elapsed());
    release_all(readers).await;
    reading.release().await.unwrap();
}

#[tokio::test]
async fn a_lock_that_the_dead_were_given_goes_on_to_readers_within_two_seconds() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let writing = here.lock("k").await.unwrap();
    writer_waits_and_dies(&server, "k").await;
    let mut waiters = JoinSet::new();
    waiters.spawn(here.read("k").into_future());
    wait_for_places(&server, 2).await;
    waiters.spawn(there.read("k").into_future());
    writing.release().await.unwrap();
    let (released, stalls) = (Instant::now(), Stalls::watch());
    let readers = all(waiters).await;
    assert!(released.elapsed() < stalls.added_to(ms(4_500)), "{:?}", released.elapsed());
    release_all(readers).await;
}

#[tokio::test]
async fn permits_are_handed_on_between_processes_without_polling() {
    let server = Server::start();
    let lockers = [patient(&server.url()).await, patient(&server.url()).await, patient(&server.url()).await];
    let mut tasks = JoinSet::new();
    for n in 0..24 {
        let locker = lockers[n % 3].clone();
        tasks.spawn(async move {
            for _ in 0..5 {
                let permit = locker.permit("k", 2).await?;
                assert!(locker.holders("k").await?.len() <= 2);
                permit.release().await?;
            }
            Ok(())
        });
    }
    all(tasks).await;
    // What nobody releases comes back by its ttl.
    let [here, there, _] = &lockers;
    let dead = here.permit("k", 1).ttl(ms(3_000)).no_renewal().await.unwrap();
    let waiter = tokio::spawn(there.permit("k", 1).into_future());
    wait_for_places(&server, 1).await;
    dead.into_lease();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(server.cli(&["KEYS", "*"]), "{k}:fence");
}

#[tokio::test]
async fn readers_that_waited_in_one_process_enter_together_though_a_writer_waits_elsewhere() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    // The process of the writer before may hand the lock over to its own.
    let elsewhere = patient(&server.url()).await;
    // A process has its turn for a tenth of a second, in which a busy machine may admit one alone.
    eventually("several enter together", async || {
        let writing = elsewhere.lock("k").await.unwrap();
        let mut waiters = JoinSet::new();
        for _ in 0..16 {
            waiters.spawn(here.read("k").into_future());
        }
        wait_for_places(&server, 1).await;
        let writes = tokio::spawn(there.lock("k").into_future());
        wait_for_places(&server, 2).await;
        writing.release().await.unwrap();
        // None is renewed or released, so those who are in stay in.
        let mut readers = Vec::new();
        while let Ok(Some(reader)) = tokio::time::timeout(ms(300), waiters.join_next()).await {
            readers.push(reader.unwrap().unwrap());
        }
        assert!(!writes.is_finished());
        let together = readers.len();
        release_all(readers).await;
        soon(writes).await.unwrap().unwrap().release().await.unwrap();
        release_all(all(waiters).await).await;
        (together > 4).then_some(())
    })
    .await;
}

#[tokio::test]
async fn two_hundred_readers_that_wait_cost_the_server_as_much_as_one() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let calls = || {
        let stats = server.cli(&["INFO", "commandstats"]);
        let calls = stats.lines().filter(|line| line.starts_with("cmdstat_eval"));
        calls.map(|line| line.split(['=', ',']).nth(1).unwrap().parse::<u32>().unwrap()).sum::<u32>()
    };
    let writing = there.lock("k").await.unwrap();
    let mut waiters = JoinSet::new();
    waiters.spawn(here.read("k").into_future());
    wait_for_places(&server, 1).await;
    for _ in 1..200 {
        waiters.spawn(here.read("k").into_future());
    }
    sleep(ms(500)).await;
    let before = calls();
    sleep(ms(3_000)).await;
    let waiting = calls() - before;
    // Two heartbeats in a second.
    assert!(waiting <= 12, "{waiting} calls in three seconds");
    writing.release().await.unwrap();
    let readers = all(waiters).await;
    assert_eq!(there.holders("k").await.unwrap().len(), 200);
    let entering = calls() - before - waiting;
    assert!(entering < 200 * 4, "{entering} calls for 200 readers");
    release_all(readers).await;
}

/// A waiter that would have been handed the lock isn't in the line.
#[tokio::test]
async fn after_a_downgrade_the_next_writer_of_the_process_holds_back_the_readers_of_others() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let writing = here.lock("k").await.unwrap();
    let second = tokio::spawn(here.lock("k").into_future());
    wait_for_places(&server, 1).await;
    let third = tokio::spawn(here.lock("k").into_future());
    sleep(ms(50)).await;
    writing.release().await.unwrap();
    let second = soon(second).await.unwrap().unwrap();
    wait_for_places(&server, 0).await;
    let reader = second.downgrade().await.unwrap();
    wait_for_places(&server, 1).await;
    assert!(matches!(soon(there.try_read("k")).await, Err(Error::NotObtained { .. })));
    let behind = tokio::spawn(there.read("k").into_future());
    wait_for_places(&server, 2).await;
    reader.release().await.unwrap();
    let third = soon(third).await.unwrap().unwrap();
    assert!(!behind.is_finished());
    third.downgrade().await.unwrap().release().await.unwrap();
    soon(behind).await.unwrap().unwrap().release().await.unwrap();
}
