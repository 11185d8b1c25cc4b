//! What the server does: each function is one script, and one step.

use super::state::{Lock, Member, Mode, SharedState};
use super::{Shares, What};

impl SharedState {
    /// Runs a request that has been sent. Returns whether it was granted, or done.
    pub(super) fn run(&mut self, shares: &Shares, client: usize, what: What) -> bool {
        let holds = self.held_for(shares, client).is_some() && !self.clients[client].is_excused;
        let done = match what {
            What::Acquire => self.acquire(shares, client),
            What::Renew => self.renew(shares, client),
            What::Downgrade => self.downgrade(shares, client),
            What::Release => {
                self.release(shares, client);
                true
            }
        };
        self.broken.lost |= holds && !done && what != What::Acquire && self.clients[client].believes();
        done
    }

    /// Returns the head of the line. Places of silent processes at the head are dropped.
    pub(super) fn head(&mut self) -> Option<u8> {
        while let Some(first) = self.line.first().copied() {
            if self.alive[usize::from(first)] > 0 {
                return Some(first);
            }
            self.line.remove(0);
        }
        None
    }

    fn leave_line(&mut self, client: usize) {
        self.line.retain(|place| usize::from(*place) != client);
    }

    fn enter_line(&mut self, shares: &Shares, client: usize) {
        if !shares.clients[client].waits {
            return;
        }
        if !self.line.contains(&(client as u8)) {
            self.line.push(client as u8);
        }
        self.alive[client] = shares.alive;
    }

    /// Frees a key that was ours or is free: it goes to the head of the line.
    fn pass_on(&mut self, shares: &Shares) -> Option<u8> {
        let head = self.head();
        self.free();
        if let Some(place) = head {
            self.line.remove(0);
            self.lock = Lock::Reserved { place, left: shares.confirm };
        }
        head
    }

    /// Returns whether the share of a client counts.
    fn counts(&self, shares: &Shares, client: usize) -> bool {
        self.members[client].is_some_and(|member| member.left > 0 || !shares.rules.dead_do_not_count)
    }

    /// Returns how many have a permit.
    fn holders(&self, shares: &Shares) -> usize {
        let mut tokens = Vec::new();
        for (client, role) in shares.clients.iter().enumerate() {
            if self.counts(shares, client) && !(shares.rules.tokens_count && tokens.contains(&role.token)) {
                tokens.push(role.token);
            }
        }
        tokens.len() + self.rests.len()
    }

    /// The longest that anybody has the key, with others or alone.
    fn longest(&self) -> i8 {
        let members = self.members.iter().flatten().map(|member| member.left);
        members.chain(self.rests.iter().copied()).max().unwrap_or(0)
    }

    /// `acquire_one.lua`, `acquire_in_line.lua`, and their like for shares. Returns whether it was granted.
    pub(super) fn acquire(&mut self, shares: &Shares, client: usize) -> bool {
        let role = &shares.clients[client];
        let place = client as u8;
        if self.line.contains(&place) {
            self.alive[client] = shares.alive;
        }
        let granted = match role.mode {
            Mode::Write => self.acquire_alone(shares, client),
            Mode::Read | Mode::Permit => self.acquire_share(shares, client),
        };
        if granted {
            self.leave_line(client);
            self.clients[client].asked = self.clients[client].asked.max(role.ttl);
            return true;
        }
        self.enter_line(shares, client);
        if self.lock == Lock::Free {
            self.pass_on(shares);
        }
        false
    }

    fn acquire_alone(&mut self, shares: &Shares, client: usize) -> bool {
        let role = &shares.clients[client];
        let is_turn = match self.lock {
            Lock::Held { token, left } if token == role.token => {
                self.lock = Lock::Held { token, left: left.max(role.ttl) };
                return true;
            }
            // A repeat of what was granted before the holder became a reader.
            Lock::Free if role.waits => self.head().is_none_or(|head| usize::from(head) == client),
            // It barges in.
            Lock::Free => true,
            Lock::Reserved { place, .. } => usize::from(place) == client,
            Lock::Marker { .. } => !shares.rules.writers_see_shares,
            Lock::Held { .. } | Lock::Nobody { .. } => false,
        };
        if is_turn {
            self.lock = Lock::Held { token: role.token, left: role.ttl };
        }
        is_turn
    }

    fn acquire_share(&mut self, shares: &Shares, client: usize) -> bool {
        let (rules, role) = (&shares.rules, &shares.clients[client]);
        let twins = || shares.clients.iter().enumerate().filter(|(_, other)| other.token == role.token);
        let is_behind = |place: u8| usize::from(place) != client;
        let before = {
            let ours = self.line.iter().position(|place| usize::from(*place) == client);
            let all = &self.line[..ours.unwrap_or(self.line.len())];
            all.iter().any(|place| self.alive[usize::from(*place)] > 0)
        };
        match self.lock {
            Lock::Marker { mode, left } if mode == role.mode || !rules.kinds_differ => {
                let is_in = twins().any(|(twin, _)| self.counts(shares, twin));
                if !(is_in && rules.again_at_once) {
                    if rules.shares_wait && self.head().is_some_and(is_behind)
                        || role.mode == Mode::Permit && self.holders(shares) >= shares.limit
                    {
                        self.broken.again |= is_in;
                        return false;
                    }
                    self.broken.order |= before;
                }
                let left = if rules.marker_grows { left.max(role.ttl) } else { left };
                self.lock = Lock::Marker { mode, left };
            }
            Lock::Free | Lock::Reserved { .. } => {
                let is_turn = match self.lock {
                    Lock::Reserved { place, .. } => !is_behind(place),
                    _ => self.head().is_none_or(|head| !is_behind(head)),
                };
                if !is_turn {
                    return false;
                }
                if rules.free_is_empty {
                    self.members = Default::default();
                    self.rests.clear();
                }
                self.lock = Lock::Marker { mode: role.mode, left: role.ttl };
            }
            Lock::Held { .. } | Lock::Marker { .. } | Lock::Nobody { .. } => return false,
        }
        let left = self.members[client].map_or(0, |member| member.left).max(role.ttl);
        self.members[client] = Some(Member { left, is_stale: false });
        true
    }

