//! A model of those who wait for several keys, in the lines of two keys: everything that can happen does, in any order.
//! `tests/line_model.rs` covers a line by itself, with deaths, losses and times that end; here nothing goes wrong.
//!
//! | in the model                    | in the crate                                                        |
//! | ------------------------------- | ------------------------------------------------------------------- |
//! | `ask`                           | `acquire.lua`; for one key `acquire_in_line.lua`                    |
//! | `pass_on`, `leave`              | `line.lua`, `leave.lua`, the end of `release.lua`                   |
//! | `Phase::Refused`, `Moves`       | `Position::enter_line_for`: leaves one line, and enters another     |
//! | `pass_on` by one that waits     | `heartbeat.lua`                                                     |
//!
//! A waiter that goes to another line has left the first before it asks again, which holds unless a request is on its
//! way for longer than the next two are. Otherwise it may be refused by a turn of its own, and go back.
//!
//! The promises: whatever happens is over at some time, without a fair schedule; then all have been served, and nothing
//! is left behind.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "these are tests")]

use std::collections::HashMap;

/// What a request whose turn it is at one key takes besides.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Only what is free. It goes to the line for the first key that isn't.
    Free,
    /// Also what is another's turn.
    Turns,
    /// Also what is another's turn, unless that one has lost its turn before.
    TurnsOnce,
}

/// The keys that each waiter wants, in the order of its request.
struct World {
    rule: Rule,
    waiters: &'static [&'static [usize]],
    /// Those who are served come again, but for the last waiter, which is in line from the start. All is over once that
    /// is served.
    come_again: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Lock {
    Free,
    /// One that was there before, and doesn't come again.
    First,
    Held(usize),
    Reserved {
        waiter: usize,
        again: bool,
    },
}

/// The place of a waiter, and whether it has lost its turn. A waiter has no more than one in each line.
type Place = (usize, bool);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Waits,
    /// It has learned which key another holds, and enters the line for that.
    Moves(usize),
    /// The reply that says so is on its way.
    Refused(usize),
    Holds,
    Over,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Waiter {
    phase: Phase,
    /// The key in whose line it stands.
    stands: Option<usize>,
    /// The lines that it is about to leave.
    leaves: [bool; 2],
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    locks: [Lock; 2],
    lines: [Vec<Place>; 2],
    waiters: Vec<Waiter>,
}

impl State {
    fn first(world: &World) -> Self {
        let waiter = Waiter { phase: Phase::Waits, stands: None, leaves: [false; 2] };
        let mut state = Self {
            locks: [Lock::First; 2],
            lines: [Vec::new(), Vec::new()],
            waiters: vec![waiter; world.waiters.len()],
        };
        if let (true, [.., last]) = (world.come_again, world.waiters) {
            let (name, key) = (world.waiters.len() - 1, last[0]);
            state.waiters[name].stands = Some(key);
            state.lines[key].push((name, false));
        }
        state
    }

    fn is_in_line(&self, waiter: usize, key: usize) -> bool {
        self.lines[key].iter().any(|place| place.0 == waiter)
    }

    fn pass_on(&mut self, key: usize) {
        self.locks[key] = match self.lines[key].is_empty() {
            true => Lock::Free,
            false => {
                let (waiter, again) = self.lines[key].remove(0);
                Lock::Reserved { waiter, again }
            }
        };
    }

    fn leave(&mut self, waiter: usize, key: usize) {
        self.lines[key].retain(|place| place.0 != waiter);
        let is_its_turn = matches!(self.locks[key], Lock::Reserved { waiter: whose, .. } if whose == waiter);
        if self.locks[key] == Lock::Free || is_its_turn {
            self.pass_on(key);
        }
    }

    fn ask(&mut self, world: &World, waiter: usize) {
        let (keys, stands) = (world.waiters[waiter], self.waiters[waiter].stands);
        let has_turn = |key: usize| {
            let is_its_turn = matches!(self.locks[key], Lock::Reserved { waiter: whose, .. } if whose == waiter);
            is_its_turn && stands == Some(key)
        };
        let takes_turns = world.rule != Rule::Free && keys.iter().any(|key| has_turn(*key));
        let may_take = |key: usize| match self.locks[key] {
            // acquire_in_line.lua looks at the line.
            Lock::Free => keys.len() > 1 || self.lines[key].first().is_none_or(|head| head.0 == waiter),
            Lock::Reserved { again, .. } => has_turn(key) || takes_turns && !(again && world.rule == Rule::TurnsOnce),
            Lock::First | Lock::Held(_) => false,
        };
        let mut refused = keys.iter().copied().filter(|key| !may_take(*key));
        let first = refused.next();
        let stays = stands.filter(|key| world.rule != Rule::Free && !may_take(*key));
        if let Some(key) = stays.or(first) {
            if stands != Some(key) || !self.is_in_line(waiter, key) {
                self.waiters[waiter].phase = Phase::Refused(key);
            }
            return;
        }
        for key in keys {
            match std::mem::replace(&mut self.locks[*key], Lock::Held(waiter)) {
                Lock::Reserved { waiter: other, .. } if other != waiter => self.lines[*key].insert(0, (other, true)),
                _ => {}
            }
        }
        self.waiters[waiter].phase = Phase::Holds;
        if let Some(key) = self.waiters[waiter].stands.take() {
            self.waiters[waiter].leaves[key] = true;
        }
    }

