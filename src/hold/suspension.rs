//! The time for which this machine was suspended. The server's clock goes on meanwhile, but [`Instant`] stands still.
//!
//! Linux has a clock that counts this time, `CLOCK_BOOTTIME`. Where it has moved away from `CLOCK_MONOTONIC`, the
//! machine was suspended since both were read last. Nothing tells when, so whatever was before the reading that found
//! it is taken to have been before the suspension: a deadline may come too early by that, and never too late.
//!
//! Elsewhere no suspension is found. On Windows, [`Instant`] counts the time by itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

#[cfg(not(test))]
use self::real::{OF_THIS_MACHINE, lead};
#[cfg(test)]
use self::simulated::{OF_THIS_MACHINE, lead};

/// The clocks are read one after the other, so their distance varies. No suspension is as short as this.
const NOISE: Duration = Duration::from_millis(10);
/// How many suspensions are remembered one by one.
const REMEMBERED: usize = 64;

/// Returns for how long this machine was suspended since the first call. Reads the clocks.
pub(crate) fn total() -> Duration {
    OF_THIS_MACHINE.with(Suspensions::total)
}

/// Returns the instant that is as long ago as `then` really is: earlier by what the machine was suspended since. Reads
/// the clocks.
pub(crate) fn real(then: Instant) -> Instant {
    read(then).real
}

/// What one reading of the clocks says about an instant.
#[derive(Clone, Copy)]
pub(crate) struct Reading {
    pub(crate) now: Instant,
    /// See [`real`].
    pub(crate) real: Instant,
    /// See [`total`].
    pub(crate) total: Duration,
}

/// Reads the clocks.
pub(crate) fn read(then: Instant) -> Reading {
    let (since, total) = OF_THIS_MACHINE.with(|suspensions| {
        let total = suspensions.total();
        (suspensions.since(then), total)
    });
    Reading { now: Instant::now(), real: earlier(then, since), total }
}

pub(crate) fn earlier(instant: Instant, by: Duration) -> Instant {
    instant.checked_sub(by).unwrap_or(instant)
}

/// The suspensions since the first reading of the clocks.
struct Suspensions {
    /// By how many nanoseconds one clock was ahead of the other when a suspension was found last.
    lead: AtomicU64,
    total: AtomicU64,
    found: Mutex<Vec<Suspension>>,
}

struct Suspension {
    /// The machine was awake again by then.
    until: Instant,
    time: Duration,
}

/// Before the first reading.
const UNKNOWN: u64 = u64::MAX;

impl Suspensions {
    const fn new() -> Self {
        Self { lead: AtomicU64::new(UNKNOWN), total: AtomicU64::new(0), found: Mutex::new(Vec::new()) }
    }

    fn total(&self) -> Duration {
        let lead = nanos(lead());
        if lead > self.lead.load(Ordering::Acquire).saturating_add(nanos(NOISE)) || self.is_new() {
            self.note(lead);
        }
        Duration::from_nanos(self.total.load(Ordering::Acquire))
    }

    fn is_new(&self) -> bool {
        self.lead.load(Ordering::Acquire) == UNKNOWN
    }

    fn note(&self, lead: u64) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.lead.load(Ordering::Acquire);
        if before != UNKNOWN {
            // Nothing, if another thread has found it meanwhile.
            let time = lead.saturating_sub(before);
            if time <= nanos(NOISE) {
                return;
            }
            if found.len() == REMEMBERED {
                // As if the two oldest had ended together.
                let oldest = found.remove(0);
                found.iter_mut().take(1).for_each(|next| next.time += oldest.time);
            }
            found.push(Suspension { until: Instant::now(), time: Duration::from_nanos(time) });
            self.total.fetch_add(time, Ordering::AcqRel);
        }
        self.lead.store(lead, Ordering::Release);
    }

    fn since(&self, then: Instant) -> Duration {
        if self.total.load(Ordering::Acquire) == 0 {
            return Duration::ZERO;
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.iter().filter(|suspension| then <= suspension.until).map(|suspension| suspension.time).sum()
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(UNKNOWN - 1)
}

#[cfg(not(test))]
mod real {
    use std::time::Duration;

    use super::Suspensions;

    pub(super) struct OfThisMachine(Suspensions);

    pub(super) static OF_THIS_MACHINE: OfThisMachine = OfThisMachine(Suspensions::new());

    impl OfThisMachine {
        pub(super) fn with<T>(&self, read: impl FnOnce(&Suspensions) -> T) -> T {
            read(&self.0)
        }
    }

    /// Returns by how much the clock that counts suspensions is ahead of the other. Read in this order, it is never
    /// more than that.
    #[cfg(any(target_os = "android", target_os = "linux"))]
    pub(super) fn lead() -> Duration {
        use nix::time::{ClockId, clock_gettime};

        let read = |clock| clock_gettime(clock).map(Duration::from).ok();
        let both = read(ClockId::CLOCK_BOOTTIME).zip(read(ClockId::CLOCK_MONOTONIC));
        both.map_or(Duration::ZERO, |(boot, awake)| boot.saturating_sub(awake))
    }

    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    pub(super) fn lead() -> Duration {
        Duration::ZERO
    }
}

/// A machine for each test.
#[cfg(test)]
mod simulated {
    use std::cell::Cell;
    use std::time::Duration;

    use super::Suspensions;

    thread_local! {
        pub(super) static OF_THIS_MACHINE: Suspensions = const { Suspensions::new() };
        static LEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    pub(super) fn lead() -> Duration {
        LEAD.get()
    }

    /// Suspends the machine of this thread's test, after the clocks were read a first time.
    pub(crate) fn suspend(time: Duration) {
        super::total();
        LEAD.set(LEAD.get() + time);
    }
}

#[cfg(test)]
pub(crate) use self::simulated::suspend;

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn counts_each_suspension_from_the_first_reading_on_once() {
        assert_eq!(total(), Duration::ZERO);
        suspend(ms(5_000));
        assert_eq!((total(), total()), (ms(5_000), ms(5_000)));
        suspend(NOISE);
        assert_eq!(total(), ms(5_000));
        suspend(ms(1));
        assert_eq!(total(), ms(5_011));
    }

    #[tokio::test(start_paused = true)]
    async fn an_instant_is_as_much_earlier_as_the_machine_was_suspended_after_it() {
        let first = Instant::now();
        suspend(ms(5_000));
        total();
        advance(ms(1)).await;
        let second = Instant::now();
        suspend(ms(300));
        total();
        assert_eq!(first - real(first), ms(5_300));
        assert_eq!(second - real(second), ms(300));
        advance(ms(1)).await;
        assert_eq!(real(Instant::now()), Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn more_suspensions_than_are_remembered_lose_no_time() {
        let start = Instant::now();
        for _ in 0..REMEMBERED + 10 {
            suspend(ms(1_000));
            total();
            advance(ms(1)).await;
        }
        assert_eq!(start - real(start), total());
        assert_eq!(real(Instant::now()), Instant::now());
    }
}
