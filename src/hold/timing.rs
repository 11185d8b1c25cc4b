//! The arithmetic of a lock's time: deadline, next renewal, pause after a failure. Pure: it has no clock of its own.

use std::time::Duration;

use tokio::time::Instant;

use crate::Error;

/// The shortest and the longest ttl that make sense: below, the drift eats it up; above, the server's own arithmetic
/// comes near its end, and so does the patience of whoever waits for a dead holder's lock.
pub(crate) const MIN_VALIDITY: Duration = Duration::from_millis(1);
pub(crate) const MAX_TTL: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Returns the instant so much later, or one that nobody lives to see where the clock ends before that.
pub(crate) fn after(now: Instant, time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(100 * MAX_TTL.as_secs());
    now + time.min(FAR)
}

/// How much faster than ours the server's clock may run: what is cut off a ttl before we trust it.
///
/// Redlock's safety argument calls it the clock drift:
/// <https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/>.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drift {
    pub(crate) factor: f64,
    pub(crate) margin: Duration,
}

impl Default for Drift {
    fn default() -> Self {
        Self { factor: 0.01, margin: Duration::from_millis(2) }
    }
}

impl Drift {
    fn of(self, ttl: Duration) -> Duration {
        // A factor that is no number between 0 and 1 cuts off everything: `validate` then refuses every ttl.
        let factor = if (0.0..1.0).contains(&self.factor) { self.factor } else { 1.0 };
        ttl.mul_f64(factor).saturating_add(self.margin)
    }

    /// For how long after it was sent a request with this ttl may be relied upon.
    fn validity(self, ttl: Duration) -> Duration {
        ttl.saturating_sub(self.of(ttl))
    }

    /// Until when the lock is surely held, when a request with this ttl, sent at `sent`, succeeds.
    ///
    /// Counted from before the request left, as the server can't have started its own count any earlier. Counting from
    /// the reply would be wrong by the time that the reply took.
    pub(crate) fn deadline(self, sent: Instant, ttl: Duration) -> Instant {
        sent + self.validity(ttl)
    }

    /// Whether a lock that was obtained with this much of its ttl left is worth having: a tenth, at least.
    pub(crate) fn suffices(self, remaining: Duration, ttl: Duration) -> bool {
        !remaining.is_zero() && remaining >= self.validity(ttl) / 10
    }

    /// The ttl in whole milliseconds, as the server counts; rounded up, it would promise more than the server keeps.
    pub(crate) fn validate(self, ttl: Duration) -> Result<Duration, Error> {
        if ttl > MAX_TTL {
            return Err(Error::InvalidTtl("it is longer than 365 days"));
        }
        let ttl = ttl - Duration::from_nanos(u64::from(ttl.subsec_nanos() % 1_000_000));
        if self.validity(ttl) < MIN_VALIDITY {
            return Err(Error::InvalidTtl("the allowance for clock drift leaves nothing of it; use a longer one"));
        }
        Ok(ttl)
    }
}

/// When a held lock is renewed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Renewal {
    /// Every third of the ttl: two more tries fit in when one fails.
    #[default]
    Third,
    Every(Duration),
    Never,
}

impl Renewal {
    /// The time from one confirmed request to the next renewal.
    pub(crate) fn interval(self, ttl: Duration) -> Option<Duration> {
        match self {
            Self::Third => Some(ttl / 3),
            // Kept below the ttl also after `renew_for` has made it shorter than the request foresaw.
            Self::Every(interval) => Some(interval.min(ttl / 2)),
            Self::Never => None,
        }
    }

    /// When the renewal is due that follows a confirmed request.
    ///
    /// Rounded down to a grid that begins at `origin`: so those of many locks fall together, and share calls. Spread
    /// evenly each would travel alone, at ten times the cost.
    pub(crate) fn due(self, sent: Instant, ttl: Duration, origin: Instant) -> Option<Instant> {
        const STEPS: u32 = 32;
        let interval = self.interval(ttl)?;
        let due = sent + interval;
        let step = (interval / STEPS).as_nanos().max(1);
        let past = due.saturating_duration_since(origin).as_nanos() % step;
        // Less than a step, and so less than the interval: never before it was sent.
        Some(due - Duration::from_nanos(u64::try_from(past).unwrap_or_default()))
    }

