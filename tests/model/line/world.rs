//! What can happen next, and what must hold whatever happens.

use stateright::{Model, Property};

use super::state::{Call, Handing, Lock, PLACES, PROCESSES, Phase, Request, SHARED, Sent, State, Waiter};

pub const EXCLUSION: &str = "never two that believe that they hold the lock";
pub const NO_GHOST: &str = "once all is quiet, the line contains only waiters";
pub const GRANTED: &str = "a heartbeat gives a free lock to the line";
pub const ORDER: &str = "no later place overtakes an earlier one";
pub const KEPT: &str = "a live place stays in the line";
pub const SERVED: &str = "after a calm, all waiters are served";

/// The safeguards that keep the promises. A test turns one off and shows which promise is broken.
#[derive(Clone, Copy, Debug)]
pub struct Safeguards {
    /// A release compares the token.
    pub compare_and_delete: bool,
    /// A heartbeat enters no place.
    pub heartbeat_enters_nobody: bool,
    /// A heartbeat gives a free lock to the head of the line.
    pub heartbeat_passes_on: bool,
    /// A waiter that leaves passes a reservation on.
    pub leave_passes_on: bool,
    /// A release gives the lock to the head of the line.
    pub release_looks_at_line: bool,
    /// A reservation ends by itself.
    pub reservation_expires: bool,
    /// A heartbeat is that of a process, not of one waiter.
    pub sign_of_process: bool,
    /// A waiter that finds the lock free takes it only if nobody else is the head of the line.
    pub free_is_for_the_head: bool,
    /// A waiter that takes the turn of another of its process gives that one its own place.
    pub places_are_swapped: bool,
    /// A process forgets that it is in the line only if a script has taken it out.
    pub in_line_until_out: bool,
    /// A lane whose waiter has asked without the place doesn't take the grant for one that took the place out.
    pub in_line_until_asked_out: bool,
    /// What a hand-over has done to a place in the line counts only if the waiter has not learned it in another way.
    pub late_outcomes_are_old: bool,
    /// A process that isn't sure what its requests have done leaves the line once they can't run any longer.
    pub doubt_leaves_again: bool,
    /// A lock that a gone waiter didn't take leaves nothing of that waiter in the line.
    pub gone_leaves_again: bool,
    /// A process passes the lock on after [`IN_A_ROW`] turns.
    pub turns_end: bool,
    /// A hand-over that a waiter learns of by asking is a turn in a row as well.
    pub unheard_turns_count: bool,
    /// Turns without the server count as well.
    pub local_turns_end: bool,
    /// A process whose waiter takes a lock over without the server knows that this took no place out of the line.
    pub take_over_leaves_line_alone: bool,
    /// A holder whose lock is taken over leaves its release to the successor.
    pub nobody_else_releases: bool,
    /// A lock isn't taken over if a request that gives it to its token has an unknown outcome.
    pub sure_tokens_go_on: bool,
}

pub const ALL: Safeguards = Safeguards {
    compare_and_delete: true,
    heartbeat_enters_nobody: true,
    heartbeat_passes_on: true,
    leave_passes_on: true,
    release_looks_at_line: true,
    reservation_expires: true,
    sign_of_process: true,
    free_is_for_the_head: true,
    places_are_swapped: true,
    in_line_until_out: true,
    in_line_until_asked_out: true,
    late_outcomes_are_old: true,
    doubt_leaves_again: true,
    gone_leaves_again: true,
    turns_end: true,
    unheard_turns_count: true,
    local_turns_end: true,
    take_over_leaves_line_alone: true,
    nobody_else_releases: true,
    sure_tokens_go_on: true,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Shared,
    Own,
}

