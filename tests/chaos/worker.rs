//! A worker process: tasks that contend for keys in all ways there are, and record what their guards say.
//!
//! While a guard is held, it is asked every [`SAMPLE`], right after the grant, and right before it is ended. The
//! checker says what follows from that.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};
use tenure::{Driver, Error, Lease, LockGuard, LockRequest, Locker, WatchDog, WatchEvent};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::checker::LEFT;
use crate::history::{Event, GUARDS_PER_WORKER, GuardId, Mode, Nanos, Recorder, now};
use crate::register::{Answer, Ask, Client, Letter, Phase};

/// The ttl of all locks.
pub(crate) const TTL: Duration = Duration::from_millis(400);
/// How long a node of a quorum doesn't vote after its start.
pub(crate) const WINDOW: Duration = Duration::from_secs(1);
const TASKS: usize = 24;
const SAMPLE: Duration = Duration::from_millis(20);
const HOT: usize = 8;
const COLD: usize = 200;
/// How many have a permit at the same time.
const LIMIT: usize = 2;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What the parent tells a worker, as its argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Work {
    pub(crate) number: u64,
    pub(crate) seed: u64,
    /// Several of a quorum, otherwise one.
    pub(crate) urls: Vec<String>,
    pub(crate) is_quorum: bool,
    pub(crate) min_replicas: usize,
    pub(crate) register: PathBuf,
    pub(crate) history: PathBuf,
}

/// How a lock is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Style {
    Plain,
    Fair,
    Try,
    Several,
    /// By a token that others use, too.
    UserToken,
    Read,
    Permit,
    /// A lock becomes that of a reader.
    Downgraded,
    /// It is obtained, and then kept by the watchdog.
    Watched,
    /// The lease of another process is adopted.
    Adopted,
    /// The request is dropped at a random moment.
    GivenUp,
}

const STYLES: [(Style, u32); 11] = [
    (Style::Plain, 20),
    (Style::Fair, 15),
    (Style::Try, 12),
    (Style::Several, 14),
    (Style::UserToken, 10),
    (Style::Read, 12),
    (Style::Permit, 8),
    (Style::Downgraded, 4),
    (Style::Watched, 10),
    (Style::Adopted, 8),
    (Style::GivenUp, 6),
];

pub(crate) fn run(work: Work) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(contend(work));
}

async fn contend(work: Work) {
    let register = Client::connect(&work.register).await;
    let locker = connect(&work).await;
    let recorder = Arc::new(Recorder::create(&work.history));
    let watched = Arc::<Watched>::default();
    let (dog_recorder, dog_watched) = (recorder.clone(), watched.clone());
    let dog = WatchDog::builder(&locker).on_event(move |event| dog_watched.ended(event, &dog_recorder)).build();
    let (guards, calm) = (AtomicU64::new(work.number * GUARDS_PER_WORKER), AtomicBool::new(false));
    let has_permits = !work.is_quorum;
    let worker =
        Arc::new(Worker { locker: locker.clone(), has_permits, dog, watched, register, recorder, guards, calm });
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let rng = Rng::with_seed(work.seed.wrapping_add(task as u64));
        tasks.spawn(worker.clone().task(rng));
    }
    while worker.phase().await == Phase::Chaos {
        sleep(ms(50)).await;
    }
    worker.calm.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    locker.close().await;
    // All that belongs to the lockers and the watchdog ends with them.
    drop(locker);
    let Ok(Worker { locker, dog, register, .. }) = Arc::try_unwrap(worker) else { panic!("a task has a worker") };
    drop((locker, dog));
    let alive = || Handle::current().metrics().num_alive_tasks();
    let patience = Instant::now() + Duration::from_secs(10);
    while alive() > 0 && Instant::now() < patience {
        sleep(ms(10)).await;
    }
    register.ask(&Ask::Closed { worker: work.number, tasks: alive() }).await;
    while !matches!(register.ask(&Ask::Phase).await, Answer::Phase(Phase::Over)) {
        sleep(ms(20)).await;
    }
}

