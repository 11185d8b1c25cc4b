//! Which locks are handed over without the server, and which through it: on the embedded store, whose calls are
//! counted, under paused time.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tenure_test_support::eventually;
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{advance, sleep, timeout};

use crate::store::faulty::{Fault, FaultyStore, Operation};
use crate::store::memory::MemoryStore;
use crate::{Error, LockGuard, LockRequest, Locker, LockerBuilder, Loss, WatchDog};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Less than the ttl of a lock that is not released, and enough for the busiest machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A locker on a store that counts its calls, other than renewals.
struct Counted {
    locker: Locker,
    store: Arc<MemoryStore>,
    calls: Arc<AtomicU32>,
}

fn counted(builder: LockerBuilder, renewals: Fault) -> Counted {
    let (store, calls) = (Arc::new(MemoryStore::new()), Arc::new(AtomicU32::new(0)));
    let count = calls.clone();
    let plan = move |operation| match operation {
        Operation::Renew => renewals,
        _ => {
            count.fetch_add(1, Ordering::Relaxed);
            Fault::None
        }
    };
    let faulty = FaultyStore::new(store.clone(), plan);
    Counted { locker: builder.command_timeout(ms(500)).build(Box::new(faulty), None), store, calls }
}

impl Counted {
    fn new() -> Self {
        counted(Locker::builder(), Fault::None)
    }

    /// Returns how many calls there have been since the last time.
    fn calls(&self) -> u32 {
        self.calls.swap(0, Ordering::Relaxed)
    }

    /// Waits in a task, and is in the queue when this returns.
    async fn waits(request: LockRequest) -> JoinHandle<Result<LockGuard, Error>> {
        let waiter = tokio::spawn(request.into_future());
        yield_now().await;
        waiter
    }

    /// Returns a guard that the server has handed over, with tokens for those after it; and those who wait behind it.
    async fn handed_over<const N: usize>(
        &self,
        request: impl Fn() -> LockRequest,
    ) -> (LockGuard, [JoinHandle<Result<LockGuard, Error>>; N]) {
        self.handed_over_to(|request| request, request).await
    }