/// The size of the model.
#[derive(Clone, Debug)]
pub struct World {
    pub safeguards: Safeguards,
    /// The process and the kind of each waiter.
    pub waiters: &'static [(usize, Kind)],
    /// How many mishaps one behaviour may have.
    pub mishaps: u8,
    /// The mishaps that may happen.
    pub can: &'static [Mishap],
    /// Whether the requests of a process that concern the line arrive in order, unless a call times out. They don't if
    /// scripts are loaded again, and on a cluster whose slots move.
    pub in_order: bool,
    /// Whether waiters that have had the lock come again.
    pub come_again: bool,
    /// The promises to check.
    pub promises: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// A process dies.
    Die,
    /// A call has an unknown outcome: the reply is lost, or the request is lost or late.
    Timeout,
    /// A waiter gives up.
    GiveUp,
    /// A first waiter that isn't polled goes behind the others of its lane.
    Park,
    /// A live process is silent for so long that it counts as dead.
    Silence,
    /// A live waiter doesn't confirm a reservation in time.
    Unconfirmed,
    /// A lock ends before its holder releases it.
    Expire,
    /// Somebody who is not in the line takes the lock.
    Barge,
    /// A release finds no subscription.
    Unheard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// `late`: the grant has ended, and so has its deadline, which counts from before the request.
    Granted {
        late: bool,
    },
    Held,
    /// The place is in the line.
    Waits,
    /// The place is not in the line, or it is its turn.
    Ask,
    Done,
    NotOurs,
    PassedBy,
    HandedOver {
        alone: bool,
        late: bool,
    },
}

impl Answer {
    pub(super) const GRANTED: Self = Self::Granted { late: false };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A waiter comes.
    Come {
        waiter: u8,
    },
    /// The first of a lane asks for the lock, with its place in the line or without one.
    Ask {
        waiter: u8,
        in_line: bool,
    },
    Heartbeat {
        waiter: u8,
    },
    /// The server runs a waiter's request.
    Run {
        waiter: u8,
    },
    /// The reply arrives.
    Learn {
        waiter: u8,
    },
    /// A waiter takes the lock that was handed over to it.
    Take {
        waiter: u8,
    },
    Release {
        waiter: u8,
        heard: bool,
    },
    /// A holder hands the lock over to a waiter of its process, without the server.
    HandOverHere {
        waiter: u8,
    },
    /// A grant to a waiter that is gone is undone.
    Undo {
        waiter: u8,
    },
    /// A request that nobody waits for runs.
    RunLate {
        at: usize,
    },
    /// A process leaves a place, in the background; with a mishap, the request is lost or late.
    Leave {
        process: usize,
        is_lost: bool,
    },
    GiveUp {
        waiter: u8,
    },
    Timeout {
        waiter: u8,
    },
    Park {
        process: usize,
        own: bool,
    },
    Die {
        process: usize,
    },
    Silence {
        process: usize,
    },
    SilencePlace {
        place: u8,
    },
    /// The content of the lock key expires.
    Expire,
    Barge,
    /// A holder that is not in the line frees the lock, with or without a notification.
    StrangerEnds {
        heard: bool,
    },
}

impl World {
    pub fn process_of(&self, place: u8) -> usize {
        match place.checked_sub(SHARED) {
            Some(shared) => usize::from(shared / PLACES),
            None => self.waiters[usize::from(place)].0,
        }
    }

    /// `is_ours` in `acquire_in_line.lua`.
    pub fn is_ours(&self, other: u8, place: u8) -> bool {
        let both_own = other < SHARED && place < SHARED;
        other == place || both_own && self.process_of(other) == self.process_of(place)
    }

    pub fn process(&self, waiter: u8) -> usize {
        self.waiters[usize::from(waiter)].0
    }

    pub fn is_own(&self, waiter: u8) -> bool {
        self.waiters[usize::from(waiter)].1 == Kind::Own
    }

    pub fn place(&self, state: &State, waiter: u8) -> u8 {
        let process = self.process(waiter);
        if self.is_own(waiter) { waiter } else { state.processes[process].shared_place(process) }
    }

