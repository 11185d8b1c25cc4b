//! Failovers: a replica becomes the primary.
//!
//! Within the assumptions, the replica has all that was granted. Under a Sentinel, `min_replicas` ensures that, however
//! the failover comes about. In a cluster, the nemesis ensures it: before a failover is forced, the primary stops
//! writing, and its replica catches up.

use std::time::{Duration, Instant};

use super::Fault::{self, FailOver, ForceFailOver, KillPrimary, TakeOver};
use super::{Lasting, Nemesis, Place};
use crate::history::now;
use crate::topology::Breaks;

/// One that isn't over before a replica has become the primary.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failover {
    pub(super) from: usize,
    pub(super) to: usize,
}

/// A failover that takes longer has failed. For no longer does a node of a cluster pursue one that it was asked for.
pub(super) const LONGEST: Duration = Duration::from_secs(6);

const NO_ELECTION: &str = "cluster-replica-no-failover";

impl Nemesis<'_> {
    /// Returns who would follow whom among this server and its partner, if that can be told now.
    pub(super) fn failover_of(&self, server: usize) -> Option<Failover> {
        let partner = self.topology.partner(server)?;
        let pair = [server, partner];
        let asked = pair.into_iter().find(|&place| !self.is_busy(Place::Server(place)))?;
        let other = if asked == server { partner } else { server };
        let (from, to) = if self.topology.is_primary(asked) { (asked, other) } else { (other, asked) };
        (!self.is_busy(Place::Server(to))).then_some(Failover { from, to })
    }

    pub(super) fn fail_over(&mut self, fault: Fault, Failover { from, to }: Failover) -> bool {
        // It is frozen, and can't be asked.
        let is_away = self.is_busy(Place::Server(from));
        if let Some(sentinel) = self.topology.sentinel() {
            if !is_away && !self.topology.has_caught_up(to, from) {
                return false;
            }
            if fault == FailOver {
                return sentinel.cli(&["SENTINEL", "FAILOVER", "locks"]) == "OK";
            }
            self.topology.server(from).kill();
            return true;
        }
        if fault == FailOver {
            return self.ask_to_fail_over(to, &[]);
        }
        if self.topology.breaks != Breaks::Memory && !self.stop_writing(from, to) {
            return false;
        }
        let is_begun = match fault {
            ForceFailOver => self.ask_to_fail_over(to, &["FORCE"]),
            TakeOver => self.ask_to_fail_over(to, &["TAKEOVER"]),
            _ => {
                self.topology.server(from).kill();
                match self.rng.u8(..3) {
                    0 => self.ask_to_fail_over(to, &["FORCE"]),
                    1 => self.ask_to_fail_over(to, &["TAKEOVER"]),
                    // It stands for election.
                    _ => self.topology.server(to).cli(&["CONFIG", "SET", NO_ELECTION, "no"]) == "OK",
                };
                true
            }
        };
        if !is_begun {
            self.go_on_writing(from);
        }
        is_begun
    }

    fn ask_to_fail_over(&mut self, replica: usize, how: &[&str]) -> bool {
        self.topology.server(replica).cli(&[&["CLUSTER", "FAILOVER"], how].concat()) == "OK"
    }

    /// Stops a primary until its replica has all that it had written, and returns whether it has. Then the primary
    /// writes nothing until the failover is over.
    fn stop_writing(&mut self, primary: usize, replica: usize) -> bool {
        let millis = (LONGEST * 2).as_millis().to_string();
        if self.topology.server(primary).cli(&["CLIENT", "PAUSE", &millis, "WRITE"]) != "OK" {
            return false;
        }
        let patience = Instant::now() + Duration::from_millis(300);
        while Instant::now() < patience {
            if self.topology.has_caught_up(replica, primary) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.go_on_writing(primary);
        false
    }

    fn go_on_writing(&mut self, server: usize) {
        self.topology.server(server).cli(&["CLIENT", "UNPAUSE"]);
    }

    /// Looks whether replicas were promoted, which ends that fault.
    pub(super) fn follow_failovers(&mut self) {
        if self.looked.elapsed() < Duration::from_millis(100) {
            return;
        }
        self.looked = Instant::now();
        for at in 0..self.lasting.len() {
            let Lasting { until, failover: Some(Failover { to, .. }), .. } = self.lasting[at] else { continue };
            if until > Instant::now() && self.topology.is_primary(to) {
                self.lasting[at].until = Instant::now();
                self.harm.failovers += 1;
                self.note(now(), format!("server {to} is the primary"));
            }
        }
        if self.topology.sentinel().is_some() && ![0, 1].into_iter().any(|place| self.is_busy(Place::Server(place))) {
            self.demote();
        }
    }

    /// Makes the server that the Sentinel has replaced a replica, as the Sentinel would after ten seconds. There are no
    /// locks until then.
    fn demote(&mut self) {
        let (primary, other) = if self.topology.is_primary(0) { (0, 1) } else { (1, 0) };
        let is_primary = |place: usize| self.topology.servers()[place].cli(&["ROLE"]).starts_with("master");
        if is_primary(other) && is_primary(primary) {
            let port = self.topology.server(primary).port().to_string();
            self.topology.server(other).cli(&["REPLICAOF", "127.0.0.1", &port]);
            self.topology.server(other).cli(&["CONFIG", "REWRITE"]);
            self.note(now(), format!("server {other} follows"));
        }
    }

    pub(super) fn end_failover(&mut self, fault: Fault, Failover { from, to }: Failover) {
        let is_cluster = self.topology.sentinel().is_none();
        match fault {
            KillPrimary => self.topology.restart(from),
            ForceFailOver | TakeOver if self.topology.breaks != Breaks::Memory => {
                // Whoever it has kept waiting is sent to the new primary, once it knows that there is one.
                let patience = Instant::now() + Duration::from_secs(1);
                while self.topology.is_primary(from) && Instant::now() < patience {
                    std::thread::sleep(Duration::from_millis(5));
                }
                self.go_on_writing(from);
            }
            _ => {}
        }
        if is_cluster && fault == KillPrimary && self.topology.breaks != Breaks::Memory {
            self.topology.server(to).cli(&["CONFIG", "SET", NO_ELECTION, "yes"]);
        }
    }
}
