//! The processes: their queues, what they send, and how they handle the replies.

use super::state::{Call, Handing, Lock, PLACES, Phase, Process, Request, SHARED, Sent, State, Waiter};
use super::world::{Answer, World};

/// `IN_A_ROW` in `src/acquire/queue.rs`.
const IN_A_ROW: u8 = 2;

impl State {
    pub(super) fn at(&self, waiter: u8) -> &Waiter {
        &self.waiters[usize::from(waiter)]
    }

    pub(super) fn at_mut(&mut self, waiter: u8) -> &mut Waiter {
        &mut self.waiters[usize::from(waiter)]
    }

    pub(super) fn lane(&mut self, world: &World, waiter: u8) -> &mut Vec<u8> {
        let process = &mut self.processes[world.process(waiter)];
        if world.is_own(waiter) { &mut process.own } else { &mut process.shared }
    }

    pub(super) fn is_first(&self, world: &World, waiter: u8) -> bool {
        let process = &self.processes[world.process(waiter)];
        let lane = if world.is_own(waiter) { &process.own } else { &process.shared };
        lane.first() == Some(&waiter)
    }

    pub(super) fn is_idle(&self, waiter: u8) -> bool {
        let known = self.at(waiter);
        known.phase == Phase::Waiting && known.call == Call::None && !known.handing.has_lock()
    }

    /// Returns the token by which the waiter holds the lock.
    pub(super) fn token(&self, waiter: u8) -> u8 {
        self.at(waiter).took_over.unwrap_or(waiter)
    }

    /// Returns whether somebody holds the lock by this token, releases it, or is to take it over.
    pub(super) fn is_used(&self, token: u8) -> bool {
        (0..self.waiters.len() as u8).any(|waiter| match self.at(waiter) {
            Waiter { handing: Handing::TakenOver { token: other, .. }, .. } => *other == token,
            Waiter { phase: Phase::Holding | Phase::Releasing, .. } => self.token(waiter) == token,
            _ => false,
        })
    }

    /// Returns whether the lock is undone that this waiter's token holds: the waiter is gone, and nobody else has taken
    /// the lock over. One that isn't sure what its requests have done does so whatever became of the lock.
    pub(super) fn is_to_undo(&self, waiter: u8) -> bool {
        let known = self.at(waiter);
        let is_undone = known.is_unsure || !self.is_used(waiter);
        known.phase == Phase::Over && self.lock == Lock::Held(waiter) && is_undone
    }

    pub(super) fn send(&mut self, world: &World, waiter: u8, request: Request) {
        self.at_mut(waiter).call = Call::Sent(request);
        let is_of_line = !matches!(request, Request::Release { .. } | Request::Acquire { place: None, .. });
        if is_of_line && world.in_order {
            self.processes[world.process(waiter)].sent.push(Sent::Call(waiter));
        }
    }

    /// Sends, in the background, that nobody has this place any longer.
    pub(super) fn send_leave(&mut self, world: &World, place: u8) {
        match world.in_order {
            true => self.processes[world.process_of(place)].sent.push(Sent::Leave(place)),
            false => self.send_late(Request::Leave { place }),
        }
    }

    /// Removes the waiter's call from what is in flight.
    pub(super) fn unsend(&mut self, world: &World, waiter: u8) {
        self.processes[world.process(waiter)].sent.retain(|sent| *sent != Sent::Call(waiter));
    }

    /// Returns whether nothing is in flight that has to run first.
    pub(super) fn can_run(&self, world: &World, waiter: u8) -> bool {
        let sent = &self.processes[world.process(waiter)].sent;
        sent.first() == Some(&Sent::Call(waiter)) || !sent.contains(&Sent::Call(waiter))
    }

    pub(super) fn send_late(&mut self, request: Request) {
        if let Err(at) = self.late.binary_search(&request) {
            self.late.insert(at, request);
        }
    }