    fn can(&self, state: &State, mishap: Mishap) -> bool {
        state.mishaps < self.mishaps && self.can.contains(&mishap)
    }

    pub fn names(&self) -> impl Iterator<Item = u8> + use<> {
        0..self.waiters.len() as u8
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State { waiters: vec![Waiter::default(); self.waiters.len()], ..State::default() };
        for process in &mut state.processes {
            process.up = true;
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for waiter in self.names() {
            self.actions_of(state, waiter, actions);
        }
        actions.extend((0..state.late.len()).map(|at| Action::RunLate { at }));
        for process in 0..PROCESSES {
            self.actions_of_process(state, process, actions);
        }
        match state.lock {
            Lock::Free if self.can(state, Mishap::Barge) => actions.push(Action::Barge),
            Lock::Stranger => actions.extend([true, false].map(|heard| Action::StrangerEnds { heard })),
            Lock::Reserved(entry) if self.safeguards.reservation_expires => {
                if !state.is_awaited(self, entry.place) || self.can(state, Mishap::Unconfirmed) {
                    actions.push(Action::Expire);
                }
            }
            Lock::Held(waiter) => {
                if !state.processes[self.process(waiter)].up || self.can(state, Mishap::Expire) {
                    actions.push(Action::Expire);
                }
            }
            Lock::Free | Lock::Reserved(_) => {}
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Come { waiter } => next.come(self, waiter),
            Action::Ask { waiter, in_line } => next.ask(self, waiter, in_line),
            Action::Heartbeat { waiter } => {
                let place = self.place(&next, waiter);
                next.send(self, waiter, Request::Heartbeat { place });
            }
            Action::Run { waiter } => next.run_call(self, waiter),
            Action::Learn { waiter } => {
                let Call::Answered(request, answer) = next.at(waiter).call else { return None };
                next.learn(self, waiter, request, answer);
            }
            Action::Take { waiter } => {
                // `Ticket::pass_on` of a lock that was handed over.
                if !self.safeguards.in_line_until_out {
                    next.processes[self.process(waiter)].in_line &= self.is_own(waiter);
                }
                next.take(self, waiter);
            }
            Action::Release { waiter, heard } => {
                next.mishaps += u8::from(!heard);
                next.at_mut(waiter).phase = Phase::Releasing;
                let request = if heard { next.next(self, waiter) } else { None };
                let token = next.token(waiter);
                next.send(self, waiter, request.unwrap_or(Request::Release { token, heard }));
            }
            Action::HandOverHere { waiter } => next.hand_over_here(self, waiter),
            Action::Undo { .. } => {
                next.pass_on(self);
                next.kept = 0;
            }
            Action::RunLate { at } => {
                let (before, request) = (next.lock, next.late.remove(at));
                let answer = next.run(self, request);
                next.note_turn(self, before, request, answer);
                next.leave_again(self, request);
            }
            Action::Leave { process, is_lost } => {
                let Sent::Leave(place) = next.processes[process].sent.remove(0) else { return None };
                if is_lost {
                    next.mishaps += 1;
                    next.send_late(Request::Leave { place });
                } else {
                    let before = next.lock;
                    let answer = next.run(self, Request::Leave { place });
                    next.note_turn(self, before, Request::Leave { place }, answer);
                }
            }
            Action::GiveUp { waiter } => {
                next.mishaps += 1;
                let known = next.at_mut(waiter);
                (known.phase, known.call) = (Phase::Over, Call::None);
                next.leave_lane(self, waiter, false);
                next.at_mut(waiter).handing = Handing::No;
            }
            Action::Timeout { waiter } => {
                next.mishaps += 1;
                next.time_out(self, waiter);
            }
            Action::Park { process, own } => {
                next.mishaps += 1;
                let known = &mut next.processes[process];
                if own { known.own.rotate_left(1) } else { known.shared.rotate_left(1) }
            }
            Action::Die { process } => {
                next.mishaps += 1;
                next.die(self, process);
            }
            Action::Silence { process } => {
                let is_mishap = self.gives_signs(state, process);
                next.mishaps += u8::from(is_mishap);
                next.alive &= !(1 << process);
                next.excused |= u8::from(is_mishap) << process;
            }
            Action::SilencePlace { place } => next.silent_places.push(place),
            Action::Expire => {
                let is_mishap = match state.lock {
                    Lock::Reserved(entry) => state.is_awaited(self, entry.place),
                    Lock::Held(waiter) => state.processes[self.process(waiter)].up,
                    Lock::Free | Lock::Stranger => false,
                };
                next.mishaps += u8::from(is_mishap);
                next.kept = 0;
                next.expire();
            }
            Action::Barge => {
                next.mishaps += 1;
                next.kept = 0;
                next.lock = Lock::Stranger;
            }
            Action::StrangerEnds { heard: true } => drop(next.pass_on(self)),
            Action::StrangerEnds { heard: false } => next.lock = Lock::Free,
        }
        Some(next).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(EXCLUSION, Self::excludes),
            Property::always(NO_GHOST, Self::has_no_ghost),
            Property::always(GRANTED, Self::is_granted),
            Property::always(ORDER, |_, state: &State| !state.broken.order),
            Property::always(KEPT, |_, state: &State| !state.broken.kept),
            Property::always(SERVED, Self::are_served),
        ];
        properties.retain(|property| self.promises.contains(&property.name));
        properties
    }
}

