//! The lines of those who wait for keys that others hold.
//!
//! Those who wait for one key stand in the queue of their locker ([`queue`](crate::acquire::queue)), and the first of
//! them in the line for that key, if there are other lockers. A request for several keys is in no queue, and stands in
//! the line for one of its keys.
//!
//! 1. Who wants a key alone holds back those who came later and could share it, by when their request
//!    [began](Wanted::since): without that, readers who come before the others have left would keep it out for ever.
//!    Those who came before it pass, as they would on a server.
//! 2. Who waits for one key is served in the order in which the lockers came, so that none of them keeps a key to
//!    itself. One who doesn't wait may come in between. There is no order between those who want a key alone and those
//!    who wait for several.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::Key;
use crate::mode::Mode;
use crate::store::LinePlace;
#[cfg(doc)]
use crate::store::Wanted;

/// For how long a place counts after a sign of life. As in the lines of a server.
const ALIVE: Duration = Duration::from_millis(1_500);

/// A place, and which of the lockers has given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaceOf {
    pub(crate) locker: u64,
    pub(crate) place: LinePlace,
}

/// What somebody in a line waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitsFor {
    One(Mode),
    Several,
}

/// The lines of all keys. None is empty.
#[derive(Default)]
pub(super) struct Lines(HashMap<Key, Vec<Standing>>);

/// One that stands in a line.
struct Standing {
    whose: PlaceOf,
    waits_for: WaitsFor,
    since: Instant,
    /// Until when it counts, unless there is another sign of life.
    until: Instant,
}

impl Lines {
    /// Enters the line, unless the place is in it.
    pub(super) fn enter(&mut self, key: &Key, whose: PlaceOf, waits_for: WaitsFor, now: Instant) {
        let line = self.0.entry(key.clone()).or_default();
        line.retain(|standing| now < standing.until);
        let until = now + ALIVE;
        match line.iter_mut().find(|standing| standing.whose == whose) {
            // The next who has the place may wait for something else.
            Some(standing) => (standing.waits_for, standing.until) = (waits_for, until),
            None => line.push(Standing { whose, waits_for, since: now, until }),
        }
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

    /// Returns until when those who want the key alone hold a request back that could share it, unless they give
    /// another sign of life. If it has a place in the line, they are those before it; otherwise those who were there
    /// when it [began](Wanted::since).
    pub(super) fn before_shared(
        &self,
        key: &Key,
        began: Instant,
        place: Option<PlaceOf>,
        now: Instant,
    ) -> Option<Instant> {
        let stands = self.alive(key, now).any(|standing| Some(standing.whose) == place);
        let before = self.alive(key, now).take_while(|standing| Some(standing.whose) != place);
        let wants_it_alone = |standing: &&Standing| match standing.waits_for {
            WaitsFor::One(mode) => !mode.is_shared(),
            WaitsFor::Several => true,
        };
        let first = before.filter(wants_it_alone).filter(|standing| stands || standing.since <= began);
        first.map(|standing| standing.until).max()
    }

    /// Returns until when another locker is served before this place, unless it gives another sign of life.
    pub(super) fn before(&self, key: &Key, whose: PlaceOf, now: Instant) -> Option<Instant> {
        let waits_for_it = |standing: &&Standing| standing.waits_for != WaitsFor::Several;
        let first = self.alive(key, now).find(waits_for_it)?;
        (first.whose.locker != whose.locker).then_some(first.until)
    }

    #[cfg(test)]
    pub(super) fn is_waited_for(&self, key: &Key, now: Instant) -> bool {
        self.alive(key, now).next().is_some()
    }

    fn alive(&self, key: &Key, now: Instant) -> impl Iterator<Item = &Standing> {
        self.0.get(key).into_iter().flatten().filter(move |standing| now < standing.until)
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
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        assert_eq!(lines.before_shared(&key, now - ms(1), None, now), None);
        assert_eq!(lines.before_shared(&key, now, None, now), Some(now + ALIVE));
        assert_eq!(lines.before_shared(&Key::from("other"), now, None, now), None);
        lines.enter(&key, place(1, 1), WaitsFor::Several, now + ms(5));
        lines.leave(&key, place(0, 1));
        assert_eq!(
            lines.before_shared(&key, now + ms(4), None, now + ms(9)),
            None,
            "it came before the one that is left"
        );
        assert_eq!(lines.before_shared(&key, now + ms(5), None, now + ms(9)), Some(now + ms(5) + ALIVE));
    }

    #[test]
    fn a_place_without_a_sign_of_life_counts_no_longer_and_is_removed() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        let later = now + ms(1_000);
        assert!(lines.heartbeat(&key, place(0, 1), later) && !lines.heartbeat(&key, place(0, 2), later));
        assert_eq!(lines.before_shared(&key, later, None, now + ALIVE), Some(later + ALIVE));
        let over = later + ALIVE;
        assert_eq!(lines.before_shared(&key, later, None, over), None);
        assert!(!lines.heartbeat(&key, place(0, 1), over), "it has to enter again");
        lines.enter(&key, place(0, 1), WaitsFor::Several, over);
        assert_eq!(lines.before_shared(&key, over - ms(1), None, over), None, "at the end of the line");
        lines.sweep(over);
        assert_eq!(lines.len(), 1);
        lines.sweep(over + ALIVE);
        assert_eq!(lines.len(), 0);
    }

    #[test]
    fn who_shares_a_key_waits_for_none_but_those_who_want_it_alone() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::One(Mode::Read), now);
        lines.enter(&key, place(0, 2), WaitsFor::One(Mode::Permit), now);
        assert_eq!(lines.before_shared(&key, now, None, now), None);
        lines.enter(&key, place(0, 3), WaitsFor::One(Mode::Exclusive), now);
        assert_eq!(lines.before_shared(&key, now, None, now), Some(now + ALIVE));
        assert_eq!(lines.before_shared(&key, now, Some(place(0, 2)), now), None, "it is before that one");
        // What comes next with the place of the one that wanted the key alone.
        assert_eq!(lines.before_shared(&key, now, Some(place(0, 3)), now), None);
        lines.enter(&key, place(0, 3), WaitsFor::One(Mode::Read), now);
        assert_eq!(lines.before_shared(&key, now, None, now), None);
    }

    #[test]
    fn lockers_are_served_in_the_order_in_which_they_came() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        assert_eq!(lines.before(&key, place(1, 1), now), None);
        lines.enter(&key, place(0, 2), WaitsFor::One(Mode::Read), now + ms(1));
        lines.enter(&key, place(1, 1), WaitsFor::One(Mode::Exclusive), now + ms(2));
        let later = now + ms(9);
        assert_eq!(lines.before(&key, place(1, 1), later), Some(now + ms(1) + ALIVE));
        assert_eq!(lines.before(&key, place(0, 3), later), None, "its own locker's turn");
        lines.leave(&key, place(0, 2));
        assert_eq!(lines.before(&key, place(1, 1), later), None);
        assert_eq!(lines.before(&key, place(0, 3), later), Some(now + ms(2) + ALIVE));
        assert_eq!(lines.before(&key, place(0, 3), now + ms(2) + ALIVE), None, "it gives no sign of life");
    }

    #[test]
    fn nothing_is_left_of_a_line_that_all_have_left() {
        let (key, now) = (Key::from("k"), Instant::now());
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        lines.leave(&key, place(0, 1));
        lines.leave(&key, place(0, 1));
        assert_eq!(lines.len(), 0);
    }
}
