//! The lines of those who wait for several keys: each stands in the line for one of them, which another holds.
//!
//! The embedded store needs no other line. Those who wait for one key stand in the queue of their locker, and who asks
//! to share the key looks there first ([`queue`](crate::acquire::queue)). A request for several keys is in no queue.
//!
//! A place holds back those who came later and could share the key, by when their request [began](Wanted::since):
//! without that, readers who come before the others have left would keep such a request out for ever. Those who came
//! before it pass, as they would on a server. It holds back nobody who wants the key alone.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::Key;
use crate::store::LinePlace;
#[cfg(doc)]
use crate::store::Wanted;

/// For how long a place counts after a sign of life. As in the lines of a server.
pub(crate) const ALIVE: Duration = Duration::from_millis(1_500);

/// A place, and which of the lockers has given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaceOf {
    pub(crate) locker: u64,
    pub(crate) place: LinePlace,
}

/// The lines of all keys. None is empty.
#[derive(Default)]
pub(super) struct Lines(HashMap<Key, Vec<Standing>>);

/// One that stands in a line.
struct Standing {
    whose: PlaceOf,
    since: Instant,
    /// Until when it counts, unless there is another sign of life.
    until: Instant,
}

impl Lines {
    /// Enters the line, unless the place is in it.
    pub(super) fn enter(&mut self, key: &Key, whose: PlaceOf, now: Instant) {
        if self.heartbeat(key, whose, now) {
            return;
        }
        let line = self.0.entry(key.clone()).or_default();
        line.retain(|standing| now < standing.until);
        line.push(Standing { whose, since: now, until: now + ALIVE });
    }

    /// Notes a sign of life. Returns whether the place is in the line.
    pub(super) fn heartbeat(&mut self, key: &Key, whose: PlaceOf, now: Instant) -> bool {
        let mut line = self.0.get_mut(key).into_iter().flatten();
        let standing = line.find(|standing| standing.whose == whose && now < standing.until);
        standing.map(|standing| standing.until = now + ALIVE).is_some()
    }

    pub(super) fn leave(&mut self, key: &Key, whose: PlaceOf) {
        if let Some(line) = self.0.get_mut(key) {
            line.retain(|standing| standing.whose != whose);
            if line.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// Returns until when those hold a request back that has begun then, unless they give another sign of life.
    pub(super) fn before(&self, key: &Key, began: Instant, now: Instant) -> Option<Instant> {
        let line = self.0.get(key).into_iter().flatten();
        line.filter(|standing| standing.since <= began && now < standing.until).map(|standing| standing.until).max()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Removes those that have given no sign of life.
    pub(super) fn sweep(&mut self, now: Instant) {
        self.0.retain(|_, line| {
            line.retain(|standing| now < standing.until);
            !line.is_empty()
        });
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn place(locker: u64, number: u64) -> PlaceOf {
        PlaceOf { locker, place: LinePlace { number, is_shared: false } }
    }

    #[test]
    fn who_came_before_a_place_is_not_held_back_by_it() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), now);
        assert_eq!(lines.before(&key, now - ms(1), now), None);
        assert_eq!(lines.before(&key, now, now), Some(now + ALIVE));
        assert_eq!(lines.before(&Key::from("other"), now, now), None);
        lines.enter(&key, place(1, 1), now + ms(5));
        lines.leave(&key, place(0, 1));
        assert_eq!(lines.before(&key, now + ms(4), now + ms(9)), None, "it came before the one that is left");
        assert_eq!(lines.before(&key, now + ms(5), now + ms(9)), Some(now + ms(5) + ALIVE));
    }

    #[test]
    fn a_place_without_a_sign_of_life_counts_no_longer_and_is_removed() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), now);
        let later = now + ms(1_000);
        assert!(lines.heartbeat(&key, place(0, 1), later) && !lines.heartbeat(&key, place(0, 2), later));
        assert_eq!(lines.before(&key, later, now + ALIVE), Some(later + ALIVE));
        let over = later + ALIVE;
        assert_eq!(lines.before(&key, later, over), None);
        assert!(!lines.heartbeat(&key, place(0, 1), over), "it has to enter again");
        lines.enter(&key, place(0, 1), over);
        assert_eq!(lines.before(&key, over - ms(1), over), None, "at the end of the line");
        lines.sweep(over);
        assert_eq!(lines.len(), 1);
        lines.sweep(over + ALIVE);
        assert_eq!(lines.len(), 0);
    }

    #[test]
    fn nothing_is_left_of_a_line_that_all_have_left() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), now);
        lines.enter(&key, place(0, 1), now);
        lines.leave(&key, place(0, 1));
        lines.leave(&key, place(0, 1));
        assert_eq!(lines.len(), 0);
    }
}
