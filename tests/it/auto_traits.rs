//! What every public type promises to the compiler.

use tenure::{
    Error, Holder, Key, LockGuard, LockRequest, Locker, LockerBuilder, Loss, Lost, NodeError, Obtaining, Protected,
    Retry, Token, WatchDog, WatchDogBuilder, WatchEvent, WatchRequest, WatchStatus, Watching, WeakWatchDog,
};

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