    /// Returns whether nothing is left of a waiter that came earlier.
    pub(super) fn is_forgotten(&self, waiter: u8) -> bool {
        let about = |request: &Request| match *request {
            Request::Acquire { waiter: other, .. } | Request::Release { token: other, .. } => other == waiter,
            Request::HandOver { from, to, .. } => from == waiter || to == waiter,
            Request::Enter { place } | Request::Heartbeat { place } | Request::Leave { place } => place == waiter,
        };
        let is_under_way = self.waiters.iter().any(|other| match &other.call {
            Call::None => false,
            Call::Sent(request) | Call::Answered(request, _) => about(request),
        });
        let is_reserved = matches!(self.lock, Lock::Reserved(entry) if entry.place == waiter);
        let is_held = self.lock == Lock::Held(waiter);
        let is_used = self.is_used(waiter);
        let is_left = self.processes.iter().any(|process| process.sent.contains(&Sent::Leave(waiter)));
        !is_under_way
            && !is_reserved
            && !is_held
            && !is_used
            && !self.is_in_line(waiter)
            && !self.late.iter().any(about)
            && !is_left
    }

    pub(super) fn is_quiet(&self) -> bool {
        let calls = self.waiters.iter().any(|waiter| waiter.call != Call::None);
        !calls && self.late.is_empty() && self.processes.iter().all(|process| process.sent.is_empty())
    }

    /// `Ticket::leave` in `src/acquire/queue/ticket.rs`.
    pub(super) fn leave_lane(&mut self, world: &World, waiter: u8, has_lock: bool) {
        self.lane(world, waiter).retain(|other| *other != waiter);
        // A hand-over that is on its way may put the place into the line.
        let is_on_its_way = matches!(self.at(waiter).handing, Handing::Asked | Handing::Failed { settled: false });
        let process = world.process(waiter);
        if world.is_own(waiter) {
            if !has_lock || self.at(waiter).doubt {
                self.send_leave(world, waiter);
            }
            return;
        }
        let place = self.processes[process].shared_place(process);
        let known = &mut self.processes[process];
        if known.shared.is_empty() {
            let may_be_in_line = std::mem::take(&mut known.in_line) || is_on_its_way && !has_lock;
            known.doubt = false;
            known.places = (known.places + 1) % PLACES;
            if may_be_in_line {
                self.send_leave(world, place);
            }
        }
    }

    /// `Lane::next`: the first waiter, if the lock can be handed over to it.
    fn next_of(&self, lane: &[u8]) -> Option<u8> {
        let first = *lane.first()?;
        let can = matches!(self.at(first).handing, Handing::No | Handing::Failed { settled: true });
        can.then_some(first)
    }

    /// `Queues::next_to_take_over`: the waiter that takes the lock over without the server.
    pub(super) fn next_to_take_over(&self, world: &World, from: u8) -> Option<u8> {
        let known = &self.processes[world.process(from)];
        let has_turn = known.in_a_row < IN_A_ROW || !world.safeguards.local_turns_end;
        // `Hold::can_be_taken_over`.
        let is_sure = !self.at(self.token(from)).is_unsure || !world.safeguards.sure_tokens_go_on;
        self.next_of(&known.shared).filter(|_| has_turn && is_sure && !known.in_line)
    }

    /// `Shared::hand_over_here`.
    pub(super) fn hand_over_here(&mut self, world: &World, from: u8) {
        let Some(to) = self.next_to_take_over(world, from) else { return };
        let (token, process) = (self.token(from), world.process(from));
        let known = &mut self.processes[process];
        known.in_a_row = (known.in_a_row + 1).min(IN_A_ROW);
        self.at_mut(to).handing = Handing::TakenOver { token, late: false };
        self.at_mut(from).end();
        if !world.safeguards.nobody_else_releases {
            self.send_late(Request::Release { token, heard: true });
        }
        self.note_kept(world, process, true);
    }

