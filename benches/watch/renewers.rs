//! The contenders, and how each of them holds and observes its locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tenure::{LockGuard, Locker, Token, WatchDog};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::raw_fred::RawFred;
use crate::raw_redis::RawRedis;
use crate::{INTERVAL, TOLERANCE, TTL};

/// The number of locks that are obtained at a time.
pub(crate) const AT_A_TIME: u32 = 64;

/// tenure's default. It is set explicitly, because the lateness of renewals is computed from the deadlines.
const DRIFT: (f64, Duration) = (0.01, Duration::from_millis(2));

/// The script that `Refresh` and `Extend` of the Go libraries run.
const COMPARE_AND_PEXPIRE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then \
     return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0";

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Contender {
    /// A guard for each lock.
    Guards,
    /// One watchdog for all locks.
    WatchDog,
    FredTickers,
    RedisTickers,
}

impl Contender {
    pub(crate) const ALL: [Self; 4] = [Self::Guards, Self::WatchDog, Self::FredTickers, Self::RedisTickers];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Guards => "tenure guards",
            Self::WatchDog => "tenure watchdog",
            Self::FredTickers => "raw fred tickers",
            Self::RedisTickers => "raw redis tickers",
        }
    }

    /// Connects, and warms up what the first lock needs.
    pub(crate) async fn start(self, url: &str) -> Renewer {
        match self {
            Self::Guards => Renewer::Guards { locker: locker(url).await, guards: Vec::new() },
            Self::WatchDog => {
                let locker = locker(url).await;
                Renewer::WatchDog { dog: WatchDog::builder(&locker).renew_every(INTERVAL).build(), locker }
            }
            Self::FredTickers => {
                let raw = Raw::Fred(RawFred::connect(url, COMPARE_AND_PEXPIRE).await);
                Renewer::Tickers { raw, tally: Arc::default() }
            }
            Self::RedisTickers => {
                let raw = Raw::Redis(RawRedis::connect(url, COMPARE_AND_PEXPIRE).await);
                Renewer::Tickers { raw, tally: Arc::default() }
            }
        }
    }
}

async fn locker(url: &str) -> Locker {
    let (factor, margin) = DRIFT;
    let builder = Locker::builder().ttl(TTL).renew_every(INTERVAL).drift(factor, margin);
    let locker = builder.connect(url).await.expect("a connection");
    let guard = locker.try_lock("warm-up").await.expect("free");
    guard.renew().await.expect("held");
    guard.release().await.expect("held");
    locker
}

/// Returns the key of the nth lock; all keys have the same length.
pub(crate) fn key(n: u32) -> String {
    format!("watch:{n:06}")
}

/// A contender at work.
pub(crate) enum Renewer {
    Guards { locker: Locker, guards: Vec<Vec<LockGuard>> },
    WatchDog { locker: Locker, dog: WatchDog },
    Tickers { raw: Raw, tally: Arc<Tally> },
}

/// The failures of the locks that tickers renew.
#[derive(Default)]
pub(crate) struct Tally {
    late: AtomicU32,
    lost: AtomicU32,
}

impl Renewer {
    /// Obtains this many locks, which are renewed from then on.
    pub(crate) async fn obtain(&mut self, locks: u32) {
        let mut obtaining = JoinSet::new();
        for first in 0..AT_A_TIME {
            let share = (first..locks).step_by(AT_A_TIME as usize);
            match self {
                Self::Guards { locker, .. } => obtaining.spawn(obtain_guards(locker.clone(), share)),
                Self::WatchDog { locker, dog } => obtaining.spawn(hand_over(locker.clone(), dog.clone(), share)),
                Self::Tickers { raw, tally } => obtaining.spawn(start_tickers(raw.clone(), tally.clone(), share)),
            };
        }
        let obtained = obtaining.join_all().await;
        if let Self::Guards { guards, .. } = self {
            *guards = obtained;
        }
    }

    /// Checks all deadlines. The tickers check theirs themselves.
    pub(crate) fn look(&self, looks: &mut Looks) {
        match self {
            Self::Guards { guards, .. } => {
                let now = Instant::now();
                for (n, guard) in guards.iter().flatten().enumerate() {
                    looks.at(n, guard.deadline(), now);
                }
            }
            Self::WatchDog { dog, .. } => {
                for n in 0..looks.len() {
                    let deadline = dog.status(key(n)).and_then(|status| status.deadline);
                    if let Some(deadline) = deadline {
                        looks.at(n as usize, deadline, Instant::now());
                    }
                }
            }
            Self::Tickers { .. } => {}
        }
    }

    /// Returns how many renewals were late, by the renewer's own count if it has one.
    pub(crate) fn late(&self, looks: &Looks) -> u32 {
        match self {
            Self::Tickers { tally, .. } => tally.late.load(Ordering::Relaxed),
            _ => looks.late,
        }
    }

