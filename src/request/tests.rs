//! The errors of requests that give up, on a store that fails as planned, under paused time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::task::yield_now;
use tokio::time::Instant;

use super::*;
use crate::Locker;
use crate::store::faulty::{Fault, FaultyStore, Operation};
use crate::store::memory::MemoryStore;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Returns a locker whose nth call that acquires a lock fails as `plan` returns. A call takes 500 ms at most.
fn locker(plan: impl Fn(u32) -> Fault + Send + Sync + 'static) -> Locker {
    let calls = AtomicU32::new(0);
    let plan = move |operation| match operation {
        Operation::Acquire => plan(calls.fetch_add(1, Ordering::Relaxed) + 1),
        _ => Fault::None,
    };
    let store = FaultyStore::new(Arc::new(MemoryStore::new()), plan);
    Locker::builder().command_timeout(ms(500)).build(Box::new(store), None)
}

/// Waits in a task. The request is in the queue when this returns.
async fn waits(request: LockRequest) -> tokio::task::JoinHandle<Result<LockGuard, Error>> {
    let waiter = tokio::spawn(request.into_future());
    yield_now().await;
    waiter
}

#[tokio::test(start_paused = true)]
async fn a_request_behind_one_that_has_no_answer_is_not_told_that_another_holds_the_lock() {
    let locker = locker(|_| Fault::Hung);
    let first = waits(locker.lock("k")).await;
    // Before the first request has learned anything, and after it has learned that the server is silent.
    for limit in [ms(0), ms(300), ms(2_000)] {
        let started = Instant::now();
        let error = locker.lock("k").wait_at_most(limit).await.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert_eq!(started.elapsed(), limit);
    }
    first.abort();
}

