//! What every public type promises to the compiler.

use tenure::{
    Error, Holder, Key, LockGuard, LockRequest, Locker, LockerBuilder, Loss, Lost, NodeError, Obtaining, Protected,
    Retry, Token,
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
    movable::<LockGuard>();
    movable::<Obtaining>();
}

#[test]
fn public_types_have_a_debug_form() {
    shows_itself::<Locker>();
    shows_itself::<LockRequest>();
    shows_itself::<LockGuard>();
    shows_itself::<Obtaining>();
    shows_itself::<Lost>();
    shows_itself::<Protected<std::future::Ready<()>>>();
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
