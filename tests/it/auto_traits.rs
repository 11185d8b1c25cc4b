//! The auto traits and the `Debug` output of every public type.

use std::time::Duration;

use tenure::{
    Error, Holder, Key, Lease, LockGuard, LockRequest, Locker, LockerBuilder, Loss, Lost, NodeError, Obtaining,
    Protected, Retry, Token, WatchDog, WatchDogBuilder, WatchEvent, WatchRequest, WatchStatus, Watching, WeakWatchDog,
};
use tenure_test_support::Server;

fn anywhere<T: Send + Sync + 'static>() {}
fn movable<T: Send + Unpin + 'static>() {}
fn shows_itself<T: std::fmt::Debug>() {}

#[test]
fn public_types_may_cross_threads() {
    anywhere::<Locker>();
    anywhere::<LockerBuilder>();
    anywhere::<LockRequest>();
    anywhere::<LockGuard>();
    anywhere::<Lost>();
    anywhere::<Protected<std::future::Ready<()>>>();
    anywhere::<Holder>();
    anywhere::<Key>();
    anywhere::<Token>();
    anywhere::<Retry>();
    anywhere::<Error>();
    anywhere::<NodeError>();
    anywhere::<Loss>();
    anywhere::<WatchDog>();
    anywhere::<WatchDogBuilder>();
    anywhere::<WatchEvent>();
    anywhere::<WatchRequest>();
    anywhere::<WatchStatus>();
    anywhere::<WeakWatchDog>();
    movable::<LockGuard>();
    movable::<Obtaining>();
    movable::<WatchDog>();
    movable::<Watching>();
}

#[test]
fn public_types_have_a_debug_form() {
    shows_itself::<Locker>();
    shows_itself::<LockRequest>();
    shows_itself::<LockGuard>();
    shows_itself::<Obtaining>();
    shows_itself::<Lost>();
    shows_itself::<Protected<std::future::Ready<()>>>();
    shows_itself::<WatchDog>();
    shows_itself::<WatchDogBuilder>();
    shows_itself::<WatchEvent>();
    shows_itself::<WatchRequest>();
    shows_itself::<WatchStatus>();
    shows_itself::<Watching>();
    shows_itself::<WeakWatchDog>();
}

#[tokio::test]
async fn scopes_and_requests_can_be_spawned() {
    let locker = Locker::in_memory();
    let request = tokio::spawn(locker.lock("k").into_future());
    drop(request.await.unwrap().unwrap());
    let scope = tokio::spawn(async move {
        locker
            .scope("k", async |guard| {
                tokio::task::yield_now().await;
                guard.is_held()
            })
            .await
    });
    assert!(scope.await.unwrap().unwrap());
}

#[tokio::test]
async fn what_a_watchdog_is_asked_for_can_be_spawned() {
    let locker = Locker::in_memory();
    let dog = WatchDog::builder(&locker).build();
    let lease = locker.lock("k").await.unwrap().into_lease();
    tokio::spawn(dog.watch_lease(lease).into_future()).await.unwrap().unwrap();
    let releasing = dog.clone();
    tokio::spawn(async move { releasing.release("k").await }).await.unwrap().unwrap();
    let releasing = dog.clone();
    assert!(tokio::spawn(async move { releasing.release_all().await }).await.unwrap().is_empty());
    assert_eq!(tokio::spawn(dog.shutdown()).await.unwrap(), []);
}

/// Asserts that the output fits in one line of a log, and contains only what concerns the reader.
fn assert_is_short(value: &impl std::fmt::Debug) {
    let shown = format!("{value:?}");
    assert!(shown.len() < 1_500, "{} bytes: {}", shown.len(), &shown[..1_500]);
    for secret in ["redis.call", "KEYS", "hidden", "104, 105"] {
        assert!(!shown.contains(secret), "{secret}: {shown}");
    }
}

#[tokio::test]
async fn debug_shows_no_script_no_metadata_and_no_token() {
    let nodes = [Server::start(), Server::start(), Server::start()];
    let urls = nodes.iter().map(Server::url);
    let lockers = [
        Locker::in_memory(),
        Locker::connect(&nodes[0].url()).await.unwrap(),
        Locker::builder().restart_window(Duration::ZERO).quorum(urls).await.unwrap(),
    ];
    for locker in lockers {
        let token = || "hidden".parse().unwrap();
        let guards: Vec<LockGuard> = {
            let mut guards = Vec::new();
            for n in 0..100 {
                guards.push(locker.lock(format!("k{n}")).token(token()).metadata("hidden".repeat(100)).await.unwrap());
            }
            guards
        };
        let dog = WatchDog::builder(&locker).on_event(|_| {}).build();
        let lease = Lease::new("k", token(), Duration::from_secs(1));
        assert_is_short(&locker);
        assert_is_short(&locker.lock("k").token(token()).metadata("hidden".repeat(100)));
        assert_is_short(&guards[0]);
        assert_is_short(&guards[0].lost());
        assert_is_short(&guards[0].protect(async {}));
        assert_is_short(&locker.lock("k").into_future());
        assert_is_short(&dog);
        assert_is_short(&dog.downgrade());
        assert_is_short(&WatchDog::builder(&locker));
        assert_is_short(&dog.watch_lease(lease.clone()));
        assert_is_short(&lease);
    }
    assert_is_short(&Locker::builder());
    assert_is_short(&Retry::linear(Duration::from_secs(1)));
}