/// Connects, which may take several attempts: the servers are under attack.
async fn connect(work: &Work) -> Locker {
    let driver = match work.number % 2 {
        0 if cfg!(all(feature = "fred", feature = "redis")) => Driver::Redis,
        _ => Driver::default(),
    };
    let builder = Locker::builder()
        .driver(driver)
        .ttl(TTL)
        .command_timeout(ms(300))
        .restart_window(WINDOW)
        .min_replicas(work.min_replicas)
        .local_hand_over(work.number % 3 != 0);
    loop {
        let connected = match &work.urls[..] {
            [url] if !work.is_quorum => builder.clone().connect(url).await,
            urls => builder.clone().quorum(urls).await,
        };
        match connected {
            Ok(locker) => return locker,
            Err(error) if error.is_transient() => sleep(ms(20)).await,
            Err(error) => panic!("{error}"),
        }
    }
}

struct Worker {
    locker: Locker,
    has_permits: bool,
    dog: WatchDog,
    watched: Arc<Watched>,
    register: Client,
    recorder: Arc<Recorder>,
    /// The next guard's name.
    guards: AtomicU64,
    calm: AtomicBool,
}

/// What the history knows of a request and its guard.
#[derive(Clone, Debug)]
struct Name {
    id: GuardId,
    mode: Mode,
    holder: String,
    keys: Vec<String>,
    /// Once it is granted.
    fence: u64,
}

/// A lock that is held.
enum Kept {
    Guard(LockGuard),
    /// By the watchdog, under this key.
    Watched(String),
}

