//! The server's state of one lock, and what each script does to it, line by line.

use super::state::{Lock, Request, SHARED, Sent, State};
use super::world::{Answer, World};

/// A place in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Entry {
    pub(super) place: u8,
    /// How many grants may still go to others before this place is served. Only the model knows this.
    pub(super) ahead: u8,
}

impl State {
    /// `head_of` in `line.lua`.
    fn head_of(&mut self, world: &World) -> Option<u8> {
        while let Some(head) = self.line.first().copied() {
            if self.is_alive(world, head.place) {
                return Some(head.place);
            }
            // A live place is never dropped unless its process was silent.
            let process = world.process_of(head.place);
            let was_silent = self.excused >> process & 1 == 1;
            self.broken.kept |= self.is_had(world, head.place) && world.gives_signs(self, process) && !was_silent;
            self.leave_line(head.place);
        }
        None
    }

    fn is_alive(&self, world: &World, place: u8) -> bool {
        match world.safeguards.sign_of_process {
            true => self.alive >> world.process_of(place) & 1 == 1,
            false => !self.silent_places.contains(&place),
        }
    }

    /// `leave_line` in `line.lua`.
    fn leave_line(&mut self, place: u8) -> Option<Entry> {
        let at = self.line.iter().position(|entry| entry.place == place)?;
        Some(self.line.remove(at))
    }

    /// `sign_of_life` in `line.lua`.
    fn sign_of_life(&mut self, world: &World, place: u8) {
        let process = world.process_of(place);
        self.alive |= 1 << process;
        if self.is_calm {
            self.fresh |= 1 << process;
        }
        self.excused &= !(1 << process);
        self.silent_places.retain(|silent| *silent != place);
    }

    /// `enter_line` in `line.lua`.
    fn enter_line(&mut self, world: &World, place: u8) {
        if !self.is_in_line(place) {
            let reserved = matches!(self.lock, Lock::Reserved(_));
            let ahead = self.line.len() as u8 + u8::from(reserved);
            self.line.push(Entry { place, ahead });
        }
        self.sign_of_life(world, place);
    }

    /// `pass_on` in `line.lua`. Returns the place that has the turn.
    pub(super) fn pass_on(&mut self, world: &World) -> Option<u8> {
        self.lock = Lock::Free;
        if !world.safeguards.release_looks_at_line {
            return None;
        }
        self.reserve(world)
    }

    fn reserve(&mut self, world: &World) -> Option<u8> {
        let head = self.head_of(world)?;
        let entry = self.leave_line(head)?;
        self.lock = Lock::Reserved(entry);
        Some(head)
    }

    /// Gives the lock to a waiter. Unless `is_kept`, the grant counts against every place in the line.
    fn grant(&mut self, waiter: u8, is_kept: bool) {
        self.lock = Lock::Held(waiter);
        if is_kept {
            return;
        }
        for entry in &mut self.line {
            self.broken.order |= entry.ahead == 0;
            entry.ahead = entry.ahead.saturating_sub(1);
        }
    }

    /// `take_turn` in `line.lua`: `place` takes the turn of another place of its process, which gets `place` in return.
    fn take_turn(&mut self, world: &World, turn: u8, place: u8) {
        let reserved = match self.lock {
            Lock::Reserved(entry) => Some(entry),
            Lock::Free | Lock::Held(_) | Lock::Stranger => None,
        };
        if turn == place {
            self.leave_line(place);
            return;
        }
        if world.safeguards.places_are_swapped {
            let Some(mut entry) = reserved.or_else(|| self.leave_line(turn)) else { return };
            match self.line.iter().position(|entry| entry.place == place) {
                Some(at) => {
                    let ahead = self.line[at].ahead;
                    self.line[at] = Entry { ahead, ..entry };
                }
                None => {
                    // The grant that follows counts as one of them.
                    entry.ahead = self.line.len() as u8 + 1;
                    self.line.push(entry);
                }
            }
            return;
        }
        // The entry stays in front, unless the lock was reserved and the taker had a place.
        if let Some(mut entry) = reserved {
            match self.line.iter().position(|entry| entry.place == place) {
                Some(at) => {
                    let ahead = self.line[at].ahead;
                    self.line[at] = Entry { ahead, ..entry };
                }
                None => {
                    entry.ahead = 1;
                    self.line.insert(0, entry);
                }
            }
        } else {
            self.leave_line(place);
            if let Some(entry) = self.line.iter_mut().find(|entry| entry.place == turn) {
                entry.ahead += 1;
            }
        }
    }

    pub(super) fn is_in_line(&self, place: u8) -> bool {
        self.line.iter().any(|entry| entry.place == place)
    }

    /// Does what the server does with a request.
    pub(super) fn run(&mut self, world: &World, request: Request) -> Answer {
        match request {
            Request::Acquire { waiter, place: None } => self.acquire_one(waiter),
            Request::Acquire { waiter, place: Some(place) } => self.acquire_in_line(world, waiter, place),
            Request::Enter { place } => {
                self.enter_line(world, place);
                Answer::Done
            }
            Request::Heartbeat { place } => self.heartbeat(world, place),
            Request::Leave { place } => self.leave(world, place),
            Request::Release { token, heard } => self.release(world, token, heard),
            Request::HandOver { from, to, place, may_keep, in_line } => {
                self.hand_over(world, [from, to], place, may_keep, in_line)
            }
        }
    }

