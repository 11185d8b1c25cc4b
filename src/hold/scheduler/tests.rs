use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::runtime::Builder;
use tokio::task::{unconstrained, yield_now};
use tokio::time::advance;

use super::*;
use crate::hold::timing::{Drift, Renewal};
use crate::hold::{FinalStep, Grant, Hold, Observer, Owned};
use crate::locker::shared::Shared;
use crate::mode::Mode;
use crate::store::faulty::{Fault, FaultyStore, Operation, Ran, Witness};
use crate::store::memory::MemoryStore;
use crate::store::notifications::Subscription;
use crate::store::{Answer, Ending, InLine, Latest, Queueing, Store, Wanted};
use crate::{Key, Locker, Loss, Token};

pub(super) const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(super) const EVERY_200: Renewal = Renewal::Every(ms(200));

/// What has happened, and when: "200: renew 0 1" for a call that renews two locks.
pub(super) struct Log {
    start: Instant,
    lines: Mutex<Vec<(Instant, u64, String)>>,
    calls: AtomicU64,
}

impl Log {
    /// Adds a lock to the line of this call.
    fn add(&self, call: u64, what: &str, lock: &str) {
        let (now, mut lines) = (Instant::now(), self.lines.lock().unwrap());
        match lines.last_mut() {
            Some((at, last, line)) if *last == call && *at == now => *line = format!("{line} {lock}"),
            _ => lines.push((now, call, format!("{what} {lock}"))),
        }
    }

    pub(super) fn note(&self, what: &str, lock: &str) {
        self.add(self.calls.fetch_add(1, Ordering::Relaxed), what, lock);
    }

    /// Takes the lines since the last time.
    pub(super) fn take(&self) -> Vec<String> {
        let lines = mem::take(&mut *self.lines.lock().unwrap());
        lines.into_iter().map(|(at, _, line)| format!("{}: {line}", (at - self.start).as_millis())).collect()
    }
}

impl Witness for Log {
    fn sent(&self, _: Operation, _: Fault) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    fn ran(&self, call: u64, ran: Ran<'_>) {
        match ran {
            Ran::Renew(owned, ..) => self.add(call, "renew", &owned.key().to_string()),
            Ran::Release(owned, ..) => self.add(call, "release", &owned.key().to_string()),
            _ => {}
        }
    }

    fn subscribes(&self, subscription: Subscription) -> Subscription {
        subscription
    }
}

/// Logs what the renewer of a lock reports. A loss is reported twice, and logged once.
struct Reports {
    log: Arc<Log>,
    lock: String,
    loss: Mutex<Option<Loss>>,
}

impl Observer for Reports {
    fn renewed(&self, _: Instant) {
        self.log.note("renewed", &self.lock);
    }

    fn renewal_failed(&self, _: Arc<Error>, _: Duration) {
        self.log.note("failed", &self.lock);
    }

    fn lost(&self, loss: Loss) {
        if self.loss.lock().unwrap().replace(loss) != Some(loss) {
            self.log.note(&format!("{loss:?}"), &self.lock);
        }
    }
}

/// A locker whose store logs what it runs.
pub(super) struct World {
    pub(super) log: Arc<Log>,
    store: Arc<MemoryStore>,
    shared: Arc<Shared>,
}

/// A lock as its guard has it.
pub(super) struct Lock {
    pub(super) hold: Arc<Hold>,
    pub(super) handle: Handle,
}

impl World {
    /// `plan` says what goes wrong with the nth call that renews.
    pub(super) fn new(plan: impl Fn(u64) -> Fault + Send + Sync + 'static) -> Self {
        let log = Arc::new(Log { start: Instant::now(), lines: Mutex::default(), calls: AtomicU64::new(0) });
        let (store, renewals) = (Arc::new(MemoryStore::new()), AtomicU64::new(0));
        let plan = move |operation| match operation {
            Operation::Renew => plan(renewals.fetch_add(1, Ordering::Relaxed)),
            _ => Fault::None,
        };
        let faulty = FaultyStore::new(store.clone(), plan).witnessed(log.clone());
        let locker = Locker::builder().command_timeout(ms(500)).build(Box::new(faulty), None);
        Self { log, store, shared: locker.shared().clone() }
    }

    /// Locks the keys for a minute.
    pub(super) fn lock(&self, keys: &[&str], renewal: Renewal) -> Lock {
        self.lock_for(ms(60_000), keys, renewal, &Runtime::current())
    }

