//! The end of a program: a guard that is dropped last is released all the same.

use std::time::{Duration, Instant};

use tenure::Locker;
use tenure_test_support::Server;
use tokio::runtime::Builder;

const LIMIT: Duration = Duration::from_secs(10);

/// Runs the body of a `main`, and returns how many of 20 keys are left when its runtime has ended.
fn left_after(server: &Server, isolated: bool, builder: &mut Builder) -> String {
    let url = server.url();
    let runtime = builder.enable_all().build().unwrap();
    runtime.block_on(async {
        let locker = Locker::builder().isolated(isolated).connect(&url).await.unwrap();
        let _closes = locker.close_on_drop(LIMIT);
        let mut guards = Vec::new();
        for n in 0..20 {
            guards.push(locker.lock(format!("k:{n}")).await.unwrap());
        }
    });
    drop(runtime);
    server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"])
}

#[test]
fn guards_that_are_dropped_as_main_returns_are_released_where_the_locker_closes_on_drop() {
    let server = Server::start();
    for _ in 0..5 {
        assert_eq!(left_after(&server, false, Builder::new_multi_thread().worker_threads(2)), "0");
        assert_eq!(left_after(&server, true, Builder::new_multi_thread().worker_threads(2)), "0");
        assert_eq!(left_after(&server, true, &mut Builder::new_current_thread()), "0");
    }
}

#[test]
fn closing_on_drop_does_not_wait_where_nothing_could_be_released_meanwhile() {
    let server = Server::start();
    let started = Instant::now();
    left_after(&server, false, &mut Builder::new_current_thread());
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
}

/// The only worker would run the releases itself, if it were not blocked.
#[test]
fn a_worker_thread_may_close_on_drop_as_well() {
    let server = Server::start();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let url = server.url();
    for _ in 0..20 {
        let url = url.clone();
        let waited = runtime.block_on(async {
            let task = async move {
                let locker = Locker::connect(&url).await.unwrap();
                let closes = locker.close_on_drop(LIMIT);
                drop(locker.lock("k").await.unwrap());
                let started = Instant::now();
                drop(closes);
                started.elapsed()
            };
            tokio::spawn(task).await.unwrap()
        });
        assert!(waited < LIMIT / 2, "{waited:?}");
        assert_eq!(server.cli(&["EXISTS", "k"]), "0");
    }
}

#[test]
fn closing_on_drop_gives_up_at_its_limit() {
    let server = Server::start();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let started = runtime.block_on(async {
        let locker = Locker::connect(&server.url()).await.unwrap();
        let _closes = locker.close_on_drop(Duration::from_millis(200));
        let _guard = locker.lock("k").await.unwrap();
        server.freeze();
        Instant::now()
    });
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    runtime.shutdown_background();
    server.thaw();
}