impl Worker {
    async fn task(self: Arc<Self>, mut rng: Rng) {
        while !self.is_calm() {
            match pick(&mut rng) {
                Style::Adopted => self.adopt(&mut rng).await,
                // Counting doesn't compose.
                Style::Permit if !self.has_permits => {}
                style => self.lock(style, &mut rng).await,
            }
        }
        // Now everybody is served.
        self.lock(Style::Plain, &mut rng).await;
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    async fn phase(&self) -> Phase {
        match self.register.ask(&Ask::Phase).await {
            Answer::Phase(phase) => phase,
            answer => panic!("{answer:?}"),
        }
    }

    /// Asks for a lock, holds it, and ends it.
    async fn lock(&self, style: Style, rng: &mut Rng) {
        let key = if rng.u8(..100) < 70 { hot(rng.usize(..HOT)) } else { format!("cold{}", rng.usize(..COLD)) };
        let keys = if style == Style::Several { pair(rng) } else { vec![key] };
        let may_try = matches!(style, Style::Several | Style::Read | Style::Permit);
        let is_try = style == Style::Try || may_try && rng.u8(..3) == 0;
        let mut name = self.name(keys);
        let (mode, mut request) = self.request(style, is_try, &name.keys);
        name.mode = mode;
        if style == Style::Fair {
            request = request.fair(true);
        }
        if style == Style::UserToken {
            name.holder = format!("user-{}", rng.u8(..2));
            request = request.token(name.holder.parse().expect("a token"));
        }
        let is_patient = !is_try && style != Style::GivenUp && (self.is_calm() || rng.u8(..4) == 0);
        if !is_try && !is_patient {
            request = request.wait_at_most(ms(rng.u64(50..1_500)));
        }
        let outlives_ttl = rng.u8(..100) < outlives(style);
        if outlives_ttl {
            request = request.no_renewal();
        }
        self.attempt(&name, is_patient);
        let answer = match style {
            Style::GivenUp => timeout(ms(rng.u64(..20) * rng.u64(..20)), request).await.ok(),
            _ => Some(request.await),
        };
        let Some(guard) = self.answered(&mut name, answer) else { return };
        let kept = match style {
            Style::Watched => self.watch(guard, &name),
            Style::Downgraded => self.downgrade(guard, &mut name).await.map(Kept::Guard),
            _ => Some(Kept::Guard(guard)),
        };
        if let Some(kept) = kept {
            let length = if outlives_ttl { TTL } else { length(rng) };
            self.keep(kept, &name, length, style == Style::UserToken, rng).await;
        }
    }

    fn request(&self, style: Style, is_try: bool, keys: &[String]) -> (Mode, LockRequest) {
        let (locker, key) = (&self.locker, keys[0].as_str());
        match style {
            Style::Read if is_try => (Mode::Read, locker.try_read(key)),
            Style::Read => (Mode::Read, locker.read(key)),
            Style::Permit if is_try => (Mode::Permit { limit: LIMIT }, locker.try_permit(key, LIMIT)),
            Style::Permit => (Mode::Permit { limit: LIMIT }, locker.permit(key, LIMIT)),
            _ if is_try => (Mode::Exclusive, locker.try_lock_all(keys)),
            _ => (Mode::Exclusive, locker.lock_all(keys)),
        }
    }

    /// Makes a writer a reader. The fencing token stays the same, as it is still the same holder.
    async fn downgrade(&self, guard: LockGuard, name: &mut Name) -> Option<LockGuard> {
        self.sample_guard(&guard, name);
        self.ending(name, "downgraded");
        let holder = name.holder.clone();
        *name = Name { mode: Mode::Read, holder, ..self.name(name.keys.clone()) };
        self.attempt(name, false);
        let downgraded = guard.downgrade().await;
        self.answered(name, Some(downgraded))
    }

    /// Takes a lease that another process has left, holds it, and ends it.
    async fn adopt(&self, rng: &mut Rng) {
        let Answer::Letter(Some(letter)) = self.register.ask(&Ask::Take).await else {
            return sleep(ms(5)).await;
        };
        let lease = lease_of(&letter.lease);
        let keys = lease.keys().iter().map(|key| String::from_utf8_lossy(key.as_bytes()).into_owned()).collect();
        let mut name = Name { holder: letter.holder, mode: letter.mode, ..self.name(keys) };
        self.attempt(&name, false);
        let adopted = self.locker.adopt(lease).await;
        if let Some(guard) = self.answered(&mut name, Some(adopted)) {
            self.keep(Kept::Guard(guard), &name, length(rng), false, rng).await;
        }
    }

    fn name(&self, keys: Vec<String>) -> Name {
        let id = self.guards.fetch_add(1, Ordering::Relaxed);
        Name { id, mode: Mode::Exclusive, holder: id.to_string(), keys, fence: 0 }
    }

    fn attempt(&self, name: &Name, patient: bool) {
        let Name { id: guard, mode, holder, keys, .. } = name.clone();
        self.recorder.write(&Event::Attempt { at: now(), guard, mode, holder, keys, patient });
    }

    /// Records the answer to a request; `None` if it was given up.
    fn answered(&self, name: &mut Name, answer: Option<Result<LockGuard, Error>>) -> Option<LockGuard> {
        let at = now();
        let reason = match answer {
            Some(Ok(guard)) => {
                name.fence = guard.fencing_token().expect("all requests are fenced");
                self.recorder.write(&Event::Granted { at, guard: name.id, fence: name.fence });
                return Some(guard);
            }
            Some(Err(Error::NotObtained { .. })) => "not obtained".to_owned(),
            Some(Err(Error::NotHeld { .. })) => "not held".to_owned(),
            Some(Err(error)) if error.is_transient() => "no answer".to_owned(),
            Some(Err(error)) => error.to_string(),
            None => "given up".to_owned(),
        };
        self.recorder.write(&Event::Failed { at, guard: name.id, reason });
        None
    }

    /// Gives a guard to the watchdog.
    fn watch(&self, guard: LockGuard, name: &Name) -> Option<Kept> {
        let key = name.keys.first()?.clone();
        if !self.watched.begin(&key, name.id) {
            return Some(Kept::Guard(guard));
        }
        let at = now();
        if self.dog.watch(guard).is_ok() {
            return Some(Kept::Watched(key));
        }
        // It is lost already.
        self.watched.refused(&key);
        self.recorder.write(&Event::Ending { at, guard: name.id, how: "not watched".to_owned() });
        None
    }

    /// Holds a lock for a while, and ends it.
    async fn keep(&self, kept: Kept, name: &Name, length: Duration, is_shared: bool, rng: &mut Rng) {
        let end = Instant::now() + length;
        let writes = name.mode == Mode::Exclusive && rng.bool();
        let is_held = loop {
            if !self.sample(&kept, name) {
                break false;
            }
            if writes {
                self.write(name).await;
            }
            if Instant::now() >= end || self.is_calm() {
                break self.sample(&kept, name);
            }
            sleep_until(end.min(Instant::now() + SAMPLE)).await;
        };
        if !is_held && writes {
            // Somebody who never looks.
            self.write(name).await;
        }
        match kept {
            Kept::Watched(key) if is_held => self.end_watched(&key, name, rng).await,
            Kept::Watched(_) => {}
            Kept::Guard(guard) => self.end(guard, name, is_shared, rng).await,
        }
    }

    /// Asks whether the lock is held, and records the answer.
    fn sample(&self, kept: &Kept, name: &Name) -> bool {
        match kept {
            Kept::Guard(guard) => self.sample_guard(guard, name),
            Kept::Watched(key) => {
                let (guard, before) = (name.id, now());
                let status = self.dog.status(key.as_str());
                let after = now();
                // Its loss is recorded by the callback.
                let deadline = status.filter(|status| status.held).and_then(|status| status.deadline);
                let Some(deadline) = deadline.map(|deadline| self.recorder.nanos(deadline)) else { return false };
                if !self.watched.held(key, guard, deadline) {
                    return false;
                }
                self.recorder.write(&Event::Held { before, after, guard, deadline });
                true
            }
        }
    }

    fn sample_guard(&self, kept: &LockGuard, name: &Name) -> bool {
        let (guard, before) = (name.id, now());
        let held = kept.check();
        let after = now();
        let deadline = self.recorder.nanos(kept.deadline());
        self.recorder.write(&match held {
            Ok(()) => Event::Held { before, after, guard, deadline },
            Err(loss) => Event::Lost { at: after, guard, loss: format!("{loss:?}"), deadline },
        });
        held.is_ok()
    }

    async fn write(&self, name: &Name) {
        for key in &name.keys {
            let fence = name.fence;
            let before = now();
            let answer = self.register.ask(&Ask::Write { key: key.clone(), fence }).await;
            let after = now();
            let accepted = matches!(answer, Answer::Accepted(true));
            self.recorder.write(&Event::Wrote { before, after, guard: name.id, key: key.clone(), accepted });
        }
    }

    /// Ends a guard in one of all ways. A release ends all guards of its token, so those that share one are dropped.
    async fn end(&self, guard: LockGuard, name: &Name, is_shared: bool, rng: &mut Rng) {
        let way = if is_shared { 9 } else { rng.u8(..12) };
        let how = match way {
            0..5 => "released",
            5..7 => "release given up",
            7..9 if !self.is_calm() => LEFT,
            _ => "dropped",
        };
        self.ending(name, how);
        match how {
            "released" => drop(guard.release().await),
            "release given up" => drop(timeout(Duration::from_micros(rng.u64(..1_000)), guard.release()).await),
            LEFT => self.give(&guard.into_lease(), name).await,
            _ => drop(guard),
        }
        self.recorder.write(&Event::Ended { at: now(), guard: name.id });
    }

    async fn end_watched(&self, key: &str, name: &Name, rng: &mut Rng) {
        if rng.bool() && !self.is_calm() {
            self.ending(name, LEFT);
            // If it was lost just now, this may be the next one's.
            let lease = self.dog.unwatch(key).filter(|lease| lease.fencing_token() == Some(name.fence));
            if let Some(lease) = lease {
                self.give(&lease, name).await;
            }
        } else {
            self.ending(name, "released");
            drop(self.dog.release(key).await);
        }
        self.recorder.write(&Event::Ended { at: now(), guard: name.id });
    }

    fn ending(&self, name: &Name, how: &str) {
        self.recorder.write(&Event::Ending { at: now(), guard: name.id, how: how.to_owned() });
    }

    async fn give(&self, lease: &Lease, name: &Name) {
        let letter = Letter { lease: text_of(lease), holder: name.holder.clone(), mode: name.mode };
        self.register.ask(&Ask::Give(letter)).await;
    }
}

/// The guards that the watchdog keeps, by key, with the deadlines that were last seen.
///
/// The status and the events of a key are those of whatever guard is watched under it. So a guard is only given to the
/// watchdog once the end of the last one was reported, and a status is only believed if that has not happened
/// meanwhile.
#[derive(Default)]
struct Watched {
    guards: Mutex<HashMap<String, (GuardId, Nanos)>>,
}

impl Watched {
    fn guards(&self) -> MutexGuard<'_, HashMap<String, (GuardId, Nanos)>> {
        self.guards.lock().expect("nobody panics with it")
    }

