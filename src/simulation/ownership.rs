//! What a guard leaves in the background, to the millisecond, when calls are slow, late or lost.

use std::future::IntoFuture;

use super::*;
use crate::store::Store;
use crate::{Lease, Token};

fn token() -> Token {
    "worker-7".parse().unwrap()
}

/// Returns a count of the calls of this kind, and the plan that counts them.
fn counted(operation: Operation) -> (Arc<AtomicU32>, impl Fn(Operation) -> Fault + Send + Sync + 'static) {
    let calls = Arc::new(AtomicU32::new(0));
    let counter = calls.clone();
    let plan = move |called| {
        counter.fetch_add(u32::from(called == operation), Ordering::Relaxed);
        Fault::None
    };
    (calls, plan)
}

/// Returns a plan in which only the first call of this kind fails.
fn first(operation: Operation, fault: Fault) -> impl Fn(Operation) -> Fault + Send + Sync + 'static {
    let calls = AtomicU32::new(0);
    move |called| {
        let is_first = called == operation && calls.fetch_add(1, Ordering::Relaxed) == 0;
        if is_first { fault } else { Fault::None }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_release_of_a_dropped_guard_does_not_end_what_its_token_obtained_meanwhile() {
    for fault in [Fault::RunAfter(ms(50)), Fault::Doubled(ms(50)), Fault::AnswerLost, Fault::RunAfter(ms(5_000))] {
        let locker = locker(first(Operation::Release, fault));
        let dropped = locker.obtain("k").token(token()).await.unwrap();
        drop(dropped);
        let guard = locker.obtain("k").token(token()).await.unwrap();
        for _ in 0..20 {
            sleep(ms(100)).await;
            guard.renew().await.unwrap();
        }
        assert!(guard.is_held(), "{fault:?}");
        guard.release().await.unwrap();
        assert_eq!(locker.inspect("k").await.unwrap(), None, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_explicit_release_that_comes_late_does_not_end_what_its_token_obtained_meanwhile() {
    let locker = locker(first(Operation::Release, Fault::RunAfter(ms(5_000))));
    let released = locker.obtain("k").token(token()).await.unwrap();
    released.release().await.unwrap();
    let guard = locker.obtain("k").token(token()).ttl(ms(60_000)).await.unwrap();
    sleep(ms(6_000)).await;
    guard.renew().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_explicit_release_that_is_tried_again_does_not_end_what_its_token_obtained_meanwhile() {
    let locker = locker(first(Operation::Release, Fault::AnswerLost));
    let released = locker.obtain("k").token(token()).await.unwrap();
    let releasing = tokio::spawn(released.release());
    // The server has freed the lock, and the release is about to be tried again.
    tokio::task::yield_now().await;
    let guard = locker.try_lock("k").token(token()).ttl(ms(60_000)).await.unwrap();
    assert_eq!(releasing.await.unwrap().ok(), Some(()));
    guard.renew().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_comes_late_is_undone_after_the_release_of_its_request() {
    // The call has 500 ms: the server refuses it later.
    for late in [1, 100, 499, 501, 10_000] {
        let locker = locker(first(Operation::Acquire, Fault::RunAfter(ms(late))));
        let request = locker.lock("k").ttl(ms(3_600_000));
        // Here the caller asks again at once; it would also give up at once if the server cut the connection.
        let given_up = timeout(ms(0), request.clone().into_future()).await;
        assert!(given_up.is_err());
        request.await.unwrap().release().await.unwrap();
        sleep(ms(1_500)).await;
        assert_eq!(locker.inspect("k").await.unwrap(), None, "{late} ms late");
        locker.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_is_dropped_on_a_loss_that_the_server_told_releases_nothing() {
    let store = Arc::new(MemoryStore::new());
    let (releases, plan) = counted(Operation::Release);
    let locker = locker_on(store.clone(), plan);
    let guards = [locker.lock("a").await.unwrap(), locker.lock("b").await.unwrap()];
    store.forget();
    let told = guards.map(|guard| async move {
        assert_eq!(guard.lost().await, Loss::Missing);
        drop(guard);
    });
    for told in told {
        told.await;
    }
    locker.close().await;
    assert_eq!(releases.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn an_adoption_that_failed_is_taken_back() {
    for fault in [Fault::AnswerLost, Fault::Hung, Fault::RunAfter(ms(300)), Fault::RunAfter(ms(900))] {
        let store = Arc::new(MemoryStore::new());
        let here = locker_on(store.clone(), |_| Fault::None);
        let there = locker_on(store.clone(), first(Operation::Renew, fault));
        let lease = here.lock("k").ttl(ms(600_000)).await.unwrap().into_lease();
        let failed = timeout(ms(200), there.adopt(lease.clone())).await;
        assert!(!matches!(failed, Ok(Ok(_))), "{fault:?}");
        drop(failed);
        there.close().await;
        // The lease is as good as before, and its next holder may release the lock.
        let guard = here.adopt(lease).await.unwrap();
        drop(guard);
        here.close().await;
        assert_eq!(store.inspect(&"k".into(), ms(500)).await.unwrap(), None, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_died_does_not_keep_the_key_for_as_long_as_one_that_had_the_same_token_later() {
    let store = Arc::new(MemoryStore::new());
    let token = token();
    let dies = locker_on(store.clone(), |operation| match operation {
        Operation::Acquire => Fault::None,
        _ => Fault::Lost,
    });
    drop(dies.obtain("k").token(token.clone()).ttl(ms(1_000)).await.unwrap());
    // After a restart, the process comes back with its token, and drops the lock a while after its earlier ttl.
    let locker = locker_on(store, |_| Fault::None);
    let guard = locker.obtain("k").token(token).ttl(ms(600_000)).await.unwrap();
    sleep(ms(5_000)).await;
    drop(guard);
    sleep(ms(1_000)).await;
    assert_eq!(locker.inspect("k").await.unwrap(), None);
}

/// Gives the first adoption back while a second one has the lock.
#[tokio::test(start_paused = true)]
async fn an_adoption_that_failed_takes_nothing_from_the_next() {
    for fault in [Fault::AnswerLost, Fault::RunAfter(ms(300))] {
        let store = Arc::new(MemoryStore::new());
        let locker = locker_on(store.clone(), first(Operation::Renew, fault));
        let lease = locker.lock("k").ttl(ms(600_000)).await.unwrap().into_lease();
        let failed = timeout(ms(200), locker.adopt(lease.clone())).await;
        assert!(!matches!(failed, Ok(Ok(_))), "{fault:?}");
        drop(failed);
        let guard = locker.adopt(lease).await.unwrap();
        sleep(ms(3_000)).await;
        guard.renew().await.unwrap();
        drop(guard);
        locker.close().await;
        assert_eq!(store.inspect(&"k".into(), ms(500)).await.unwrap(), None, "{fault:?}");
    }
}

/// The lease is over when it is adopted, so that the first try to give the lock back finds nothing.
#[tokio::test(start_paused = true)]
async fn an_adoption_that_comes_late_is_taken_back_although_the_lease_was_over() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), first(Operation::Renew, Fault::RunAfter(ms(300))));
    let lease = Lease::new("k", token(), ms(600_000));
    let given_up = timeout(ms(100), locker.adopt(lease)).await;
    assert!(given_up.is_err());
    sleep(ms(100)).await;
    let guard = locker.obtain("k").token(token()).await.unwrap();
    sleep(ms(1_500)).await;
    guard.renew().await.unwrap();
    drop(guard);
    locker.close().await;
    assert_eq!(store.inspect(&"k".into(), ms(500)).await.unwrap(), None);
}