    pub(crate) fn validate(self, ttl: Duration, drift: Drift) -> Result<(), Error> {
        match self {
            Self::Every(interval) if interval < Duration::from_millis(1) => {
                Err(Error::InvalidRenewal("it is shorter than a millisecond"))
            }
            Self::Every(interval) if interval >= drift.validity(ttl) => {
                Err(Error::InvalidRenewal("the lock would expire before its first renewal; use less than the ttl"))
            }
            _ => Ok(()),
        }
    }
}

/// How long one call may take: never past the deadline, as an answer that comes later is of no use.
pub(crate) fn call_timeout(command_timeout: Duration, now: Instant, deadline: Instant) -> Duration {
    command_timeout.min(deadline.saturating_duration_since(now))
}

/// How long one renewal may take: half of what is left, at most. One that hangs on a connection that is dead must leave
/// time for another on a new connection.
pub(crate) fn renewal_timeout(command_timeout: Duration, now: Instant, deadline: Instant) -> Duration {
    command_timeout.min(deadline.saturating_duration_since(now) / 2)
}

/// The pause after the `failures`th failed renewal in a row: growing, but so that a next try still fits in before the
/// deadline. `chance` is random in `0.0..1.0`: many whose server fails at once shall not come back at once.
pub(crate) fn pause_after(failures: u32, interval: Duration, remaining: Duration, chance: f64) -> Duration {
    const FLOOR: Duration = Duration::from_millis(5);
    let first = (interval / 16).clamp(FLOOR, Duration::from_millis(250));
    let grown = first.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    let pause = grown.min(interval).mul_f64(0.75 + chance / 2.0);
    pause.min(remaining / 2).max(FLOOR)
}

/// When to log again that something still fails: at once, then at intervals that double, from 10 s up to 10 min.
#[derive(Debug, Default)]
pub(crate) struct Reminders {
    next: Option<Instant>,
    interval: Duration,
}

impl Reminders {
    const FIRST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(600);

    /// Returns whether to log a failure that happens now.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.interval = (self.interval * 2).clamp(Self::FIRST, Self::LONGEST);
        self.next = Some(now + self.interval);
        true
    }
}

/// When to look at a lock again that is held for so long: when its ttl ends, or so often, whichever comes first. A lock
/// that is released by who sends no messages is found by that alone. Those who wait on other machines shall not come at
/// once.
pub(crate) fn look_after(held: Option<Duration>, every: Duration, chance: f64) -> Duration {
    const SPREAD: Duration = Duration::from_millis(9);
    let poll = every.mul_f64(0.75 + chance / 2.0);
    held.map_or(poll, |held| poll.min(held.saturating_add(Duration::from_millis(1) + SPREAD.mul_f64(chance))))
}

