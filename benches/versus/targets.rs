//! The ratios that tenure aims at. They are no tests: the benchmark prints which of them this run has met.

use crate::rivals::{ON_FRED_UNFENCED, ON_REDIS, ON_REDIS_UNFENCED, RAW_FRED, RAW_REDIS, RSLOCK};

/// What the rate of one rival should be, compared to another's.
pub(crate) struct Target {
    pub(crate) tasks: usize,
    pub(crate) rival: &'static str,
    pub(crate) to: &'static str,
    pub(crate) bound: Bound,
}

pub(crate) enum Bound {
    /// The time of a pair is at most so many times the other's.
    Time(f64),
    /// There are at least so many times the other's pairs in a second.
    Pairs(f64),
}

const fn target(tasks: usize, rival: &'static str, to: &'static str, bound: Bound) -> Target {
    Target { tasks, rival, to, bound }
}

pub(crate) const TARGETS: [Target; 14] = [
    target(1, ON_REDIS_UNFENCED, RSLOCK, Bound::Time(1.05)),
    target(1, ON_REDIS, RSLOCK, Bound::Time(1.25)),
    target(1, ON_FRED_UNFENCED, RAW_FRED, Bound::Time(1.12)),
    target(16, ON_REDIS_UNFENCED, RSLOCK, Bound::Pairs(1.0)),
    target(16, ON_REDIS, RSLOCK, Bound::Pairs(0.8)),
    target(16, ON_FRED_UNFENCED, RAW_FRED, Bound::Pairs(1.0)),
    target(64, ON_REDIS_UNFENCED, RAW_REDIS, Bound::Pairs(1.2)),
    target(64, ON_REDIS, RAW_REDIS, Bound::Pairs(1.0)),
    target(64, ON_FRED_UNFENCED, RAW_FRED, Bound::Pairs(1.6)),
    target(256, ON_REDIS_UNFENCED, RAW_REDIS, Bound::Pairs(1.3)),
    target(256, ON_REDIS_UNFENCED, RSLOCK, Bound::Pairs(2.5)),
    target(256, ON_REDIS, RAW_REDIS, Bound::Pairs(1.0)),
    target(256, ON_REDIS, RSLOCK, Bound::Pairs(2.0)),
    target(256, ON_FRED_UNFENCED, RAW_FRED, Bound::Pairs(2.2)),
];

impl Target {
    /// Describes the target, and whether a median ratio of the two rates meets it.
    pub(crate) fn judge(&self, rates: f64) -> String {
        let Self { rival, to, .. } = self;
        let (what, ratio, bound, is_met) = match self.bound {
            Bound::Time(most) => ("time", 1.0 / rates, format!("at most {most:.2}"), 1.0 / rates <= most),
            Bound::Pairs(least) => ("pairs/s", rates, format!("at least {least:.2}"), rates >= least),
        };
        let verdict = if is_met { "met" } else { "missed" };
        format!("{verdict:<6}  {rival}: {what} {ratio:.2} of {to}, should be {bound}")
    }
}
