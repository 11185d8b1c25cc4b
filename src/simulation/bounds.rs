//! Locks that are held at least or at most for a time: exact timing on the embedded store.

use super::*;
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