    /// `acquire_one.lua`: `SET NX`, like other libraries; `acquire.lua` if the key holds the token already.
    fn acquire_one(&mut self, waiter: u8) -> Answer {
        match self.lock {
            Lock::Free => {
                // Any library can do this; but without mishaps, the lock isn't free while somebody waits.
                self.broken.order |= self.mishaps == 0 && !self.line.is_empty();
                self.lock = Lock::Held(waiter);
            }
            Lock::Held(holder) if holder == waiter => {}
            _ => return Answer::Held,
        }
        Answer::GRANTED
    }

    /// `acquire_in_line.lua`.
    fn acquire_in_line(&mut self, world: &World, waiter: u8, place: u8) -> Answer {
        if self.is_in_line(place) {
            self.sign_of_life(world, place);
        }
        if self.lock == Lock::Held(waiter) {
            // 'ALONE', then `acquire.lua`.
            self.leave_line(place);
            return Answer::GRANTED;
        }
        let turn = match self.lock {
            Lock::Held(_) | Lock::Stranger => None,
            Lock::Reserved(entry) => Some(entry.place),
            Lock::Free if world.safeguards.free_is_for_the_head => Some(self.head_of(world).unwrap_or(place)),
            Lock::Free => Some(place),
        };
        match turn {
            Some(turn) if world.is_ours(turn, place) => {
                self.take_turn(world, turn, place);
                self.sign_of_life_if_in_line(world, turn);
                self.leave_line(place);
                self.grant(waiter, false);
                Answer::GRANTED
            }
            _ => {
                self.enter_line(world, place);
                if self.lock == Lock::Free {
                    self.reserve(world);
                }
                Answer::Held
            }
        }
    }

    fn sign_of_life_if_in_line(&mut self, world: &World, place: u8) {
        if self.is_in_line(place) {
            self.sign_of_life(world, place);
        }
    }

    /// `heartbeat.lua`.
    fn heartbeat(&mut self, world: &World, place: u8) -> Answer {
        if !self.is_in_line(place) {
            if !world.safeguards.heartbeat_enters_nobody {
                self.enter_line(world, place);
                return Answer::Waits;
            }
            return Answer::Ask;
        }
        self.sign_of_life(world, place);
        let finds = self.lock == Lock::Free && world.safeguards.heartbeat_passes_on;
        match finds && self.reserve(world) == Some(place) {
            true => Answer::Ask,
            false => Answer::Waits,
        }
    }

    /// `leave.lua`.
    fn leave(&mut self, world: &World, place: u8) -> Answer {
        self.leave_line(place);
        let is_reserved = matches!(self.lock, Lock::Reserved(entry) if entry.place == place);
        let is_free = self.lock == Lock::Free && !self.line.is_empty();
        if world.safeguards.leave_passes_on && (is_free || is_reserved) {
            self.pass_on(world);
        }
        Answer::Done
    }

    /// `release_one.lua`, or `pass_on_one.lua` if somebody is subscribed.
    fn release(&mut self, world: &World, token: u8, heard: bool) -> Answer {
        if self.lock != Lock::Held(token) && world.safeguards.compare_and_delete {
            return Answer::Done;
        }
        match heard {
            true => drop(self.pass_on(world)),
            false => self.lock = Lock::Free,
        }
        Answer::Done
    }

    /// `hand_over.lua`.
    fn hand_over(&mut self, world: &World, [from, to]: [u8; 2], place: u8, may_keep: bool, in_line: bool) -> Answer {
        if self.lock != Lock::Held(from) {
            return Answer::NotOurs;
        }
        let head = if may_keep { None } else { self.head_of(world) };
        if head.is_some_and(|head| !world.is_ours(head, place)) {
            self.enter_line(world, place);
            self.pass_on(world);
            return Answer::PassedBy;
        }
        if let Some(head) = head {
            self.take_turn(world, head, place);
        }
        if head.is_some() || in_line {
            self.leave_line(place);
        }
        self.grant(to, may_keep);
        Answer::HandedOver { alone: !may_keep && head.is_none(), late: false }
    }

    /// Returns whether a reservation for this place ends by a request: that of a waiter, or that of its process to
    /// leave the place, which is on its way.
    pub(super) fn is_awaited(&self, world: &World, place: u8) -> bool {
        let process = &self.processes[world.process_of(place)];
        self.is_had(world, place) || process.up && process.sent.contains(&Sent::Leave(place))
    }

    /// Returns whether somebody waits with this place.
    pub(super) fn is_had(&self, world: &World, place: u8) -> bool {
        let process = world.process_of(place);
        if place >= SHARED {
            let known = &self.processes[process];
            return known.up && known.shared_place(process) == place && !known.shared.is_empty();
        }
        self.processes[process].up && self.processes[process].own.contains(&place)
    }
}
