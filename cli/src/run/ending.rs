//! When the command has to be ended. No processes here, and no clock.

use std::fmt;
use std::time::Duration;

use tenure::Loss;
use tokio::time::Instant;

use crate::args::RunOptions;

/// The grace period, unless it is set or too long.
const GRACE: Duration = Duration::from_secs(5);
/// How long before the deadline the last process is killed, at least and at most: it takes a moment until all are gone,
/// and longer on a busy machine. In between it is a fiftieth of the ttl, or of the limit if that is less.
const MARGIN: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// The shortest ttl that leaves time to renew before the command has to be ended.
const SHORTEST_TTL: Duration = Duration::from_secs(1);
/// How often the group is looked at while it ends.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(5);

/// When the command has to be ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    grace: Duration,
    /// The ttl, or the limit if that is less.
    span: Duration,
    at_most: Option<Duration>,
    /// When the lock is held for as long as it may.
    limit: Option<Instant>,
}

/// Why the command has to be ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The lock was lost.
    Lost(Loss),
    /// It could not be renewed, and would be lost before the grace period is over.
    NotRenewed,
    LimitReached,
    /// The system doesn't tell what has become of the command.
    Unknown(String),
}

impl Plan {
    /// # Errors
    ///
    /// Returns what is wrong with the options: no lock could be held for as long as they want.
    pub(super) fn new(options: &RunOptions) -> Result<Self, String> {
        if options.ttl < SHORTEST_TTL {
            return Err("--ttl is too short: a command can't be watched for less than 1s".to_owned());
        }
        let longest = options.at_most.map_or(options.ttl, |most| most.min(options.ttl));
        let grace = options.grace.unwrap_or_else(|| GRACE.min(longest / 4));
        if grace > longest / 2 {
            let most = humantime::format_duration(longest / 2);
            return Err(format!("--grace is too long: at most half of --ttl and --at-most, {most}"));
        }
        Ok(Self { grace, span: longest, at_most: options.at_most, limit: None })
    }

    /// Returns the plan for a lock that was obtained now, and whose guard has this deadline.
    ///
    /// The guard counts its limit from when its request was sent, as it does its first deadline.
    pub(super) fn begun(self, now: Instant, deadline: Instant) -> Self {
        let limit = self.at_most.and_then(|most| {
            let by_deadline = deadline.checked_add(most.saturating_sub(self.span))?;
            Some(now.checked_add(most)?.min(by_deadline))
        });
        Self { limit, ..self }
    }

    pub(super) fn grace(&self) -> Duration {
        self.grace
    }

    fn margin(&self) -> Duration {
        let [least, most] = MARGIN;
        (self.span / 50).clamp(least, most)
    }

    /// Returns how often the watcher is told of a new deadline at least. Nothing wakes us when a renewal succeeds, and
    /// each renewal must reach the watcher well before it is due to act by the deadline before that.
    pub(super) fn tell_every(&self) -> Duration {
        self.span / 8
    }

    /// Returns when the command has to be ended, unless the lock is renewed before.
    pub(super) fn end_at(&self, deadline: Instant) -> Instant {
        deadline.checked_sub(self.grace + self.margin()).unwrap_or(deadline)
    }

    pub(super) fn is_over(&self, deadline: Instant, now: Instant) -> bool {
        now >= self.end_at(deadline)
    }

    /// Returns when what is left of a command that was told to end is killed.
    pub(super) fn kill_at(&self, deadline: Instant, told: Instant) -> Instant {
        (told + self.grace).min(deadline.checked_sub(self.margin()).unwrap_or(deadline)).max(told)
    }

    /// Returns why the deadline has come so near.
    pub(super) fn why(&self, deadline: Instant, now: Instant) -> Why {
        // With a limit, the deadline is before it by the allowance for the clocks.
        let allowance = self.span / 50 + self.margin();
        match self.limit {
            Some(limit) if deadline + allowance >= limit || now >= limit => Why::LimitReached,
            _ => Why::NotRenewed,
        }
    }
}