impl World {
    fn actions_of(&self, state: &State, waiter: u8, actions: &mut Vec<Action>) {
        let (known, process) = (state.at(waiter), &state.processes[self.process(waiter)]);
        if !process.up {
            return;
        }
        let comes =
            known.phase == Phase::Away || self.come_again && known.phase == Phase::Over && state.is_forgotten(waiter);
        if comes {
            actions.push(Action::Come { waiter });
        }
        match known.call {
            Call::None => {}
            Call::Sent(_) if state.can_run(self, waiter) => actions.push(Action::Run { waiter }),
            Call::Sent(_) => {}
            Call::Answered(..) => actions.push(Action::Learn { waiter }),
        }
        if known.call != Call::None && self.can(state, Mishap::Timeout) {
            actions.push(Action::Timeout { waiter });
        }
        match known.phase {
            Phase::Waiting => {
                if known.call == Call::None && known.handing.has_lock() {
                    actions.push(Action::Take { waiter });
                }
                // Earlier requests run first; otherwise this one has timed out before.
                if !matches!(known.call, Call::Sent(_)) && self.can(state, Mishap::GiveUp) {
                    actions.push(Action::GiveUp { waiter });
                }
                // A waiter may have decided to ask just before it has the lock without having asked.
                let is_taken_over = known.call == Call::None && matches!(known.handing, Handing::TakenOver { .. });
                if state.is_first(self, waiter) && (state.is_idle(waiter) || is_taken_over) {
                    let may_be_in_line = self.is_own(waiter) || process.in_line;
                    actions.push(Action::Ask { waiter, in_line: true });
                    if !may_be_in_line && !known.was_refused {
                        actions.push(Action::Ask { waiter, in_line: false });
                    }
                    if may_be_in_line {
                        actions.push(Action::Heartbeat { waiter });
                    }
                }
            }
            Phase::Holding => {
                actions.push(Action::Release { waiter, heard: true });
                if self.can(state, Mishap::Unheard) {
                    actions.push(Action::Release { waiter, heard: false });
                }
                if state.next_to_take_over(self, waiter).is_some() {
                    actions.push(Action::HandOverHere { waiter });
                }
            }
            Phase::Over if state.is_to_undo(waiter) => actions.push(Action::Undo { waiter }),
            Phase::Away | Phase::Releasing | Phase::Over => {}
        }
    }

