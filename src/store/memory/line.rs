//! The lines of those who wait for keys that others hold.
//!
//! Those who wait for one key stand in the queue of their locker ([`queue`](crate::acquire::queue)), and the first of
//! them in the line for that key, if there are other lockers. A request for several keys is in no queue, and stands in
//! the line for one of its keys.
//!
//! 1. A request waits behind those in the line who came before it and can't share the key with it, also where the key
//!    is open to it: without that, readers who come before the others have left would keep a writer out for ever. Who
//!    has no place yet came when it [began](Wanted::since).
//! 2. A request that wants the key alone is served in the order of the lockers, and the queue of its own locker knows
//!    the order within that. One that doesn't wait may come in between.
//! 3. Requests for several keys hold back those who would share one of them, and no others: there is no order between
//!    them and those who want one key alone.
//! 4. When a place leaves the line, or its next waiter wants something else, those behind it are notified, unless the
//!    key is held by one alone: then its release notifies them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::Key;
use crate::mode::Mode;
use crate::store::{InLine, LinePlace, Wanted};

/// For how long a place counts after a sign of life. As in the lines of a server.
const ALIVE: Duration = Duration::from_millis(1_500);

/// A place, and which of the lockers has given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlaceOf {
    pub(crate) locker: u64,
    pub(crate) place: LinePlace,
}

impl PlaceOf {
    /// Returns the place of a request for one key that waits.
    pub(crate) fn of(wanted: &Wanted, in_line: InLine, locker: u64) -> Option<Self> {
        match in_line {
            InLine::At { place, .. } if wanted.owned.keys.len() == 1 => Some(Self { locker, place }),
            _ => None,
        }
    }
}

/// What somebody in a line waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitsFor {
    One(Mode),
    Several,
}

/// A request for one key, as the line sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) mode: Mode,
    /// The place that it has in the line, or takes there if it is refused.
    pub(super) whose: Option<PlaceOf>,
    pub(super) since: Instant,
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

impl Standing {
    fn holds_back(&self, request: &Request) -> bool {
        match (self.waits_for, request.mode) {
            (WaitsFor::One(Mode::Read), Mode::Read) => false,
            (WaitsFor::One(_), Mode::Exclusive) => request.whose.is_some_and(|own| own.locker != self.whose.locker),
            (WaitsFor::One(_), _) => true,
            (WaitsFor::Several, mode) => mode.is_shared(),
        }
    }
}

impl Lines {
    /// Enters the line, unless the place is in it. Returns whether it was there for something else.
    pub(super) fn enter(&mut self, key: &Key, whose: PlaceOf, waits_for: WaitsFor, now: Instant) -> bool {
        let line = self.0.entry(key.clone()).or_default();
        line.retain(|standing| now < standing.until);
        let until = now + ALIVE;
        let Some(standing) = line.iter_mut().find(|standing| standing.whose == whose) else {
            line.push(Standing { whose, waits_for, since: now, until });
            return false;
        };
        standing.until = until;
        std::mem::replace(&mut standing.waits_for, waits_for) != waits_for
    }

    /// Notes a sign of life. Returns whether the place is in the line.
    pub(super) fn heartbeat(&mut self, key: &Key, whose: PlaceOf, now: Instant) -> bool {
        let mut line = self.0.get_mut(key).into_iter().flatten();
        let standing = line.find(|standing| standing.whose == whose && now < standing.until);
        standing.map(|standing| standing.until = now + ALIVE).is_some()
    }

    /// Leaves the line. Returns whether the place was in it.
    pub(super) fn leave(&mut self, key: &Key, whose: PlaceOf) -> bool {
        let Some(line) = self.0.get_mut(key) else { return false };
        let before = line.len();
        line.retain(|standing| standing.whose != whose);
        let has_left = line.len() < before;
        if line.is_empty() {
            self.0.remove(key);
        }
        has_left
    }