/// The pause before the `attempt`th look at a lock that another holds: growing with the attempts, and never past the
/// moment at which the holder's ttl ends.
pub(crate) fn poll_after(attempt: u32, holder: Option<Duration>, chance: f64) -> Duration {
    const FIRST: Duration = Duration::from_millis(10);
    const CEILING: Duration = Duration::from_millis(250);
    let grown = FIRST.saturating_mul(1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX)).min(CEILING);
    let pause = grown.mul_f64(0.5 + chance / 2.0);
    holder.map_or(pause, |remaining| pause.min(remaining.saturating_add(Duration::from_millis(1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_deadline_lies_drift_before_the_end_of_the_ttl_counted_from_the_send() {
        let sent = Instant::now();
        assert_eq!(Drift::default().deadline(sent, ms(2_000)) - sent, ms(2_000 - 20 - 2));
        let none = Drift { factor: 0.0, margin: Duration::ZERO };
        assert_eq!(none.deadline(sent, ms(2_000)) - sent, ms(2_000));
    }

    #[test]
    fn a_ttl_that_cannot_work_is_refused() {
        let drift = Drift::default();
        for ttl in [Duration::ZERO, Duration::from_nanos(999_999), ms(1), ms(3), Duration::MAX, MAX_TTL + ms(1)] {
            assert!(matches!(drift.validate(ttl), Err(Error::InvalidTtl(_))), "{ttl:?}");
        }
        assert_eq!(drift.validate(ms(4)).unwrap(), ms(4));
        assert_eq!(drift.validate(MAX_TTL).unwrap(), MAX_TTL);
        for factor in [f64::NAN, f64::INFINITY, 1.0, -0.5] {
            assert!(Drift { factor, margin: ms(2) }.validate(ms(30_000)).is_err(), "{factor}");
        }
    }

    #[test]
    fn a_ttl_is_rounded_down_to_what_the_server_counts_in() {
        assert_eq!(Drift::default().validate(Duration::from_micros(30_999)).unwrap(), ms(30));
    }

    #[test]
    fn a_renewal_that_comes_too_late_is_refused() {
        let drift = Drift::default();
        assert!(Renewal::Every(ms(100)).validate(ms(100), drift).is_err());
        assert!(Renewal::Every(ms(97)).validate(ms(100), drift).is_err());
        assert!(Renewal::Every(Duration::ZERO).validate(ms(100), drift).is_err());
        assert!(Renewal::Every(ms(96)).validate(ms(100), drift).is_ok());
        assert!(Renewal::Never.validate(ms(100), drift).is_ok());
    }

    #[test]
    fn renewals_of_many_locks_fall_together_and_a_little_early() {
        let origin = Instant::now();
        let due = |sent: u64| Renewal::Every(ms(3_200)).due(origin + ms(sent), ms(10_000), origin).unwrap() - origin;
        assert_eq!(due(0), ms(3_200));
        assert_eq!(due(99), ms(3_200));
        assert_eq!(due(100), ms(3_300));
        for sent in 0..10_000 {
            let early = ms(sent + 3_200) - due(sent);
            assert!(early < ms(100), "{early:?}");
        }
        assert_eq!(Renewal::Never.due(origin, ms(10_000), origin), None);
        // Whatever came first.
        assert!(Renewal::Third.due(origin, ms(30_000), origin + ms(60_000)).is_some());
    }

    #[test]
    fn pauses_after_failures_grow_and_leave_room_for_a_next_try() {
        let pause = |failures, remaining| pause_after(failures, ms(10_000), remaining, 0.5);
        assert_eq!(pause(1, ms(20_000)), ms(250));
        assert_eq!(pause(2, ms(20_000)), ms(500));
        assert_eq!(pause(40, ms(50_000)), ms(10_000));
        assert_eq!(pause(u32::MAX, ms(100)), ms(50));
        assert_eq!(pause(3, Duration::ZERO), ms(5));
    }

    #[test]
    fn polls_slow_down_but_never_oversleep_the_holder() {
        assert_eq!(poll_after(1, None, 1.0), ms(10));
        assert_eq!(poll_after(99, None, 1.0), ms(250));
        assert_eq!(poll_after(99, Some(ms(30)), 1.0), ms(31));
    }

    #[test]
    fn no_time_is_too_far_for_the_clock() {
        let now = Instant::now();
        assert_eq!(after(now, ms(7)), now + ms(7));
        assert!(after(now, Duration::MAX) > now + MAX_TTL);
        assert_eq!(poll_after(99, Some(Duration::MAX), 1.0), ms(250));
    }

    #[test]
    fn a_failure_that_lasts_is_logged_less_and_less_often_and_never_for_the_last_time() {
        let (start, mut reminders) = (Instant::now(), Reminders::default());
        let logged: Vec<u64> = (0..7_200).filter(|s| reminders.is_due(start + Duration::from_secs(*s))).collect();
        assert_eq!(logged[..8], [0, 10, 30, 70, 150, 310, 630, 1_230]);
        assert!(logged.windows(2).all(|pair| pair[1] - pair[0] <= 600), "{logged:?}");
    }

    #[test]
    fn half_of_what_is_left_is_kept_for_another_renewal() {
        let now = Instant::now();
        assert_eq!(renewal_timeout(ms(2_000), now, now + ms(600)), ms(300));
        assert_eq!(renewal_timeout(ms(2_000), now, now + ms(20_000)), ms(2_000));
        assert_eq!(renewal_timeout(ms(2_000), now, now), Duration::ZERO);
    }

    #[test]
    fn an_answer_after_the_deadline_is_not_waited_for() {
        let now = Instant::now();
        assert_eq!(call_timeout(ms(500), now, now + ms(90)), ms(90));
        assert_eq!(call_timeout(ms(500), now, now + ms(900)), ms(500));
        assert_eq!(call_timeout(ms(500), now, now - ms(1)), Duration::ZERO);
    }
}