#[tokio::test(start_paused = true)]
async fn a_request_behind_one_that_found_the_lock_held_is_told_so() {
    let locker = locker(|_| Fault::None);
    let held = locker.lock("k").await.unwrap();
    let first = waits(locker.lock("k")).await;
    let error = locker.lock("k").wait_at_most(ms(300)).await.unwrap_err();
    let Error::NotObtained { key, attempts: 0, waited } = error else { panic!("{error}") };
    assert_eq!((key, waited), ("k".into(), ms(300)));
    // The same if the request before has got the lock, and nobody has asked since.
    drop(held);
    let behind = waits(locker.lock("k").wait_at_most(ms(300))).await;
    let guard = first.await.unwrap().unwrap();
    assert!(matches!(behind.await.unwrap(), Err(Error::NotObtained { .. })));
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn what_was_learned_last_counts() {
    // The lock is found held, and then the server stops replying.
    let locker = locker(|call| if call <= 2 { Fault::None } else { Fault::Hung });
    let _held = locker.lock("k").await.unwrap();
    let first = waits(locker.lock("k").wait_at_most(ms(4_000))).await;
    let behind = waits(locker.lock("k").wait_at_most(ms(3_990))).await;
    for waiter in [behind, first] {
        let error = waiter.await.unwrap().unwrap_err();
        assert!(error.is_timeout(), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_next_and_has_not_asked_yet_knows_what_the_one_before_learned() {
    let locker = locker(|call| if call == 1 { Fault::None } else { Fault::Refused });
    let held = locker.lock("k").await.unwrap();
    let first = waits(locker.lock("k")).await;
    let second = waits(locker.lock("k").wait_at_most(ms(5))).await;
    first.abort();
    let error = second.await.unwrap().unwrap_err();
    assert!(error.is_timeout(), "{error}");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_the_limit_cuts_short_hides_no_holder() {
    // 100 ms from the server: attempts begin after 0 and 150 ms, and the second has 40 ms.
    let locker = locker(|_| Fault::AnsweredAfter(ms(100)));
    let _held = locker.lock("k").await.unwrap();
    let every = || Retry::linear(ms(50));
    let error = locker.obtain("k").retry(every()).wait_at_most(ms(190)).await.unwrap_err();
    assert!(matches!(error, Error::NotObtained { attempts: 2, .. }), "{error}");
    // If no holder was seen, the error doesn't report one.
    let error = locker.obtain("other").retry(every()).wait_at_most(ms(40)).await.unwrap_err();
    assert!(error.is_timeout(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_passes_in_a_pause_after_a_failure_reports_the_failure() {
    for failing in [1, 2] {
        let locker = locker(move |call| if call <= failing { Fault::Refused } else { Fault::None });
        let request = || locker.obtain("k").wait_at_most(ms(100));
        let error = request().retry(Retry::linear(ms(1_000))).await.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        let error = request().retry(Retry::none()).await;
        assert_eq!(error.is_err(), failing == 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_for_several_keys_names_the_one_that_is_held() {
    let locker = locker(|_| Fault::None);
    let _held = locker.lock("b").await.unwrap();
    let error = locker.lock_all(["a", "b"]).wait_at_most(ms(300)).await.unwrap_err();
    assert!(matches!(&error, Error::NotObtained { key, .. } if *key == "b".into()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_was_true_only_before_a_request_began_is_not_what_it_is_told() {
    // The lock is held and released, and from then on the server is silent.
    let locker = locker(|call| if call <= 3 { Fault::None } else { Fault::Hung });
    let held = locker.obtain("k").token("worker-7".parse().unwrap()).await.unwrap();
    let first = waits(locker.lock("k").token("worker-8".parse().unwrap())).await;
    let before = waits(locker.lock("k").wait_at_most(ms(200))).await;
    tokio::time::sleep(ms(50)).await;
    held.release().await.unwrap();
    tokio::time::sleep(ms(50)).await;
    let after = locker.lock("k").wait_at_most(ms(50)).await.unwrap_err();
    assert!(after.is_timeout(), "{after}");
    assert!(matches!(before.await.unwrap(), Err(Error::NotObtained { .. })), "it was held while this one waited");
    first.abort();
}

/// The first waiter is still asking whether its token has the lock, and listens to nothing yet.
#[tokio::test(start_paused = true)]
async fn a_lock_that_this_process_has_released_or_lost_is_not_what_a_request_that_begins_then_is_told_of() {
    // A lock without a fencing token is handed over without the server.
    for (is_lost, fenced) in [(false, true), (true, true), (false, false), (true, false)] {
        let store = Arc::new(MemoryStore::new());
        let plan = |operation| if operation == Operation::Read { Fault::Lost } else { Fault::None };
        let faulty = FaultyStore::new(store.clone(), plan);
        let locker = Locker::builder().fenced(fenced).command_timeout(ms(500)).build(Box::new(faulty), None);
        let held = locker.lock("k").await.unwrap();
        let next = waits(locker.lock("k")).await;
        let first = waits(locker.lock("k").token("worker-7".parse().unwrap())).await;
        held.release().await.unwrap();
        let guard = next.await.unwrap().unwrap();
        let before = waits(locker.lock("k").wait_at_most(ms(100))).await;
        tokio::time::sleep(ms(10)).await;
        match is_lost {
            false => guard.release().await.unwrap(),
            true => {
                store.delete(&"k".into());
                guard.renew().await.unwrap_err();
            }
        }
        tokio::time::sleep(ms(10)).await;
        let after = locker.lock("k").wait_at_most(ms(50)).await.unwrap_err();
        assert!(after.is_timeout(), "{after}");
        assert!(matches!(before.await.unwrap(), Err(Error::NotObtained { .. })), "it was held while this one waited");
        first.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_holds_the_lock_already_waits_behind_nobody() {
    let locker = locker(|_| Fault::None);
    let token: Token = "worker-7".parse().unwrap();
    let held = locker.obtain("k").token(token.clone()).await.unwrap();
    let first = waits(locker.lock("k")).await;
    let started = Instant::now();
    let again = locker.lock("k").token(token).await.unwrap();
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(again.fencing_token(), held.fencing_token());
    first.abort();
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_the_requests_own_token_has_obtained_is_not_held_by_another() {
    let locker = locker(|call| if call == 1 { Fault::AnswerLost } else { Fault::None });
    let request = || locker.lock("k").token("mine".parse().unwrap());
    // It doesn't learn that it has the lock, and waits before it asks again; its twin has the lock meanwhile.
    let first = waits(request().wait_at_most(ms(5))).await;
    let _twin = request().await.unwrap();
    let error = first.await.unwrap().unwrap_err();
    assert!(error.is_timeout(), "{error}");
}

/// It asks whether its token has the lock, before it is told that others wait.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_held_back_by_others_keeps_its_limit_and_hears_of_the_end() {
    let store = Arc::new(MemoryStore::new());
    let plan = |operation| if operation == Operation::Read { Fault::Lost } else { Fault::None };
    let faulty = FaultyStore::new(store.clone(), plan);
    let locker = Locker::builder().command_timeout(ms(500)).build(Box::new(faulty), None);
    let elsewhere = Locker::builder().build(Box::new(FaultyStore::new(store, |_| Fault::None)), None);
    let _held = elsewhere.lock("k").await.unwrap();
    let first = waits(locker.lock("k")).await;
    let retry = Retry::linear(ms(10));
    let request = || locker.try_read("k").token("worker-7".parse().unwrap()).retry(retry.clone());
    let started = Instant::now();
    request().wait_at_most(ms(100)).await.unwrap_err();
    assert!(started.elapsed() <= ms(100), "{:?}", started.elapsed());
    let closed = waits(request()).await;
    let started = Instant::now();
    locker.close().await;
    assert!(matches!(closed.await.unwrap(), Err(Error::Closed)));
    assert!(started.elapsed() <= ms(50), "{:?}", started.elapsed());
    first.abort();
}