    /// `Queues::next`: the waiter that the lock is handed over to.
    pub(super) fn next(&mut self, world: &World, from: u8) -> Option<Request> {
        let process = world.process(from);
        let known = &self.processes[process];
        let has_turn = known.in_a_row < IN_A_ROW || !world.safeguards.turns_end;
        let (to, may_keep) = match (self.next_of(&known.shared), self.next_of(&known.own)) {
            (Some(waiter), _) if has_turn => (waiter, true),
            (_, Some(waiter)) | (Some(waiter), None) => (waiter, false),
            (None, None) => return None,
        };
        let in_line = known.in_line || world.is_own(to);
        let place = world.place(self, to);
        let known = &mut self.processes[process];
        known.in_a_row = (known.in_a_row + 1).min(IN_A_ROW);
        self.at_mut(to).handing = Handing::Asked;
        let from = self.token(from);
        Some(Request::HandOver { from, to, place, may_keep, in_line })
    }

    /// A waiter has got the lock, and knows it.
    pub(super) fn begin(&mut self, world: &World, waiter: u8) {
        let known = self.at_mut(waiter);
        (known.phase, known.handing) = (Phase::Holding, Handing::No);
        self.leave_lane(world, waiter, true);
    }

    pub(super) fn learn(&mut self, world: &World, waiter: u8, request: Request, answer: Answer) {
        let process = world.process(waiter);
        self.at_mut(waiter).call = Call::None;
        match (request, answer) {
            (Request::Acquire { place, .. }, Answer::Granted { late: false }) => {
                // `Ticket::pass_on`.
                let by_hand_over = matches!(self.at(waiter).handing, Handing::Asked | Handing::Done { .. });
                let known = &mut self.processes[process];
                if !by_hand_over || !world.safeguards.unheard_turns_count {
                    known.in_a_row = 1;
                }
                // A request without the place took none out of the line, into which a hand-over may have put it
                // meanwhile.
                if place.is_some() || !world.safeguards.in_line_until_asked_out {
                    known.in_line &= world.is_own(waiter) || known.doubt;
                }
                self.begin(world, waiter);
            }
            (Request::Acquire { .. }, Answer::Granted { late: true }) => self.ask(world, waiter, true),
            (Request::Acquire { .. }, _) => self.at_mut(waiter).was_refused = true,
            (Request::HandOver { to, place, in_line, .. }, answer) => {
                self.at_mut(waiter).end();
                self.handed_over(world, to, place, in_line, answer);
            }
            (Request::Release { .. }, _) => self.at_mut(waiter).end(),
            // The request may have run after a hand-over that came meanwhile.
            (Request::Enter { .. }, _) => {
                let known = self.at_mut(waiter);
                known.doubt |= known.handing != Handing::No && world.safeguards.doubt_leaves_again;
            }
            (Request::Heartbeat { .. } | Request::Leave { .. }, _) => {}
        }
    }

    /// `HandOver` in `src/acquire/queue/hand_over.rs`.
    pub(super) fn handed_over(&mut self, world: &World, to: u8, place: u8, told: bool, answer: Answer) {
        let process = world.process(to);
        let is_own = world.is_own(to);
        let waits = self.at(to).phase == Phase::Waiting;
        match answer {
            Answer::HandedOver { alone, late } => {
                let known = &mut self.processes[process];
                if alone && (waits || !world.safeguards.unheard_turns_count) {
                    known.in_a_row = 1;
                }
                // The next waiter may have entered the place again, if this one got the lock by asking, or has left.
                let is_known = told && (waits || !world.safeguards.late_outcomes_are_old);
                if is_known || !world.safeguards.in_line_until_out {
                    known.in_line &= is_own || known.doubt;
                }
                if waits {
                    self.at_mut(to).handing = Handing::Done { late };
                }
            }
            Answer::PassedBy => {
                let others = self.processes[process].shared.first().copied();
                let is_had = if is_own { waits } else { self.is_had(world, place) };
                let known = &mut self.processes[process];
                if waits || !world.safeguards.unheard_turns_count {
                    known.in_a_row = 0;
                }
                let others = others.filter(|_| is_own && !known.in_line);
                known.in_line |= !is_own && is_had;
                if waits {
                    self.at_mut(to).handing = Handing::No;
                }
                if !is_had && world.safeguards.gone_leaves_again {
                    self.send_leave(world, place);
                }
                if let Some(first) = others.filter(|first| self.at(*first).handing == Handing::No) {
                    self.at_mut(first).handing = Handing::Failed { settled: true };
                }
            }
            _ if waits => self.at_mut(to).handing = Handing::Failed { settled: true },
            _ => {}
        }
    }

