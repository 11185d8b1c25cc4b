//! Locks on a store that fails as planned, under paused time: exact timing to the millisecond, and thousands of random
//! histories, none of which may have two holders at once.

mod actor;
mod bounds;
mod oracle;
mod ownership;
mod real;
mod universe;

use std::future::{Future, IntoFuture, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::time::{Instant, sleep, timeout};

use crate::hold::Hold;
use crate::store::faulty::{Fault, FaultyStore, Operation};
use crate::store::memory::MemoryStore;
use crate::{Error, LockGuard, Locker, Loss, Retry};

pub(crate) use self::oracle::born;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Returns a locker whose calls fail as planned; drift is 1 % and 2 ms.
fn locker(plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Locker {
    locker_on(Arc::new(MemoryStore::new()), plan)
}

fn locker_on(store: Arc<MemoryStore>, plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Locker {
    let builder = Locker::builder().ttl(ms(2_000)).command_timeout(ms(500));
    builder.build(Box::new(FaultyStore::new(store, plan)), None)
}

/// Returns a plan in which only calls of this kind fail.
fn only(operation: Operation, fault: Fault) -> impl Fn(Operation) -> Fault + Send + Sync + 'static {
    move |called| if called == operation { fault } else { Fault::None }
}

/// Returns when, counted from `start`, and how the guard was lost. Asserts that `is_held` changes at that instant.
async fn loss_of(guard: &LockGuard, start: Instant) -> (Duration, Loss) {
    let mut lost = Box::pin(guard.lost());
    let over = guard.cancellation_token();
    loop {
        tokio::select! {
            biased;
            loss = &mut lost => {
                assert!(!guard.is_held() && over.is_cancelled());
                return (start.elapsed(), loss);
            }
            () = sleep(ms(1)) => {}
        }
        // A millisecond later, only the clock can have ended the lock.
        assert_eq!(guard.is_held(), Instant::now() < guard.deadline() && guard.check().is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_hung_store_is_a_loss_at_the_deadline_to_the_millisecond() {
    for fault in [Fault::Hung, Fault::Refused, Fault::AnsweredAfter(ms(600)), Fault::RunAfter(ms(9_000))] {
        let locker = locker(only(Operation::Renew, fault));
        let start = Instant::now();
        let guard = locker.lock("k").await.unwrap();
        // 2,000 less 1 % and 2 ms.
        assert_eq!(loss_of(&guard, start).await, (ms(1_978), Loss::Expired), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_definite_answer_is_a_loss_at_that_renewal() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), only(Operation::Renew, Fault::Forgotten));
    let start = Instant::now();
    let guard = locker.lock("k").ttl(ms(3_000)).await.unwrap();
    assert_eq!(loss_of(&guard, start).await, (ms(1_000), Loss::Missing));

    let start = Instant::now();
    let healthy = locker_on(store.clone(), |_| Fault::None);
    let guard = healthy.lock("k").ttl(ms(3_000)).await.unwrap();
    locker.obtain("k").token(guard.token().clone()).await.unwrap().release().await.unwrap();
    let _other = locker.lock("k").no_renewal().await.unwrap();
    assert_eq!(loss_of(&guard, start).await, (ms(1_000), Loss::Taken));
}

#[tokio::test(start_paused = true)]
async fn renewals_come_every_third_of_the_ttl_and_count_from_their_send() {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let locker = locker({
        let sent = sent.clone();
        move |operation| {
            if operation == Operation::Renew {
                sent.lock().unwrap().push(Instant::now());
            }
            Fault::AnsweredAfter(ms(100))
        }
    });
    let guard = locker.lock("k").ttl(ms(3_000)).await.unwrap();
    let start = Instant::now() - ms(100);
    sleep(ms(5_000)).await;
    let sent: Vec<_> = sent.lock().unwrap().iter().map(|&at| at - start).collect();
    assert_eq!(sent, [ms(1_000), ms(2_000), ms(3_000), ms(4_000), ms(5_000)]);
    // The last renewal has no reply yet.
    assert_eq!(guard.deadline() - start, ms(4_000 + 3_000 - 30 - 2));
}

#[tokio::test(start_paused = true)]
async fn failures_are_retried_with_growing_pauses_until_one_succeeds() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let locker = locker({
        let calls = calls.clone();
        move |operation| {
            if operation != Operation::Renew {
                return Fault::None;
            }
            let mut calls = calls.lock().unwrap();
            calls.push(Instant::now());
            if calls.len() < 5 { Fault::Refused } else { Fault::None }
        }
    });
    let guard = locker.lock("k").ttl(ms(9_000)).await.unwrap();
    sleep(ms(8_900)).await;
    assert_eq!(guard.check(), Ok(()));
    let calls = calls.lock().unwrap();
    let pauses: Vec<_> = calls.windows(2).map(|pair| pair[1] - pair[0]).take(4).collect();
    assert!(pauses[3] > pauses[0] * 3, "{pauses:?}");
}

#[tokio::test(start_paused = true)]
async fn a_release_is_not_held_up_by_a_hung_renewal() {
    let locker = locker(only(Operation::Renew, Fault::Hung));
    let guard = locker.lock("k").await.unwrap();
    sleep(ms(1_000)).await;
    let start = Instant::now();
    guard.release().await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    locker.close().await;
}

/// Returns five locks that are renewed together after 1,000 ms, the number of renewal calls, and when they were
/// obtained.
async fn five_together(
    fault: impl Fn(u32) -> Fault + Send + Sync + 'static,
) -> (Vec<LockGuard>, Arc<AtomicU32>, Instant) {
    let calls = Arc::new(AtomicU32::new(0));
    let locker = locker({
        let calls = calls.clone();
        move |operation| match operation {
            Operation::Renew => fault(calls.fetch_add(1, Ordering::Relaxed)),
            _ => Fault::None,
        }
    });
    let start = Instant::now();
    let mut guards = Vec::new();
    for n in 0..5 {
        guards.push(locker.lock(format!("k{n}")).ttl(ms(3_000)).await.unwrap());
    }
    (guards, calls, start)
}

#[tokio::test(start_paused = true)]
async fn locks_that_are_due_together_are_renewed_by_one_call() {
    let (guards, calls, start) = five_together(|_| Fault::None).await;
    sleep(ms(10_500)).await;
    assert_eq!(calls.load(Ordering::Relaxed), 10);
    for guard in guards {
        assert_eq!(guard.deadline() - start, ms(10_000 + 3_000 - 30 - 2));
    }
}

#[tokio::test(start_paused = true)]
async fn locks_that_are_renewed_together_are_lost_when_each_would_be() {
    let deadline = ms(3_000 - 30 - 2);
    let faults = [
        (Fault::Hung, deadline, Loss::Expired),
        (Fault::Refused, deadline, Loss::Expired),
        (Fault::AnsweredAfter(ms(600)), deadline, Loss::Expired),
        (Fault::RunAfter(ms(9_000)), deadline, Loss::Expired),
        (Fault::Forgotten, ms(1_000), Loss::Missing),
    ];
    for (fault, at, how) in faults {
        let (guards, _, start) = five_together(move |_| fault).await;
        for guard in &guards {
            assert_eq!(guard.lost().await, how, "{fault:?}");
            assert_eq!(start.elapsed(), at, "{fault:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn locks_whose_renewal_together_failed_are_renewed_one_by_one() {
    let (guards, calls, start) = five_together(|call| if call == 0 { Fault::Refused } else { Fault::None }).await;
    sleep(ms(1_001)).await;
    assert_eq!(calls.load(Ordering::Relaxed), 1, "after a pause");
    sleep(ms(400)).await;
    assert_eq!(calls.load(Ordering::Relaxed), 6);
    assert!(guards.iter().all(|guard| guard.deadline() - start > ms(1_001 + 3_000 - 30 - 2)));
}

#[tokio::test(start_paused = true)]
async fn what_is_done_to_one_lock_is_not_held_up_by_a_hung_renewal_of_many() {
    let (mut guards, _, start) = five_together(|call| if call == 0 { Fault::Hung } else { Fault::None }).await;
    sleep(ms(1_100)).await;
    guards.pop().unwrap().release().await.unwrap();
    guards.pop().unwrap().renew_for(ms(400)).await.unwrap();
    assert_eq!(start.elapsed(), ms(1_100));
    let short = guards.pop().unwrap();
    short.renew_for(ms(400)).await.unwrap();
    sleep(ms(1_000)).await;
    assert!(short.is_held(), "renewed on its own, for its present ttl");
    assert!(short.deadline() - start < ms(2_500));
    assert!(guards.iter().all(LockGuard::is_held));
}

#[tokio::test(start_paused = true)]
async fn a_release_whose_answer_was_lost_is_a_release() {
    let calls = AtomicU32::new(0);
    let locker = locker(move |operation| match operation {
        // It runs, and the connection breaks before the reply.
        Operation::Release if calls.fetch_add(1, Ordering::Relaxed) == 0 => Fault::AnswerLost,
        _ => Fault::None,
    });
    locker.lock("k").await.unwrap().release().await.unwrap();
    assert_eq!(locker.inspect("k").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_renewer_outlives_its_guard_until_the_ttl_at_most() {
    for fault in [Fault::Hung, Fault::Refused] {
        let locker = locker(only(Operation::Release, fault));
        let guard = locker.lock("k").await.unwrap();
        let start = Instant::now();
        assert!(matches!(guard.release().await, Err(Error::Redis(_))));
        assert!(start.elapsed() <= ms(500));
        locker.close().await;
        assert!(start.elapsed() <= ms(2_000), "{:?}", start.elapsed());
        // Longer than the renewer's task waits for other locks.
        sleep(ms(1_000)).await;
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_for_a_while_still_has_what_was_dropped_released() {
    let back = Instant::now() + ms(9_000);
    let locker = locker(move |operation| match operation {
        Operation::Release if Instant::now() < back => Fault::Refused,
        _ => Fault::None,
    });
    drop(locker.lock("k").ttl(ms(30_000)).await.unwrap());
    sleep(ms(8_000)).await;
    assert!(locker.inspect("k").await.unwrap().is_some());
    sleep(ms(2_000)).await;
    assert_eq!(locker.inspect("k").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn what_was_dropped_is_released_for_as_long_as_the_server_may_keep_it_not_only_until_the_deadline() {
    let back = Instant::now() + ms(9_000);
    let locker = locker(move |operation| match operation {
        // A shorter ttl that never arrives: the guard must allow for it, and the server knows nothing of it.
        Operation::Renew => Fault::Refused,
        Operation::Release if Instant::now() < back => Fault::Refused,
        _ => Fault::None,
    });
    let guard = locker.lock("k").ttl(ms(600_000)).no_renewal().await.unwrap();
    assert!(guard.renew_for(ms(1_000)).await.is_err());
    drop(guard);
    sleep(ms(10_000)).await;
    assert_eq!(locker.inspect("k").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_within_fifty_milliseconds_of_its_limit_even_when_the_server_hangs() {
    let locker = locker(only(Operation::Acquire, Fault::Hung));
    for limit in [0, 10, 499, 501, 5_000] {
        let start = Instant::now();
        let failed = locker.lock("k").wait_at_most(ms(limit)).await.unwrap_err();
        assert!(matches!(failed, Error::Redis(_)), "{failed}");
        let waited = start.elapsed();
        assert!(waited >= ms(limit) && waited <= ms(limit + 50), "{waited:?} of {limit} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn work_that_becomes_ready_with_the_loss_has_lost() {
    let locker = locker(only(Operation::Renew, Fault::Hung));
    let guard = locker.lock("k").await.unwrap();
    let deadline = guard.deadline();
    let dropped = Arc::new(AtomicBool::new(false));
    struct Dropped(Arc<AtomicBool>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let work = {
        let mark = Dropped(dropped.clone());
        async move {
            tokio::time::sleep_until(deadline).await;
            drop(mark);
        }
    };
    let mut protected = Box::pin(guard.protect(work));
    assert_eq!((&mut protected).await, Err(Loss::Expired));
    assert!(dropped.load(Ordering::Relaxed), "dropped with the loss, not with the future");

    // Work that ends late, in a single step, was not under the lock until its end.
    let guard = locker.lock("other").await.unwrap();
    let late = guard.protect(poll_fn(|cx| {
        let advanced = pin!(tokio::time::advance(ms(2_000))).poll(cx);
        assert!(advanced.is_pending(), "time has passed, and only then are other tasks let in");
        Poll::Ready(())
    }));
    assert_eq!(late.await, Err(Loss::Expired));
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_at_its_limit_to_the_millisecond() {
    let locker = locker(|_| Fault::None);
    let _held = locker.lock("k").await.unwrap();
    // The second waiter is behind the first, which holds it up no longer than the first one's limit.
    let start = Instant::now();
    let first = tokio::spawn(locker.lock("k").wait_at_most(ms(300)).into_future());
    let second = tokio::spawn(locker.lock("k").wait_at_most(ms(500)).into_future());
    assert!(matches!(first.await.unwrap(), Err(Error::NotObtained { .. })));
    assert_eq!(start.elapsed(), ms(300));
    assert!(matches!(second.await.unwrap(), Err(Error::NotObtained { .. })));
    assert_eq!(start.elapsed(), ms(500));
}

#[tokio::test(start_paused = true)]
async fn retrying_ends_at_its_limit_to_the_millisecond() {
    let locker = locker(|_| Fault::None);
    let _held = locker.lock("k").await.unwrap();
    for (pause, expected) in [(50, 6), (70, 5), (400, 1)] {
        let start = Instant::now();
        let request = locker.obtain("k").retry(Retry::linear(ms(pause))).wait_at_most(ms(300));
        let Err(Error::NotObtained { attempts, .. }) = request.await else { panic!("obtained") };
        assert_eq!((start.elapsed(), attempts), (ms(300), expected), "every {pause} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_holder_is_followed_when_its_ttl_ends() {
    let locker = locker(|_| Fault::None);
    let start = Instant::now();
    locker.lock("k").ttl(ms(60_000)).await.unwrap().into_lease();
    let guard = locker.lock("k").await.unwrap();
    let late = start.elapsed() - ms(60_000);
    assert!(late <= ms(10), "{late:?}");
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_that_fails_leaves_the_lock_to_who_waits() {
    for fault in [Fault::Hung, Fault::Refused, Fault::AnswerLost, Fault::RunAfter(ms(700))] {
        let calls = AtomicU32::new(0);
        let locker = locker(move |operation| match operation {
            // The hand-over, which is the first release.
            Operation::Release if calls.fetch_add(1, Ordering::Relaxed) == 0 => fault,
            _ => Fault::None,
        });
        let guard = locker.lock("k").await.unwrap();
        let waiter = tokio::spawn(locker.lock("k").into_future());
        sleep(ms(10)).await;
        let first = guard.fencing_token();
        guard.release().await.unwrap();
        let guard = waiter.await.unwrap().unwrap();
        assert!(guard.fencing_token() > first, "{fault:?}");
        guard.release().await.unwrap();
        assert_eq!(locker.inspect("k").await.unwrap(), None, "{fault:?}");
    }
}

/// What an observer sees of a history.
struct History {
    /// How often a client obtained the lock while another still believed that it held it.
    overlaps: u32,
    /// The fencing tokens, in the order in which their holders learned them.
    fences: Vec<u64>,
}

/// Runs three clients on one lock, each on its own connection that loses, delays and doubles calls, with one to three
/// tasks that hand the lock over to each other.
async fn history(seed: u64, faults: &'static [fn(&mut fastrand::Rng) -> Fault]) -> History {
    let store = Arc::new(MemoryStore::new());
    let held: Arc<Mutex<Vec<Arc<Hold>>>> = Arc::default();
    let fences = Arc::new(Mutex::new(Vec::new()));
    let overlaps = Arc::new(AtomicU32::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..3 {
        let rng = Mutex::new(fastrand::Rng::with_seed(seed * 3 + client));
        let locker = locker_on(store.clone(), move |_| {
            let mut rng = rng.lock().unwrap();
            if rng.u8(..10) < 5 { Fault::None } else { rng.choice(faults).unwrap()(&mut rng) }
        });
        for task in 0..=seed % 3 {
            let (locker, held, fences, overlaps) = (locker.clone(), held.clone(), fences.clone(), overlaps.clone());
            let mut rng = fastrand::Rng::with_seed(seed * 7 + client + task * 1_000_003);
            clients.spawn(async move {
                for _ in 0..6 {
                    let request = locker.lock("k").wait_at_most(ms(rng.u64(..8_000)));
                    let Ok(Ok(guard)) = timeout(ms(rng.u64(..16_000)), request).await else { continue };
                    // Another lock, which is renewed along with this one.
                    let _beside = match rng.bool() {
                        true => locker.try_lock(format!("{client} {task}")).await.ok(),
                        false => None,
                    };
                    if guard.is_held() {
                        let mut held = held.lock().unwrap();
                        let others = held.iter().filter(|other| other.check().is_ok()).count();
                        overlaps.fetch_add(u32::from(others > 0), Ordering::Relaxed);
                        held.push(guard.hold());
                        fences.lock().unwrap().push(guard.fencing_token().unwrap());
                    }
                    drop(timeout(ms(rng.u64(..6_000)), guard.lost()).await);
                    match rng.u8(..3) {
                        0 => drop(guard),
                        1 => drop(guard.release().await),
                        _ => drop(timeout(ms(rng.u64(..300)), guard.release()).await),
                    }
                }
            });
        }
    }
    clients.join_all().await;
    let fences = std::mem::take(&mut *fences.lock().unwrap());
    History { overlaps: overlaps.load(Ordering::Relaxed), fences }
}

/// Plays so many histories, or as many as `TENURE_HISTORIES` says. Returns how many these are.
fn histories(faults: &'static [fn(&mut fastrand::Rng) -> Fault], few: u64, mut check: impl FnMut(u64, History)) -> u64 {
    let count = universe::number("TENURE_HISTORIES").unwrap_or(few);
    for seed in 0..count {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        fastrand::seed(seed);
        check(seed, runtime.block_on(history(seed, faults)));
    }
    count
}

/// The faults of networks and servers.
const FAULTS: &[fn(&mut fastrand::Rng) -> Fault] = &[
    |_| Fault::Refused,
    |_| Fault::Hung,
    |_| Fault::AnswerLost,
    |rng| Fault::AnsweredAfter(ms(rng.u64(..700))),
    |rng| Fault::RunAfter(ms(rng.u64(..700))),
    |rng| Fault::RunAfter(ms(rng.u64(..5_000))),
    |rng| Fault::Doubled(ms(rng.u64(..5_000))),
];

/// The fault that this kind of lock does not survive: a server that forgets.
const BEYOND: &[fn(&mut fastrand::Rng) -> Fault] = &[|_| Fault::Forgotten, |_| Fault::Refused];

#[test]
fn no_history_has_two_holders_at_once_or_fencing_tokens_that_fall() {
    let mut obtained = 0;
    let count = histories(FAULTS, 2_000, |seed, History { overlaps, fences }| {
        assert_eq!(overlaps, 0, "two holders at once, seed {seed}");
        assert!(fences.is_sorted_by(|earlier, later| earlier < later), "fencing tokens don't grow, seed {seed}");
        obtained += fences.len() as u64;
    });
    // Otherwise the histories have shown nothing.
    assert!(obtained > 5 * count, "{obtained}");
}

/// Ignores the fencing tokens: two holders at once may learn theirs in any order.
#[test]
fn a_server_that_forgets_has_two_holders_at_once_or_the_histories_are_toothless() {
    let mut found = 0;
    let count = histories(BEYOND, 2_000, |_, History { overlaps, .. }| found += overlaps as u64);
    assert!(20 * found > count, "{found}");
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_taken_back_is_no_guards_whatever_a_slow_answer_says() {
    let store = Arc::new(MemoryStore::new());
    let is_slow = Arc::new(AtomicBool::new(false));
    let locker = {
        let is_slow = is_slow.clone();
        let plan = move |operation| match operation {
            _ if !is_slow.load(Ordering::Relaxed) => Fault::None,
            Operation::Release => Fault::AnsweredAfter(ms(200)),
            _ => Fault::AnsweredAfter(ms(2_000)),
        };
        let builder = Locker::builder().ttl(ms(10_000)).command_timeout(ms(5_000)).poll_every(ms(100));
        builder.build(Box::new(FaultyStore::new(store.clone(), plan)), None)
    };
    let other = locker_on(store, |_| Fault::None);
    let guard = locker.lock("k").await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    sleep(ms(10)).await;
    // The waiter asks after the lock was handed over to it, and before it learns of the hand-over. The server replies
    // that it has the lock; the reply comes after the lock was taken back from it, as it seemed not to be polled.
    is_slow.store(true, Ordering::Relaxed);
    guard.release().await.unwrap();
    is_slow.store(false, Ordering::Relaxed);
    let held = timeout(ms(1_500), other.lock("k").into_future()).await.unwrap().unwrap();
    sleep(ms(3_000)).await;
    assert!(held.is_held());
    assert!(!waiter.is_finished(), "two holders at once");
    held.release().await.unwrap();
    waiter.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_releases_what_was_handed_over_to_a_future_that_is_not_polled() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let guard = locker.lock("k").await.unwrap();
    let mut parked = locker.lock("k").into_future();
    assert!(timeout(ms(10), &mut parked).await.is_err());
    guard.release().await.unwrap();
    assert!(store.holder(&"k".into()).is_some());
    locker.close().await;
    assert_eq!(store.holder(&"k".into()), None);
    assert!(matches!(parked.await, Err(Error::Closed)));
    assert_eq!(store.holder(&"k".into()), None);
}

#[tokio::test(start_paused = true)]
async fn closing_waits_until_what_was_handed_over_to_a_waiter_that_it_ends_is_undone() {
    let store = Arc::new(MemoryStore::new());
    // The undo takes a while.
    let locker = locker_on(store.clone(), |operation| match operation {
        Operation::Release => Fault::RunAfter(ms(50)),
        _ => Fault::None,
    });
    let guard = locker.lock("k").await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    sleep(ms(200)).await;
    guard.release().await.unwrap();
    assert!(store.holder(&"k".into()).is_some());
    locker.close().await;
    assert_eq!(store.holder(&"k".into()), None);
    assert!(matches!(waiter.await.unwrap(), Err(Error::Closed)));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_whose_heartbeat_gets_no_reply_asks_as_soon_as_it_is_notified() {
    let store = Arc::new(MemoryStore::new());
    let holder = locker_on(store.clone(), |_| Fault::None);
    let beats = Arc::new(AtomicU32::new(0));
    let locker = locker_on(store, {
        let beats = beats.clone();
        move |operation| match operation {
            Operation::Line => {
                beats.fetch_add(1, Ordering::Relaxed);
                Fault::Lost
            }
            _ => Fault::None,
        }
    });
    let guard = holder.lock("k").await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    sleep(ms(700)).await;
    assert_eq!(beats.load(Ordering::Relaxed), 1);
    guard.release().await.unwrap();
    let guard = timeout(ms(10), waiter).await.unwrap().unwrap().unwrap();
    guard.release().await.unwrap();
    // And as soon as the ttl of a dead holder ends: here while the second heartbeat has no reply.
    drop(holder.lock("k").ttl(ms(1_300)).await.unwrap().into_lease());
    let began = Instant::now();
    let guard = locker.lock("k").await.unwrap();
    assert!(began.elapsed() < ms(1_400), "{:?}", began.elapsed());
    drop(guard);
}

/// An explicit release ends the lock for all grants of a token, also where it arrives late.
#[tokio::test(start_paused = true)]
async fn a_release_that_was_given_up_ends_nothing_that_its_token_obtains_after_that() {
    for reads in [false, true] {
        let store = Arc::new(MemoryStore::new());
        let is_late = Arc::new(AtomicBool::new(false));
        let locker = locker_on(store.clone(), {
            let is_late = is_late.clone();
            move |operation| match operation {
                Operation::Release if is_late.swap(false, Ordering::Relaxed) => Fault::RunAfter(ms(100)),
                _ => Fault::None,
            }
        });
        let request = || {
            let request = if reads { locker.read("k") } else { locker.lock("k") };
            request.token("worker-7".parse().unwrap())
        };
        let guard = request().await.unwrap();
        is_late.store(true, Ordering::Relaxed);
        assert!(timeout(ms(10), guard.release()).await.is_err());
        let again = request().wait_at_most(ms(20_000)).await.unwrap();
        sleep(ms(2_000)).await;
        let left = again.server_ttl().await.unwrap();
        assert!(left.is_some(), "reads: {reads}; it was ended by the late release");
        again.release().await.unwrap();
        // An adopted lease is ended no more than a guard. Another release may be given up on while a request waits.
        for adopts in [true, false] {
            let (guard, other) = (request().await.unwrap(), request().await.unwrap());
            let other_lease = crate::Lease::new("k", other.token().clone(), ms(30_000));
            is_late.store(true, Ordering::Relaxed);
            assert!(timeout(ms(10), guard.release()).await.is_err());
            let again = tokio::spawn({
                let (locker, request) = (locker.clone(), request());
                async move {
                    match adopts {
                        true => locker.adopt(other_lease).await,
                        false => request.wait_at_most(ms(20_000)).await,
                    }
                }
            });
            sleep(ms(400)).await;
            is_late.store(true, Ordering::Relaxed);
            assert!(timeout(ms(10), other.release()).await.is_err());
            sleep(ms(2_000)).await;
            match again.await.unwrap() {
                Ok(again) => {
                    assert!(again.server_ttl().await.unwrap().is_some(), "reads: {reads}, adopts: {adopts}");
                    again.release().await.unwrap();
                }
                Err(error) => assert!(adopts && matches!(error, Error::NotHeld { .. }), "{error}"),
            }
        }
        // Nobody waits for another key, nor where nothing can be late.
        is_late.store(true, Ordering::Relaxed);
        assert!(timeout(ms(10), request().await.unwrap().release()).await.is_err());
        let began = Instant::now();
        let other_key = if reads { locker.read("l") } else { locker.lock("l") };
        drop(other_key.token("worker-7".parse().unwrap()).await.unwrap());
        assert_eq!(began.elapsed(), Duration::ZERO);
        let refused = request().wait_at_most(ms(50)).await.unwrap_err();
        assert!(refused.to_string().contains("a release of the same token"), "{refused}");
        sleep(ms(2_000)).await;
        let began = Instant::now();
        request().await.unwrap().release().await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_attempt_may_have_left_is_undone_also_where_the_lock_was_taken_back_since() {
    let store = Arc::new(MemoryStore::new());
    let is_late = Arc::new(AtomicBool::new(false));
    let locker = {
        let is_late = is_late.clone();
        let plan = move |operation| match operation {
            Operation::Acquire if is_late.swap(false, Ordering::Relaxed) => Fault::RunAfter(ms(4_000)),
            _ => Fault::None,
        };
        let faulty = FaultyStore::new(store.clone(), plan).living(10);
        Locker::builder().ttl(ms(60_000)).command_timeout(ms(500)).build(Box::new(faulty), None)
    };
    let guard = locker.lock("k").await.unwrap();
    is_late.store(true, Ordering::Relaxed);
    let mut parked = locker.lock("k").into_future();
    assert!(timeout(ms(700), &mut parked).await.is_err());
    // The lock is handed over to the parked request, and taken back from it.
    guard.release().await.unwrap();
    sleep(ms(1_000)).await;
    assert_eq!(store.holder(&"k".into()), None);
    parked.await.unwrap().release().await.unwrap();
    // The first request has arrived by now.
    sleep(ms(6_000)).await;
    assert_eq!(store.holder(&"k".into()), None);
}

#[tokio::test(start_paused = true)]
async fn what_may_have_been_handed_over_to_a_future_that_is_not_polled_is_taken_back() {
    let store = Arc::new(MemoryStore::new());
    let is_lost = Arc::new(AtomicBool::new(false));
    let locker = locker_on(store.clone(), {
        let is_lost = is_lost.clone();
        move |_| if is_lost.swap(false, Ordering::Relaxed) { Fault::AnswerLost } else { Fault::None }
    });
    let guard = locker.lock("k").ttl(ms(60_000)).await.unwrap();
    let mut parked = locker.lock("k").ttl(ms(60_000)).into_future();
    assert!(timeout(ms(10), &mut parked).await.is_err());
    is_lost.store(true, Ordering::Relaxed);
    guard.release().await.unwrap();
    assert!(store.holder(&"k".into()).is_some(), "it was handed over, and nobody knows");
    sleep(ms(2_000)).await;
    assert_eq!(store.holder(&"k".into()), None);
    parked.await.unwrap().release().await.unwrap();
}
