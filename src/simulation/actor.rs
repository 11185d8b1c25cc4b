//! The tasks of a universe: they make any public call, in any order, and give up at any point.

use std::future::{Future, IntoFuture, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, advance, sleep, timeout};

use super::ms;
use super::oracle::{Asking, Doing, World, doing};
use crate::mode::Mode;
use crate::{Error, Key, Lease, LockGuard, LockRequest, Locker, Loss, Retry, Token, WatchDog};

/// The timeout of a call to the server, with which the lockers of a universe are built.
pub(super) const COMMAND_TIMEOUT: Duration = ms(500);
/// The ttl of the locks in a calm universe, in which none may be left to its ttl.
const LONG: Duration = ms(600_000);
/// How long such a lock may be idle while somebody waits for it. Each waiter that is not polled costs a moment.
const IDLE: Duration = ms(6_000);
/// How much longer than they should calls may take.
const TOLERANCE: Duration = ms(60);

/// The habits of the tasks of one universe.
#[derive(Debug)]
pub(super) struct Habits {
    /// The weight of each step.
    steps: Vec<(Step, u32)>,
    ttls: Vec<Duration>,
    tokens: Vec<Token>,
    /// How many of ten requests bring their own token.
    named: u8,
    sharing: Sharing,
    /// How many of ten calls are given up before they end.
    given_up: u8,
    keys: Vec<Key>,
    /// The longest pause of a task.
    rest: u64,
    pub(super) alike: Alike,
    /// True if calls take real time.
    in_real_time: bool,
}

/// How requests share their keys.
#[derive(Debug)]
struct Sharing {
    /// How many of ten do so.
    shared: u8,
    modes: Vec<Mode>,
    limits: Vec<usize>,
}

/// Whether requests are alike and wait for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alike {
    No,
    Yes,
    /// And no lock is left to its ttl, so that it must never be idle for long while somebody waits.
    AndCalm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Obtain,
    /// Polls a request a few times, and keeps it.
    Park,
    /// Goes on with such a request, or drops it.
    Unpark,
    ObtainAll,
    Twins,
    Scope,
    Renew,
    RenewFor,
    Ensure,
    ServerTtl,
    Protect,
    Release,
    Drop,
    IntoLease,
    Adopt,
    EnsureLease,
    Inspect,
    Holders,
    Downgrade,
    Watch,
    WatchLease,
    Unwatch,
    DogReleases,
    DogReleasesAll,
    DogShutsDown,
    DogIsDropped,
    Close,
    Rest,
    DeleteKey,
    Stall,
}

impl Step {
    /// Returns whether no lock is left to its ttl by this step.
    fn is_calm(self) -> bool {
        matches!(
            self,
            Self::Obtain
                | Self::Park
                | Self::Unpark
                | Self::Scope
                | Self::Renew
                | Self::ServerTtl
                | Self::Protect
                | Self::Release
                | Self::Drop
                | Self::Inspect
                | Self::Holders
                | Self::Downgrade
                | Self::Rest
        )
    }
}

/// Steps that belong together, for the universes that do little else. The others mix all steps.
const THEMES: &[&[Step]] = &[
    &[],
    &[],
    &[],
    &[],
    // Sets of which one key is lost.
    &[Step::ObtainAll, Step::Renew, Step::DeleteKey],
    // Ttls that are set exactly, one after the other.
    &[Step::RenewFor, Step::Protect],
    // The same token, again and again.
    &[Step::Twins, Step::IntoLease, Step::Adopt],
    // Writers that become readers.
    &[Step::Downgrade, Step::Holders, Step::Renew],
    // Watchdogs.
    &[Step::Watch, Step::WatchLease, Step::Unwatch, Step::DogReleases, Step::DogShutsDown, Step::DogIsDropped],
];

