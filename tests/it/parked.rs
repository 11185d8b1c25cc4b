//! Futures that are kept and not polled, and runtimes that are not driven, hold nobody up.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use tenure::{Locker, Obtaining};
use tenure_test_support::{Server, eventually, soon};
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Polls a future whenever it wakes, for some time, and then never again.
async fn park(mut future: Obtaining, polled: Duration) -> Obtaining {
    assert!(timeout(polled, &mut future).await.is_err(), "it obtained the lock");
    future
}

/// Less than the ttl of 30 s; far more than others need to find that a future is parked.
const SOON: Duration = ms(20_000);

#[tokio::test]
async fn closing_waits_for_no_future_that_is_not_polled() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    locker.lock("k").await.unwrap().release().await.unwrap();
    server.freeze();
    let mut parked = Box::pin(locker.lock("k").into_future());
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..2 {
        assert!(Pin::new(&mut parked).poll(&mut context).is_pending());
    }
    server.thaw();
    timeout(SOON, locker.close()).await.unwrap();
    // Its request runs, if it was sent, and is undone.
    eventually("nothing is left", async || (server.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
    assert!(matches!(soon(parked).await, Err(tenure::Error::Closed)));
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
async fn closing_releases_what_was_dropped_on_a_runtime_that_is_not_driven() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let (url, others) = (server.url(), locker.clone());
    let undriven = std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let guards = runtime.block_on(async move {
            let own = Locker::connect(&url).await.unwrap();
            vec![(own.lock("a").await.unwrap(), own), (others.lock("b").await.unwrap(), others)]
        });
        (runtime, guards)
    });
    let (runtime, guards) = undriven.join().unwrap();
    for (guard, locker) in guards {
        drop(guard);
        // A call on a stalled connection has to fail first; the ttl would take 30 s.
        timeout(ms(15_000), locker.close()).await.unwrap();
    }
    assert_eq!(server.cli(&["EXISTS", "a", "b"]), "0");
    // On another thread, as a runtime can't be dropped where blocking is not allowed.
    std::thread::spawn(move || drop(runtime)).join().unwrap();
}

#[tokio::test]
async fn a_lock_that_was_handed_over_to_a_future_that_is_not_polled_goes_to_others() {
    let server = Server::start();
    let [here, there] = [Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap()];
    for others in [&here, &there] {
        let guard = here.lock("k").await.unwrap();
        let parked = park(here.lock("k").into_future(), ms(100)).await;
        let waiter = tokio::spawn(others.lock("k").into_future());
        sleep(ms(100)).await;
        guard.release().await.unwrap();
        let guard = timeout(SOON, waiter).await.unwrap().unwrap().unwrap();
        // The parked future waits again as soon as it is polled.
        let again = tokio::spawn(parked);
        sleep(ms(100)).await;
        guard.release().await.unwrap();
        soon(again).await.unwrap().unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn a_future_that_is_not_polled_keeps_its_turn_from_nobody() {
    let server = Server::start();
    let [here, there] = [Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap()];
    for fair in [false, true] {
        for others in [&here, &there] {
            let guard = there.lock("k").fair(fair).await.unwrap();
            let parked = park(here.lock("k").fair(fair).into_future(), ms(100)).await;
            let waiter = tokio::spawn(others.lock("k").fair(fair).into_future());
            sleep(ms(100)).await;
            guard.release().await.unwrap();
            let guard = timeout(SOON, waiter).await.unwrap().unwrap().unwrap();
            drop(parked);
            guard.release().await.unwrap();
        }
    }
    eventually("nothing is left", async || (server.cli(&["KEYS", "*"]) == "{k}:fence").then_some(())).await;
}

/// The first waiter and the supervisor of the queues are on a runtime that is driven until the second waiter has come.
#[tokio::test]
async fn a_waiter_behind_one_whose_runtime_is_no_longer_driven_gets_the_lock() {
    let server = Server::start();
    let [here, there] = [Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap()];
    let guard = there.lock("k").await.unwrap();
    let (locker, (entered, has_entered)) = (here.clone(), tokio::sync::oneshot::channel());
    let (stop, is_stopped) = tokio::sync::oneshot::channel();
    let undriven = std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let parked = runtime.block_on(async {
            let waits = |time| park(locker.lock("k").into_future(), ms(time));
            // The supervisor runs here once somebody waits behind the first.
            let (first, second) = tokio::join!(waits(300), waits(300));
            entered.send(()).unwrap();
            is_stopped.await.unwrap();
            (first, second)
        });
        (runtime, parked)
    });
    has_entered.await.unwrap();
    let waiter = tokio::spawn(here.lock("k").into_future());
    sleep(ms(100)).await;
    stop.send(()).unwrap();
    let stopped = tokio::task::spawn_blocking(|| undriven.join().unwrap()).await.unwrap();
    guard.release().await.unwrap();
    timeout(SOON, waiter).await.unwrap().unwrap().unwrap().release().await.unwrap();
    // On another thread, as a runtime can't be dropped where blocking is not allowed.
    std::thread::spawn(move || drop(stopped)).join().unwrap();
}

#[tokio::test]
async fn parked_waiters_of_a_store_in_memory_hold_nobody_up() {
    let locker = Locker::in_memory();
    let guard = locker.lock("k").await.unwrap();
    let mut parked = Vec::new();
    for _ in 0..3 {
        parked.push(park(locker.lock("k").into_future(), ms(10)).await);
    }
    let waiter = tokio::spawn(locker.lock("k").into_future());
    sleep(ms(10)).await;
    guard.release().await.unwrap();
    timeout(SOON, waiter).await.unwrap().unwrap().unwrap().release().await.unwrap();
}