    /// The same, for a request of another kind.
    async fn handed_over_to<const N: usize>(
        &self,
        change: impl Fn(LockRequest) -> LockRequest,
        request: impl Fn() -> LockRequest,
    ) -> (LockGuard, [JoinHandle<Result<LockGuard, Error>>; N]) {
        let first = self.locker.lock("k").await.unwrap();
        let second = Self::waits(change(self.locker.lock("k"))).await;
        let mut others = Vec::new();
        for _ in 0..N {
            others.push(Self::waits(request()).await);
        }
        first.release().await.unwrap();
        let second = second.await.unwrap().unwrap();
        self.calls();
        (second, others.try_into().unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn a_successor_has_the_lock_without_the_server_and_a_fencing_token_of_its_own() {
    let counted = Counted::new();
    let (second, [third, fourth]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let (token, deadline) = (counted.store.holder(&"k".into()).unwrap().0, second.deadline());
    let (fence, lost) = (second.fencing_token().unwrap(), second.lost());
    second.release().await.unwrap();
    assert_eq!(lost.await, Loss::Released);
    let third = third.await.unwrap().unwrap();
    assert_eq!((third.fencing_token(), third.deadline()), (Some(fence + 1), deadline));
    drop(third);
    let fourth = fourth.await.unwrap().unwrap();
    assert_eq!(fourth.fencing_token(), Some(fence + 2));
    assert_eq!(counted.store.holder(&"k".into()).unwrap().0, token, "nothing has changed at the server");
    assert_eq!(counted.calls(), 0);
    fourth.release().await.unwrap();
    assert!(counted.store.holder(&"k".into()).is_none());
    let next = counted.locker.lock("k").await.unwrap();
    assert!(next.fencing_token() > Some(fence + 16));
}

#[tokio::test(start_paused = true)]
async fn a_fencing_token_that_the_server_has_not_reserved_is_given_to_nobody() {
    let locker = Locker::in_memory();
    let first = locker.lock("k").await.unwrap();
    let second = Counted::waits(locker.lock("k")).await;
    first.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    let fence = second.fencing_token();
    second.release().await.unwrap();
    assert!(locker.lock("k").await.unwrap().fencing_token() > fence);
}

#[tokio::test(start_paused = true)]
async fn after_sixteen_turns_in_a_row_the_lock_goes_through_the_server() {
    let counted = Counted::new();
    let (mut guard, others) = counted.handed_over::<40>(|| counted.locker.lock("k")).await;
    let mut calls = Vec::new();
    for other in others {
        let fence = guard.fencing_token();
        guard.release().await.unwrap();
        guard = other.await.unwrap().unwrap();
        assert!(guard.fencing_token() > fence);
        calls.push(counted.calls());
    }
    assert!(calls.iter().sum::<u32>() <= 3, "{calls:?}");
    assert!(calls.iter().sum::<u32>() >= 2, "{calls:?}");
}

#[tokio::test(start_paused = true)]
async fn so_does_a_lock_without_fencing_tokens_which_runs_out_of_none() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let (mut guard, others) = counted.handed_over::<40>(|| counted.locker.lock("k")).await;
    for other in others {
        guard.release().await.unwrap();
        guard = other.await.unwrap().unwrap();
    }
    let calls = counted.calls();
    assert!((2..=3).contains(&calls), "{calls}");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_of_another_kind_is_served_by_the_server() {
    type Case = (&'static str, fn(LockRequest) -> LockRequest);
    let cases: [Case; 5] = [
        ("another ttl", |request| request.ttl(ms(9_000))),
        ("metadata", |request| request.metadata("m")),
        ("no renewal", LockRequest::no_renewal),
        ("a chosen token", |request| request.token("mine".parse().unwrap())),
        ("fair", |request| request.fair(true)),
    ];
    for (kind, change) in cases {
        let counted = Counted::new();
        let (second, [third, _fourth]) = counted.handed_over(|| change(counted.locker.lock("k"))).await;
        second.release().await.unwrap();
        let third = third.await.unwrap().unwrap();
        assert!(counted.calls() > 0, "{kind}");
        assert!(third.is_held(), "{kind}");
    }
}

/// Without fencing tokens, so that none to spare are missed.
#[tokio::test(start_paused = true)]
async fn a_lock_of_another_kind_goes_through_the_server() {
    type Case = (&'static str, fn(LockRequest) -> LockRequest);
    let cases: [Case; 4] = [
        ("another ttl", |request| request.ttl(ms(9_000))),
        ("metadata", |request| request.metadata("m")),
        ("a chosen token", |request| request.token("mine".parse().unwrap())),
        ("a fencing token, and none to spare", |request| request.fenced(true).metadata("m")),
    ];
    for (kind, change) in cases {
        let counted = counted(Locker::builder().fenced(false), Fault::None);
        let (second, [third]) = counted.handed_over_to(change, || counted.locker.lock("k")).await;
        second.release().await.unwrap();
        let third = third.await.unwrap().unwrap();
        assert!(counted.calls() > 0 && third.is_held(), "{kind}");
        third.release().await.unwrap();
        assert!(counted.store.holder(&"k".into()).is_none(), "{kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_not_renewed_is_renewed_by_its_successor() {
    let counted = counted(Locker::builder().ttl(ms(900)), Fault::None);
    let (second, [third, _fourth]) = counted.handed_over_to(LockRequest::no_renewal, || counted.locker.lock("k")).await;
    // No tokens are taken for those after a lock that is not renewed.
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert_eq!(counted.calls(), 1);
    sleep(ms(2_000)).await;
    assert!(third.is_held());
}

#[tokio::test(start_paused = true)]
async fn several_locks_as_one_go_through_the_server() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let set = counted.locker.lock_all(["k", "l"]).await.unwrap();
    let next = Counted::waits(counted.locker.lock("k")).await;
    counted.calls();
    set.release().await.unwrap();
    let next = next.await.unwrap().unwrap();
    assert!(counted.calls() > 0 && next.is_held());
    assert!(counted.store.holder(&"l".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_lease_stays_at_the_server_and_goes_through_it_once_it_is_adopted() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let lease = second.into_lease();
    assert_eq!(counted.store.holder(&"k".into()).unwrap().0, *lease.token());
    let second = counted.locker.adopt(lease.clone()).await.unwrap();
    counted.calls();
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert!(counted.calls() > 0);
    assert_ne!(third.token(), lease.token());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_a_watchdog_keeps_goes_through_the_server() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let dog = WatchDog::builder(&counted.locker).build();
    dog.watch(second).unwrap();
    dog.release("k").await.unwrap();
    assert!(third.await.unwrap().unwrap().is_held());
    assert!(counted.calls() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_ttl_was_set_goes_through_the_server() {
    // The server has set a shorter ttl; it may have, and may still do so, as its replies don't come.
    let cases = [(ms(9_000), Fault::None), (ms(9_000), Fault::AnswerLost), (ms(10_000), Fault::AnswerLost)];
    for (ttl, renewals) in cases {
        let counted = counted(Locker::builder().fenced(false).ttl(ms(10_000)), renewals);
        let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
        assert_eq!(second.renew_for(ttl).await.is_ok(), matches!(renewals, Fault::None));
        second.release().await.unwrap();
        let third = third.await.unwrap().unwrap();
        assert!(counted.calls() > 0, "{ttl:?} {renewals:?}");
        assert_eq!(third.ttl(), ms(10_000));
    }
}

#[tokio::test(start_paused = true)]
async fn a_longer_ttl_that_was_promised_once_is_not_handed_over() {
    let counted = counted(Locker::builder().fenced(false).ttl(ms(1_000)), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    second.ensure(ms(60_000)).await.unwrap();
    let deadline = second.deadline();
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert!(third.deadline() < deadline);
    assert!(third.remaining() <= ms(1_000));
    third.release().await.unwrap();
    assert!(counted.store.holder(&"k".into()).is_none());
}

/// The token may get the lock again after its release, and whoever undoes that must not end the lock of another.
#[tokio::test(start_paused = true)]
async fn a_lock_of_a_request_that_may_still_be_run_goes_through_the_server() {
    let (store, calls) = (Arc::new(MemoryStore::new()), Arc::new(AtomicU32::new(0)));
    let count = calls.clone();
    let faulty = FaultyStore::new(store.clone(), move |operation| match operation {
        Operation::Acquire if count.fetch_add(1, Ordering::Relaxed) == 0 => Fault::AnswerLost,
        Operation::Release => {
            count.fetch_add(1, Ordering::Relaxed);
            Fault::None
        }
        _ => Fault::None,
    });
    let locker = Locker::builder().fenced(false).command_timeout(ms(500)).build(Box::new(faulty), None);
    let doubtful = locker.lock("k").await.unwrap();
    let next = Counted::waits(locker.lock("k")).await;
    let before = calls.load(Ordering::Relaxed);
    doubtful.release().await.unwrap();
    let next = next.await.unwrap().unwrap();
    assert!(calls.load(Ordering::Relaxed) > before);
    sleep(ms(5_000)).await;
    assert!(next.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_locker_is_closed_is_handed_to_nobody() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    // It waits for no guard that is held.
    counted.locker.close().await;
    drop(second);
    assert!(matches!(third.await.unwrap(), Err(Error::Closed)));
    counted.locker.close().await;
    assert!(counted.store.holder(&"k".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn closing_releases_what_was_handed_over_to_a_future_that_is_not_polled() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let second = counted.locker.lock("k").await.unwrap();
    let mut parked = Box::pin(counted.locker.lock("k").into_future());
    assert!(futures_poll(&mut parked).await.is_none());
    counted.calls();
    drop(second);
    assert!(counted.store.holder(&"k".into()).is_some() && counted.calls() == 0);
    counted.locker.close().await;
    assert!(counted.store.holder(&"k".into()).is_none());
    assert!(matches!(parked.await, Err(Error::Closed)));
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_is_dropped_leaves_the_lock_to_the_one_behind_it_at_once() {
    let counted = Counted::new();
    let (second, [third, fourth]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let fence = second.fencing_token();
    second.release().await.unwrap();
    third.abort();
    let before = tokio::time::Instant::now();
    let fourth = fourth.await.unwrap().unwrap();
    assert!(before.elapsed() < ms(10), "{:?}", before.elapsed());
    assert!(fourth.fencing_token() > fence.map(|fence| fence + 1));
}

#[tokio::test(start_paused = true)]
async fn a_renewal_of_the_holder_before_that_is_run_late_harms_nobody() {
    let counted = counted(Locker::builder().ttl(ms(900)), Fault::RunAfter(ms(250)));
    let renewed = |request: LockRequest| request.renew_every(ms(50));
    let (second, [third, _fourth]) = counted.handed_over_to(renewed, || counted.locker.lock("k")).await;
    // Its renewal is on its way now.
    sleep(ms(60)).await;
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert_eq!(counted.calls(), 0);
    sleep(ms(2_000)).await;
    assert!(third.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_the_server_has_lost_is_found_out_by_the_successor() {
    let counted = counted(Locker::builder().ttl(ms(900)), Fault::None);
    let (second, [third, fourth]) = counted.handed_over(|| counted.locker.lock("k")).await;
    counted.store.delete(&"k".into());
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert_eq!(third.lost().await, Loss::Missing);
    let fourth = fourth.await.unwrap().unwrap();
    assert!(fourth.fencing_token() > third.fencing_token());
}

#[tokio::test(start_paused = true)]
async fn after_a_hand_over_whose_reply_was_lost_fencing_tokens_grow() {
    let (store, releases) = (Arc::new(MemoryStore::new()), AtomicU32::new(0));
    let faulty = FaultyStore::new(store, move |operation| match operation {
        Operation::Release if releases.fetch_add(1, Ordering::Relaxed) == 1 => Fault::AnswerLost,
        _ => Fault::None,
    });
    let locker = Locker::builder().command_timeout(ms(500)).build(Box::new(faulty), None);
    let mut guard = locker.lock("k").await.unwrap();
    let mut waiters = Vec::new();
    for _ in 0..40 {
        waiters.push(Counted::waits(locker.lock("k")).await);
    }
    for waiter in waiters {
        let fence = guard.fencing_token();
        drop(guard);
        guard = waiter.await.unwrap().unwrap();
        assert!(guard.fencing_token() > fence);
    }
}

#[tokio::test]
async fn an_isolated_locker_hands_over_too_and_a_guard_that_is_dropped_without_a_runtime_does_not() {
    // On a busy machine a turn may take so long that the next one goes through the server.
    eventually("all turns are handed over", async || isolated_hands_over().await.then_some(())).await;

    let locker = Locker::in_memory();
    let (first, second) = (locker.lock("k").await.unwrap(), tokio::spawn(locker.lock("k").into_future()));
    sleep(ms(20)).await;
    std::thread::spawn(move || drop(first)).join().unwrap();
    assert!(timeout(PATIENCE, second).await.unwrap().unwrap().unwrap().is_held());
}

/// Returns whether all who waited have the lock by one token, after turns of guards that were dropped elsewhere.
async fn isolated_hands_over() -> bool {
    let locker = Locker::builder().isolated(true).in_memory();
    let first = locker.lock("k").await.unwrap();
    let waiters = [0; 4].map(|_| tokio::spawn(locker.lock("k").into_future()));
    sleep(ms(20)).await;
    let mut guard = first;
    let mut tokens = HashSet::new();
    for waiter in waiters {
        let before = guard;
        std::thread::spawn(move || drop(before)).join().unwrap();
        guard = timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap();
        tokens.insert(locker.inspect("k").await.unwrap().unwrap().token);
    }
    // The first two get it from the server, which gives tokens to spare to the first.
    tokens.len() == 1
}

#[test]
fn a_successor_whose_runtime_stands_still_keeps_nobody_waiting() {
    let new = || Builder::new_current_thread().enable_time().build().unwrap();
    let (here, still, locker) = (new(), new(), Locker::builder().fenced(false).in_memory());
    let first = here.block_on(locker.lock("k").into_future()).unwrap();
    // Its task must not be the one that supervises waiters: that one would be replaced when the next of them comes.
    let _other = here.block_on(async {
        let other = locker.lock("other").await.unwrap();
        (other, Counted::waits(locker.lock("other")).await, Counted::waits(locker.lock("other")).await)
    });
    // It is polled once, and never again.
    let parked = still.spawn(locker.lock("k").into_future());
    still.block_on(yield_now());
    here.block_on(async {
        let next = Counted::waits(locker.lock("k")).await;
        drop(first);
        assert!(timeout(ms(3_000), next).await.unwrap().unwrap().unwrap().is_held());
    });
    drop(parked);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_somebody_has_read_ends_with_its_guard() {
    let counted = Counted::new();
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let token = second.token().clone();
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert!(counted.calls() > 0);
    assert_ne!(*third.token(), token);
}

#[tokio::test(start_paused = true)]
async fn a_twin_of_a_successor_has_no_smaller_fencing_token() {
    let counted = Counted::new();
    let (first, [successor]) = counted.handed_over(|| counted.locker.lock("k")).await;
    first.release().await.unwrap();
    let successor = successor.await.unwrap().unwrap();
    let twin = counted.locker.try_lock("k").token(successor.token().clone()).await.unwrap();
    assert!(twin.fencing_token() >= successor.fencing_token());
    let last = twin.fencing_token();
    drop((twin, successor));
    assert!(counted.locker.lock("k").await.unwrap().fencing_token() > last);
}

#[tokio::test(start_paused = true)]
async fn too_little_time_is_not_handed_over() {
    // So short that it is still the turn of this process.
    let counted = counted(Locker::builder().ttl(ms(120)), Fault::Refused);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    sleep(ms(61)).await;
    assert!(second.is_held());
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert!(counted.calls() > 0);
    assert!(third.remaining() > ms(100));
}

#[tokio::test(start_paused = true)]
async fn the_switch_turns_it_off() {
    let counted = counted(Locker::builder().local_hand_over(false), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    second.release().await.unwrap();
    drop(third.await.unwrap().unwrap());
    assert!(counted.calls() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_successor_renews_the_lock_until_it_releases_it() {
    let counted = counted(Locker::builder().ttl(ms(900)), Fault::None);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    sleep(ms(5_000)).await;
    assert!(third.is_held());
    assert!(counted.store.holder(&"k".into()).is_some());
    drop(third);
    counted.locker.close().await;
    assert!(counted.store.holder(&"k".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_leaves_before_it_learns_of_the_lock_leaves_nothing() {
    let counted = Counted::new();
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    second.release().await.unwrap();
    // It is not polled in between.
    third.abort();
    assert!(third.await.unwrap_err().is_cancelled());
    counted.locker.close().await;
    assert!(counted.store.holder(&"k".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_is_not_polled_keeps_the_lock_from_nobody() {
    let counted = Counted::new();
    let mut parked = Box::pin(counted.locker.lock("k").into_future());
    let first = counted.locker.lock("k").await.unwrap();
    let second = Counted::waits(counted.locker.lock("k")).await;
    assert!(futures_poll(&mut parked).await.is_none());
    first.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    let fourth = Counted::waits(counted.locker.lock("k")).await;
    second.release().await.unwrap();
    let before = tokio::time::Instant::now();
    let fourth = fourth.await.unwrap().unwrap();
    assert!(before.elapsed() < ms(2_000), "{:?}", before.elapsed());
    drop(fourth);
    assert!(parked.await.unwrap().is_held());
}

/// Polls once.
async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| match std::pin::Pin::new(&mut *future).poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn nothing_is_taken_over_from_a_lock_that_is_lost() {
    let counted = Counted::new();
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    counted.store.delete(&"k".into());
    assert!(second.renew().await.is_err());
    drop(second);
    advance(ms(1)).await;
    let third = third.await.unwrap().unwrap();
    assert!(counted.store.holder(&"k".into()).is_some() && third.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_parked_successor_keeps_nobody_waiting_also_where_nobody_else_waits_here() {
    let counted = counted(Locker::builder().fenced(false), Fault::None);
    let first = counted.locker.lock("k").await.unwrap();
    let mut parked = Box::pin(counted.locker.lock("k").into_future());
    assert!(futures_poll(&mut parked).await.is_none());
    first.release().await.unwrap();
    sleep(ms(3_000)).await;
    assert!(counted.store.holder(&"k".into()).is_none());
    assert!(parked.await.unwrap().is_held());
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_comes_too_late_begins_anew_and_has_a_greater_fencing_token() {
    let counted = counted(Locker::builder().ttl(ms(400)), Fault::Refused);
    let (second, [third, fourth, _fifth]) = counted.handed_over(|| counted.locker.lock("k")).await;
    let mut fences = vec![second.fencing_token()];
    second.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    fences.push(third.fencing_token());
    third.release().await.unwrap();
    // The fourth does not run before almost all of the ttl is over.
    advance(ms(370)).await;
    let fourth = fourth.await.unwrap().unwrap();
    fences.push(fourth.fencing_token());
    assert!(fences.is_sorted_by(|a, b| a < b), "{fences:?}");
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_comes_too_late_gives_the_token_of_the_holder_before_up() {
    let counted = counted(Locker::builder().ttl(ms(400)), Fault::Refused);
    let (second, [third]) = counted.handed_over(|| counted.locker.lock("k")).await;
    second.release().await.unwrap();
    advance(ms(401)).await;
    let third = third.await.unwrap().unwrap();
    assert_eq!(*third.token(), counted.store.holder(&"k".into()).unwrap().0);
    third.release().await.unwrap();
    assert!(counted.store.holder(&"k".into()).is_none());
}