    /// Records that a place may enter the line with this request, whenever it runs.
    pub(super) fn doubt_line(&mut self, world: &World, request: Request) {
        let place = match request {
            Request::Acquire { place: Some(place), .. } | Request::Enter { place } => place,
            Request::HandOver { place, .. } => place,
            _ => return,
        };
        if !world.safeguards.doubt_leaves_again || !self.is_had(world, place) {
            return;
        }
        if place < SHARED {
            self.at_mut(place).doubt = true;
        } else {
            let known = &mut self.processes[world.process_of(place)];
            (known.doubt, known.in_line) = (true, true);
        }
    }

    /// Once the request can't run any longer, leaves the place again, unless somebody waits there.
    pub(super) fn leave_again(&mut self, world: &World, request: Request) {
        let place = match request {
            Request::Acquire { place: Some(place), .. } | Request::Enter { place } => place,
            Request::HandOver { place, .. } => place,
            _ => return,
        };
        let is_up = self.processes[world.process_of(place)].up;
        if is_up && world.safeguards.doubt_leaves_again && !self.is_had(world, place) {
            self.send_leave(world, place);
        }
    }

    /// Makes the outcome of a call unknown; the request may still arrive if it hasn't.
    pub(super) fn time_out(&mut self, world: &World, waiter: u8) {
        self.unsend(world, waiter);
        let call = std::mem::take(&mut self.at_mut(waiter).call);
        let request = match call {
            Call::None => return,
            Call::Sent(request) => {
                self.send_late(request);
                request
            }
            Call::Answered(request, _) => request,
        };
        self.doubt_line(world, request);
        match request {
            Request::Acquire { waiter, .. } => self.at_mut(waiter).is_unsure = true,
            Request::HandOver { to, .. } => {
                let known = self.at_mut(to);
                known.is_unsure = true;
                if known.phase == Phase::Waiting {
                    known.handing = Handing::Failed { settled: false };
                }
            }
            _ => {}
        }
        if matches!(request, Request::HandOver { .. } | Request::Release { .. }) {
            self.send(world, waiter, Request::Release { token: self.token(waiter), heard: true });
        }
    }

    pub(super) fn expire(&mut self) {
        if let Lock::Held(holder) = self.lock {
            // The holder's deadline was before that (`src/hold.rs`), and so was that of each grant in flight.
            for waiter in 0..self.waiters.len() as u8 {
                let has_token = self.token(waiter) == holder;
                let known = self.at_mut(waiter);
                if known.phase == Phase::Holding && has_token {
                    known.end();
                }
                if let Handing::TakenOver { token, late } = &mut known.handing {
                    *late |= *token == holder;
                }
            }
            let known = self.at_mut(holder);
            if let Handing::Done { late } = &mut known.handing {
                *late = true;
            }
            if let Call::Answered(Request::Acquire { .. }, Answer::Granted { late }) = &mut known.call {
                *late = true;
            }
            for other in &mut self.waiters {
                if let Call::Answered(Request::HandOver { to, .. }, Answer::HandedOver { late, .. }) = &mut other.call {
                    *late |= *to == holder;
                }
            }
        }
        self.lock = Lock::Free;
    }

