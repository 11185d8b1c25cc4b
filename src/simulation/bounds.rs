//! Locks that are held at least or at most for a time: exact timing on the embedded store.

use super::*;
use crate::Token;
use crate::store::faulty::Fault;

/// Returns how long the server keeps the key from now on; `None` if it is free.
fn left(store: &MemoryStore, key: &'static str) -> Option<Duration> {
    store.holder(&key.into()).map(|(_, until)| until - Instant::now())
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_reaches_its_limit_is_lost_just_before_it_and_free_at_once() {
    // The allowance for drift is 2 ms, and 1 % of what was left at the last renewal. Those come every third of the ttl,
    // which is the limit at most, and not in the last half of a third.
    for (ttl, limit, ends) in [
        (3_000, 900, 900 - 3 - 2),
        (3_000, 3_000, 3_000 - 10 - 2),
        (3_000, 3_400, 3_400 - 14 - 2),
        (3_000, 3_600, 3_600 - 6 - 2),
        (3_000, 60_400, 60_400 - 14 - 2),
    ] {
        let store = Arc::new(MemoryStore::new());
        let locker = locker_on(store.clone(), |_| Fault::None);
        let start = Instant::now();
        let guard = locker.lock("k").ttl(ms(ttl)).hold_at_most(ms(limit)).await.unwrap();
        let (at, loss) = loss_of(&guard, start).await;
        assert_eq!((at, loss), (ms(ends), Loss::LimitReached), "ttl {ttl}, limit {limit}");
        sleep(ms(1)).await;
        assert_eq!(left(&store, "k"), None, "released in the background");
        let released = guard.release().await.unwrap_err();
        assert!(matches!(released, Error::NotHeld { loss: Loss::LimitReached, .. }), "{released}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_request_keeps_a_key_beyond_the_limit() {
    for limit in [5, 700, 2_000, 2_001, 3_333, 10_000] {
        let store = Arc::new(MemoryStore::new());
        let locker = locker_on(store.clone(), |_| Fault::None);
        let start = Instant::now();
        let guard = locker.lock("k").hold_at_most(ms(limit)).await.unwrap();
        let look = || {
            assert!(left(&store, "k").is_none_or(|left| Instant::now() + left <= start + ms(limit)), "{limit}");
            assert!(guard.deadline() < start + ms(limit));
        };
        look();
        let calls: [&dyn Fn() -> _; 4] = [
            &|| Box::pin(guard.renew()) as std::pin::Pin<Box<dyn Future<Output = _>>>,
            &|| Box::pin(guard.ensure(ms(60_000))),
            &|| Box::pin(guard.renew_for(ms(90_000))),
            &|| Box::pin(guard.renew_for(ms(1_500))),
        ];
        for call in calls.iter().cycle() {
            sleep(ms(limit / 20)).await;
            if !guard.is_held() {
                break;
            }
            drop(call().await);
            look();
            if limit < 20 {
                sleep(ms(1)).await;
            }
        }
        assert_eq!(guard.check(), Err(Loss::LimitReached), "{limit}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_renewals_fail_before_its_limit_expires() {
    let locker = locker(only(Operation::Renew, Fault::Refused));
    let start = Instant::now();
    let guard = locker.lock("k").hold_at_most(ms(2_500)).await.unwrap();
    assert_eq!(loss_of(&guard, start).await, (ms(1_978), Loss::Expired));
    // Without renewals it does, too.
    let guard = locker.lock("k").no_renewal().hold_at_most(ms(2_500)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::Expired);
    // What has reached the limit needs no renewal, and can't fail any more.
    let guard = locker.lock("k").hold_at_most(ms(1_900)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
    let guard = locker.lock("k").no_renewal().hold_at_most(ms(1_900)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
}

#[tokio::test(start_paused = true)]
async fn a_ttl_that_was_made_shorter_expires_before_the_limit() {
    let locker = locker(only(Operation::Renew, Fault::Lost));
    let guard = locker.lock("k").hold_at_most(ms(1_000)).await.unwrap();
    guard.renew_for(ms(300)).await.unwrap_err();
    assert_eq!(guard.lost().await, Loss::Expired);
}

#[tokio::test(start_paused = true)]
async fn a_limit_makes_no_renewal_more_frequent_and_a_loss_is_found_as_soon_as_ever() {
    let renewals = Arc::new(AtomicU32::new(0));
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), {
        let renewals = renewals.clone();
        move |operation| {
            renewals.fetch_add(u32::from(operation == Operation::Renew), Ordering::Relaxed);
            Fault::None
        }
    });
    let guard = locker.lock("k").ttl(ms(3_000)).hold_at_most(ms(10_500)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
    assert_eq!(renewals.load(Ordering::Relaxed), 10);
    // Also after the ttl has reached the limit.
    let locker = locker_on(store.clone(), |_| Fault::None);
    let start = Instant::now();
    let guard = locker.lock("k").ttl(ms(3_000)).hold_at_most(ms(3_500)).await.unwrap();
    sleep(ms(1_500)).await;
    store.delete(&"k".into());
    assert_eq!(loss_of(&guard, start).await, (ms(2_000), Loss::Missing));
}

#[tokio::test(start_paused = true)]
async fn the_limit_counts_from_the_request_that_was_granted() {
    // Granted at once, and the reply takes 300 ms.
    let locker = locker(only(Operation::Acquire, Fault::AnsweredAfter(ms(300))));
    let start = Instant::now();
    let guard = locker.lock("k").no_renewal().hold_at_most(ms(1_000)).await.unwrap();
    assert_eq!(loss_of(&guard, start).await, (ms(1_000 - 10 - 2), Loss::LimitReached));
    // A wait counts for nothing.
    let locker = super::locker(|_| Fault::None);
    let start = Instant::now();
    let first = locker.lock("k").ttl(ms(60_000)).await.unwrap();
    let second = tokio::spawn(locker.lock("k").no_renewal().hold_at_most(ms(1_000)).into_future());
    sleep(ms(5_000)).await;
    first.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    assert_eq!(loss_of(&second, start).await, (ms(5_000 + 1_000 - 10 - 2), Loss::LimitReached));
}

#[tokio::test(start_paused = true)]
async fn a_limit_is_neither_inherited_nor_lost_when_a_lock_changes_hands_in_a_process() {
    let locker = locker(|_| Fault::None);
    let start = Instant::now();
    let limited = locker.lock("k").hold_at_most(ms(3_000)).await.unwrap();
    let plain = tokio::spawn(locker.lock("k").into_future());
    let limited_too = tokio::spawn(locker.lock("k").hold_at_most(ms(4_000)).into_future());
    sleep(ms(10)).await;
    drop(limited);
    let plain = plain.await.unwrap().unwrap();
    sleep(ms(6_000)).await;
    assert!(plain.is_held());
    drop(plain);
    let limited_too = limited_too.await.unwrap().unwrap();
    let (at, loss) = loss_of(&limited_too, start).await;
    assert_eq!(loss, Loss::LimitReached);
    assert!(at > ms(6_010 + 3_900) && at < ms(6_010 + 4_000), "{at:?}");
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_cannot_work_is_refused_by_name_before_anything_is_sent() {
    let locker = locker(|operation| panic!("{operation:?} was sent"));
    for limit in [Duration::ZERO, Duration::from_nanos(1), ms(1), ms(3)] {
        let refused = locker.lock("k").hold_at_most(limit).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidHold(_)) && refused.to_string().contains("hold_at_most"), "{refused}");
    }
    let locker = super::locker(|_| Fault::None);
    for limit in [ms(4), ms(5), ms(1_000_000), Duration::MAX] {
        let guard = locker.lock("k").hold_at_most(limit).await.unwrap();
        assert!(guard.is_held(), "{limit:?}");
        guard.release().await.unwrap();
    }
    // An interval that the limit leaves no time for is no mistake: there is nothing to renew.
    let guard = locker.lock("k").renew_every(ms(1_000)).hold_at_most(ms(500)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
}

#[tokio::test(start_paused = true)]
async fn what_watches_a_guard_learns_that_the_limit_has_ended_it() {
    let locker = locker(|_| Fault::None);
    let limited = || locker.lock("k").hold_at_most(ms(500));
    let guard = limited().await.unwrap();
    assert_eq!(guard.protect(std::future::pending::<()>()).await, Err(Loss::LimitReached));
    let guard = limited().await.unwrap();
    guard.cancellation_token().cancelled().await;
    assert_eq!(guard.check(), Err(Loss::LimitReached));
    let events = Arc::new(Mutex::new(Vec::new()));
    let dog = crate::WatchDog::builder(&locker)
        .on_event({
            let events = events.clone();
            move |event| events.lock().unwrap().push(format!("{event:?}"))
        })
        .build();
    let guard = limited().await.unwrap();
    let lost = guard.lost();
    dog.watch(guard).unwrap();
    assert_eq!(lost.await, Loss::LimitReached);
    sleep(ms(50)).await;
    dog.shutdown().await;
    let events = events.lock().unwrap();
    assert!(events.iter().any(|event| event.contains("LimitReached")), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_limit_ends_its_own_grant_of_a_token_and_no_other() {
    let locker = locker(|_| Fault::None);
    let token = || "shared".parse().unwrap();
    let limited = locker.lock("k").token(token()).hold_at_most(ms(1_000)).await.unwrap();
    let other = locker.lock("k").token(token()).await.unwrap();
    assert_eq!(limited.lost().await, Loss::LimitReached);
    sleep(ms(5_000)).await;
    assert!(other.is_held());
    other.release().await.unwrap();
}

/// Returns whether the key is taken although nobody holds the lock.
fn is_nobodys(store: &MemoryStore, key: &'static str) -> bool {
    store.holder(&key.into()).is_some_and(|(holder, _)| holder == Token::nobody())
}

#[tokio::test(start_paused = true)]
async fn a_key_stays_taken_for_exactly_the_rest_of_its_least_time_whoever_ends_the_guard_and_how() {
    // Shorter and longer than the ttl of 2,000 ms.
    for least in [300, 1_999, 2_000, 7_000] {
        for how in ["release", "drop", "watchdog"] {
            let store = Arc::new(MemoryStore::new());
            let locker = locker_on(store.clone(), |_| Fault::None);
            let guard = locker.lock("k").hold_at_least(ms(least)).await.unwrap();
            let token = guard.token().clone();
            sleep(ms(100)).await;
            let start = Instant::now();
            match how {
                "release" => guard.release().await.unwrap(),
                "drop" => drop(guard),
                _ => {
                    let dog = crate::WatchDog::builder(&locker).build();
                    dog.watch(guard).unwrap();
                    dog.release("k").await.unwrap();
                }
            }
            assert_eq!(start.elapsed(), Duration::ZERO);
            tokio::task::yield_now().await;
            sleep(ms(1)).await;
            assert_eq!(left(&store, "k"), Some(ms(least - 101)), "{how}");
            assert!(is_nobodys(&store, "k"));
            assert_eq!(locker.inspect("k").await.unwrap(), None);
            for request in [locker.try_lock("k"), locker.try_lock("k").token(token)] {
                assert!(matches!(request.await, Err(Error::NotObtained { .. })), "{how}");
            }
            sleep(ms(least - 102)).await;
            assert!(locker.try_lock("k").await.is_err());
            sleep(ms(1)).await;
            locker.try_lock("k").await.unwrap().release().await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_after_the_least_time_is_like_any_other() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    for least in [0, 500] {
        let guard = locker.lock("k").hold_at_least(ms(least)).await.unwrap();
        let next = tokio::spawn(locker.lock("k").into_future());
        sleep(ms(500)).await;
        guard.release().await.unwrap();
        let start = Instant::now();
        next.await.unwrap().unwrap().release().await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO, "handed over");
    }
    assert_eq!(left(&store, "k"), None);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_gets_the_lock_when_the_least_time_is_over_and_not_before() {
    let locker = Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000)).in_memory();
    let start = Instant::now();
    let guard = locker.lock("k").hold_at_least(ms(3_000)).await.unwrap();
    let waiters = [(); 3].map(|()| tokio::spawn(locker.lock("k").into_future()));
    sleep(ms(200)).await;
    drop(guard);
    for (waiter, lets_go) in waiters.into_iter().zip([3_000, 3_000, 3_000]) {
        let next = waiter.await.unwrap().unwrap();
        let at = start.elapsed();
        assert!(at >= ms(lets_go) && at <= ms(lets_go + 15), "{at:?}");
        drop(next);
    }
}

/// Unfenced, so that every holder could hand it over.
#[tokio::test(start_paused = true)]
async fn nothing_is_handed_over_without_the_server_before_the_least_time_is_over() {
    let locker = Locker::builder().ttl(ms(60_000)).fenced(false).in_memory();
    for (held, expected) in [(200, 3_000), (3_000, 3_000), (5_000, 5_000)] {
        let start = Instant::now();
        let guard = locker.lock("k").hold_at_least(ms(3_000)).await.unwrap();
        let waiter = tokio::spawn(locker.lock("k").into_future());
        sleep(ms(held)).await;
        guard.release().await.unwrap();
        let next = waiter.await.unwrap().unwrap();
        let at = start.elapsed();
        assert!(at >= ms(expected) && at <= ms(expected + 15), "{at:?}");
        next.release().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_obtained_late_is_kept_from_when_it_was_obtained() {
    // Granted after 200 ms of 300: counted from the request, it would be too short.
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), only(Operation::Acquire, Fault::RunAfter(ms(200))));
    let guard = locker.lock("k").hold_at_least(ms(1_000)).await.unwrap();
    guard.release().await.unwrap();
    assert_eq!(left(&store, "k"), Some(ms(1_000)));
}

#[tokio::test(start_paused = true)]
async fn a_release_whose_reply_was_lost_is_a_release_and_prolongs_nothing() {
    let calls = Arc::new(AtomicU32::new(0));
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), {
        let calls = calls.clone();
        move |operation| match operation {
            Operation::Release if calls.fetch_add(1, Ordering::Relaxed) == 0 => Fault::AnswerLost,
            _ => Fault::None,
        }
    });
    let start = Instant::now();
    let guard = locker.lock("k").hold_at_least(ms(1_000)).await.unwrap();
    guard.release().await.unwrap();
    assert!(calls.load(Ordering::Relaxed) > 1 && start.elapsed() > Duration::ZERO);
    assert_eq!(store.holder(&"k".into()).unwrap().1 - start, ms(1_000));
    // In the background as well.
    calls.store(0, Ordering::Relaxed);
    let start = Instant::now();
    drop(locker.lock("other").hold_at_least(ms(1_000)).await.unwrap());
    sleep(ms(700)).await;
    assert!(calls.load(Ordering::Relaxed) > 1);
    assert_eq!(store.holder(&"other".into()).unwrap().1 - start, ms(1_000));
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_run_late_leaves_the_key_for_what_is_left_then() {
    let store = Arc::new(MemoryStore::new());
    let back = Instant::now() + ms(1_500);
    let locker = locker_on(store.clone(), move |operation| match operation {
        Operation::Release if Instant::now() < back => Fault::Refused,
        _ => Fault::None,
    });
    let start = Instant::now();
    drop(locker.lock("k").hold_at_least(ms(4_000)).await.unwrap());
    sleep(ms(1_900)).await;
    assert!(is_nobodys(&store, "k"));
    assert_eq!(store.holder(&"k".into()).unwrap().1 - start, ms(4_000));
    // A server that is away for longer than the ttl lets the lock expire.
    let away = locker_on(store.clone(), only(Operation::Release, Fault::Refused));
    drop(away.lock("other").hold_at_least(ms(4_000)).await.unwrap());
    sleep(ms(2_000)).await;
    assert_eq!(left(&store, "other"), None);
}

#[tokio::test(start_paused = true)]
async fn of_several_keys_those_that_are_left_stay_taken_when_one_is_lost() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let start = Instant::now();
    let guard = locker.lock_all(["a", "b", "c"]).hold_at_least(ms(60_000)).await.unwrap();
    store.delete(&"a".into());
    store.delete(&"c".into());
    store.give(&"c".into(), Token::random(), ms(10_000));
    let loss = guard.lost().await;
    assert_eq!(loss, Loss::Taken);
    drop(guard);
    sleep(ms(1)).await;
    assert_eq!(left(&store, "a"), None, "nothing brings it back");
    assert!(is_nobodys(&store, "b"));
    assert_eq!(store.holder(&"b".into()).unwrap().1 - start, ms(60_000));
    assert!(!is_nobodys(&store, "c"), "it is another's");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_was_not_granted_leaves_nothing() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), only(Operation::Acquire, Fault::AnswerLost));
    locker.try_lock("k").hold_at_least(ms(60_000)).await.unwrap_err();
    // Its future may be dropped as well.
    let slow = locker_on(store.clone(), only(Operation::Acquire, Fault::AnsweredAfter(ms(300))));
    timeout(ms(100), slow.lock("other").hold_at_least(ms(60_000)).into_future()).await.unwrap_err();
    // Or the grant comes too late.
    let late = locker_on(store.clone(), only(Operation::Acquire, Fault::AnsweredAfter(ms(299))));
    late.try_lock("late").ttl(ms(310)).hold_at_least(ms(60_000)).await.unwrap_err();
    sleep(ms(700)).await;
    for key in ["k", "other", "late"] {
        assert_eq!(left(&store, key), None, "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_lost_leaves_nothing_extra() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), only(Operation::Renew, Fault::Refused));
    let guard = locker.lock("k").hold_at_least(ms(60_000)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::Expired);
    drop(guard);
    sleep(ms(30)).await;
    assert_eq!(left(&store, "k"), None);
    // What was deleted by hand, and obtained by another, is not touched.
    let locker = locker_on(store.clone(), |_| Fault::None);
    let guard = locker.lock("k").hold_at_least(ms(60_000)).await.unwrap();
    store.delete(&"k".into());
    let other = locker.try_lock("k").await.unwrap();
    assert!(matches!(guard.release().await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    other.release().await.unwrap();
    assert_eq!(left(&store, "k"), None);
}

#[tokio::test(start_paused = true)]
async fn after_the_end_at_its_limit_the_key_stays_taken_as_well() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let start = Instant::now();
    let guard = locker.lock("k").hold_at_most(ms(1_000)).hold_at_least(ms(5_000)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
    sleep(ms(1)).await;
    assert!(is_nobodys(&store, "k"));
    assert_eq!(store.holder(&"k".into()).unwrap().1 - start, ms(5_000));
}

#[tokio::test(start_paused = true)]
async fn closing_does_not_wait_for_the_least_time() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    drop(locker.lock("k").hold_at_least(ms(60_000)).await.unwrap());
    let start = Instant::now();
    locker.close().await;
    assert!(start.elapsed() <= ms(1), "{:?}", start.elapsed());
    assert!(is_nobodys(&store, "k"));
    let locker = locker_on(store.clone(), |_| Fault::None);
    drop(locker.lock("other").hold_at_least(ms(60_000)).await.unwrap());
    assert_eq!(locker.close_within(ms(10)).await, 0);
    sleep(ms(1_000)).await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn all_keys_of_a_set_stay_taken() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    locker.lock_all(["a", "b"]).hold_at_least(ms(1_000)).await.unwrap().release().await.unwrap();
    assert_eq!((left(&store, "a"), left(&store, "b")), (Some(ms(1_000)), Some(ms(1_000))));
    assert!(matches!(locker.try_lock_all(["b", "c"]).await, Err(Error::NotObtained { key, .. }) if key == "b".into()));
    assert_eq!(left(&store, "c"), None);
}

#[tokio::test(start_paused = true)]
async fn of_several_guards_of_one_token_the_last_leaves_the_key_to_nobody() {
    let token = || "shared".parse().unwrap();
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let start = Instant::now();
    let least = locker.lock("k").token(token()).hold_at_least(ms(5_000)).await.unwrap();
    let other = locker.lock("k").token(token()).ttl(ms(900)).await.unwrap();
    drop(least);
    sleep(ms(100)).await;
    assert!(other.is_held() && !is_nobodys(&store, "k"));
    // A shorter ttl does not let the key expire before its time.
    other.renew_for(ms(200)).await.unwrap();
    assert_eq!(store.holder(&"k".into()).unwrap().1 - start, ms(5_000));
    drop(other);
    sleep(ms(10)).await;
    assert!(is_nobodys(&store, "k"));
    assert_eq!(store.holder(&"k".into()).unwrap().1 - start, ms(5_000));
    assert!(locker.try_lock("k").token(token()).await.is_err());

    // An explicit release ends the lock for all: for the least time of its own guard, or at once.
    let least = locker.lock("other").token(token()).hold_at_least(ms(5_000)).await.unwrap();
    let other = locker.lock("other").token(token()).await.unwrap();
    least.release().await.unwrap();
    assert!(is_nobodys(&store, "other"));
    assert_eq!(other.lost().await, Loss::Taken);
    let least = locker.lock("third").token(token()).hold_at_least(ms(5_000)).await.unwrap();
    let other = locker.lock("third").token(token()).await.unwrap();
    drop(least);
    sleep(ms(10)).await;
    other.release().await.unwrap();
    assert_eq!(left(&store, "third"), None);
}

#[tokio::test(start_paused = true)]
async fn a_lease_has_no_bounds() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let guard = locker.lock("k").hold_at_least(ms(60_000)).hold_at_most(ms(3_000)).await.unwrap();
    let adopted = locker.adopt(guard.into_lease()).await.unwrap();
    sleep(ms(10_000)).await;
    adopted.release().await.unwrap();
    assert_eq!(left(&store, "k"), None);
}

#[tokio::test(start_paused = true)]
async fn a_least_time_that_cannot_work_is_refused_by_name_before_anything_is_sent() {
    let locker = locker(|operation| panic!("{operation:?} was sent"));
    for least in [Duration::from_secs(366 * 24 * 60 * 60), Duration::MAX] {
        let refused = locker.lock("k").hold_at_least(least).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidHold(_)) && refused.to_string().contains("hold_at_least"), "{refused}");
    }
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    for (key, least, rest) in [
        ("a", Duration::ZERO, None),
        ("b", Duration::from_nanos(1), Some(ms(1))),
        ("c", Duration::from_micros(2_500), Some(ms(3))),
        ("d", Duration::from_secs(365 * 24 * 60 * 60), Some(Duration::from_secs(365 * 24 * 60 * 60))),
    ] {
        locker.lock(key).hold_at_least(least).await.unwrap().release().await.unwrap();
        assert_eq!(left(&store, key), rest, "{least:?}");
    }
}

/// The release at the limit finds the key, however long it takes: the ttl isn't cut before the least time is over.
#[tokio::test(start_paused = true)]
async fn after_the_limit_the_key_stays_taken_also_if_the_release_arrives_late() {
    for (ttl, most, least) in [(60_000, 1_000, 5_000), (2_000, 1_000, 5_000), (1_000, 1_000, 2_500)] {
        let store = Arc::new(MemoryStore::new());
        let locker = locker_on(store.clone(), only(Operation::Release, Fault::RunAfter(ms(300))));
        let start = Instant::now();
        let request = locker.lock("k").ttl(ms(ttl)).hold_at_most(ms(most)).hold_at_least(ms(least));
        let guard = request.await.unwrap();
        assert_eq!(loss_of(&guard, start).await, (ms(most), Loss::LimitReached), "exactly");
        assert!(store.holder(&"k".into()).unwrap().1 - start <= ms(least));
        sleep(ms(400)).await;
        assert!(is_nobodys(&store, "k"), "{ttl}");
        let until = store.holder(&"k".into()).unwrap().1 - start;
        assert!(until >= ms(least) && until <= ms(least + 300), "{until:?}");
    }
    // A grant that comes after the limit is too late.
    let locker = locker(only(Operation::Acquire, Fault::AnsweredAfter(ms(300))));
    let late = locker.try_lock("k").hold_at_most(ms(200)).hold_at_least(ms(60_000)).await.unwrap_err();
    assert!(matches!(late, Error::ValidityExpired), "{late}");
}

#[tokio::test(start_paused = true)]
async fn a_lock_whose_ttl_is_as_long_as_its_least_time_is_not_freed_before_when_it_expires() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let start = Instant::now();
    let guard = locker.lock("k").ttl(ms(10_000)).no_renewal().hold_at_least(ms(10_000)).await.unwrap();
    assert_eq!(loss_of(&guard, start).await, (ms(9_898), Loss::Expired));
    sleep(ms(1)).await;
    assert_eq!(left(&store, "k"), Some(ms(10_000 - 9_898 - 1)), "it is not freed before");
    sleep(ms(200)).await;
    assert_eq!(left(&store, "k"), None);
}