    /// Returns how many of the locks are no longer held.
    pub(crate) fn lost(&self, locks: u32) -> u32 {
        match self {
            Self::Guards { guards, .. } => locks - count(guards.iter().flatten().filter(|guard| guard.is_held())),
            Self::WatchDog { dog, .. } => {
                let held = |n: &u32| dog.status(key(*n)).is_some_and(|status| status.held);
                locks - count((0..locks).filter(held))
            }
            Self::Tickers { tally, .. } => tally.lost.load(Ordering::Relaxed),
        }
    }
}

fn count<T>(things: impl Iterator<Item = T>) -> u32 {
    things.fold(0, |count, _| count + 1)
}

async fn obtain_guards(locker: Locker, share: impl ExactSizeIterator<Item = u32>) -> Vec<LockGuard> {
    let mut guards = Vec::with_capacity(share.len());
    for n in share {
        guards.push(locker.try_lock(key(n)).await.expect("free"));
    }
    guards
}

async fn hand_over(locker: Locker, dog: WatchDog, share: impl Iterator<Item = u32>) -> Vec<LockGuard> {
    for n in share {
        let guard = locker.try_lock(key(n)).await.expect("free");
        dog.watch(guard).expect("held");
    }
    Vec::new()
}

async fn start_tickers(raw: Raw, tally: Arc<Tally>, share: impl Iterator<Item = u32>) -> Vec<LockGuard> {
    for n in share {
        let (key, token) = (key(n), Token::random());
        assert!(raw.try_lock(&key, token.as_str()).await, "free");
        // The task ends with the runtime, that is, with the program.
        tokio::spawn(tick(raw.clone(), tally.clone(), key, token));
    }
    Vec::new()
}

/// The watchdog of the READMEs: a ticker, and a script call at each tick.
async fn tick(raw: Raw, tally: Arc<Tally>, key: String, token: Token) {
    let mut ticker = interval_at(Instant::now() + INTERVAL, INTERVAL);
    // Like Go's tickers if nobody receives their ticks.
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let due = ticker.tick().await;
        let renewed = raw.renew(&key, token.as_str()).await;
        if renewed == Some(false) {
            tally.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // A failed renewal is repeated at the next tick, which is late.
        if renewed.is_none() || due.elapsed() > TOLERANCE {
            tally.late.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[derive(Clone)]
pub(crate) enum Raw {
    Fred(RawFred),
    Redis(RawRedis),
}

impl Raw {
    async fn try_lock(&self, key: &str, token: &str) -> bool {
        match self {
            Self::Fred(raw) => raw.try_lock(key, token).await,
            Self::Redis(raw) => raw.try_lock(key, token).await,
        }
    }

    /// Returns `None` if the server could not be reached, or failed.
    async fn renew(&self, key: &str, token: &str) -> Option<bool> {
        match self {
            Self::Fred(raw) => raw.run_script(key, token).await.ok(),
            Self::Redis(raw) => raw.run_script(key, token).await.ok(),
        }
    }
}

/// The deadlines at the last check.
///
/// A deadline is the instant at which the last confirmed request was sent, plus a fixed time. So the step from one to
/// the next is the time between two renewals, to the microsecond, as long as the checks are more frequent than the
/// renewals. A renewal that is in flight for too long is seen only if a check falls into that time.
pub(crate) struct Looks {
    seen: Vec<Seen>,
    late: u32,
}

#[derive(Clone, Copy)]
struct Seen {
    deadline: Option<Instant>,
    /// Whether the renewal after this deadline is already counted as late.
    overdue: bool,
}

impl Looks {
    /// Uses all of its memory from the beginning, so none of it counts as memory of the locks.
    pub(crate) fn new(locks: u32) -> Self {
        let never = Seen { deadline: Some(Instant::now()), overdue: false };
        let mut seen = vec![never; locks as usize];
        seen.fill(Seen { deadline: None, ..never });
        Self { seen, late: 0 }
    }

    fn len(&self) -> u32 {
        u32::try_from(self.seen.len()).unwrap_or(u32::MAX)
    }

    fn at(&mut self, n: usize, deadline: Instant, now: Instant) {
        let Some(seen) = self.seen.get_mut(n) else { return };
        let (factor, margin) = DRIFT;
        let due = deadline - (TTL - TTL.mul_f64(factor) - margin) + INTERVAL;
        let was = seen.deadline.replace(deadline);
        let step = was.map_or(INTERVAL, |was| deadline.saturating_duration_since(was));
        let late = step > INTERVAL + TOLERANCE && !seen.overdue;
        if !step.is_zero() {
            seen.overdue = false;
        }
        let overdue = now > due + TOLERANCE && !seen.overdue;
        seen.overdue |= overdue;
        self.late += u32::from(late) + u32::from(overdue);
    }
}