    /// Returns until when a request has to wait for those before it, unless they give another sign of life.
    pub(super) fn before(&self, key: &Key, request: &Request, now: Instant) -> Option<Instant> {
        let is_own = |standing: &&Standing| Some(standing.whose) == request.whose;
        let stands = self.alive(key, now).any(|standing| is_own(&standing));
        let before = self.alive(key, now).take_while(|standing| !is_own(standing));
        let before = before.filter(|standing| stands || standing.since <= request.since);
        before.filter(|standing| standing.holds_back(request)).map(|standing| standing.until).max()
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

    fn request(mode: Mode, since: Instant) -> Request {
        Request { mode, whose: None, since }
    }

    fn at(mode: Mode, whose: PlaceOf, since: Instant) -> Request {
        Request { mode, whose: Some(whose), since }
    }

    #[test]
    fn who_came_before_a_place_is_not_held_back_by_it() {
        let (key, now) = (Key::from("k"), Instant::now());
        let reads = |since| request(Mode::Read, since);
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        assert_eq!(lines.before(&key, &reads(now - ms(1)), now), None);
        assert_eq!(lines.before(&key, &reads(now), now), Some(now + ALIVE));
        assert_eq!(lines.before(&Key::from("other"), &reads(now), now), None);
        lines.enter(&key, place(1, 1), WaitsFor::Several, now + ms(5));
        assert!(lines.leave(&key, place(0, 1)) && !lines.leave(&key, place(0, 1)));
        assert_eq!(lines.before(&key, &reads(now + ms(4)), now + ms(9)), None, "it came before the one that is left");
        assert_eq!(lines.before(&key, &reads(now + ms(5)), now + ms(9)), Some(now + ms(5) + ALIVE));
        // One that is in the line came when it entered.
        lines.enter(&key, place(2, 1), WaitsFor::One(Mode::Read), now + ms(6));
        let early = at(Mode::Read, place(2, 1), now);
        assert_eq!(lines.before(&key, &early, now + ms(9)), Some(now + ms(5) + ALIVE));
    }

    #[test]
    fn a_place_without_a_sign_of_life_counts_no_longer_and_is_removed() {
        let (key, now) = (Key::from("k"), Instant::now());
        let reads = |since| request(Mode::Read, since);
        let mut lines = Lines::default();
        lines.enter(&key, place(0, 1), WaitsFor::Several, now);
        let later = now + ms(1_000);
        assert!(lines.heartbeat(&key, place(0, 1), later) && !lines.heartbeat(&key, place(0, 2), later));
        assert_eq!(lines.before(&key, &reads(later), now + ALIVE), Some(later + ALIVE));
        let over = later + ALIVE;
        assert_eq!(lines.before(&key, &reads(later), over), None);
        assert!(!lines.heartbeat(&key, place(0, 1), over), "it has to enter again");
        lines.enter(&key, place(0, 1), WaitsFor::Several, over);
        assert_eq!(lines.before(&key, &reads(over - ms(1)), over), None, "at the end of the line");
        lines.sweep(over);
        assert_eq!(lines.len(), 1);
        lines.sweep(over + ALIVE);
        assert_eq!(lines.len(), 0);
    }

    #[test]
    fn a_request_waits_behind_those_with_whom_it_cannot_share_the_key() {
        use Mode::{Exclusive, Permit, Read};
        use WaitsFor::{One, Several};
        let (key, now) = (Key::from("k"), Instant::now());
        for (waits_for, held_back) in [
            (One(Read), vec![Permit, Exclusive]),
            (One(Permit), vec![Read, Permit, Exclusive]),
            (One(Exclusive), vec![Read, Permit, Exclusive]),
            (Several, vec![Read, Permit]),
        ] {
            let mut lines = Lines::default();
            lines.enter(&key, place(0, 1), waits_for, now);
            for mode in [Read, Permit, Exclusive] {
                let expected = held_back.contains(&mode).then_some(now + ALIVE);
                let found = lines.before(&key, &at(mode, place(1, 1), now), now);
                assert_eq!(found, expected, "{mode:?} behind {waits_for:?}");
                let own = lines.before(&key, &at(mode, place(0, 1), now), now);
                assert_eq!(own, None, "{mode:?} with the place of {waits_for:?}");
            }
        }
    }

    #[test]
    fn lockers_are_served_in_the_order_in_which_they_came() {
        let (key, now) = (Key::from("k"), Instant::now());
        let wants = |whose| at(Mode::Exclusive, whose, now + ms(9));
        let mut lines = Lines::default();
        assert!(!lines.enter(&key, place(0, 2), WaitsFor::One(Mode::Read), now + ms(1)));
        assert!(!lines.enter(&key, place(1, 1), WaitsFor::One(Mode::Exclusive), now + ms(2)));
        let later = now + ms(9);
        assert_eq!(lines.before(&key, &wants(place(1, 1)), later), Some(now + ms(1) + ALIVE));
        assert_eq!(lines.before(&key, &wants(place(2, 1)), later), Some(now + ms(2) + ALIVE), "it comes last");
        // The next waiter of a locker has its place.
        assert!(lines.enter(&key, place(0, 2), WaitsFor::One(Mode::Exclusive), later));
        assert!(!lines.enter(&key, place(0, 2), WaitsFor::One(Mode::Exclusive), later));
        assert_eq!(lines.before(&key, &wants(place(0, 2)), later), None);
        lines.leave(&key, place(0, 2));
        assert_eq!(lines.before(&key, &wants(place(1, 1)), later), None);
        assert_eq!(lines.before(&key, &wants(place(0, 3)), later), Some(now + ms(2) + ALIVE));
        assert_eq!(lines.before(&key, &wants(place(1, 3)), later), None, "its queue knows who of its locker is next");
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
