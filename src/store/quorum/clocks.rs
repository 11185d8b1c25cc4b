//! Which number to propose as the fencing token: ahead of every node's last number and clock, but not by much.
//!
//! The order of fencing tokens doesn't depend on this: the nodes enforce it. A bad guess costs another round.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::store::node::Seen;

/// How far a proposal is ahead of the clocks that it is made for, in us, so that it is still ahead when it arrives.
const LEAD: u64 = 100_000;

/// A proposal is ahead of all nodes whose clocks are ahead of a majority's by less than this, in us. Clocks that are
/// further ahead are ignored.
const TOGETHER: u64 = 1_000_000;

/// The highest number: Lua's numbers are exact below 2^53.
const HIGHEST: u64 = (1 << 53) - 2;

/// Returns the microseconds since 1970.
pub(super) fn since_1970() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_micros()).unwrap_or(HIGHEST)
}

/// Our clock, and what is known of the nodes' clocks.
pub(super) struct Clocks {
    own: Box<dyn Fn() -> u64 + Send + Sync>,
    needed: usize,
    known: Mutex<Known>,
}

struct Known {
    /// How far each node's clock was ahead of ours, including the time that the call took to get there.
    ahead: Vec<Option<i64>>,
    /// The highest number that was proposed or seen.
    highest: u64,
}

impl Clocks {
    pub(super) fn new(own: impl Fn() -> u64 + Send + Sync + 'static, nodes: usize, needed: usize) -> Self {
        let known = Mutex::new(Known { ahead: vec![None; nodes], highest: 0 });
        Self { own: Box::new(own), needed, known }
    }

    pub(super) fn now(&self) -> u64 {
        (self.own)()
    }

    /// Returns a number that a majority should grant. `seen` is what the nodes that would grant another one have just
    /// replied: they may be a bare majority, and all have to grant this. `lead` is how far it must be ahead of their
    /// clocks if calls take longer than usual.
    pub(super) fn propose(&self, seen: impl Iterator<Item = Seen> + Clone, lead: Duration) -> u64 {
        let lead = u64::try_from(lead.as_micros()).unwrap_or(HIGHEST).max(LEAD);
        let now = self.now();
        let mut known = self.known();
        let clocks = known.ahead.iter().flatten().map(|&ahead| now.saturating_add_signed(ahead));
        let known_clock = reach(clocks, self.needed).unwrap_or(now);
        let seen_clock = reach(seen.clone().map(|seen| seen.now), self.needed).unwrap_or(0);
        let mut number = known_clock.max(seen_clock).saturating_add(lead);
        // Unless a fence key holds nonsense, which must not affect other keys.
        if known.highest < number.saturating_add(TOGETHER) {
            number = number.max(known.highest.saturating_add(1));
        }
        if let Some(last) = reach(seen.map(|seen| seen.last), self.needed) {
            number = number.max(last.saturating_add(1));
        }
        let number = number.min(HIGHEST);
        known.highest = number;
        number
    }

    /// Notes a node's reply to a call that was sent when our clock showed `sent`.
    pub(super) fn learn(&self, place: usize, sent: u64, seen: Seen) {
        let mut known = self.known();
        if let Some(ahead) = known.ahead.get_mut(place) {
            *ahead = i64::try_from(i128::from(seen.now) - i128::from(sent)).ok();
        }
        let near = seen.last < seen.now.saturating_add(TOGETHER);
        if near {
            known.highest = known.highest.max(seen.last);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Clocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clocks").finish_non_exhaustive()
    }
}

/// Returns the highest value that is not far above a majority's, so that no single node misleads us.
fn reach(values: impl Iterator<Item = u64>, needed: usize) -> Option<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    let majority = *values.get(needed - 1).or_else(|| values.last())?;
    values.into_iter().rev().find(|&value| value <= majority.saturating_add(TOGETHER))
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    const HOUR: u64 = 3_600_000_000;

    #[test]
    fn one_node_with_a_wrong_clock_leads_nobody_astray() {
        assert_eq!(reach([5, 9, HOUR].into_iter(), 2), Some(9));
        assert_eq!(reach([5, 9, 7].into_iter(), 2), Some(9));
        assert_eq!(reach([HOUR, 2 * HOUR, 5].into_iter(), 2), Some(HOUR));
        assert_eq!(reach([HOUR].into_iter(), 2), Some(HOUR));
        assert_eq!(reach([].into_iter(), 2), None);
    }

    #[test]
    fn a_client_learns_the_clock_of_the_nodes() {
        let clocks = Clocks::new(|| 5 * HOUR, 3, 2);
        assert_eq!(clocks.propose(iter::empty(), Duration::ZERO), 5 * HOUR + LEAD);
        for place in 0..3 {
            clocks.learn(place, 5 * HOUR, Seen { now: 7 * HOUR, last: 0 });
        }
        assert_eq!(clocks.propose(iter::empty(), Duration::ZERO), 7 * HOUR + LEAD);
        assert_eq!(clocks.propose(iter::empty(), Duration::ZERO), 7 * HOUR + LEAD + 1);
        for place in 0..3 {
            clocks.learn(place, 5 * HOUR, Seen { now: 4 * HOUR, last: 9 * HOUR });
        }
        assert_eq!(clocks.propose(iter::empty(), Duration::ZERO), 4 * HOUR + LEAD);
        let seen = [0, 5, 0].map(|more| Seen { now: 4 * HOUR, last: 9 * HOUR + more });
        assert_eq!(clocks.propose(seen.into_iter(), Duration::ZERO), 9 * HOUR + 6);
    }
}
