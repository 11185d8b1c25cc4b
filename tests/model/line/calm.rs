//! The calm that ends a behaviour: from any state, all waiters are served if nothing more goes wrong.

use super::state::{Call, Handing, Lock, PROCESSES, Phase, Request, Sent, State};
use super::world::{Answer, World};

/// The number of rounds of the calm. One is the time between two heartbeats.
const ROUNDS: u8 = 60;
/// In rounds: how long a process counts as alive, a reservation lasts, and the lock of a dead holder lasts; how often a
/// waiter without notifications polls.
const ALIVE: u8 = 3;
const CONFIRM: u8 = 2;
const TTL: u8 = 4;
const POLL: u8 = 6;

impl World {
    /// Runs a state on: nothing more goes wrong, and no new waiter comes. No notification arrives, so heartbeats and a
    /// rare poll find everything. Returns whether all waiters are served, one after the other.
    pub(super) fn after_a_calm(&self, mut state: State, arrives: bool, is_reversed: bool) -> bool {
        state.is_calm = true;
        self.leave_all(&mut state);
        let late = std::mem::take(&mut state.late);
        if arrives {
            for request in late {
                state.run(self, request);
            }
        }
        let mut calm = Calm { lock: state.lock, lock_age: 0, silent: [0; PROCESSES] };
        for round in 0..ROUNDS {
            if self.is_served(&state) {
                return true;
            }
            let mut names: Vec<u8> = self.names().collect();
            if is_reversed {
                names.reverse();
            }
            state.fresh = 0;
            for waiter in names {
                if state.processes[self.process(waiter)].up {
                    self.go_on(&mut state, waiter, round % POLL == 0);
                }
            }
            calm.pass(self, &mut state);
        }
        false
    }

    fn is_served(&self, state: &State) -> bool {
        state.processes.iter().all(|process| process.firsts().next().is_none())
            && self.names().all(|waiter| {
                let gone = !state.processes[self.process(waiter)].up;
                gone || !matches!(state.at(waiter).phase, Phase::Holding | Phase::Releasing | Phase::Waiting)
            })
    }

    /// Does what a live waiter does in a round.
    fn go_on(&self, state: &mut State, waiter: u8, looks: bool) {
        self.finish_call(state, waiter);
        if state.at(waiter).handing.has_lock() && state.at(waiter).call == Call::None {
            state.take(self, waiter);
        }
        let known = *state.at(waiter);
        match known.phase {
            Phase::Holding if state.next_to_take_over(self, waiter).is_some() => state.hand_over_here(self, waiter),
            Phase::Holding => {
                state.at_mut(waiter).phase = Phase::Releasing;
                let token = state.token(waiter);
                let request = state.next(self, waiter).unwrap_or(Request::Release { token, heard: true });
                state.send(self, waiter, request);
                self.finish_call(state, waiter);
            }
            Phase::Waiting if state.is_first(self, waiter) && state.is_idle(waiter) => {
                let place = self.place(state, waiter);
                let may_be_in_line = self.is_own(waiter) || state.processes[self.process(waiter)].in_line;
                let is_told = matches!(known.handing, Handing::Failed { .. });
                let asks =
                    looks || is_told || may_be_in_line && state.run(self, Request::Heartbeat { place }) == Answer::Ask;
                if asks {
                    state.ask(self, waiter, true);
                    self.finish_call(state, waiter);
                }
            }
            Phase::Over if state.is_to_undo(waiter) => drop(state.pass_on(self)),
            _ => {}
        }
    }

    /// Leaves all places. In the calm, no request has to wait for an earlier one.
    fn leave_all(&self, state: &mut State) {
        for process in 0..PROCESSES {
            for sent in std::mem::take(&mut state.processes[process].sent) {
                match sent {
                    Sent::Call(waiter) => state.run_call(self, waiter),
                    Sent::Leave(place) => {
                        state.run(self, Request::Leave { place });
                    }
                }
            }
        }
    }

    fn finish_call(&self, state: &mut State, waiter: u8) {
        state.run_call(self, waiter);
        if let Call::Answered(request, answer) = state.at(waiter).call {
            state.learn(self, waiter, request, answer);
        }
    }
}

/// What ends by time.
struct Calm {
    lock: Lock,
    lock_age: u8,
    silent: [u8; PROCESSES],
}

impl Calm {
    fn pass(&mut self, world: &World, state: &mut State) {
        self.lock_age = if self.lock == state.lock { self.lock_age + 1 } else { 0 };
        self.lock = state.lock;
        let ends = match state.lock {
            Lock::Reserved(_) => self.lock_age >= CONFIRM && world.safeguards.reservation_expires,
            Lock::Held(token) => {
                let holds = |waiter| state.at(waiter).phase == Phase::Holding && state.token(waiter) == token;
                let is_kept = state.processes[world.process(token)].up && world.names().any(holds);
                self.lock_age >= TTL && !is_kept
            }
            Lock::Stranger => self.lock_age >= TTL,
            Lock::Free => false,
        };
        if ends {
            state.expire();
        }
        for (process, silent) in self.silent.iter_mut().enumerate() {
            let is_fresh = state.fresh >> process & 1 == 1;
            *silent = if is_fresh { 0 } else { *silent + 1 };
            if *silent >= ALIVE {
                state.alive &= !(1 << process);
            }
        }
    }
}