    fn lock_for(&self, ttl: Duration, keys: &[&str], renewal: Renewal, runtime: &Runtime) -> Lock {
        let keys = keys.iter().map(|key| Key::from(*key)).collect();
        let owned = Owned { keys, token: Token::random(), own_token: true, grant: None, mode: Mode::Exclusive };
        let (queueing, latest) = (Queueing::None, Arc::new(Latest::default()));
        let wanted = Wanted {
            owned: owned.clone(),
            metadata: Box::default(),
            ttl,
            fenced: false,
            queueing,
            takes_over: false,
            latest,
            limit: 0,
            since: Instant::now(),
        };
        at_once(self.store.acquire(&wanted, InLine::No, ms(500)));
        let drift = Drift { factor: 0.0, margin: Duration::ZERO };
        let grant = Grant::new(Instant::now(), ttl, None);
        let hold = Arc::new(Hold::new(owned, Box::default(), &grant, drift, renewal.into(), self.log.start, false));
        let (log, lock) = (self.log.clone(), hold.owned.key().to_string());
        hold.observe(Arc::new(Reports { log, lock, loss: Mutex::default() })).unwrap();
        let handle = self.shared.keep(hold.clone(), runtime);
        Lock { hold, handle }
    }

    /// Locks that are all due in 200 ms.
    fn locks(&self, names: &[&str]) -> Vec<Lock> {
        names.iter().map(|name| self.lock(&[name], EVERY_200)).collect()
    }

    /// What happens until then.
    async fn until(&self, millis: u64) -> Vec<String> {
        sleep_until(self.log.start + ms(millis)).await;
        // Each task that wakes up at the same time may wake others.
        for _ in 0..8 {
            yield_now().await;
        }
        self.log.take()
    }
}

impl Lock {
    /// As a guard that is dropped.
    pub(super) fn drop_guard(&self) {
        self.hold.end(Loss::Released);
        assert!(self.hold.set_final_step(FinalStep::Release(None)));
        self.handle.call();
    }
}

/// The embedded store never waits.
fn at_once<T>(answer: Answer<'_, T>) -> T {
    match pin!(unconstrained(answer)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer.unwrap(),
        Poll::Pending => unreachable!(),
    }
}

fn tasks() -> usize {
    Runtime::current().metrics().num_alive_tasks()
}