    /// Returns all states that can come next.
    fn next(&self, world: &World) -> Vec<Self> {
        let mut all = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            if next != *self {
                all.push(next);
            }
        };
        for key in 0..2 {
            if self.locks[key] == Lock::First {
                add(&|next| next.pass_on(key));
            }
        }
        for (name, waiter) in self.waiters.iter().enumerate() {
            for key in 0..2 {
                if waiter.leaves[key] {
                    add(&|next| {
                        next.waiters[name].leaves[key] = false;
                        next.leave(name, key);
                    });
                }
            }
            match waiter.phase {
                Phase::Waits => {
                    // What it leaves, it has left before it asks again: it is refused by no earlier turn of its own.
                    if waiter.leaves == [false; 2] {
                        add(&|next| next.ask(world, name));
                    }
                    // A heartbeat.
                    let key = waiter.stands.filter(|key| self.is_in_line(name, *key) && self.locks[*key] == Lock::Free);
                    key.into_iter().for_each(|key| add(&|next| next.pass_on(key)));
                }
                Phase::Refused(key) => add(&|next| {
                    let known = &mut next.waiters[name];
                    known.phase = Phase::Moves(key);
                    if let Some(before) = known.stands.take().filter(|before| *before != key) {
                        known.leaves[before] = true;
                    }
                }),
                // It would be another place, which the model doesn't tell from the one that it leaves.
                Phase::Moves(key) if !waiter.leaves[key] => add(&|next| {
                    next.waiters[name].phase = Phase::Waits;
                    next.waiters[name].stands = Some(key);
                    let is_its_turn = matches!(next.locks[key], Lock::Reserved { waiter, .. } if waiter == name);
                    if !next.is_in_line(name, key) && !is_its_turn {
                        next.lines[key].push((name, false));
                    }
                }),
                Phase::Moves(_) => {}
                Phase::Holds => add(&|next| {
                    next.waiters[name].phase = Phase::Over;
                    for key in world.waiters[name] {
                        next.pass_on(*key);
                    }
                }),
                Phase::Over if world.come_again && waiter.leaves == [false; 2] => {
                    add(&|next| next.waiters[name].phase = Phase::Waits);
                }
                Phase::Over => {}
            }
        }
        all
    }

    fn is_over(&self, world: &World) -> bool {
        world.come_again && matches!(self.waiters.last().map(|last| last.phase), Some(Phase::Holds))
    }

    fn has_served_all(&self) -> bool {
        let all = self.waiters.iter().all(|waiter| waiter.phase == Phase::Over && waiter.leaves == [false; 2]);
        all && self.locks == [Lock::Free; 2] && self.lines.iter().all(Vec::is_empty)
    }
}

/// Searches all states. Returns their number, or a way back to a state that was there before.
fn search(world: &World) -> Result<usize, Vec<State>> {
    let first = State::first(world);
    // Whether what follows from it has been searched.
    let mut known = HashMap::from([(first.clone(), false)]);
    let mut path = vec![(first.clone(), first.next(world))];
    while let Some((state, rest)) = path.last_mut() {
        let Some(next) = rest.pop() else {
            known.insert(state.clone(), true);
            path.pop();
            continue;
        };
        match known.get(&next) {
            Some(true) => continue,
            Some(false) => {
                let way = path.into_iter().map(|(state, _)| state).skip_while(|state| *state != next);
                return Err(way.collect());
            }
            None => {}
        }
        let after = if next.is_over(world) { Vec::new() } else { next.next(world) };
        assert!(
            !after.is_empty() || next.is_over(world) || next.has_served_all(),
            "nothing happens any more: {next:?}"
        );
        known.insert(next.clone(), false);
        path.push((next, after));
    }
    Ok(known.len())
}

/// Returns the states, one in a line.
fn text(way: &[State]) -> String {
    way.iter().map(|state| format!("{state:?}\n")).collect()
}

const NEAR: &[usize] = &[0, 1];
const FAR: &[usize] = &[1, 0];

fn is_served(waiters: &'static [&'static [usize]], at_least: usize) {
    let found = search(&World { rule: Rule::TurnsOnce, waiters, come_again: false });
    let states = found.unwrap_or_else(|way| panic!("{}", text(&way)));
    println!("{states} states");
    assert!(states >= at_least, "{states}");
}

#[test]
fn two_that_want_the_same_keys_are_served() {
    is_served(&[NEAR, FAR], 100);
}

#[test]
fn three_that_want_the_same_keys_are_served() {
    is_served(&[NEAR, FAR, NEAR], 1_000);
}

#[test]
fn two_that_want_both_keys_and_one_for_each_of_them_are_served() {
    is_served(&[NEAR, FAR, &[0], &[1]], 1_000);
}

#[test]
fn those_who_take_only_what_is_free_refuse_each_other_for_ever() {
    assert!(search(&World { rule: Rule::Free, waiters: &[NEAR, FAR], come_again: false }).is_err());
}

#[test]
fn one_that_wants_one_key_is_served_while_others_want_both_again_and_again() {
    let found = search(&World { rule: Rule::TurnsOnce, waiters: &[NEAR, NEAR, &[1]], come_again: true });
    println!("{} states", found.unwrap_or_else(|way| panic!("{}", text(&way))));
}

#[test]
fn one_that_loses_its_turn_again_and_again_is_never_served() {
    assert!(search(&World { rule: Rule::Turns, waiters: &[NEAR, NEAR, &[1]], come_again: true }).is_err());
}