    /// Returns false if another guard is watched, or its end was not reported yet.
    fn begin(&self, key: &str, guard: GuardId) -> bool {
        let mut guards = self.guards();
        let is_free = !guards.contains_key(key);
        if is_free {
            guards.insert(key.to_owned(), (guard, 0));
        }
        is_free
    }

    /// Of a guard that was refused, no end is reported.
    fn refused(&self, key: &str) {
        self.guards().remove(key);
    }

    /// Notes a deadline from a status that was read just now. Returns false if that may be the status of another guard.
    fn held(&self, key: &str, guard: GuardId, deadline: Nanos) -> bool {
        match self.guards().get_mut(key) {
            Some((watched, latest)) if *watched == guard => {
                *latest = deadline;
                true
            }
            _ => false,
        }
    }

    fn ended(&self, event: &WatchEvent, recorder: &Recorder) {
        let loss = match event {
            WatchEvent::Lost { loss, .. } => Some(loss),
            WatchEvent::Released { .. } | WatchEvent::Stopped { .. } => None,
            _ => return,
        };
        let key = String::from_utf8_lossy(event.key().as_bytes()).into_owned();
        let mut guards = self.guards();
        if let (Some((guard, deadline)), Some(loss)) = (guards.remove(&key), loss) {
            // Before the next guard can be given to the watchdog.
            recorder.write(&Event::Lost { at: now(), guard, loss: format!("{loss:?}"), deadline });
        }
    }
}

