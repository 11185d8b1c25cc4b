//! The order of events, and what becomes of locks, to the millisecond: under paused time, on a store that fails as
//! each test says.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, advance, sleep, timeout};

use super::*;
use crate::store::faulty::{Fault, FaultyStore, Operation};
use crate::store::memory::MemoryStore;
use crate::{Loss, Token};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Renewed every second, lost 2,968 ms after the last renewal was sent.
const TTL: Duration = ms(3_000);

fn locker(plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Locker {
    locker_on(Arc::new(MemoryStore::new()), plan)
}

fn locker_on(store: Arc<MemoryStore>, plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Locker {
    Locker::builder().ttl(TTL).command_timeout(ms(500)).build(Box::new(FaultyStore::new(store, plan)), None)
}

fn renewals(fault: Fault) -> impl Fn(Operation) -> Fault + Send + Sync + 'static {
    move |called| if called == Operation::Renew { fault } else { Fault::None }
}

fn lease(key: &str) -> Lease {
    Lease::new(key, Token::random(), TTL)
}

/// The events that a callback got, in short form.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, event: &WatchEvent) {
        self.0.lock().unwrap().push(short(event));
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    fn watchdog(&self, locker: &Locker) -> WatchDog {
        let log = self.clone();
        WatchDog::builder(locker).on_event(move |event| log.add(event)).build()
    }
}

fn short(event: &WatchEvent) -> String {
    let what = match event {
        WatchEvent::Obtained { .. } => "obtained".to_owned(),
        WatchEvent::Renewed { count, .. } => format!("renewed {count}"),
        WatchEvent::RenewFailed { count, .. } => format!("failed {count}"),
        WatchEvent::Lost { loss, .. } => format!("lost {loss:?}"),
        WatchEvent::Released { .. } => "released".to_owned(),
        WatchEvent::Stopped { reason: Some(reason), .. } => match &**reason {
            Error::Closed => "stopped: closed".to_owned(),
            Error::ShutDown => "stopped: shut down".to_owned(),
            Error::NoRuntime => "stopped: no runtime".to_owned(),
            reason => format!("stopped: {reason}"),
        },
        WatchEvent::Stopped { reason: None, .. } => "stopped".to_owned(),
    };
    format!("{} {what}", event.key())
}

/// A callback that returns only when the test lets it go, once for each event.
fn blocked(log: &Log) -> (impl Fn(&WatchEvent) + Send + Sync + 'static, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (let_go, wait) = mpsc::channel();
    let (entered, entries) = mpsc::channel();
    let (log, wait) = (log.clone(), Mutex::new(wait));
    let callback = move |event: &WatchEvent| {
        entered.send(()).ok();
        // Once the test has dropped the sender, it returns at once.
        wait.lock().unwrap().recv().ok();
        log.add(event);
    };
    (callback, let_go, entries)
}