    fn actions_of_process(&self, state: &State, process: usize, actions: &mut Vec<Action>) {
        let known = &state.processes[process];
        if state.alive >> process & 1 == 1 && (!self.gives_signs(state, process) || self.can(state, Mishap::Silence)) {
            actions.push(Action::Silence { process });
        }
        if !known.up {
            return;
        }
        if matches!(known.sent.first(), Some(Sent::Leave(_))) {
            actions.push(Action::Leave { process, is_lost: false });
            if self.can(state, Mishap::Timeout) {
                actions.push(Action::Leave { process, is_lost: true });
            }
        }
        if self.can(state, Mishap::Die) && self.waiters.iter().any(|(other, _)| *other == process) {
            actions.push(Action::Die { process });
        }
        if self.can(state, Mishap::Park) {
            // `Lane::check_first`: one that a hand-over is on its way to stays the first.
            let is_parked = |first: &u8| {
                let is_over = matches!(state.at(*first).handing, Handing::No | Handing::Failed { settled: true });
                is_over && state.is_idle(*first)
            };
            let parks = |lane: &Vec<u8>| lane.len() > 1 && lane.first().is_some_and(is_parked);
            actions.extend(parks(&known.own).then_some(Action::Park { process, own: true }));
            actions.extend(parks(&known.shared).then_some(Action::Park { process, own: false }));
        }
        if !self.safeguards.sign_of_process {
            // Waiters behind the first of a lane send no heartbeats of their own.
            let behind = known.own.iter().skip(1).filter(|place| state.is_in_line(**place));
            let silent = behind.filter(|place| !state.silent_places.contains(place));
            actions.extend(silent.map(|place| Action::SilencePlace { place: *place }));
        }
    }

    /// Returns whether somebody in this process sends heartbeats.
    pub fn gives_signs(&self, state: &State, process: usize) -> bool {
        let known = &state.processes[process];
        let acts = |first: &u8| {
            let first = state.at(*first);
            known.in_line || first.call != Call::None || first.handing != Handing::No
        };
        known.up && (!known.own.is_empty() || known.shared.first().is_some_and(acts))
    }

    fn excludes(&self, state: &State) -> bool {
        let believes = |waiter: &u8| {
            let process = &state.processes[self.process(*waiter)];
            process.up && state.at(*waiter).phase == Phase::Holding
        };
        let mut holders = self.names().filter(believes);
        let is_held = holders.next().is_none_or(|waiter| state.lock == Lock::Held(state.token(waiter)));
        is_held && holders.next().is_none()
    }

    fn has_no_ghost(&self, state: &State) -> bool {
        let waits = |place: u8| !state.processes[self.process_of(place)].up || state.is_had(self, place);
        let is_reserved_for_one = match state.lock {
            Lock::Reserved(entry) => waits(entry.place),
            _ => true,
        };
        !state.is_quiet() || is_reserved_for_one && state.line.iter().all(|entry| waits(entry.place))
    }

    /// Returns whether the lock is no longer free after the next heartbeat of anybody in the line.
    fn is_granted(&self, state: &State) -> bool {
        let gives_sign = |waiter: &u8| {
            let known = &state.processes[self.process(*waiter)];
            let may_be_in_line = self.is_own(*waiter) || known.in_line;
            known.up && may_be_in_line && state.is_first(self, *waiter) && state.is_idle(*waiter)
        };
        state.lock != Lock::Free
            || self.names().filter(gives_sign).all(|waiter| {
                let place = self.place(state, waiter);
                let mut next = state.clone();
                let answer = next.run(self, Request::Heartbeat { place });
                next.lock != Lock::Free || answer == Answer::Ask
            })
    }

    /// Returns whether all waiters are served, whether requests in flight arrive or not, in either order of the
    /// processes.
    fn are_served(&self, state: &State) -> bool {
        [(false, false), (true, false), (true, true)]
            .iter()
            .all(|(arrives, is_reversed)| self.after_a_calm(state.clone(), *arrives, *is_reversed))
    }
}