#[tokio::test(start_paused = true)]
async fn each_runs_when_it_is_due_also_when_it_came_later_than_others() {
    let world = World::new(|_| Fault::None);
    let _late = world.lock_for(ms(900), &["late"], Renewal::Never, &Runtime::current());
    sleep(ms(100)).await;
    let _soon = world.lock_for(ms(200), &["soon"], Renewal::Never, &Runtime::current());
    assert_eq!(
        world.until(900).await,
        ["300: Expired soon", "300: release soon", "900: Expired late", "900: release late"]
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_has_run_rests_until_it_is_due_again() {
    let world = World::new(|call| if call < 3 { Fault::AnsweredAfter(ms(10)) } else { Fault::Forgotten });
    let lock = world.lock(&["a"], EVERY_200);
    for at in [200, 400, 600] {
        world.until(at - 1).await;
        assert_eq!(tasks(), 1);
        assert_eq!(world.until(at).await, [format!("{at}: renew a")]);
        assert_eq!(tasks(), 2, "the scheduler's, and its own");
        assert_eq!(world.until(at + 50).await, [format!("{}: renewed a", at + 10)]);
        assert_eq!(tasks(), 1);
    }
    assert_eq!(world.until(850).await, ["800: renew a", "800: Missing a"]);
    lock.handle.call();
    lock.handle.remove();
    sleep(LINGER).await;
    assert_eq!(tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn of_many_that_are_due_together_not_all_start_at_once() {
    // Locks of two keys run by themselves, those of one are renewed together.
    for keys in [2, 1] {
        let world = World::new(|_| Fault::None);
        let lock = |n| world.lock(&[format!("{n}").as_str(), &format!("{n}x")][..keys], EVERY_200);
        let locks: Vec<_> = (0..2 * AT_A_TIME + 1).map(lock).collect();
        for (at, expected) in [(200, AT_A_TIME), (201, AT_A_TIME), (202, 1)] {
            let happened = world.until(at).await;
            let renewals = happened.iter().filter_map(|line| line.strip_prefix(&format!("{at}: renew ")));
            assert_eq!(renewals.map(|locks| locks.split(' ').count()).sum::<usize>(), expected);
        }
        drop(locks);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_rests_can_be_called_and_can_be_removed() {
    for is_called in [true, false] {
        let world = World::new(|_| Fault::AnsweredAfter(ms(10)));
        let lock = world.lock(&["a"], EVERY_200);
        assert_eq!(world.until(250).await, ["200: renew a", "210: renewed a"]);
        if is_called {
            lock.drop_guard();
            assert_eq!(world.until(300).await, ["250: release a"]);
        } else {
            lock.handle.remove();
            assert_eq!(world.until(300).await, ["250: Expired a"], "nobody renews it any longer");
        }
        assert_eq!(world.until(60_000).await, [""; 0]);
        assert_eq!(tasks(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_called_while_it_runs_looks_again_before_it_rests() {
    let world = World::new(|_| Fault::None);
    let lock = world.lock(&["a"], EVERY_200);
    let (id, later) = (lock.handle.id, Instant::now() + ms(900));
    let mut state = lock.handle.scheduler.state();
    let due = state.take_due(Instant::now() + ms(200), AT_A_TIME);
    assert_eq!(due.runs.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id]);
    for _ in 0..2 {
        assert!(!state.call(id) && state.interrupt(id).is_none());
    }
    assert_eq!(state.rest(id, later), Rest::LookAgain);
    assert_eq!(state.rest(id, later), Rest::Done);
    assert_eq!(state.first_due(), Some(later));
}

#[tokio::test(start_paused = true)]
async fn one_that_is_called_or_interrupted_while_it_waits_for_the_server_looks_at_once() {
    for call in [Handle::call, Handle::interrupt] {
        let world = World::new(|_| Fault::AnsweredAfter(ms(100)));
        let lock = world.lock(&["a"], EVERY_200);
        assert_eq!(world.until(250).await, ["200: renew a"]);
        call(&lock.handle);
        call(&lock.handle);
        assert_eq!(world.until(360).await, ["250: renew a", "350: renewed a"]);
        // While it rests, it has nothing to do.
        call(&lock.handle);
        assert_eq!(world.until(430).await, [""; 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn renewals_that_are_due_together_are_sent_together_and_no_renewer_runs() {
    let world = World::new(|_| Fault::AnsweredAfter(ms(50)));
    let _locks = world.locks(&["0", "1", "2"]);
    for at in [200, 400] {
        assert_eq!(world.until(at).await, [format!("{at}: renew 0 1 2")]);
        assert_eq!(tasks(), 2, "the scheduler's, and the batch's");
        let renewed = [0, 1, 2].map(|lock| format!("{}: renewed {lock}", at + 50));
        assert_eq!(world.until(at + 60).await, renewed);
        assert_eq!(tasks(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_is_called_while_its_batch_is_on_its_way_runs_at_once_and_one_that_is_removed_is_gone() {
    let world = World::new(|_| Fault::AnsweredAfter(ms(50)));
    let locks = world.locks(&["0", "1", "2", "3"]);
    assert_eq!(world.until(220).await, ["200: renew 0 1 2 3"]);
    locks[2].handle.remove();
    assert_eq!(world.log.take(), ["220: Expired 2"]);
    locks[1].drop_guard();
    locks[1].handle.call();
    assert_eq!(world.until(240).await, ["220: release 1"]);
    assert_eq!(world.until(320).await, ["250: renewed 0", "250: renewed 3"]);
    // The others rest, and can be called and removed as before.
    locks[0].drop_guard();
    assert_eq!(world.until(330).await, ["320: release 0"]);
    locks[3].handle.remove();
    assert_eq!(world.log.take(), ["330: Expired 3"]);
    sleep(LINGER * 2).await;
    assert_eq!(tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn one_whose_renewal_in_a_batch_failed_runs_and_knows_why() {
    let world = World::new(|call| if call == 0 { Fault::Lost } else { Fault::None });
    let locks = world.locks(&["0", "1"]);
    assert_eq!(world.until(705).await, ["700: failed 0", "700: failed 1"], "after the timeout of the batch");
    assert!(locks.iter().all(|lock| lock.hold.last_error().is_some_and(|error| error.is_timeout())));
    let mut retried = world.until(800).await;
    retried.iter_mut().for_each(|line| *line = line.split_once(": ").unwrap().1.to_owned());
    retried.sort();
    assert_eq!(retried, ["renew 0", "renew 1", "renewed 0", "renewed 1"], "each by itself");
}

#[tokio::test(start_paused = true)]
async fn one_whose_batch_finds_it_lost_runs_and_the_others_rest() {
    let world = World::new(|_| Fault::None);
    let locks = world.locks(&["0", "1", "2"]);
    at_once(world.store.release(&locks[1].hold.owned, Ending::Lock, ms(500)));
    let happened = world.until(250).await;
    assert_eq!(happened, ["200: renew 0 1 2", "200: renewed 0", "200: renewed 2", "200: Missing 1"]);
    assert_eq!(world.until(400).await, ["400: renew 0 2", "400: renewed 0", "400: renewed 2"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_sent_together_runs_and_so_does_one_that_is_due_alone() {
    let world = World::new(|_| Fault::AnsweredAfter(ms(50)));
    let _locks = [&["0"][..], &["1", "1'"], &["2"]].map(|keys| world.lock(keys, EVERY_200));
    assert_eq!(world.until(200).await, ["200: renew 1", "200: renew 0 2"]);
    assert_eq!(tasks(), 3, "the scheduler's, the batch's and that of the one that runs");

    let world = World::new(|_| Fault::AnsweredAfter(ms(50)));
    let alone = world.lock(&["0"], EVERY_200);
    assert_eq!(world.until(220).await, ["200: renew 0"]);
    // A batch would take no notice of this.
    alone.handle.interrupt();
    assert_eq!(world.until(240).await, ["220: renew 0"]);
}

#[test]
fn a_runtime_that_ends_drops_those_whose_batch_is_on_its_way() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (world, locks) = runtime.block_on(async {
        let world = World::new(|_| Fault::AnsweredAfter(ms(50)));
        let locks = world.locks(&["0", "1"]);
        assert_eq!(world.until(200).await, ["200: renew 0 1"]);
        (world, locks)
    });
    drop(runtime);
    assert!(locks.iter().all(|lock| lock.hold.over().is_cancelled()));
    assert_eq!(world.log.take().len(), 2);
    locks.iter().for_each(|lock| lock.handle.call());
}

#[tokio::test(start_paused = true)]
async fn one_that_is_called_runs_at_once_and_one_that_is_removed_never() {
    let world = World::new(|_| Fault::None);
    let [a, b] = ["a", "b"].map(|name| world.lock(&[name], EVERY_200));
    sleep(ms(1)).await;
    b.drop_guard();
    b.handle.call();
    assert_eq!(world.until(1).await, ["1: release b"]);
    b.handle.remove();
    a.handle.remove();
    a.handle.call();
    assert_eq!(world.until(2_000).await, ["1: Expired a"]);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_soon_after_the_last_has_left_and_another_begins_with_the_next() {
    let world = World::new(|_| Fault::None);
    for _ in 0..3 {
        let lock = world.lock(&["a"], Renewal::Never);
        sleep(ms(5_000)).await;
        assert_eq!(tasks(), 1);
        lock.handle.remove();
        assert!(lock.hold.over().is_cancelled());
        sleep(LINGER).await;
        assert_eq!(tasks(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn locks_in_a_row_share_one_task() {
    let world = World::new(|_| Fault::None);
    let first = world.lock(&["a"], Renewal::Never);
    first.handle.remove();
    for _ in 0..40 {
        sleep(LINGER / 50).await;
        let lock = world.lock(&["a"], Renewal::Never);
        assert!(Arc::ptr_eq(&lock.handle.scheduler, &first.handle.scheduler));
        lock.handle.remove();
        assert_eq!(tasks(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_locker() {
    let world = World::new(|_| Fault::None);
    let lock = world.lock(&["a"], Renewal::Never);
    lock.handle.remove();
    drop(world);
    advance(ms(1)).await;
    assert_eq!(tasks(), 0);
}

#[test]
fn a_runtime_that_ends_drops_what_rests_and_accepts_no_more() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (world, before) = runtime.block_on(async {
        let world = World::new(|_| Fault::None);
        // One has not run yet, the other rests after it has run.
        let before = [("a", Renewal::Never), ("b", EVERY_200)].map(|(name, renewal)| world.lock(&[name], renewal));
        assert_eq!(world.until(250).await, ["200: renew b", "200: renewed b"]);
        (world, before)
    });
    let ended = runtime.handle().clone();
    drop(runtime);
    let after = world.lock_for(ms(60_000), &["after"], Renewal::Never, &ended);
    for lock in before.iter().chain([&after]) {
        assert!(lock.hold.over().is_cancelled());
        lock.handle.call();
        lock.handle.remove();
    }
    assert_eq!(world.log.take().len(), 3);
}