    pub(super) fn take(&mut self, world: &World, waiter: u8) {
        match self.at(waiter).handing {
            Handing::Done { late: true } => {
                self.at_mut(waiter).handing = Handing::No;
                self.ask(world, waiter, true);
            }
            Handing::TakenOver { late: true, .. } => {
                self.at_mut(waiter).handing = Handing::No;
                self.leave_lane(world, waiter, false);
                self.lane(world, waiter).push(waiter);
            }
            Handing::TakenOver { token, .. } => {
                if !world.safeguards.take_over_leaves_line_alone {
                    self.processes[world.process(waiter)].in_line = false;
                }
                self.at_mut(waiter).took_over = Some(token);
                self.begin(world, waiter);
            }
            _ => self.begin(world, waiter),
        }
    }

    pub(super) fn ask(&mut self, world: &World, waiter: u8, in_line: bool) {
        let place = in_line.then(|| world.place(self, waiter));
        if in_line && !world.is_own(waiter) {
            self.processes[world.process(waiter)].in_line = true;
        }
        let known = self.at_mut(waiter);
        if matches!(known.handing, Handing::Failed { .. }) {
            known.handing = Handing::No;
        }
        self.send(world, waiter, Request::Acquire { waiter, place });
    }

    pub(super) fn come(&mut self, world: &World, waiter: u8) {
        *self.at_mut(waiter) = Waiter { phase: Phase::Waiting, ..Waiter::default() };
        let lane = self.lane(world, waiter);
        lane.push(waiter);
        let is_first = lane.len() == 1;
        if world.is_own(waiter) && !is_first {
            self.send(world, waiter, Request::Enter { place: waiter });
        }
    }

    pub(super) fn run_call(&mut self, world: &World, waiter: u8) {
        if let Call::Sent(request) = self.at(waiter).call {
            self.unsend(world, waiter);
            let before = self.lock;
            let answer = self.run(world, request);
            self.at_mut(waiter).call = Call::Answered(request, answer);
            self.note_turn(world, before, request, answer);
        }
    }

    /// Counts the turns for which a process keeps the lock from others.
    pub(super) fn note_turn(&mut self, world: &World, before: Lock, request: Request, answer: Answer) {
        let Request::HandOver { from, may_keep, .. } = request else {
            if self.lock != before {
                self.kept = 0;
            }
            return;
        };
        self.note_kept(world, world.process(from), may_keep && matches!(answer, Answer::HandedOver { .. }));
    }

    fn note_kept(&mut self, world: &World, process: usize, is_handed_over: bool) {
        let others_wait = self.line.iter().any(|entry| world.process_of(entry.place) != process);
        let is_kept = is_handed_over && others_wait;
        self.kept = if is_kept { self.kept + 1 } else { 0 };
        // The line gave the process its first turn. A process that doesn't know of a hand-over may take it for such a
        // turn.
        self.broken.order |= self.kept >= IN_A_ROW + self.mishaps;
    }
}

impl Waiter {
    fn end(&mut self) {
        (self.phase, self.took_over) = (Phase::Over, None);
    }
}

impl Handing {
    /// Returns whether the waiter has the lock, and only has to take it.
    pub(super) fn has_lock(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::TakenOver { .. })
    }
}

impl Process {
    pub(super) fn firsts(&self) -> impl Iterator<Item = u8> + use<> {
        [self.shared.first().copied(), self.own.first().copied()].into_iter().flatten()
    }
}

impl State {
    pub(super) fn die(&mut self, world: &World, process: usize) {
        let known = &mut self.processes[process];
        *known = Process { places: known.places, ..Process::default() };
        for waiter in world.names().filter(|waiter| world.process(*waiter) == process) {
            if let Call::Sent(request) = std::mem::take(&mut self.at_mut(waiter).call) {
                self.send_late(request);
            }
            let known = self.at_mut(waiter);
            known.handing = Handing::No;
            if known.phase != Phase::Away {
                known.end();
            }
        }
    }
}