impl Why {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Lost(Loss::Taken) => "taken",
            Self::Lost(Loss::Missing) => "missing",
            Self::Lost(_) => "expired",
            Self::NotRenewed => "not_renewed",
            Self::LimitReached => "limit_reached",
            Self::Unknown(_) => "unknown",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(loss) => write!(f, "the lock was lost ({loss})"),
            Self::NotRenewed => f.write_str("the lock could not be renewed, and is about to be lost"),
            Self::LimitReached => f.write_str("the lock was held for as long as --at-most allows"),
            Self::Unknown(error) => write!(f, "the system lost track of it ({error})"),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    pub(in crate::run) fn plan(options: &[&str]) -> Result<Plan, String> {
        let args = [&["tenure", "run", "k"][..], options, &["--", "true"]].concat();
        let Ok(Args { command: Command::Run(options), .. }) = Args::try_parse_from(args) else { panic!("run") };
        Plan::new(&options)
    }

    #[tokio::test(start_paused = true)]
    async fn the_grace_time_is_over_before_the_deadline() {
        let plan = plan(&["--ttl", "10s", "--grace", "3s"]).unwrap();
        let deadline = Instant::now() + ms(9_898);
        let told = plan.end_at(deadline);
        assert!(!plan.is_over(deadline, told - ms(1)) && plan.is_over(deadline, told));
        assert!(plan.kill_at(deadline, told) == told + ms(3_000) && told + ms(3_000) < deadline);
        // A loss that comes late leaves less of it, and one that has come leaves nothing.
        assert_eq!(plan.kill_at(deadline, deadline - ms(1_000)), deadline - ms(200));
        assert_eq!(plan.kill_at(deadline, deadline + ms(7)), deadline + ms(7));
        for options in [&["--ttl", "1s"][..], &["--at-most", "1s"]] {
            assert_eq!(self::plan(options).unwrap().margin(), ms(50), "{options:?}");
        }
        // One that comes early need not wait for the deadline.
        assert_eq!(plan.kill_at(deadline, deadline - ms(9_000)), deadline - ms(6_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_told_from_a_server_that_is_away() {
        let plan = plan(&["--ttl", "10s", "--at-most", "60s"]).unwrap();
        // It counts from when the lock was obtained, however long that took.
        let began = Instant::now() + ms(3_600_000);
        let begun = plan.begun(began, began + ms(9_898));
        assert_eq!(begun.why(began + ms(20_000), began + ms(14_950)), Why::NotRenewed);
        assert_eq!(begun.why(began + ms(59_900), began + ms(54_900)), Why::LimitReached);
        // The reply took 1.5 s.
        let begun = plan.begun(began, began + ms(8_398));
        assert_eq!(begun.why(began + ms(20_000), began + ms(14_950)), Why::NotRenewed);
        assert_eq!(begun.why(began + ms(58_400), began + ms(53_400)), Why::LimitReached);
        let plan = self::plan(&["--ttl", "10s", "--at-most", "1s"]).unwrap();
        let begun = plan.begun(began, began + ms(888));
        assert_eq!(begun.why(began + ms(888), began + ms(588)), Why::LimitReached);
    }

    #[test]
    fn a_grace_time_that_leaves_no_time_to_renew_is_refused() {
        for options in [&["--ttl", "10s", "--grace", "6s"][..], &["--at-most", "8s", "--grace", "5s"]] {
            assert!(plan(options).is_err_and(|why| why.contains("--grace")), "{options:?}");
        }
        assert!(plan(&["--ttl", "900ms"]).is_err_and(|why| why.contains("--ttl")));
        for (options, grace) in [
            (&["--ttl", "30s"][..], ms(5_000)),
            (&["--ttl", "2s"], ms(500)),
            (&["--at-most", "4s"], ms(1_000)),
            (&["--ttl", "1s", "--grace", "0s"], ms(0)),
        ] {
            assert_eq!(plan(options).unwrap().grace(), grace, "{options:?}");
        }
    }
}
