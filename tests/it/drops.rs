//! A guard may be dropped anywhere: the lock is released, or its ttl frees it, and nothing panics or blocks.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tenure::{LockGuard, Locker, Loss};
use tenure_test_support::{Server, eventually, soon};
use tokio::runtime::{Builder, Runtime};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

async fn is_free(server: &Server, key: &str) {
    eventually("the key is free", async || (server.cli(&["EXISTS", key]) == "0").then_some(())).await;
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Returns a guard on a runtime of its own.
fn guard_on(runtime: &Runtime, server: &Server, key: &'static str, ttl: Duration) -> (Locker, LockGuard) {
    runtime.block_on(async {
        let locker = Locker::connect(&server.url()).await.unwrap();
        let guard = locker.lock(key).ttl(ttl).await.unwrap();
        (locker, guard)
    })
}

#[tokio::test]
async fn on_a_thread_without_a_runtime() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    std::thread::spawn(move || drop(guard)).join().unwrap();
    is_free(&server, "k").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_blocking_task() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();
    is_free(&server, "k").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_panic_unwinds() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    let task = tokio::spawn(async move {
        let _guard = guard;
        panic!("the work went wrong");
    });
    assert!(task.await.unwrap_err().is_panic());
    is_free(&server, "k").await;

    let guard = locker.lock("k").await.unwrap();
    let thread = std::thread::spawn(move || {
        let _guard = guard;
        panic!("and again, on a thread");
    });
    assert!(thread.join().is_err());
    is_free(&server, "k").await;
}

#[tokio::test]
async fn by_a_thread_locals_destructor() {
    thread_local! { static KEPT: RefCell<Option<LockGuard>> = const { RefCell::new(None) }; }
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    std::thread::spawn(move || KEPT.with(|kept| kept.replace(Some(guard)).is_none())).join().unwrap();
    is_free(&server, "k").await;
}

#[tokio::test]
async fn on_another_runtime_than_it_was_made_on() {
    let server = Server::start();
    let home = runtime();
    let (_locker, guard) =
        std::thread::scope(|scope| scope.spawn(|| guard_on(&home, &server, "k", ms(30_000))).join().unwrap());
    drop(guard);
    is_free(&server, "k").await;
    home.shutdown_background();
}

#[test]
fn with_its_runtime_gone_the_guard_says_so_and_the_ttl_frees_the_lock() {
    let server = Server::start();
    let home = runtime();
    let (locker, guard) = guard_on(&home, &server, "k", ms(1_500));
    let lost = guard.lost();
    let over = guard.cancellation_token();
    home.shutdown_timeout(ms(5_000));
    // Nobody renews the guard any longer, and no task would fire at its deadline.
    assert_eq!(guard.check(), Err(Loss::Expired));
    assert!(over.is_cancelled());
    let elsewhere = runtime();
    elsewhere.block_on(async {
        assert_eq!(soon(lost).await, Loss::Expired);
        drop(guard);
        soon(locker.close()).await;
        drop(locker);
        is_free(&server, "k").await;
    });
}

#[test]
fn while_its_runtime_shuts_down() {
    let server = Server::start();
    let home = runtime();
    let (locker, guard) = guard_on(&home, &server, "k", ms(1_000));
    home.spawn(async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
    // A request in flight, too.
    home.spawn(locker.lock("k").into_future());
    let started = Instant::now();
    drop(home);
    assert!(started.elapsed() < ms(5_000));
    runtime().block_on(is_free(&server, "k"));
}

#[test]
fn a_request_outside_a_runtime_is_an_error() {
    let server = Server::start();
    let home = runtime();
    let locker = home.block_on(Locker::connect(&server.url())).unwrap();
    let mut request = locker.lock("k").into_future();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let polled = catch_unwind(AssertUnwindSafe(|| std::pin::Pin::new(&mut request).poll(&mut context)));
    assert!(matches!(polled.unwrap(), std::task::Poll::Ready(Err(tenure::Error::NoRuntime))));
}

#[test]
fn an_isolated_locker_renews_although_every_worker_is_blocked() {
    let server = Server::start();
    let home = Builder::new_current_thread().enable_all().build().unwrap();
    home.block_on(async {
        let locker = Locker::builder().isolated(true).connect(&server.url()).await.unwrap();
        let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(300)).await.unwrap();
        let (first, started) = (guard.deadline(), Instant::now());
        // Nothing else runs on this thread meanwhile.
        while guard.deadline() < first + ms(2_000) {
            assert!(started.elapsed() < ms(20_000), "nothing renews it");
            std::thread::sleep(ms(10));
        }
        assert_eq!(guard.check(), Ok(()));
        // It also releases a guard that is dropped while the caller's runtime stands still.
        drop(guard);
    });
    drop(home);
    runtime().block_on(is_free(&server, "k"));
}