impl Habits {
    /// Creates habits that leave out many of the steps, so that the remaining ones meet more often.
    pub(super) fn new(rng: &mut fastrand::Rng, keys: &[Key], tokens: Vec<Token>) -> Self {
        let mut steps = vec![(Step::Obtain, 6), (Step::Release, 2), (Step::Drop, 2), (Step::Rest, 3)];
        let optional = [
            (Step::ObtainAll, 4, 3),
            (Step::Twins, 2, 3),
            (Step::Scope, 1, 3),
            (Step::Renew, 2, 3),
            (Step::RenewFor, 4, 3),
            (Step::Ensure, 2, 3),
            (Step::ServerTtl, 1, 3),
            (Step::Protect, 2, 3),
            (Step::IntoLease, 2, 3),
            (Step::Adopt, 3, 3),
            (Step::EnsureLease, 1, 3),
            (Step::Inspect, 1, 3),
            (Step::Holders, 1, 3),
            (Step::Downgrade, 2, 3),
            (Step::Watch, 3, 3),
            (Step::WatchLease, 3, 3),
            (Step::Unwatch, 1, 3),
            (Step::DogReleases, 2, 3),
            (Step::DogReleasesAll, 1, 3),
            (Step::DogShutsDown, 1, 3),
            (Step::DogIsDropped, 1, 3),
            (Step::Close, 1, 8),
            (Step::DeleteKey, 1, 4),
            (Step::Stall, 1, 6),
        ];
        let theme = *rng.choice(THEMES).unwrap();
        for (step, weight, one_in) in optional {
            if theme.contains(&step) {
                steps.push((step, weight * 2));
            } else if theme.is_empty() && rng.u8(..one_in) == 0 {
                steps.push((step, weight));
            }
        }
        let mut ttls = vec![*rng.choice(&[ms(300), ms(1_000), ms(2_000)]).unwrap()];
        if rng.bool() {
            ttls.push(*rng.choice(&[ms(60), ms(500), ms(2_000), ms(4_000)]).unwrap());
        }
        if rng.bool() {
            ttls.push(*rng.choice(&[ms(600_000), ms(3_600_000)]).unwrap());
        }
        let named = *rng.choice(&[0, 3, 8]).unwrap();
        let given_up = *rng.choice(&[0, 2, 5]).unwrap();
        let rest = *rng.choice(&[50, 800, 4_000]).unwrap();
        let shared = *rng.choice(&[0, 3, 6, 9]).unwrap();
        let modes = rng.choice(&[&[Mode::Read][..], &[Mode::Permit], &[Mode::Read, Mode::Permit]]).unwrap().to_vec();
        let mut limits = vec![rng.usize(1..=3)];
        if rng.u8(..4) == 0 {
            limits.push(rng.usize(1..=4));
        }
        let sharing = Sharing { shared, modes, limits };
        Self {
            steps,
            ttls,
            tokens,
            named,
            sharing,
            given_up,
            keys: keys.to_vec(),
            rest,
            alike: Alike::No,
            in_real_time: false,
        }
    }

    /// Makes requests alike, so that locks change hands within a process, also by futures that are kept and not polled.
    pub(super) fn alike(mut self, is_calm: bool) -> Self {
        (self.named, self.rest) = (0, 50);
        self.ttls.truncate(1);
        self.keys.truncate(1);
        self.steps.extend([(Step::Park, 2), (Step::Unpark, 2)]);
        self.alike = Alike::Yes;
        if is_calm {
            self.alike = Alike::AndCalm;
            self.ttls = vec![LONG];
            self.steps.retain(|(step, _)| step.is_calm());
        }
        self
    }

    /// Leaves out what needs a paused clock, and the deletion of keys that nobody sees.
    pub(super) fn in_real_time(mut self) -> Self {
        self.steps.retain(|(step, _)| !matches!(step, Step::Stall | Step::DeleteKey));
        self.in_real_time = true;
        self
    }

    fn step(&self, rng: &mut fastrand::Rng) -> Step {
        let all: u32 = self.steps.iter().map(|(_, weight)| weight).sum();
        let mut chance = rng.u32(..all);
        for &(step, weight) in &self.steps {
            match chance.checked_sub(weight) {
                Some(less) => chance = less,
                None => return step,
            }
        }
        Step::Rest
    }
}

/// A process: its own locker, on its own connection, and a watchdog.
pub(super) struct Process {
    pub(super) number: usize,
    pub(super) locker: Locker,
    pub(super) dog: Mutex<Dog>,
}