    /// Returns whether the client holds the key. A member is renewed by its own requests only.
    fn renew(&mut self, shares: &Shares, client: usize) -> bool {
        let (rules, role, known) = (&shares.rules, &shares.clients[client], self.clients[client]);
        let is_either = known.is_either(role, shares);
        match &mut self.lock {
            Lock::Held { token, left } if *token == role.token && (known.mode == Mode::Write || is_either) => {
                *left = (*left).max(role.ttl);
                self.clients[client].asked = known.asked.max(role.ttl);
                return true;
            }
            Lock::Marker { mode, left } if *mode == known.mode || is_either && *mode == Mode::Read => {
                let is_in = match self.members[client] {
                    Some(member) => member.left > 0 || !rules.dead_are_missing,
                    None => !rules.renewal_adds_none,
                };
                if !is_in {
                    return false;
                }
                if rules.marker_grows {
                    *left = (*left).max(role.ttl);
                }
            }
            // Its member is still there.
            _ if !rules.renewal_looks_at_key && self.members[client].is_some_and(|member| member.left > 0) => {}
            _ => return false,
        }
        let member = self.members[client].get_or_insert(Member { left: 0, is_stale: false });
        self.broken.stale |= member.is_stale;
        member.left = member.left.max(role.ttl);
        self.clients[client].asked = known.asked.max(role.ttl);
        true
    }

    /// Returns whether the client is a reader.
    fn downgrade(&mut self, shares: &Shares, client: usize) -> bool {
        let (rules, role) = (&shares.rules, &shares.clients[client]);
        match self.lock {
            Lock::Held { token, left } if token == role.token => {
                if !rules.downgrade_is_one_step {
                    // And then asks for a share, like anybody.
                    self.pass_on(shares);
                    return true;
                }
                let left = if rules.downgrade_keeps_time { left } else { 1 };
                self.members = Default::default();
                self.rests.clear();
                self.members[client] = Some(Member { left, is_stale: false });
                self.lock = Lock::Marker { mode: Mode::Read, left };
                true
            }
            Lock::Marker { mode: Mode::Read, .. } => self.members[client].is_some_and(|member| member.left > 0),
            _ => false,
        }
    }

    /// Ends what a client has, and its place in the line.
    pub(super) fn release(&mut self, shares: &Shares, client: usize) {
        let (rules, role, known) = (&shares.rules, &shares.clients[client], self.clients[client]);
        self.leave_line(client);
        let rest = if rules.rest_ends { known.rest } else { known.rest * 2 };
        let is_either = known.is_either(role, shares);
        match self.lock {
            Lock::Held { token, .. } if token == role.token && (known.mode == Mode::Write || is_either) => {
                self.clients[client].asked = known.rest;
                if rest > 0 {
                    self.lock = Lock::Nobody { left: rest };
                    self.clients[client].kept = known.rest;
                } else {
                    self.pass_on(shares);
                }
            }
            Lock::Marker { mode, .. } if mode == known.mode || is_either && mode == Mode::Read => {
                self.end_shares(shares, client, mode, rest);
            }
            Lock::Reserved { place, .. } if usize::from(place) == client => drop(self.pass_on(shares)),
            Lock::Free if !self.line.is_empty() => drop(self.pass_on(shares)),
            _ => {}
        }
    }

    fn end_shares(&mut self, shares: &Shares, client: usize, mode: Mode, rest: i8) {
        let (rules, role, known) = (&shares.rules, &shares.clients[client], self.clients[client]);
        let was_in = self.members[client].is_some_and(|member| member.left > 0);
        let mut ended = false;
        for (other, twin) in shares.clients.iter().enumerate() {
            let is_ended = other == client || twin.token == role.token && (known.ends_all || !rules.ends_own_share);
            if is_ended && self.members[other].take().is_some() {
                ended = true;
                self.clients[other].is_excused |= other != client && known.ends_all;
                self.clients[other].asked = 0;
            }
        }
        if !ended {
            return;
        }
        if rest > 0 && was_in {
            if rules.rest_is_nobodys {
                self.rests.push(rest);
                self.rests.sort_unstable();
            } else {
                self.members[client] = Some(Member { left: rest, is_stale: false });
            }
            (self.clients[client].asked, self.clients[client].kept) = (known.rest, known.rest);
            // A repeat has nothing to leave.
            self.clients[client].rest = if rules.rest_is_nobodys { known.rest } else { 0 };
        }
        match self.longest() {
            0 => drop(self.pass_on(shares)),
            longest if rules.marker_is_cut || longest < 0 => self.lock = Lock::Marker { mode, left: longest },
            _ => {}
        }
    }

    /// Returns whether the client has to ask: its place is not in the line, or it is its turn.
    pub(super) fn heartbeat(&mut self, shares: &Shares, client: usize) -> bool {
        let place = client as u8;
        if !self.line.contains(&place) {
            return true;
        }
        self.alive[client] = shares.alive;
        let role = &shares.clients[client];
        match self.lock {
            Lock::Free => self.pass_on(shares) == Some(place),
            Lock::Marker { mode, .. } if mode == role.mode && shares.rules.heartbeat_looks_ahead => {
                let has_room = mode == Mode::Read || self.holders(shares) < shares.limit;
                self.head() == Some(place) && has_room
            }
            _ => false,
        }
    }
}
