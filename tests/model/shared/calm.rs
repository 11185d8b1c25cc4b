//! The calm that ends a behaviour: nothing more goes wrong, and no notification arrives. Heartbeats find everything.

use super::state::{Lock, Mode, Phase, SharedState};
use super::{Shares, What};

impl Shares {
    /// Returns whether all who wait are served, whether requests in flight arrive or not.
    pub(super) fn are_served(&self, state: &SharedState) -> bool {
        [false, true].iter().all(|arrives| self.after_a_calm(state.clone(), *arrives))
    }

    fn after_a_calm(&self, mut state: SharedState, arrives: bool) -> bool {
        for client in 0..self.clients.len() {
            for what in [What::Downgrade, What::Renew, What::Acquire, What::Release] {
                let known = &state.clients[client];
                let life = match what {
                    What::Acquire => known.acquire,
                    What::Renew => known.renew,
                    What::Downgrade => known.downgrade,
                    What::Release => known.release,
                };
                if arrives && life > 0 {
                    state.run(self, client, what);
                }
            }
            let known = &mut state.clients[client];
            (known.acquire, known.renew, known.downgrade, known.release) = (0, 0, 0, 0);
        }
        let longest = self.clients.iter().map(|role| role.ttl.max(role.least)).max().unwrap_or(0);
        let turns = self.clients.len() as i8;
        for _ in 0..longest + self.alive + turns * (self.confirm + 1) {
            if self.is_served(&state) {
                return true;
            }
            for client in 0..self.clients.len() {
                self.go_on(&mut state, client);
            }
            state.tick(self);
        }
        self.is_served(&state)
    }

    fn is_served(&self, state: &SharedState) -> bool {
        let waits = |client: usize| self.clients[client].waits && state.clients[client].phase == Phase::Waiting;
        !(0..self.clients.len()).any(waits)
    }

    /// A holder releases what it has; a waiter sends a heartbeat, and asks when it has to.
    fn go_on(&self, state: &mut SharedState, client: usize) {
        match state.clients[client].phase {
            Phase::Waiting if !self.clients[client].waits => {
                state.release(self, client);
                state.clients[client].phase = Phase::Over;
            }
            Phase::Waiting => {
                if state.heartbeat(self, client) && state.acquire(self, client) {
                    state.clients[client].phase = Phase::Holding;
                }
            }
            Phase::Holding | Phase::Downgrading | Phase::Ending => {
                state.release(self, client);
                state.clients[client].phase = Phase::Over;
            }
            Phase::Away | Phase::Over | Phase::Dead => {}
        }
    }

    /// Each waiter whose kind shares the key gets in, if there is room and all others that wait fall silent. Those
    /// inside stay.
    pub(super) fn shares_go_on(&self, state: &SharedState) -> bool {
        let Lock::Marker { mode, .. } = state.lock else { return true };
        let live = state.live_tokens(self);
        let may_enter = |client: &usize| {
            let (role, known) = (&self.clients[*client], &state.clients[*client]);
            let has_room = mode == Mode::Read || live.len() + state.rests.len() < self.limit;
            known.phase == Phase::Waiting && role.mode == mode && role.waits && has_room
        };
        (0..self.clients.len()).filter(may_enter).all(|client| {
            let mut next = state.clone();
            (0..=self.alive).any(|_| {
                if next.heartbeat(self, client) && next.acquire(self, client) {
                    return true;
                }
                if self.rules.silent_places_end {
                    next.alive.iter_mut().for_each(|alive| *alive = (*alive - 1).max(0));
                }
                false
            })
        })
    }
}