/// A watchdog, and the leases that it was given.
pub(super) struct Dog {
    dog: WatchDog,
    leases: Vec<Lease>,
    /// It goes on requesting them.
    asks: Vec<Asking>,
}

impl Dog {
    pub(super) fn new(locker: &Locker) -> Self {
        Self { dog: WatchDog::builder(locker).build(), leases: Vec::new(), asks: Vec::new() }
    }

    /// Drops the watchdog. The leases that it watched are left to expire.
    pub(super) fn abandon(self, world: &World) {
        for lease in self.leases {
            world.leave(lease);
        }
    }
}

impl Process {
    fn dog(&self) -> WatchDog {
        self.dog.lock().unwrap().dog.clone()
    }

    fn next_dog(&self) -> Dog {
        std::mem::replace(&mut *self.dog.lock().unwrap(), Dog::new(&self.locker))
    }
}

/// One task of a process.
pub(super) struct Actor {
    pub(super) world: Arc<World>,
    pub(super) habits: Arc<Habits>,
    pub(super) process: Arc<Process>,
    pub(super) rng: fastrand::Rng,
    pub(super) guards: Vec<LockGuard>,
    pub(super) parked: Vec<Parked>,
}

/// A request that is kept and not polled.
pub(super) struct Parked {
    request: Pin<Box<dyn Future<Output = Result<LockGuard, Error>> + Send>>,
    asking: Asking,
}

/// When to give a call up.
#[derive(Clone, Copy, Debug)]
enum GivenUp {
    Never,
    /// After this many polls.
    Polls(u32),
    After(Duration),
}

