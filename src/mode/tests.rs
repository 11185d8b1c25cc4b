//! Readers, permits and writers of one process, on the embedded store, under paused time. What every store keeps is in
//! `tests/it/conformance`.

use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, sleep};

use crate::store::faulty::{Fault, FaultyStore, Operation};
use crate::store::memory::MemoryStore;
use crate::testing::EmbeddedServer;
use crate::{Error, LockGuard, LockRequest, Locker, Token};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A locker whose calls of a kind fail as planned, and what the server was asked.
struct Counted {
    locker: Locker,
    store: Arc<MemoryStore>,
    acquires: Arc<AtomicU32>,
}

fn counted(plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Counted {
    let (store, acquires) = (Arc::new(MemoryStore::new()), Arc::new(AtomicU32::new(0)));
    let count = acquires.clone();
    let faulty = FaultyStore::new(store.clone(), move |operation| {
        count.fetch_add(u32::from(operation == Operation::Acquire), Ordering::Relaxed);
        plan(operation)
    });
    let locker = Locker::builder().command_timeout(ms(500)).poll_every(ms(60_000)).build(Box::new(faulty), None);
    Counted { locker, store, acquires }
}

impl Counted {
    /// Returns how often the server was asked for the key since this was last called.
    fn acquires(&self) -> u32 {
        self.acquires.swap(0, Ordering::Relaxed)
    }
}

/// Waits in a task. The request is in the queue when this returns.
async fn waits(request: LockRequest) -> JoinHandle<Result<LockGuard, Error>> {
    let waiter = tokio::spawn(request.into_future());
    settle().await;
    waiter
}

/// Lets the other tasks do what they can do now.
async fn settle() {
    for _ in 0..50 {
        yield_now().await;
    }
}

fn is_refused(refused: &Result<LockGuard, Error>) -> bool {
    matches!(refused, Err(Error::NotObtained { .. }))
}

/// Polls a request once, and never again.
fn poll_once(waiting: std::pin::Pin<&mut crate::Obtaining>) {
    assert!(waiting.poll(&mut Context::from_waker(Waker::noop())).is_pending());
}

#[tokio::test(start_paused = true)]
async fn a_waiting_writer_holds_new_readers_back() {
    let locker = Locker::in_memory();
    let reader = locker.read("k").await.unwrap();
    let writer = waits(locker.lock("k")).await;
    assert!(is_refused(&locker.try_read("k").await));
    let behind = waits(locker.read("k")).await;
    reader.release().await.unwrap();
    let writing = writer.await.unwrap().unwrap();
    settle().await;
    assert!(!behind.is_finished());
    let released = Instant::now();
    writing.release().await.unwrap();
    drop(behind.await.unwrap().unwrap());
    assert_eq!(released.elapsed(), ms(0), "it was notified");
}

#[tokio::test(start_paused = true)]
async fn a_fair_writer_holds_new_readers_back() {
    let locker = Locker::in_memory();
    let reader = locker.read("k").await.unwrap();
    let writer = waits(locker.lock("k").fair(true)).await;
    assert!(is_refused(&locker.try_read("k").await));
    let behind = waits(locker.read("k")).await;
    reader.release().await.unwrap();
    writer.await.unwrap().unwrap().release().await.unwrap();
    drop(behind.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_gives_up_or_is_dropped_holds_nobody_back() {
    let locker = Locker::in_memory();
    let _reader = locker.read("k").await.unwrap();
    let writer = waits(locker.lock("k").wait_at_most(ms(100))).await;
    let behind = waits(locker.read("k")).await;
    assert!(!behind.is_finished() && is_refused(&writer.await.unwrap()));
    let other = behind.await.unwrap().unwrap();
    let writer = waits(locker.lock("k")).await;
    let behind = waits(locker.read("k")).await;
    writer.abort();
    behind.await.unwrap().unwrap().release().await.unwrap();
    locker.try_read("k").await.unwrap().release().await.unwrap();
    drop(other);
}

#[tokio::test(start_paused = true)]
async fn writers_that_are_not_polled_hold_nobody_back_for_long() {
    for writers in 1..4 {
        let locker = Locker::in_memory();
        let _reader = locker.read("k").await.unwrap();
        let mut parked = Vec::new();
        for _ in 0..writers {
            let mut waiting = Box::pin(locker.lock("k").into_future());
            poll_once(waiting.as_mut());
            parked.push(waiting);
        }
        let started = Instant::now();
        drop(locker.read("k").await.unwrap());
        assert!(started.elapsed() < ms(1_500 * writers), "{writers}: {:?}", started.elapsed());
        sleep(ms(1_000)).await;
        drop(locker.try_read("k").await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_or_permit_that_is_not_polled_holds_nobody_back_for_long() {
    let requests: [fn(&Locker) -> LockRequest; 2] = [|locker| locker.read("k"), |locker| locker.permit("k", 2)];
    for request in requests {
        let locker = Locker::in_memory();
        let writer = locker.lock("k").await.unwrap();
        let mut waiting = Box::pin(request(&locker).into_future());
        poll_once(waiting.as_mut());
        settle().await;
        let behind = waits(request(&locker)).await;
        let started = Instant::now();
        writer.release().await.unwrap();
        drop(behind.await.unwrap().unwrap());
        assert!(started.elapsed() < ms(1_500), "{:?}", started.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn readers_that_waited_enter_together_and_ask_once_each() {
    let counted = counted(|_| Fault::None);
    let writer = counted.locker.lock("k").await.unwrap();
    let mut waiters = Vec::new();
    for _ in 0..200 {
        waiters.push(waits(counted.locker.read("k")).await);
    }
    // The first has asked, and others may have before it was refused.
    assert!(counted.acquires() < 6, "those behind the first don't ask");
    sleep(ms(20_000)).await;
    assert!(counted.acquires() < 6, "nor do they poll");
    let released = Instant::now();
    writer.release().await.unwrap();
    let mut readers = Vec::new();
    for waiter in waiters {
        readers.push(waiter.await.unwrap().unwrap());
    }
    assert_eq!(released.elapsed(), ms(0));
    assert!((200..=205).contains(&counted.acquires()));
    assert_eq!(counted.locker.holders("k").await.unwrap().len(), 200);
}

#[tokio::test(start_paused = true)]
async fn readers_that_find_the_key_open_do_not_wait_for_each_other() {
    let counted = counted(|operation| match operation {
        Operation::Acquire => Fault::AnsweredAfter(ms(100)),
        _ => Fault::None,
    });
    let started = Instant::now();
    let mut waiters = Vec::new();
    for _ in 0..50 {
        waiters.push(waits(counted.locker.read("k")).await);
    }
    for waiter in waiters {
        drop(waiter.await.unwrap().unwrap());
    }
    assert_eq!(started.elapsed(), ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_permit_comes_back_by_release_drop_and_ttl() {
    let locker = Locker::in_memory();
    let request = || locker.permit("k", 2);
    let one = request().await.unwrap();
    let another = request().ttl(ms(1_000)).no_renewal().await.unwrap();
    let (third, fourth, fifth) = (waits(request()).await, waits(request()).await, waits(request()).await);
    one.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    settle().await;
    assert!(!fourth.is_finished());
    drop(third);
    let _fourth = fourth.await.unwrap().unwrap();
    let started = Instant::now();
    another.into_lease();
    let _fifth = fifth.await.unwrap().unwrap();
    assert!(started.elapsed() >= ms(990) && started.elapsed() < ms(1_100), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn after_a_downgrade_readers_enter_and_a_writer_that_waits_is_not_passed() {
    let locker = Locker::in_memory();
    let writer = locker.lock("k").await.unwrap();
    let waiting = waits(locker.read("k")).await;
    let other = waits(locker.lock("k")).await;
    let behind = waits(locker.read("k")).await;
    let started = Instant::now();
    let (fence, deadline) = (writer.fencing_token(), writer.deadline());
    let lost = writer.lost();
    let reader = writer.downgrade().await.unwrap();
    assert_eq!(lost.await, crate::Loss::Released);
    assert_eq!((reader.fencing_token(), reader.deadline()), (fence, deadline));
    let second = waiting.await.unwrap().unwrap();
    settle().await;
    assert!(!other.is_finished() && !behind.is_finished());
    assert!(is_refused(&locker.try_read("k").await));
    sleep(ms(60_000)).await;
    assert!(reader.is_held() && second.is_held());
    reader.release().await.unwrap();
    second.release().await.unwrap();
    other.await.unwrap().unwrap().release().await.unwrap();
    behind.await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(started.elapsed(), ms(60_000));
}

#[tokio::test(start_paused = true)]
async fn a_downgrade_of_unknown_outcome_is_tried_again() {
    for fault in [Fault::AnswerLost, Fault::Refused, Fault::Lost, Fault::RunAfter(ms(450)), Fault::Doubled(ms(100))] {
        let calls = AtomicU32::new(0);
        let counted = counted(move |operation| match operation {
            Operation::Downgrade if calls.fetch_add(1, Ordering::Relaxed) == 0 => fault,
            _ => Fault::None,
        });
        let guard = counted.locker.lock("k").ttl(ms(2_000)).metadata("m").await.unwrap();
        // It takes the lot of the time: the reader is held for no longer than the lock was, until it is renewed.
        let deadline = guard.deadline();
        match guard.downgrade().await {
            Ok(reader) => {
                assert!(reader.is_held() && reader.deadline() == deadline && reader.metadata() == b"m", "{fault:?}");
                counted.locker.try_read("k").await.unwrap().release().await.unwrap();
                sleep(ms(10_000)).await;
                reader.release().await.unwrap();
            }
            // A call that never returns takes all of the time.
            Err(error) => assert!(error.is_timeout() && matches!(fault, Fault::Lost), "{fault:?}: {error}"),
        }
        sleep(ms(1_000)).await;
        assert!(counted.store.holder(&"k".into()).is_none());
        drop(counted.locker.try_lock("k").await.unwrap());
    }
}

/// Whatever the server has made of it, it is released.
#[tokio::test(start_paused = true)]
async fn a_downgrade_that_fails_or_is_dropped_leaves_nothing() {
    for fault in [Fault::AnswerLost, Fault::Refused, Fault::Hung, Fault::RunAfter(ms(300)), Fault::RunAfter(ms(490))] {
        for dropped in [false, true] {
            let counted = counted(move |operation| match operation {
                Operation::Downgrade => fault,
                _ => Fault::None,
            });
            let guard = counted.locker.lock("k").await.unwrap();
            let lost = guard.lost();
            {
                let mut downgrading = pin!(guard.downgrade());
                match dropped {
                    true => {
                        let once = downgrading.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                        assert!(once.is_pending(), "{fault:?}");
                    }
                    false => match downgrading.await {
                        Ok(reader) => reader.release().await.unwrap(),
                        Err(error) => assert!(error.is_timeout(), "{error}"),
                    },
                }
            }
            assert_eq!(lost.await, crate::Loss::Released);
            sleep(ms(1_000)).await;
            counted.locker.try_lock("k").await.unwrap().release().await.unwrap();
            assert_eq!(counted.locker.holders("k").await.unwrap().len(), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_downgraded_says_why() {
    let locker = Locker::in_memory();
    let token = || "me".parse::<Token>().unwrap();
    let set = locker.lock_all(["a", "b"]).await.unwrap();
    let permit = locker.permit("p", 1).await.unwrap();
    let one = locker.lock("k").token(token()).await.unwrap();
    let twin = locker.lock("k").token(token()).await.unwrap();
    for guard in [set, permit, one] {
        let refused = guard.downgrade().await.unwrap_err();
        assert!(matches!(refused, Error::Unsupported(_)), "{refused}");
    }
    sleep(ms(100_000)).await;
    let reader = twin.downgrade().await.unwrap();
    let again = reader.downgrade().await.unwrap();
    assert!(again.is_held());
    assert_eq!(locker.holders("k").await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_shares_the_key_already_waits_behind_nobody() {
    let requests: [fn(&Locker) -> LockRequest; 2] = [|locker| locker.read("k"), |locker| locker.permit("k", 1)];
    for request in requests {
        let locker = Locker::in_memory();
        let one = || request(&locker).token("me".parse().unwrap());
        let first = one().await.unwrap();
        let writer = waits(locker.lock("k")).await;
        let second = one().await.unwrap();
        let third = one().wait_at_most(ms(0)).await.unwrap();
        assert_eq!([&second, &third].map(LockGuard::fencing_token), [first.fencing_token(); 2]);
        drop((first, second));
        settle().await;
        assert!(!writer.is_finished() && third.is_held());
        third.release().await.unwrap();
        drop(writer.await.unwrap().unwrap());
    }
}

/// The first in the queue leaves, and the one that it has woken leaves before it has run.
#[tokio::test(start_paused = true)]
async fn of_waiters_that_are_dropped_at_once_nothing_is_left() {
    let counted = counted(|_| Fault::None);
    let writer = counted.locker.lock("k").await.unwrap();
    for requests in [1, 2, 3] {
        let mut waiters = Vec::new();
        for n in 0..requests {
            waiters.push(waits(if n == 1 { counted.locker.permit("k", 1) } else { counted.locker.read("k") }).await);
        }
        waiters.iter().for_each(JoinHandle::abort);
        settle().await;
        assert!(!counted.locker.shared().queues.has_waiters(&"k".into()));
    }
    writer.release().await.unwrap();
    let reader = counted.locker.try_read("k").await.unwrap();
    reader.release().await.unwrap();
    sleep(ms(2_000)).await;
    assert!(format!("{:?}", counted.locker.shared().queues).contains("keys: 0"));
    assert_eq!(counted.store.subscriptions(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_attempts_of_unknown_outcome_of_a_reader_are_undone() {
    for fault in [Fault::AnswerLost, Fault::RunAfter(ms(400)), Fault::Lost] {
        for limit in [ms(0), ms(600)] {
            let calls = AtomicU32::new(0);
            let counted = counted(move |operation| match operation {
                Operation::Acquire if calls.fetch_add(1, Ordering::Relaxed) == 0 => fault,
                _ => Fault::None,
            });
            if let Ok(reader) = counted.locker.read("k").wait_at_most(limit).await {
                reader.release().await.unwrap();
            }
            sleep(ms(2_000)).await;
            assert_eq!(counted.locker.holders("k").await.unwrap(), [], "{fault:?}");
            counted.locker.try_lock("k").await.unwrap().release().await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn closing_ends_those_who_wait_and_releases_what_was_dropped() {
    let locker = Locker::in_memory();
    let reader = locker.read("k").await.unwrap();
    let dropped = locker.read("k").await.unwrap();
    let (writer, behind) = (waits(locker.lock("k")).await, waits(locker.read("k")).await);
    drop(dropped);
    locker.close().await;
    for waiter in [writer, behind] {
        assert!(matches!(waiter.await.unwrap(), Err(Error::Closed)));
    }
    assert!(matches!(locker.try_read("k").await, Err(Error::Closed)));
    assert!(matches!(locker.holders("k").await, Err(Error::Closed)));
    sleep(ms(60_000)).await;
    assert!(reader.is_held());
    // What is held stays held, and can be made less of.
    reader.downgrade().await.unwrap().release().await.unwrap();
}

/// The reader is held for no longer than the lock was known to be, and isn't renewed as a lock.
#[tokio::test(start_paused = true)]
async fn a_downgrade_keeps_the_bounds_and_a_longer_deadline() {
    let locker = Locker::in_memory();
    let writer = locker.lock("k").ttl(ms(3_000)).hold_at_most(ms(120_000)).hold_at_least(ms(30_000)).await.unwrap();
    let started = Instant::now();
    writer.ensure(ms(60_000)).await.unwrap();
    let deadline = writer.deadline();
    let reader = writer.downgrade().await.unwrap();
    assert_eq!((reader.deadline(), reader.ttl()), (deadline, ms(3_000)));
    assert!(reader.server_ttl().await.unwrap().unwrap() > ms(59_000));
    sleep(ms(10_000)).await;
    reader.release().await.unwrap();
    locker.try_read("k").await.unwrap().release().await.unwrap();
    locker.lock("k").await.unwrap().release().await.unwrap();
    let after = started.elapsed();
    assert!(after >= ms(30_000) && after < ms(30_200), "{after:?}");
    let writer = locker.lock("k").hold_at_most(ms(20_000)).await.unwrap();
    let started = Instant::now();
    let reader = writer.downgrade().await.unwrap();
    assert_eq!(reader.lost().await, crate::Loss::LimitReached);
    assert!(started.elapsed() <= ms(20_000));
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_gone_is_not_downgraded() {
    let counted = counted(|_| Fault::None);
    let request = || counted.locker.lock("k").ttl(ms(1_000)).no_renewal();
    let expired = request().await.unwrap();
    sleep(ms(2_000)).await;
    let refused = expired.downgrade().await.unwrap_err();
    assert!(matches!(refused, Error::NotHeld { loss: crate::Loss::Expired, .. }), "{refused}");
    let missing = request().await.unwrap();
    counted.store.delete(&"k".into());
    let refused = missing.downgrade().await.unwrap_err();
    assert!(matches!(refused, Error::NotHeld { loss: crate::Loss::Missing, .. }), "{refused}");
    let taken = request().await.unwrap();
    counted.store.delete(&"k".into());
    let other = counted.locker.read("k").await.unwrap();
    let refused = taken.downgrade().await.unwrap_err();
    assert!(matches!(refused, Error::NotHeld { loss: crate::Loss::Taken, .. }), "{refused}");
    sleep(ms(5_000)).await;
    assert!(other.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_lost_like_a_lock() {
    let counted = counted(|operation| if operation == Operation::Renew { Fault::Hung } else { Fault::None });
    let expires = counted.locker.read("k").ttl(ms(3_000)).await.unwrap();
    assert_eq!(expires.lost().await, crate::Loss::Expired);
    let counted = self::counted(|_| Fault::None);
    let missing = counted.locker.read("k").ttl(ms(3_000)).await.unwrap();
    counted.store.delete(&"k".into());
    assert_eq!(missing.lost().await, crate::Loss::Missing);
    let (one, other) = (counted.locker.permit("k", 2).await.unwrap(), counted.locker.permit("k", 2).await.unwrap());
    counted.store.delete(&"k".into());
    let lock = counted.locker.lock("k").await.unwrap();
    assert_eq!((one.lost().await, other.lost().await), (crate::Loss::Taken, crate::Loss::Taken));
    assert!(lock.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_watchdog_keeps_readers_and_permits_and_obtains_a_share_when_it_is_free() {
    let locker = Locker::in_memory();
    let dog = crate::WatchDog::builder(&locker).build();
    dog.watch(locker.read("r").await.unwrap()).unwrap();
    dog.watch(locker.permit("p", 2).await.unwrap()).unwrap();
    let refused = dog.watch(locker.permit("p", 2).await.unwrap()).unwrap_err();
    assert!(matches!(refused, Error::AlreadyWatched { .. }));
    sleep(ms(100_000)).await;
    assert!(locker.try_lock("r").await.is_err() && locker.try_lock("p").await.is_err());
    let permit = dog.unwatch("p").unwrap();
    dog.watch_lease(permit.clone()).await.unwrap();
    assert_eq!(locker.holders("p").await.unwrap().len(), 1);
    dog.release_all().await;
    locker.try_lock("p").await.unwrap().release().await.unwrap();
    let refused = dog.watch_lease(permit).obtain_when_free(true).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)), "{refused}");

    let lease = locker.read("r").await.unwrap().into_lease();
    locker.adopt(lease.clone()).await.unwrap().release().await.unwrap();
    let writer = locker.lock("r").await.unwrap();
    dog.watch_lease(lease).obtain_when_free(true).await.unwrap();
    settle().await;
    assert!(!dog.status("r").unwrap().held);
    writer.release().await.unwrap();
    settle().await;
    assert!(dog.status("r").unwrap().held);
    locker.try_read("r").await.unwrap().release().await.unwrap();
    assert_eq!(dog.shutdown().await.len(), 1);
}

/// Returns a locker whose requests for locks are lost while the switch is on.
fn away_at_will() -> (Counted, Arc<AtomicBool>) {
    let is_away = Arc::new(AtomicBool::new(false));
    let plan = {
        let is_away = is_away.clone();
        move |operation| match operation {
            Operation::Acquire if is_away.load(Ordering::Relaxed) => Fault::Lost,
            _ => Fault::None,
        }
    };
    (counted(plan), is_away)
}

/// What the queue knows is of before: then, a writer held the key.
#[tokio::test(start_paused = true)]
async fn a_reader_that_gets_no_reply_is_not_told_that_another_holds_the_key() {
    let (counted, is_away) = away_at_will();
    let writer = counted.locker.lock("k").await.unwrap();
    assert!(is_refused(&counted.locker.read("k").wait_at_most(ms(10)).await));
    writer.release().await.unwrap();
    is_away.store(true, Ordering::Relaxed);
    for limit in [100, 700] {
        let failed = counted.locker.read("k").wait_at_most(ms(limit)).await.unwrap_err();
        assert!(failed.is_timeout(), "{failed}");
    }
}

/// The same for a request that doesn't wait, where another of its process waits for the server.
#[tokio::test(start_paused = true)]
async fn a_reader_behind_one_that_got_no_reply_is_not_told_that_another_holds_the_key() {
    let (counted, is_away) = away_at_will();
    is_away.store(true, Ordering::Relaxed);
    let writer = waits(counted.locker.lock("k")).await;
    for request in [counted.locker.try_read("k"), counted.locker.try_permit("k", 2)] {
        let failed = request.await.unwrap_err();
        assert!(failed.is_timeout(), "{failed}");
    }
    writer.abort();
    // The server says that another holds it, for as long as its ttl lasts.
    is_away.store(false, Ordering::Relaxed);
    counted.store.give(&"k".into(), Token::random(), ms(5_000));
    let writer = waits(counted.locker.lock("k")).await;
    assert!(is_refused(&counted.locker.try_read("k").await));
    is_away.store(true, Ordering::Relaxed);
    assert!(is_refused(&counted.locker.try_read("k").await), "without a request");
    sleep(ms(5_100)).await;
    let failed = counted.locker.try_read("k").await.unwrap_err();
    assert!(failed.is_timeout(), "{failed}");
    writer.abort();
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_for_several_keys_holds_new_readers_of_one_back() {
    let locker = Locker::in_memory();
    let reader = locker.read("a").await.unwrap();
    let both = waits(locker.lock_all(["a", "b"])).await;
    assert!(is_refused(&locker.try_read("a").await));
    let behind = waits(locker.read("a")).await;
    // Only at the key in whose line it stands, as on a server.
    locker.try_read("b").await.unwrap().release().await.unwrap();
    sleep(ms(10_000)).await;
    assert!(!both.is_finished() && !behind.is_finished());
    reader.release().await.unwrap();
    let both = both.await.unwrap().unwrap();
    settle().await;
    assert!(!behind.is_finished());
    let released = Instant::now();
    both.release().await.unwrap();
    drop(behind.await.unwrap().unwrap());
    assert_eq!(released.elapsed(), ms(0), "it was notified");
    locker.try_read("a").await.unwrap().release().await.unwrap();
}

/// Starts readers. Each comes before the one before has left, so that the key is never free by itself.
async fn stream_of_readers(key: &'static str, locker: impl Fn() -> Locker) -> Vec<JoinHandle<()>> {
    let each = |n: u64| {
        let locker = locker();
        tokio::spawn(async move {
            sleep(ms(25 * n)).await;
            loop {
                let reader = locker.read(key).await.unwrap();
                sleep(ms(100)).await;
                reader.release().await.unwrap();
            }
        })
    };
    let readers = (0..4).map(each).collect();
    sleep(ms(500)).await;
    readers
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_for_several_keys_gets_in_under_a_stream_of_readers() {
    let locker = Locker::in_memory();
    let readers = stream_of_readers("a", || locker.clone()).await;
    for turn in 0..10 {
        let began = Instant::now();
        let both = locker.lock_all(["b", "a"]).wait_at_most(ms(5_000)).await.unwrap();
        assert!(began.elapsed() <= ms(150), "turn {turn}: {:?}", began.elapsed());
        both.release().await.unwrap();
        // Readers go on.
        drop(locker.read("a").wait_at_most(ms(1_000)).await.unwrap());
    }
    readers.iter().for_each(JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_for_several_keys_and_leaves_or_is_not_polled_holds_nobody_back() {
    let locker = Locker::in_memory();
    let _reader = locker.read("a").await.unwrap();
    let both = || locker.lock_all(["a", "b"]);
    let began = Instant::now();
    let gives_up = waits(both().wait_at_most(ms(100))).await;
    let behind = waits(locker.read("a")).await;
    assert!(is_refused(&gives_up.await.unwrap()));
    drop(behind.await.unwrap().unwrap());
    assert_eq!(began.elapsed(), ms(100));
    let aborted = waits(both()).await;
    let behind = waits(locker.read("a")).await;
    aborted.abort();
    drop(behind.await.unwrap().unwrap());
    assert_eq!(began.elapsed(), ms(100));
    // It asks, enters the line, asks again, and isn't polled any longer.
    let mut parked = Box::pin(both().into_future());
    for _ in 0..20 {
        poll_once(parked.as_mut());
    }
    assert!(is_refused(&locker.try_read("a").await));
    let behind = locker.read("a").await.unwrap();
    assert!(began.elapsed() <= ms(2_100), "{:?}", began.elapsed());
    // It is in no line any longer, and goes back when it is polled again.
    let both = tokio::spawn(parked);
    sleep(ms(1_000)).await;
    assert!(is_refused(&locker.try_read("a").await) && !both.is_finished());
    behind.release().await.unwrap();
    both.abort();
    sleep(ms(1)).await;
    locker.try_read("a").await.unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_token_that_reads_already_passes_one_that_waits_for_several_keys() {
    let locker = Locker::in_memory();
    let one = || locker.try_read("a").token("me".parse().unwrap());
    let first = one().await.unwrap();
    let both = waits(locker.lock_all(["a", "b"])).await;
    let second = one().await.unwrap();
    assert!(is_refused(&locker.try_read("a").await));
    drop((first, second));
    both.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_for_several_keys_holds_back_the_readers_of_other_lockers() {
    let server = EmbeddedServer::new();
    let [here, there, other] = [(); 3].map(|()| Locker::builder().in_memory_with(&server));
    let reader = here.read("a").await.unwrap();
    let set = |locker: &Locker| locker.lock_all(["a", "b"]);
    let (one, two) = (waits(set(&here)).await, waits(set(&there)).await);
    one.abort();
    settle().await;
    assert!(is_refused(&other.try_read("a").await), "the other stands there still");
    let behind = waits(other.read("a")).await;
    reader.release().await.unwrap();
    let two = two.await.unwrap().unwrap();
    settle().await;
    assert!(!behind.is_finished());
    two.release().await.unwrap();
    drop(behind.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_writer_holds_back_the_readers_of_other_lockers() {
    let server = EmbeddedServer::new();
    let [here, there, other] = [(); 3].map(|()| Locker::builder().in_memory_with(&server));
    let reader = here.read("k").await.unwrap();
    let writer = waits(there.lock("k")).await;
    assert!(is_refused(&other.try_read("k").await));
    let behind = waits(other.read("k")).await;
    sleep(ms(10_000)).await;
    assert!(is_refused(&other.try_read("k").await), "it still waits");
    assert!(!writer.is_finished() && !behind.is_finished());
    reader.release().await.unwrap();
    let guard = writer.await.unwrap().unwrap();
    settle().await;
    assert!(!behind.is_finished());
    guard.release().await.unwrap();
    drop(behind.await.unwrap().unwrap());
    // Nothing of the writer is left to hold readers back.
    let (_one, _other) = (here.try_read("k").await.unwrap(), other.try_read("k").await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_writer_gets_in_under_the_readers_of_other_lockers() {
    let server = EmbeddedServer::new();
    let writers = Locker::builder().in_memory_with(&server);
    let readers = stream_of_readers("k", || Locker::builder().in_memory_with(&server)).await;
    for turn in 0..10 {
        let began = Instant::now();
        let writer = writers.lock("k").wait_at_most(ms(5_000)).await.unwrap();
        assert!(began.elapsed() <= ms(150), "turn {turn}: {:?}", began.elapsed());
        writer.release().await.unwrap();
        drop(writers.read("k").wait_at_most(ms(1_000)).await.unwrap());
    }
    readers.iter().for_each(JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_leaves_or_is_not_polled_holds_no_reader_of_another_locker_back() {
    let server = EmbeddedServer::new();
    let [here, there] = [(); 2].map(|()| Locker::builder().in_memory_with(&server));
    let _reader = here.read("k").await.unwrap();
    let began = Instant::now();
    let gives_up = waits(there.lock("k").wait_at_most(ms(100))).await;
    let behind = waits(here.read("k")).await;
    assert!(is_refused(&gives_up.await.unwrap()));
    drop(behind.await.unwrap().unwrap());
    assert_eq!(began.elapsed(), ms(100));
    let aborted = waits(there.lock("k")).await;
    let behind = waits(here.read("k")).await;
    aborted.abort();
    drop(behind.await.unwrap().unwrap());
    assert_eq!(began.elapsed(), ms(100));
    let mut parked = Box::pin(there.lock("k").into_future());
    for _ in 0..20 {
        poll_once(parked.as_mut());
    }
    assert!(is_refused(&here.try_read("k").await));
    let behind = here.read("k").await.unwrap();
    assert!(began.elapsed() <= ms(2_100), "{:?}", began.elapsed());
    // It goes back to the line when it is polled again.
    let writer = tokio::spawn(parked);
    sleep(ms(1_000)).await;
    assert!(is_refused(&here.try_read("k").await) && !writer.is_finished());
    behind.release().await.unwrap();
    writer.abort();
    settle().await;
    here.try_read("k").await.unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_next_who_has_the_place_of_a_writer_that_gave_up_holds_back_none_that_it_shares_with() {
    for is_open in [true, false] {
        let server = EmbeddedServer::new();
        let [here, there, other] = [(); 3].map(|()| Locker::builder().in_memory_with(&server));
        let request = |locker: &Locker| if is_open { locker.read("k") } else { locker.permit("k", 5) };
        let _shares = request(&other).await.unwrap();
        let began = Instant::now();
        let writer = waits(here.lock("k").wait_at_most(ms(100))).await;
        // The next of that locker may share the key, or has to wait all the same.
        let next = waits(here.read("k")).await;
        let behind = waits(request(&there)).await;
        assert!(is_refused(&writer.await.unwrap()));
        if is_open {
            let _both = (next.await.unwrap().unwrap(), behind.await.unwrap().unwrap());
            assert_eq!(began.elapsed(), ms(100));
        } else {
            // A permit that comes later waits for a reader, as on a server.
            next.abort();
            drop(behind.await.unwrap().unwrap());
            assert_eq!(began.elapsed(), ms(100));
        }
    }
}

type Ask = fn(&Locker) -> LockRequest;

/// Starts holders in lockers of their own that overlap, so that the key is never free by itself.
fn overlapping(server: &EmbeddedServer, request: Ask) -> Vec<JoinHandle<()>> {
    let each = |n: u64| {
        let locker = Locker::builder().in_memory_with(server);
        tokio::spawn(async move {
            sleep(ms(30 * n)).await;
            loop {
                let guard = request(&locker).await.unwrap();
                sleep(ms(90)).await;
                guard.release().await.unwrap();
            }
        })
    };
    (0..3).map(each).collect()
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_one_locker_gets_in_among_the_holders_of_others_who_share_the_key() {
    let (readers, writer): (Ask, Ask) = (|locker| locker.read("k"), |locker| locker.lock("k"));
    let (permits, one_permit): (Ask, Ask) = (|locker| locker.permit("k", 5), |locker| locker.permit("k", 1));
    let cases = [(permits, readers), (permits, one_permit), (readers, permits), (readers, writer), (permits, writer)];
    for (n, (others, waits_for)) in cases.into_iter().enumerate() {
        let server = EmbeddedServer::new();
        let tasks = overlapping(&server, others);
        sleep(ms(500)).await;
        let locker = Locker::builder().in_memory_with(&server);
        let began = Instant::now();
        drop(waits_for(&locker).wait_at_most(ms(5_000)).await.unwrap());
        assert!(began.elapsed() <= ms(150), "case {n}: {:?}", began.elapsed());
        // One that waits in the queue of its locker, behind another.
        let first = waits(if n < 2 { readers(&locker) } else { permits(&locker) }).await;
        let writer = waits(writer(&locker).wait_at_most(ms(5_000))).await;
        first.await.unwrap().unwrap().release().await.unwrap();
        drop(writer.await.unwrap().unwrap());
        tasks.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_deleted_by_hand_is_taken_by_the_first_in_the_line_however_seldom_it_polls() {
    let server = EmbeddedServer::new();
    let seldom = Locker::builder().poll_every(ms(60_000)).in_memory_with(&server);
    let [often, holds] = [(); 2].map(|()| Locker::builder().in_memory_with(&server));
    let _held = holds.lock("k").await.unwrap();
    let first = waits(seldom.lock("k")).await;
    let second = waits(often.lock("k")).await;
    sleep(ms(100)).await;
    assert!(server.lose("k"));
    let deleted = Instant::now();
    first.await.unwrap().unwrap().release().await.unwrap();
    assert!(deleted.elapsed() <= ms(500), "{:?}", deleted.elapsed());
    drop(second.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn lockers_on_one_server_take_turns_however_many_wait_in_each() {
    let server = EmbeddedServer::new();
    let [busy, quiet, reads] = [(); 3].map(|()| Locker::builder().in_memory_with(&server));
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let locker = busy.clone();
            tokio::spawn(async move {
                loop {
                    let guard = locker.lock("k").await.unwrap();
                    sleep(ms(5)).await;
                    guard.release().await.unwrap();
                }
            })
        })
        .collect();
    sleep(ms(100)).await;
    for turn in 0..10 {
        let began = Instant::now();
        drop(quiet.lock("k").wait_at_most(ms(10_000)).await.unwrap());
        assert!(began.elapsed() <= ms(300), "turn {turn}: {:?}", began.elapsed());
        drop(reads.read("k").wait_at_most(ms(10_000)).await.unwrap());
        assert!(began.elapsed() <= ms(600), "turn {turn}: {:?}", began.elapsed());
    }
    tasks.iter().for_each(JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn of_several_keys_a_reader_is_held_back_at_the_one_that_is_waited_for() {
    let locker = Locker::in_memory();
    let (a, b) = (locker.read("a").await.unwrap(), locker.read("b").await.unwrap());
    let both = waits(locker.lock_all(["a", "b"])).await;
    assert!(is_refused(&locker.try_read("a").await));
    drop(locker.try_read("b").await.unwrap());
    a.release().await.unwrap();
    settle().await;
    // It has gone to the other line.
    drop(locker.try_read("a").await.unwrap());
    assert!(is_refused(&locker.try_read("b").await));
    b.release().await.unwrap();
    both.await.unwrap().unwrap().release().await.unwrap();
}
