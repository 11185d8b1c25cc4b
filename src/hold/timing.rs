//! Computes the times of a lock: deadlines, renewals, pauses after failures. Nothing here reads the clock.

use std::time::Duration;

use tokio::time::Instant;

use super::bounds::whole_millis;
use crate::Error;

/// The shortest validity and the longest ttl. A shorter validity is eaten up by the drift. With a longer ttl the
/// server's own arithmetic comes close to its limits, and the lock of a dead holder stays for too long.
pub(crate) const MIN_VALIDITY: Duration = Duration::from_millis(1);
pub(crate) const MAX_TTL: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Returns the instant `time` after `now`; at most 100 years after it, as the clock might overflow.
pub(crate) fn after(now: Instant, time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(100 * MAX_TTL.as_secs());
    now + time.min(FAR)
}

/// How much faster than the local clock the server's clock may run. A ttl is shortened by this.
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
        // Any other factor is taken for 1, which leaves nothing of a ttl: so `validate` refuses every ttl.
        let factor = if (0.0..1.0).contains(&self.factor) { self.factor } else { 1.0 };
        ttl.mul_f64(factor).saturating_add(self.margin)
    }

    /// Returns how long a request with this ttl can be relied upon after it was sent.
    fn validity(self, ttl: Duration) -> Duration {
        ttl.saturating_sub(self.of(ttl))
    }

    /// Returns until when the lock is held if a request with this ttl, sent at `sent`, succeeds.
    ///
    /// The deadline counts from before the request was sent: the server's own count can't have started earlier. Counted
    /// from the reply, the deadline would be too late by the time that the reply took.
    pub(crate) fn deadline(self, sent: Instant, ttl: Duration) -> Instant {
        sent + self.validity(ttl)
    }

    /// Returns whether enough is left of the ttl of a lock that was just obtained: at least a tenth.
    pub(crate) fn suffices(self, remaining: Duration, ttl: Duration) -> bool {
        !remaining.is_zero() && remaining >= self.validity(ttl) / 10
    }

    /// Returns the ttl in whole milliseconds, the unit of the server. Rounded up, it would promise more than the server
    /// keeps.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidTtl`] for a ttl that is too short or too long.
    pub(crate) fn validate(self, ttl: Duration) -> Result<Duration, Error> {
        if ttl > MAX_TTL {
            return Err(Error::InvalidTtl("it is longer than 365 days"));
        }
        let ttl = whole_millis(ttl);
        if self.validity(ttl) < MIN_VALIDITY {
            return Err(Error::InvalidTtl("the allowance for clock drift leaves nothing of it; use a longer one"));
        }
        Ok(ttl)
    }
}

/// When a held lock is renewed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Renewal {
    /// Every third of the ttl: if one fails, there is time for two more.
    #[default]
    Third,
    Every(Duration),
    Never,
}

impl Renewal {
    /// Returns the time from one confirmed request to the next renewal.
    pub(crate) fn interval(self, ttl: Duration) -> Option<Duration> {
        match self {
            Self::Third => Some(ttl / 3),
            // At most half of the ttl, which `renew_for` may have made shorter than it was when the interval was set.
            Self::Every(interval) => Some(interval.min(ttl / 2)),
            Self::Never => None,
        }
    }

    /// Returns when the renewal after a confirmed request is due.
    ///
    /// The time is rounded down to a grid that begins at `origin`, so that renewals of many locks are due together and
    /// share calls. Spread evenly, each would need a call of its own, at ten times the cost
    /// (`benches/watch`).
    pub(crate) fn due(self, sent: Instant, ttl: Duration, origin: Instant) -> Option<Instant> {
        const STEPS: u32 = 32;
        let interval = self.interval(ttl)?;
        let due = sent + interval;
        let step = (interval / STEPS).as_nanos().max(1);
        let past = due.saturating_duration_since(origin).as_nanos() % step;
        // Less than a step, which is less than the interval: the result is never before `sent`.
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

/// Returns what is left until then, in whole milliseconds, the unit of the server. Rounded up: less would be too short.
pub(crate) fn rest_until(until: Instant, now: Instant) -> Option<Duration> {
    let rest = until.saturating_duration_since(now);
    let millis = rest.as_nanos().div_ceil(1_000_000);
    (millis > 0).then(|| Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)))
}

/// Returns the timeout of one call. It ends at the deadline at the latest, as a later reply is of no use.
pub(crate) fn call_timeout(command_timeout: Duration, now: Instant, deadline: Instant) -> Duration {
    command_timeout.min(deadline.saturating_duration_since(now))
}

/// Returns the timeout of one renewal: at most half of the time that is left. A renewal that hangs on a dead connection
/// must leave time for another one on a new connection.
pub(crate) fn renewal_timeout(command_timeout: Duration, now: Instant, deadline: Instant) -> Duration {
    command_timeout.min(deadline.saturating_duration_since(now) / 2)
}

/// Returns the pause after the `failures`th failure in a row. Pauses grow, but leave time for another try before the
/// deadline. `chance` is random in `0.0..1.0`, so that clients whose server has failed don't all come back at once.
pub(crate) fn pause_after(failures: u32, interval: Duration, remaining: Duration, chance: f64) -> Duration {
    const FLOOR: Duration = Duration::from_millis(5);
    let first = (interval / 16).clamp(FLOOR, Duration::from_millis(250));
    let grown = first.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    let pause = grown.min(interval).mul_f64(0.75 + chance / 2.0);
    pause.min(remaining / 2).max(FLOOR)
}

/// Limits how often a lasting failure is logged: at once, then at intervals that double from 10 s up to 10 min.
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

/// Returns when a waiter checks a lock again that is `held` for this long: when the ttl ends or after about `every`,
/// whichever comes first. If the holder's client sends no notification of the release, nothing else finds the lock
/// free. `chance` is random in `0.0..1.0`, so that waiters on several machines don't all check at once.
pub(crate) fn look_after(held: Option<Duration>, every: Duration, chance: f64) -> Duration {
    const SPREAD: Duration = Duration::from_millis(9);
    let poll = every.mul_f64(0.75 + chance / 2.0);
    held.map_or(poll, |held| poll.min(held.saturating_add(Duration::from_millis(1) + SPREAD.mul_f64(chance))))
}

/// Returns the pause before the `attempt`th check of a lock that another holds. Pauses grow, and end when the holder's
/// ttl does.
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