/// Lets time pass while the callback blocks: paused time doesn't advance by itself then.
async fn step(duration: Duration) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        advance(ms(20)).await;
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_has_its_renewals_told_and_then_one_end() {
    let locker = locker(|_| Fault::None);
    for (end, last) in [(0, "k released"), (1, "k stopped"), (2, "k stopped"), (3, "k released")] {
        let log = Log::default();
        let dog = log.watchdog(&locker);
        let weak = dog.downgrade();
        dog.watch(locker.lock("k").await.unwrap()).unwrap();
        for _ in 0..2 {
            sleep(ms(1_100)).await;
            dog.delivered().await;
        }
        let outbox = dog.inner().registry.outbox.clone();
        match end {
            0 => dog.release("k").await.unwrap(),
            1 => drop(dog.unwatch("k").unwrap()),
            2 => assert_eq!(dog.shutdown().await.len(), 1),
            _ => drop(dog),
        }
        sleep(ms(9_000)).await;
        outbox.delivered().await;
        assert_eq!(log.all(), ["k renewed 1", "k renewed 1", last]);
        assert!(weak.upgrade().is_none_or(|dog| dog.is_empty() && !dog.contains("k")));
        // A stopped lock is kept, and is free when its ttl has ended.
        assert_eq!(locker.inspect("k").await.unwrap(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_told_when_it_happens_and_the_lock_leaves_by_itself() {
    let locker = locker(renewals(Fault::Refused));
    let lost_at = Arc::new(OnceLock::new());
    let log = Log::default();
    let dog = WatchDog::builder(&locker)
        .on_event({
            let (log, lost_at) = (log.clone(), lost_at.clone());
            move |event| {
                log.add(event);
                if let WatchEvent::Lost { .. } = event {
                    lost_at.get_or_init(Instant::now);
                }
            }
        })
        .build();
    let start = Instant::now();
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    sleep(ms(2_960)).await;
    assert!(dog.status("k").is_some_and(|status| status.held && status.last_error.is_some()));
    sleep(ms(20)).await;
    assert!(dog.is_empty() && dog.status("k").is_none());
    assert!(matches!(dog.release("k").await, Err(Error::NotHeld { .. })));
    sleep(ms(9_000)).await;
    assert_eq!(*lost_at.get().unwrap() - start, ms(2_968));
    let told = log.all();
    assert!(told.len() > 3 && told[..told.len() - 1].iter().all(|event| event == "k failed 1"), "{told:?}");
    assert_eq!(told.last().unwrap(), "k lost Expired");
}

#[tokio::test(start_paused = true)]
async fn failures_and_recoveries_come_in_order() {
    let calls = AtomicU32::new(0);
    let locker = locker(move |operation| match operation {
        Operation::Renew if calls.fetch_add(1, Ordering::Relaxed) % 3 == 1 => Fault::Refused,
        _ => Fault::None,
    });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    sleep(ms(4_500)).await;
    let cycle = ["k renewed 1", "k failed 1", "k renewed 1", "k renewed 1", "k failed 1"];
    assert_eq!(log.all()[..5], cycle);
    assert_eq!(dog.status("k").unwrap().last_error.is_some(), log.all().last().unwrap() == "k failed 1");
}

#[tokio::test(start_paused = true)]
async fn a_callback_that_blocks_delays_no_renewal_and_is_told_later_how_many_there_were() {
    let locker = locker(|_| Fault::None);
    let log = Log::default();
    let (callback, let_go, entries) = blocked(&log);
    let dog = WatchDog::builder(&locker).on_event(callback).build();
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    step(ms(1_100)).await;
    entries.recv().unwrap();
    step(ms(14_000)).await;
    assert_eq!(dog.status("k").map(|status| (status.held, status.renewals)), Some((true, 15)));
    dog.release("k").await.unwrap();
    drop(let_go);
    dog.delivered().await;
    assert_eq!(log.all(), ["k renewed 1", "k renewed 14", "k released"]);
}

#[tokio::test(start_paused = true)]
async fn no_loss_is_dropped_however_long_the_callback_blocks() {
    let failing = Arc::new(AtomicBool::new(false));
    let locker = locker({
        let failing = failing.clone();
        move |operation| match operation {
            Operation::Renew if failing.load(Ordering::Relaxed) => Fault::Refused,
            _ => Fault::None,
        }
    });
    let log = Log::default();
    let (callback, let_go, entries) = blocked(&log);
    let dog = WatchDog::builder(&locker).on_event(callback).build();
    let mut events = dog.subscribe();
    for n in 0..500 {
        dog.watch(locker.lock(format!("{n}")).await.unwrap()).unwrap();
    }
    step(ms(1_100)).await;
    entries.recv().unwrap();
    failing.store(true, Ordering::Relaxed);
    step(ms(4_000)).await;
    assert!(dog.is_empty());
    drop(let_go);
    dog.delivered().await;
    let told = log.all();
    for n in 0..500 {
        let key = format!("{n} ");
        let of_key: Vec<_> = told.iter().filter(|event| event.starts_with(&key)).collect();
        // Renewed, failed, lost, however many failures there were.
        assert!(of_key.len() <= 3, "{of_key:?}");
        assert_eq!(*of_key.last().unwrap(), &format!("{n} lost Expired"));
    }
    assert_eq!(told.iter().filter(|event| event.ends_with("lost Expired")).count(), 500);
    // The stream has only the latest events, and reports how many it has dropped.
    assert!(matches!(events.try_recv(), Err(broadcast::error::TryRecvError::Lagged(_))));
}

#[tokio::test(start_paused = true)]
async fn a_callback_that_panics_is_told_the_next_event() {
    let locker = locker(|_| Fault::None);
    let log = Log::default();
    let dog = WatchDog::builder(&locker)
        .on_event({
            let log = log.clone();
            move |event| {
                log.add(event);
                panic!("as it should");
            }
        })
        .build();
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    sleep(ms(2_500)).await;
    dog.release("k").await.unwrap();
    dog.delivered().await;
    assert_eq!(log.all(), ["k renewed 1", "k renewed 1", "k released"]);
}

#[tokio::test(start_paused = true)]
async fn keys_are_added_and_removed_from_within_the_callback() {
    let locker = locker(|_| Fault::None);
    let this: Arc<OnceLock<WeakWatchDog>> = Arc::default();
    let log = Log::default();
    let spare = Arc::new(Mutex::new(Some(locker.lock("k").await.unwrap())));
    let dog = WatchDog::builder(&locker)
        .on_event({
            let (this, log, spare) = (this.clone(), log.clone(), spare.clone());
            move |event| {
                log.add(event);
                let dog = this.get().unwrap().upgrade().unwrap();
                match (event, event.key().as_bytes()) {
                    (WatchEvent::Renewed { .. }, b"first") => {
                        assert!(dog.status("first").is_some() && dog.len() == 1);
                        assert!(dog.unwatch("first").is_some());
                    }
                    (WatchEvent::Stopped { .. }, b"first") => {
                        dog.watch(spare.lock().unwrap().take().unwrap()).unwrap();
                        Handle::current().block_on(dog.release("k")).unwrap();
                        tokio::spawn(dog.watch_lease(lease("k")).obtain_when_free(true).into_future());
                    }
                    _ => {}
                }
            }
        })
        .build();
    this.get_or_init(|| dog.downgrade());
    // The spare lock is renewed by its guard in the meantime.
    dog.watch(locker.lock("first").await.unwrap()).unwrap();
    sleep(ms(1_500)).await;
    dog.delivered().await;
    sleep(ms(100)).await;
    dog.delivered().await;
    assert_eq!(log.all(), ["first renewed 1", "first stopped", "k released", "k obtained"]);
    // What the callback did keeps no handle alive.
    drop(dog);
    assert!(this.get().unwrap().upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_watched_is_refused_and_the_lock_stays() {
    let locker = locker(|_| Fault::None);
    let dog = WatchDog::builder(&locker).build();
    let guard = locker.lock_all(["a", "b"]).await.unwrap();
    let token = guard.token().clone();
    dog.watch(guard).unwrap();
    let refused = |result| matches!(result, Err(Error::AlreadyWatched { key }) if key == "b".into());
    // The same lock again, as a guard: the guard is dropped, but the lock is not released.
    let again = locker.obtain("b").token(token.clone()).await.unwrap();
    assert!(refused(dog.watch(again)));
    assert!(refused(dog.watch_lease(Lease::new("b", token, TTL)).await));
    assert!(refused(dog.watch_lease(lease("b")).obtain_when_free(true).await));
    sleep(ms(9_000)).await;
    assert!(dog.status("a").unwrap().held && dog.status("b").unwrap().held);
    assert_eq!(dog.len(), 1);

    // A lock under another token is released, as that of any dropped guard.
    let elsewhere = Locker::in_memory();
    assert!(refused(dog.watch(elsewhere.lock("b").await.unwrap())));
    sleep(ms(1)).await;
    assert_eq!(elsewhere.inspect("b").await.unwrap(), None);
    dog.release("b").await.unwrap();
    assert!(dog.is_empty() && !dog.contains("a"));
}

#[tokio::test(start_paused = true)]
async fn a_lost_guard_is_refused_and_nothing_is_told() {
    let locker = locker(|_| Fault::None);
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let guard = locker.lock("k").no_renewal().await.unwrap();
    advance(TTL).await;
    assert!(matches!(dog.watch(guard), Err(Error::NotHeld { loss: Loss::Expired, .. })));
    sleep(TTL).await;
    assert!(log.all().is_empty() && dog.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_at_once_and_refused_where_it_is_not_held() {
    let locker = locker(|_| Fault::None);
    let log = Log::default();
    let builder = WatchDog::builder(&locker).renew_every(ms(700));
    let dog = builder
        .on_event({
            let log = log.clone();
            move |event| log.add(event)
        })
        .build();
    let held = locker.lock("k").await.unwrap().into_lease();
    advance(ms(2_900)).await;
    dog.watch_lease(held).await.unwrap();
    assert!(locker.inspect("k").await.unwrap().unwrap().remaining.unwrap() > ms(2_900));
    assert!(matches!(dog.watch_lease(lease("free")).await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    let _other = locker.lock("taken").await.unwrap();
    assert!(matches!(dog.watch_lease(lease("taken")).await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    for too in [ms(0), TTL] {
        let refused = dog.watch_lease(lease("new")).renew_every(too).obtain_when_free(true).await;
        assert!(matches!(refused, Err(Error::InvalidRenewal(_))));
    }
    assert_eq!(dog.len(), 1);
    sleep(ms(1_500)).await;
    assert_eq!(log.all(), ["k renewed 1", "k renewed 1"]);
}

#[tokio::test(start_paused = true)]
async fn closing_does_not_wait_for_requests_of_a_lease_that_were_answered() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let dog = WatchDog::builder(&locker).build();
    let held = locker.lock("k").await.unwrap().into_lease();
    dog.watch_lease(held).await.unwrap();
    sleep(ms(10)).await;
    drop(dog);
    let began = Instant::now();
    locker.close().await;
    assert!(began.elapsed() < ms(1), "{:?}", began.elapsed());
    assert_eq!(store.grants_of(&"k".into()), [None], "it is the lease's again");
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_obtained_as_soon_as_it_is_free_and_kept() {
    let locker = locker(|_| Fault::None);
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let other = locker.lock("k").await.unwrap();
    let lease = lease("k");
    dog.watch_lease(lease.clone()).obtain_when_free(true).await.unwrap();
    assert!(dog.contains("k") && dog.len() == 1 && !dog.status("k").unwrap().held);
    sleep(ms(20_000)).await;
    assert!(log.all().is_empty());
    other.release().await.unwrap();
    let freed = Instant::now();
    while !dog.status("k").unwrap().held {
        sleep(ms(1)).await;
    }
    assert!(freed.elapsed() <= ms(251), "{:?}", freed.elapsed());
    sleep(ms(2_500)).await;
    assert_eq!(log.all(), ["k obtained", "k renewed 1", "k renewed 1"]);
    assert_eq!(locker.inspect("k").await.unwrap().unwrap().token, *lease.token());
    dog.release("k").await.unwrap();
    assert_eq!(locker.inspect("k").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_is_waited_for_and_metadata_is_left_alone() {
    let back = Instant::now() + ms(2_000);
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), move |_| if Instant::now() < back { Fault::Refused } else { Fault::None });
    let healthy = locker_on(store, |_| Fault::None);
    let lease = healthy.lock("k").metadata("host-3").await.unwrap().into_lease();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    dog.watch_lease(lease).obtain_when_free(true).await.unwrap();
    dog.watch_lease(self::lease("other")).obtain_when_free(true).await.unwrap();
    assert!(matches!(dog.watch_lease(self::lease("at-once")).await, Err(Error::Redis(_))));
    sleep(ms(2_600)).await;
    let mut told = log.all();
    told.sort();
    assert_eq!(told, ["k obtained", "other obtained"]);
    assert_eq!(healthy.inspect("k").await.unwrap().unwrap().metadata, b"host-3");
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_with_its_reason_and_leaves_no_task() {
    let locker = locker(|_| Fault::None);
    let before = Handle::current().metrics().num_alive_tasks();
    let held = locker.lock_all(["a", "b", "c", "d"]).await.unwrap();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    for key in ["a", "b", "c", "d"] {
        dog.watch_lease(lease(key)).obtain_when_free(true).await.unwrap();
    }
    sleep(ms(500)).await;
    assert_eq!(dog.unwatch("a"), None);
    dog.release("b").await.unwrap();
    dog.delivered().await;
    assert_eq!(log.all(), ["a stopped", "b stopped"]);
    // The locker is closed: only locks that are held are kept on.
    let closing = tokio::spawn({
        let locker = locker.clone();
        async move { locker.close().await }
    });
    sleep(ms(1)).await;
    dog.delivered().await;
    let mut told = log.all();
    told.sort();
    assert_eq!(told, ["a stopped", "b stopped", "c stopped: closed", "d stopped: closed"]);
    held.release().await.unwrap();
    closing.await.unwrap();
    drop(dog);
    // The tasks that waited take a moment to end.
    sleep(ms(2_000)).await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), before);
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_releases_guards_and_lets_leases_be() {
    let locker = locker(|_| Fault::None);
    let before = Handle::current().metrics().num_alive_tasks();
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let events = dog.subscribe();
    dog.watch(locker.lock("guard").await.unwrap()).unwrap();
    dog.watch_lease(locker.lock("lease").await.unwrap().into_lease()).await.unwrap();
    let _held = locker.lock("held").ttl(ms(60_000)).no_renewal().await.unwrap();
    dog.watch_lease(lease("held")).obtain_when_free(true).await.unwrap();
    let clone = dog.clone();
    drop(dog);
    assert_eq!(clone.len(), 3);
    let outbox = clone.inner().registry.outbox.clone();
    // On a thread outside of any runtime.
    std::thread::spawn(|| drop(clone)).join().unwrap();
    sleep(ms(1)).await;
    assert_eq!(events.len(), 3);
    assert_eq!(locker.inspect("guard").await.unwrap(), None);
    assert!(locker.inspect("lease").await.unwrap().is_some());
    sleep(TTL).await;
    assert_eq!(locker.inspect("lease").await.unwrap(), None, "nobody renews it");
    // The lock that is held without a watchdog still has its renewer.
    assert_eq!(Handle::current().metrics().num_alive_tasks(), before + 1);
    // The event is delivered by a thread of its own, for which paused time doesn't wait.
    outbox.delivered().await;
    let mut told = log.all();
    told.sort();
    assert_eq!(told, ["guard released", "held stopped", "lease stopped"]);
}

#[tokio::test(start_paused = true)]
async fn shutdown_keeps_the_locks_and_closes_the_watchdog_for_all() {
    let locker = locker(|_| Fault::None);
    let dog = WatchDog::builder(&locker).build();
    dog.watch(locker.lock("guard").await.unwrap()).unwrap();
    dog.watch_lease(locker.lock("lease").await.unwrap().into_lease()).await.unwrap();
    let _held = locker.lock("held").await.unwrap();
    dog.watch_lease(lease("held")).obtain_when_free(true).await.unwrap();
    let other = dog.clone();
    let mut leases = dog.shutdown().await;
    leases.sort_by_key(Lease::key);
    assert_eq!(leases.iter().map(Lease::key).collect::<Vec<_>>(), ["guard".into(), "lease".into()]);
    assert!(other.is_empty());
    assert!(matches!(other.watch(locker.lock("new").await.unwrap()), Err(Error::ShutDown)));
    assert!(matches!(other.watch_lease(lease("new")).obtain_when_free(true).await, Err(Error::ShutDown)));
    sleep(ms(2_900)).await;
    for lease in leases {
        locker.adopt(lease).await.unwrap().release().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_finds_the_lock_lost_says_so_to_all() {
    let store = Arc::new(MemoryStore::new());
    let locker = locker_on(store.clone(), |_| Fault::None);
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let guard = locker.lock("k").await.unwrap();
    let token = guard.token().clone();
    dog.watch(guard).unwrap();
    locker.obtain("k").token(token).await.unwrap().release().await.unwrap();
    assert!(matches!(dog.release("k").await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    dog.delivered().await;
    assert_eq!(log.all(), ["k lost Missing"]);
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_dropped_still_releases_and_is_told() {
    let locker = locker(|operation| match operation {
        Operation::Release => Fault::AnsweredAfter(ms(100)),
        _ => Fault::None,
    });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    let released = timeout(ms(50), dog.release("k")).await;
    assert!(released.is_err());
    dog.delivered().await;
    assert_eq!(log.all(), ["k released"]);
    assert!(dog.is_empty());
    locker.close().await;
}

#[tokio::test(start_paused = true)]
async fn while_it_is_released_a_key_counts_as_watched() {
    let locker = locker(|operation| match operation {
        Operation::Release => Fault::AnsweredAfter(ms(100)),
        _ => Fault::None,
    });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    let releasing = tokio::spawn({
        let dog = dog.clone();
        async move { dog.release("k").await }
    });
    sleep(ms(50)).await;
    // It is free at the server, and is obtained anew here.
    let guard = locker.lock("k").await.unwrap();
    assert!(dog.contains("k") && !dog.status("k").unwrap().held);
    assert!(matches!(dog.release("k").await, Err(Error::NotHeld { .. })));
    releasing.await.unwrap().unwrap();
    dog.watch(guard).unwrap();
    sleep(ms(1_000)).await;
    assert_eq!(log.all(), ["k released", "k renewed 1"]);
}

#[tokio::test(start_paused = true)]
async fn all_are_released_many_at_a_time_and_what_failed_is_answered() {
    let started = AtomicU32::new(0);
    let locker = locker(move |operation| match operation {
        // One of the keys, over and over.
        Operation::Release if started.fetch_add(1, Ordering::Relaxed) == 7 => Fault::Hung,
        Operation::Release => Fault::AnsweredAfter(ms(100)),
        _ => Fault::None,
    });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    for n in 0..256 {
        dog.watch(locker.lock(format!("{n}")).await.unwrap()).unwrap();
    }
    let start = Instant::now();
    let failed = dog.release_all().await;
    assert!(start.elapsed() <= ms(600), "{:?}", start.elapsed());
    assert!(matches!(&failed[..], [(_, Error::Redis(_))]), "{failed:?}");
    assert!(dog.is_empty());
    dog.delivered().await;
    assert_eq!(log.all().len(), 256);
    assert!(log.all().iter().all(|event| event.ends_with("released")));
}

#[test]
fn a_runtime_that_is_gone_is_a_loss_that_is_told() {
    let log = Log::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let dog = runtime.block_on(async {
        let locker = locker(|_| Fault::None);
        let dog = log.watchdog(&locker);
        dog.watch(locker.lock("k").await.unwrap()).unwrap();
        let _held = locker.lock("held").await.unwrap().into_lease();
        dog.watch_lease(lease("held")).obtain_when_free(true).await.unwrap();
        dog
    });
    drop(runtime);
    let patience = std::time::Instant::now() + Duration::from_secs(20);
    while log.all().len() < 2 && std::time::Instant::now() < patience {
        std::thread::yield_now();
    }
    let mut told = log.all();
    told.sort();
    assert_eq!(told, ["held stopped: no runtime", "k lost Expired"]);
    assert!(dog.is_empty());
}

#[tokio::test]
async fn the_callback_runs_beside_who_uses_the_watchdog_and_not_where_renewals_do() {
    let locker = Locker::builder().isolated(true).in_memory();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let dog = WatchDog::builder(&locker)
        .on_event(move |event| {
            let sender = sender.clone();
            if let WatchEvent::Renewed { .. } = event {
                tokio::spawn(async move { sender.send(std::thread::current().id()) });
            }
        })
        .build();
    dog.watch(locker.lock("k").renew_every(ms(1)).await.unwrap()).unwrap();
    assert_eq!(receiver.recv().await.unwrap(), std::thread::current().id());
}

/// Each time that a lock is watched, its events are a beginning, a middle and one end: whatever is done to the
/// watchdog, at whatever moment, and whatever the store does.
async fn random_life(seed: u64) {
    let rng = Mutex::new(fastrand::Rng::with_seed(seed));
    let locker = locker(move |_| {
        let mut rng = rng.lock().unwrap();
        match rng.u8(..20) {
            0..3 => Fault::Refused,
            3 => Fault::Hung,
            4 => Fault::AnswerLost,
            5 => Fault::AnsweredAfter(ms(rng.u64(..600))),
            6 => Fault::Forgotten,
            _ => Fault::None,
        }
    });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut tasks, mut leases) = (tokio::task::JoinSet::new(), Vec::new());
    for _ in 0..40 {
        let key = *rng.choice(["a", "b", "c"]).as_ref().unwrap();
        let (dog, locker, patience) = (dog.clone(), locker.clone(), ms(rng.u64(..900)));
        match rng.u8(..8) {
            0 | 1 => drop(tasks.spawn(async move {
                if let Ok(guard) = locker.try_lock(key).await {
                    dog.watch(guard).ok();
                }
            })),
            2 | 3 => {
                let (lease, wait) = (leases.pop().unwrap_or_else(|| lease(key)), rng.bool());
                tasks.spawn(async move {
                    let watching = dog.watch_lease(lease).obtain_when_free(wait).into_future();
                    timeout(patience, watching).await.ok();
                });
            }
            4 | 5 => drop(tasks.spawn(async move { drop(timeout(patience, dog.release(key)).await) })),
            6 => leases.extend(dog.unwatch(key)),
            _ => sleep(ms(rng.u64(..4_000))).await,
        }
        if rng.u8(..4) == 0 {
            sleep(ms(rng.u64(..50))).await;
        }
    }
    tasks.join_all().await;
    assert_eq!(dog.len(), ["a", "b", "c"].iter().filter(|&&key| dog.contains(key)).count(), "seed {seed}");
    let outbox = dog.inner().registry.outbox.clone();
    match rng.u8(..3) {
        0 => drop(dog),
        1 => drop(dog.release_all().await),
        _ => drop(dog.shutdown().await),
    }
    outbox.delivered().await;
    for key in ["a ", "b ", "c "] {
        let told: Vec<_> = log.all().into_iter().filter(|event| event.starts_with(key)).collect();
        let mut begun = false;
        for event in &told {
            let what = &event[2..];
            let ends = ["lost", "released", "stopped"].iter().any(|end| what.starts_with(end));
            assert!(!(begun && what == "obtained"), "seed {seed}: {told:?}");
            begun = !ends;
        }
        assert!(!begun, "seed {seed}: {told:?}");
    }
}

#[test]
fn whatever_is_done_each_lock_is_told_of_in_order_and_to_its_end() {
    for seed in 0..500 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        fastrand::seed(seed);
        runtime.block_on(random_life(seed));
    }
}

#[test]
fn a_lock_that_is_waited_for_on_a_runtime_that_nobody_drives_can_be_given_up() {
    let [idle, other] = [0; 2].map(|_| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let locker = Locker::builder().command_timeout(ms(100)).in_memory();
    let held = idle.block_on(locker.lock_all(["a", "b"]).into_future()).unwrap();
    let dog = WatchDog::builder(&locker).build();
    for key in ["a", "b"] {
        let lease = Lease::new(key, Token::random(), Duration::from_secs(30));
        idle.block_on(dog.watch_lease(lease).obtain_when_free(true).into_future()).unwrap();
    }
    other.block_on(async {
        let bound = Duration::from_secs(20);
        timeout(bound, dog.release("a")).await.expect("the release waits for a task that nobody runs").unwrap();
        let leases = timeout(bound, dog.shutdown()).await.expect("the shutdown waits for a task that nobody runs");
        assert!(leases.is_empty());
    });
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_only_waited_for_is_reported_as_stopped() {
    let locker = locker(|called| if called == Operation::Release { Fault::Hung } else { Fault::None });
    let log = Log::default();
    let dog = log.watchdog(&locker);
    let _held = locker.lock_all(["dropped", "failed", "all"]).await.unwrap();
    for key in ["dropped", "failed", "all"] {
        dog.watch_lease(lease(key)).obtain_when_free(true).await.unwrap();
    }
    assert!(timeout(ms(1), dog.release("dropped")).await.is_err());
    assert!(matches!(dog.release("failed").await, Err(Error::Redis(_))));
    dog.release_all().await;
    dog.delivered().await;
    assert_eq!(log.all(), ["dropped stopped", "failed stopped", "all stopped"]);
}

#[tokio::test(start_paused = true)]
async fn an_expiry_is_reported_with_what_led_to_it() {
    let failing = Arc::new(AtomicBool::new(true));
    let locker = locker({
        let failing = failing.clone();
        move |called| match called {
            Operation::Renew if failing.load(Ordering::Relaxed) => Fault::Refused,
            // The server has forgotten the lock, and replies so: an earlier failed renewal is not the cause.
            Operation::Renew => Fault::Forgotten,
            _ => Fault::None,
        }
    });
    let dog = WatchDog::builder(&locker).build();
    let mut events = dog.subscribe();
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    let cause = async |events: &mut broadcast::Receiver<WatchEvent>| loop {
        if let WatchEvent::Lost { loss, cause, .. } = events.recv().await.unwrap() {
            return (loss, cause);
        }
    };
    let (loss, reason) = cause(&mut events).await;
    assert!(loss == Loss::Expired && reason.is_some(), "{loss:?} {reason:?}");
    dog.watch(locker.lock("k").await.unwrap()).unwrap();
    sleep(ms(1_500)).await;
    failing.store(false, Ordering::Relaxed);
    let (loss, reason) = cause(&mut events).await;
    assert!(loss == Loss::Missing && reason.is_none(), "{loss:?} {reason:?}");
}

#[tokio::test(start_paused = true)]
async fn a_guard_knows_why_its_latest_renewal_failed_until_one_succeeds() {
    let failing = Arc::new(AtomicBool::new(true));
    let locker = locker({
        let failing = failing.clone();
        move |called| match called {
            Operation::Renew if failing.load(Ordering::Relaxed) => Fault::Refused,
            _ => Fault::None,
        }
    });
    let guard = locker.lock("k").await.unwrap();
    assert!(guard.last_error().is_none());
    sleep(ms(1_100)).await;
    assert!(guard.last_error().is_some());
    failing.store(false, Ordering::Relaxed);
    guard.renew().await.unwrap();
    assert!(guard.last_error().is_none());
    failing.store(true, Ordering::Relaxed);
    guard.renew().await.unwrap_err();
    assert!(guard.last_error().is_some());
    assert_eq!(guard.lost().await, Loss::Expired);
    assert!(guard.last_error().is_some());
}