fn pick(rng: &mut Rng) -> Style {
    let total: u32 = STYLES.iter().map(|(_, weight)| weight).sum();
    let mut left = rng.u32(..total);
    for (style, weight) in STYLES {
        match left.checked_sub(weight) {
            Some(less) => left = less,
            None => return style,
        }
    }
    Style::Plain
}

/// How many of a hundred locks are held without renewal until they expire: most hand-overs shall follow an expiry.
fn outlives(style: Style) -> u8 {
    match style {
        // The others who share it, or the watchdog, renew it.
        Style::Read | Style::Permit | Style::UserToken | Style::Watched => 6,
        _ => 50,
    }
}

/// How long other locks are held: up to three ttls, and mostly short.
fn length(rng: &mut Rng) -> Duration {
    let ttl = TTL.as_millis() as u64;
    ms(match rng.u8(..20) {
        0..16 => rng.u64(..10),
        16..19 => rng.u64(..ttl),
        _ => rng.u64(..3 * ttl),
    })
}

/// Two of them share a slot of a cluster.
fn hot(number: usize) -> String {
    format!("{{h{}}}:{}", number / 2, number % 2)
}

fn pair(rng: &mut Rng) -> Vec<String> {
    let first = rng.usize(..HOT);
    vec![hot(first), hot(first ^ 1)]
}

#[cfg(feature = "serde")]
fn text_of(lease: &Lease) -> String {
    serde_json::to_string(lease).expect("a lease is data")
}

#[cfg(feature = "serde")]
fn lease_of(text: &str) -> Lease {
    serde_json::from_str(text).expect("it was a lease")
}

#[cfg(not(feature = "serde"))]
fn text_of(lease: &Lease) -> String {
    lease.to_string()
}

#[cfg(not(feature = "serde"))]
fn lease_of(text: &str) -> Lease {
    text.parse().expect("it was a lease")
}