impl Actor {
    pub(super) async fn run(mut self, steps: usize) {
        for _ in 0..steps {
            let step = self.habits.step(&mut self.rng);
            let process = self.process.number;
            self.world.trace(|| format!("client {process}: {step:?}"));
            self.take(step).await;
            self.world.check();
        }
        self.parked.clear();
        while !self.guards.is_empty() {
            let last = *self.rng.choice(&[Step::Release, Step::Drop]).unwrap();
            self.take(last).await;
        }
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Obtain => self.obtain().await,
            Step::Park => self.park().await,
            Step::Unpark => self.unpark().await,
            Step::ObtainAll => self.obtain_all().await,
            Step::Twins => self.twins().await,
            Step::Scope => self.scope().await,
            Step::Renew | Step::RenewFor | Step::Ensure | Step::ServerTtl | Step::Protect => {
                self.use_guard(step).await;
            }
            Step::Release | Step::Drop | Step::IntoLease => self.end_guard(step).await,
            Step::Adopt | Step::EnsureLease => self.use_lease(step).await,
            Step::Inspect => {
                let (locker, key) = (self.process.locker.clone(), self.key());
                drop(self.bounded(COMMAND_TIMEOUT, Doing::default(), "inspect", locker.inspect(key)).await);
            }
            Step::Holders => {
                let (locker, key) = (self.process.locker.clone(), self.key());
                drop(self.bounded(COMMAND_TIMEOUT, Doing::default(), "holders", locker.holders(key)).await);
            }
            Step::Downgrade => self.downgrade().await,
            Step::Watch => self.watch(),
            Step::WatchLease => self.watch_lease().await,
            Step::Unwatch => {
                let key = self.key();
                if let Some(lease) = self.process.dog().unwatch(key) {
                    self.world.leave(lease);
                }
            }
            Step::DogReleases | Step::DogReleasesAll => self.dog_releases(step).await,
            Step::DogShutsDown => {
                let Dog { dog, leases, .. } = self.process.next_dog();
                for lease in leases {
                    self.world.leave(lease);
                }
                for lease in dog.shutdown().await {
                    self.world.leave(lease);
                }
            }
            Step::DogIsDropped => self.process.next_dog().abandon(&self.world),
            Step::Close => {
                let locker = self.process.locker.clone();
                drop(timeout(ms(self.rng.u64(..2_000)), locker.close()).await);
            }
            Step::Rest => sleep(ms(self.rng.u64(..=self.habits.rest))).await,
            Step::DeleteKey => {
                let key = self.key();
                self.world.delete(&key);
            }
            Step::Stall => {
                self.world.stalled();
                advance(ms(self.rng.u64(..3_000))).await;
                self.world.stalled();
            }
        }
    }

    fn key(&mut self) -> Key {
        self.rng.choice(&self.habits.keys).unwrap().clone()
    }

    fn ttl(&mut self) -> Duration {
        *self.rng.choice(&self.habits.ttls).unwrap()
    }

    fn given_up(&mut self) -> GivenUp {
        match self.rng.u8(..10) {
            n if n >= self.habits.given_up => GivenUp::Never,
            n if n % 2 == 0 => GivenUp::Polls(self.rng.u32(..6)),
            _ => GivenUp::After(ms(self.rng.u64(..1_500))),
        }
    }

    /// Sets some options of a request. Returns it with its limit and token, if it has them.
    fn set(&mut self, request: LockRequest, waits: bool) -> (LockRequest, Option<Duration>, Option<Token>) {
        let mut request = request.ttl(self.ttl());
        let mut token = None;
        if self.rng.u8(..10) < self.habits.named {
            let seen = if self.rng.u8(..5) == 0 { self.world.some_token(&mut self.rng) } else { None };
            let named = seen.unwrap_or_else(|| self.rng.choice(&self.habits.tokens).unwrap().clone());
            request = request.token(named.clone());
            token = Some(named);
        }
        let least = if self.habits.alike == Alike::AndCalm { 500 } else { 4_000 };
        match self.rng.u8(..if self.habits.alike == Alike::No { 15 } else { 120 }) {
            0..=3 => request = request.no_renewal(),
            4 => request = request.renew_every(ms(20)),
            9 => request = request.renew_every(ms(200)),
            5 => request = request.fenced(false),
            6 => request = request.fair(true),
            7 => request = request.metadata("metadata"),
            12 => request = request.hold_at_least(ms(self.rng.u64(..least))),
            13 => request = request.hold_at_most(ms(self.rng.u64(5..5_000))),
            14 => {
                request = request.hold_at_least(ms(self.rng.u64(..least)));
                request = request.hold_at_most(ms(self.rng.u64(5..3_000)));
            }
            8 if !waits => {
                request = request.retry(Retry::linear(ms(self.rng.u64(10..300))).max_retries(self.rng.usize(..5)));
            }
            _ => {}
        }
        let limit = match self.rng.u8(..4) {
            0 => ms(self.rng.u64(..100)),
            1 => ms(self.rng.u64(..1_000)),
            _ if self.habits.alike == Alike::AndCalm => ms(60_000),
            _ => ms(self.rng.u64(..10_000)),
        };
        if waits {
            return (request.wait_at_most(limit), Some(limit), token);
        }
        (request, None, token)
    }

    async fn ask(&mut self, request: LockRequest, asking: Asking, limit: Option<Duration>, token: Option<Token>) {
        let from = Instant::now();
        let limit = limit.unwrap_or(ms(4_000));
        let asked = request.into_future();
        let answer = self.bounded(limit.max(COMMAND_TIMEOUT.min(ms(30))), Doing::default(), "a request", asked).await;
        if self.habits.alike == Alike::AndCalm {
            self.world.was_not_idle(&self.habits.keys[0], from, IDLE);
        }
        match answer {
            Some(Ok(guard)) => self.guards.push(guard),
            Some(Err(error)) => self.told(&error, &asking, token.as_ref()),
            None => {}
        }
    }

    /// Returns a request for a key of one's own, or for a share of it, and its mode.
    fn request(&mut self, locker: &Locker, key: Key, waits: bool) -> (LockRequest, Mode) {
        let Sharing { shared, modes, limits } = &self.habits.sharing;
        let is_shared = self.rng.u8(..10) < *shared;
        let mode = if is_shared { *self.rng.choice(modes).unwrap() } else { Mode::Exclusive };
        let limit = *self.rng.choice(limits).unwrap();
        let request = match (mode, waits) {
            (Mode::Exclusive, true) => locker.lock(key),
            (Mode::Exclusive, false) if self.rng.bool() => locker.try_lock(key),
            (Mode::Exclusive, false) => locker.obtain(key),
            (Mode::Read, true) => locker.read(key),
            (Mode::Read, false) => locker.try_read(key),
            (Mode::Permit, true) => locker.permit(key, limit),
            (Mode::Permit, false) => locker.try_permit(key, limit),
        };
        (request, mode)
    }

    async fn park(&mut self) {
        let (locker, key) = (self.process.locker.clone(), self.key());
        let (request, mode) = self.request(&locker, key, true);
        let (request, _, _) = self.set(request, true);
        let mut parked = Parked { request: Box::pin(request.into_future()), asking: self.world.asks(mode) };
        match until(GivenUp::Polls(self.rng.u32(1..6)), &mut parked.request).await {
            Some(Ok(guard)) => self.guards.push(guard),
            Some(Err(error)) => self.told(&error, &parked.asking, None),
            None => self.parked.push(parked),
        }
    }

    async fn unpark(&mut self) {
        let Some(place) = self.rng.choice(0..self.parked.len()) else { return };
        let mut parked = self.parked.swap_remove(place);
        match until(self.given_up(), &mut parked.request).await {
            Some(Ok(guard)) => self.guards.push(guard),
            Some(Err(error)) => self.told(&error, &parked.asking, None),
            None if self.rng.bool() => self.parked.push(parked),
            None => {}
        }
    }

    async fn obtain(&mut self) {
        let (locker, key) = (self.process.locker.clone(), self.key());
        let waits = self.habits.alike != Alike::No || self.rng.bool();
        let (request, mode) = self.request(&locker, key, waits);
        let (request, limit, token) = self.set(request, waits);
        let asking = self.world.asks(mode);
        self.ask(request, asking, limit, token).await;
    }

    async fn obtain_all(&mut self) {
        let mut keys = self.habits.keys.clone();
        self.rng.shuffle(&mut keys);
        keys.truncate(self.rng.usize(1..=keys.len()));
        let locker = self.process.locker.clone();
        let waits = self.rng.bool();
        let request = if waits { locker.lock_all(keys) } else { locker.obtain_all(keys) };
        let (request, limit, token) = self.set(request, waits);
        let asking = self.world.asks(Mode::Exclusive);
        self.ask(request, asking, limit, token).await;
    }

    /// Requests the same token twice at once.
    async fn twins(&mut self) {
        let (locker, key) = (self.process.locker.clone(), self.key());
        let token = self.rng.choice(&self.habits.tokens).unwrap().clone();
        let (one, mode) = self.request(&locker, key.clone(), true);
        let (other, other_mode) = self.request(&locker, key, false);
        let (asking, other_asking) = (self.world.asks(mode), self.world.asks(other_mode));
        let (one, _, _) = self.set(one, true);
        let (other, _, _) = self.set(other, false);
        let one = one.token(token.clone()).into_future();
        let other = other.token(token.clone()).into_future();
        let (one_given_up, other_given_up) = (self.given_up(), self.given_up());
        let (one, other) = tokio::join!(until(one_given_up, one), until(other_given_up, other));
        for (answer, asking) in [(one, asking), (other, other_asking)] {
            match answer {
                None => {}
                Some(Ok(guard)) => self.guards.push(guard),
                Some(Err(error)) => self.told(&error, &asking, Some(&token)),
            }
        }
    }

    async fn scope(&mut self) {
        let (locker, key) = (self.process.locker.clone(), self.key());
        let (work, patience) = (ms(self.rng.u64(..1_000)), ms(self.rng.u64(..4_000)));
        let scope = locker.scope(key, async |guard| {
            sleep(work).await;
            guard.is_held()
        });
        let (given_up, _asking) = (self.given_up(), self.world.asks(Mode::Exclusive));
        let what = Doing { release: true, guard: None };
        drop(timeout(patience, until(given_up, doing(what, scope))).await);
    }

    async fn use_guard(&mut self, step: Step) {
        let Some(place) = self.rng.choice(0..self.guards.len()) else { return };
        let guard = self.guards.swap_remove(place);
        let what = Doing { release: false, guard: self.world.id(&guard) };
        let (ttl, time) = (self.ttl(), ms(self.rng.u64(..2_000)));
        self.world.trace(|| format!("  to guard {:?}: {ttl:?}, {time:?}", what.guard));
        match step {
            Step::Renew => drop(self.bounded(COMMAND_TIMEOUT, what, "renew", guard.renew()).await),
            // One after the other: the reply to the first may not have come when the next is sent.
            Step::RenewFor => {
                for _ in 0..self.rng.u8(1..4) {
                    let ttl = self.ttl();
                    drop(match self.rng.u8(..3) {
                        0 => self.bounded(COMMAND_TIMEOUT, what, "ensure", guard.ensure(ttl)).await,
                        _ => self.bounded(COMMAND_TIMEOUT, what, "renew_for", guard.renew_for(ttl)).await,
                    });
                }
            }
            Step::Ensure => drop(self.bounded(COMMAND_TIMEOUT, what, "ensure", guard.ensure(ttl)).await),
            Step::ServerTtl => drop(self.bounded(COMMAND_TIMEOUT, what, "server_ttl", guard.server_ttl()).await),
            _ if guard.is_held() && self.rng.bool() => {
                let stalls = self.world.stalls();
                let lost = timeout(time, guard.lost()).await;
                let late = Instant::now().saturating_duration_since(guard.deadline());
                // Promise 6. The timer rounds up.
                let on_time = if self.habits.in_real_time { ms(1_000) } else { ms(1) };
                let by_time = matches!(lost, Err(_) | Ok(Loss::Expired | Loss::LimitReached));
                if self.world.stalls() == stalls && late > on_time && by_time {
                    self.world.violate("a lock's end is reported late", format!("guard {:?}, {late:?}", what.guard));
                }
            }
            _ => {
                let protected = guard.protect(sleep(time)).await;
                if protected.is_ok() && !guard.is_held() && !self.habits.in_real_time {
                    self.world.violate("work that was not protected to its end", format!("guard {:?}", what.guard));
                }
            }
        }
        self.guards.push(guard);
    }

    async fn end_guard(&mut self, step: Step) {
        let Some(place) = self.rng.choice(0..self.guards.len()) else { return };
        let guard = self.guards.swap_remove(place);
        let id = self.world.id(&guard);
        self.world.trace(|| format!("  guard {id:?} ends: {step:?}"));
        match step {
            Step::Release => {
                let what = Doing { release: true, guard: id };
                // Not `guard.token()`: a lock whose token was read is not handed over in the process.
                self.world.ends_outside(Some(&guard.hold().owned.token));
                let released = self.bounded(COMMAND_TIMEOUT, what, "release", guard.release()).await;
                if let (Some(released), Some(id)) = (released, id) {
                    self.world.has_released(id);
                    if let Err(error) = released {
                        self.world.not_released(id, &error);
                    }
                }
            }
            Step::Drop => drop(guard),
            _ => self.world.leave(guard.into_lease()),
        }
    }

    async fn downgrade(&mut self) {
        let Some(place) = self.rng.choice(0..self.guards.len()) else { return };
        let guard = self.guards.swap_remove(place);
        let what = Doing { release: false, guard: self.world.id(&guard) };
        self.world.trace(|| format!("  guard {:?} becomes a reader", what.guard));
        if let Some(Ok(guard)) = self.bounded(COMMAND_TIMEOUT, what, "downgrade", guard.downgrade()).await {
            self.guards.push(guard);
        }
    }

    /// Returns how long a call for a lease may take: it is sent once no release can come late.
    fn limit_for(&self, lease: &Lease) -> Duration {
        let late = self.process.locker.shared().late_releases.until(lease.owned());
        COMMAND_TIMEOUT + late.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    async fn use_lease(&mut self, step: Step) {
        let locker = self.process.locker.clone();
        let Some((place, lease)) = self.world.some_lease(&mut self.rng) else { return };
        let limit = self.limit_for(&lease);
        if step == Step::EnsureLease {
            let ttl = self.ttl();
            drop(self.bounded(limit, Doing::default(), "ensure", locker.ensure(&lease, ttl)).await);
            return;
        }
        let adopted = self.bounded(limit, Doing::default(), "adopt", locker.adopt(lease)).await;
        if let Some(Ok(guard)) = adopted {
            self.world.taken_up(place);
            self.guards.push(guard);
        }
    }

    fn watch(&mut self) {
        let Some(place) = self.rng.choice(0..self.guards.len()) else { return };
        let guard = self.guards.swap_remove(place);
        guard.token();
        let lease = Lease::from_parts(guard.hold().owned.clone(), guard.ttl(), None);
        if let Err(Error::AlreadyWatched { .. }) = self.process.dog().watch(guard) {
            // If a twin is watched, it is left to expire.
            self.world.leave(lease);
        }
    }

    async fn watch_lease(&mut self) {
        let dog = self.process.dog();
        let seen = if self.rng.bool() { self.world.some_lease(&mut self.rng) } else { None };
        let (place, lease) = match seen {
            Some((place, lease)) => (Some(place), lease),
            None => {
                let token = self.rng.choice(&self.habits.tokens).unwrap().clone();
                (None, Lease::new(self.key(), token, self.ttl()))
            }
        };
        let asking = self.world.asks(Mode::Exclusive);
        self.process.dog.lock().unwrap().asks.push(asking);
        let request = dog.watch_lease(lease.clone()).obtain_when_free(self.rng.bool()).into_future();
        let limit = self.limit_for(&lease);
        let watched = self.bounded(limit, Doing::default(), "watch_lease", request).await;
        if let Some(Ok(())) = watched {
            place.into_iter().for_each(|place| self.world.taken_up(place));
            self.process.dog.lock().unwrap().leases.push(lease);
        }
    }

    async fn dog_releases(&mut self, step: Step) {
        let (dog, key, number) = (self.process.dog(), self.key(), self.process.number);
        self.world.ends_outside(None);
        if step == Step::DogReleases {
            let what = Doing { release: true, guard: None };
            drop(self.bounded(COMMAND_TIMEOUT, what, "a watchdog's release", dog.release(key)).await);
            return;
        }
        self.world.releasing_all(number, true);
        let given_up = self.given_up();
        until(given_up, dog.release_all()).await;
        self.world.releasing_all(number, false);
    }

    fn told(&self, error: &Error, asking: &Asking, own: Option<&Token>) {
        self.world.trace(|| format!("  failed: {error}"));
        // Notifications take some time, and those behind a waiter that is not polled don't get them.
        let heard = if self.habits.alike == Alike::No { ms(25) } else { IDLE };
        self.world.failed(error, asking, own, heard);
    }

    /// Does the work, unless it is given up earlier. Promise 6: it ends in time.
    async fn bounded<F: Future>(&mut self, limit: Duration, what: Doing, name: &str, work: F) -> Option<F::Output> {
        let (given_up, start, stalls) = (self.given_up(), Instant::now(), self.world.stalls());
        let done = until(given_up, doing(what, work));
        let Ok(done) = timeout(limit + ms(30_000), done).await else {
            self.world.violate(format!("{name} does not end"), String::new());
            return None;
        };
        let took = start.elapsed();
        let tolerance = if self.habits.in_real_time { ms(5_000) } else { TOLERANCE };
        if took > limit + tolerance && self.world.stalls() == stalls {
            self.world.violate(format!("{name} takes too long"), format!("{took:?}, more than {limit:?}"));
        }
        done
    }
}

/// Returns `None` if the work was given up before it was done.
async fn until<F: Future>(given_up: GivenUp, work: F) -> Option<F::Output> {
    match given_up {
        GivenUp::Never => Some(work.await),
        GivenUp::After(time) => timeout(time, work).await.ok(),
        GivenUp::Polls(polls) => {
            let (mut work, mut left) = (pin!(work), polls);
            let polled = poll_fn(|context| {
                if left == 0 {
                    return Poll::Ready(None);
                }
                left -= 1;
                work.as_mut().poll(context).map(Some)
            });
            polled.await
        }
    }
}
