//! What goes wrong: a fault every 0.5 to 2 s, of which at most two last at the same time.
//!
//! Which faults leave intact what a topology rests on, and which don't:
//!
//! | fault | one server, Sentinel, cluster | quorum |
//! | --- | --- | --- |
//! | workers frozen or killed, connections and servers cut off, slow or frozen | allowed: guards read the clock | allowed |
//! | restart with all data | allowed: every write is on the disk before the reply | as the next |
//! | restart empty or with old data | **breaks**: a second holder gets in | allowed: such a node doesn't vote for a window |
//! | flush | **breaks** | **breaks**: nothing tells the node that it has forgotten |
//! | failover | Sentinel: allowed with `min_replicas` and one replica, otherwise **breaks**; cluster: allowed if the replica has everything, as the primary has stopped writing | there is none |
//! | clock set back | allowed: keys live longer. Servers that replicate share a clock | allowed by less than the restart window: tokens follow the clocks |
//! | clock set forward | allowed within the drift, otherwise **breaks** | as one server |
//!
//! After a fault that breaks something, two guards may both be held until the older one's next renewal. Runs with
//! `--break-assumptions` and `--break-clocks` have these faults, and must show overlaps.

mod failover;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fastrand::Rng;
use tenure_test_support::Mode;

use self::failover::{Failover, LONGEST};
use crate::history::{Nanos, now};
use crate::pool::Pool;
use crate::topology::{Breaks, Kind, Topology};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Fault {
    FreezeServer,
    /// The server executes nothing for a while, and so is slow.
    PauseServer,
    /// The server cuts all its connections.
    KillConnections,
    /// The server is killed, and comes back with what it had persisted.
    RestartServer,
    /// The server is killed, and comes back empty.
    RestartEmpty,
    /// What a server will have if it is restarted.
    Save,
    Flush,
    /// A replica is promoted, and its primary takes part in it.
    FailOver,
    /// A replica promotes itself, with the votes of the other primaries.
    ForceFailOver,
    /// A replica promotes itself, and nobody is asked.
    TakeOver,
    /// A primary is killed, and is back once its replica has been promoted.
    KillPrimary,
    /// A server's clock is set back, or forward.
    StepClock,
    /// Nothing passes between workers and servers, until all that was held back does.
    Partition,
    /// Replies are lost.
    Silence,
    Slow,
    Cut,
    HalfClose,
    Garble,
    /// A reply is lost, and the next ones follow.
    Swallow,
    /// A reply is lost, and its connection cut.
    Lose,
    /// A request is delivered long after its connection was cut.
    Late,
    FreezeWorker,
    KillWorker,
}

use Fault::*;

/// Faults of what a worker has between itself and the servers.
const CONNECTIONS: [Fault; 9] = [Partition, Silence, Slow, Cut, HalfClose, Garble, Swallow, Lose, Late];
const WORKERS: [Fault; 4] = [FreezeWorker, FreezeWorker, KillWorker, KillWorker];
const FAIL_OVERS: [Fault; 4] = [FailOver, ForceFailOver, TakeOver, KillPrimary];

/// Returns all faults for a topology. Those that are more frequent are there several times.
fn faults(topology: &Topology) -> Vec<Fault> {
    let servers: &[Fault] = &[FreezeServer, FreezeServer, PauseServer, KillConnections];
    let connections: &[Fault] = if topology.proxies().is_empty() { &[KillConnections] } else { &CONNECTIONS };
    let own: &[Fault] = match (topology.kind, topology.breaks) {
        (_, Breaks::Clocks) => &[StepClock],
        (Kind::Single, Breaks::Nothing) => &[RestartServer, RestartServer, RestartServer, StepClock, StepClock],
        (Kind::Sentinel, Breaks::Nothing) => {
            &[&[FailOver; 16][..], &[KillPrimary; 6], &[RestartServer, StepClock]].concat()
        }
        (Kind::Cluster, Breaks::Nothing) => {
            let forced = [&[ForceFailOver; 6][..], &[TakeOver; 6], &[KillPrimary; 4]].concat();
            &[&[FailOver; 14][..], &forced, &[RestartServer, RestartServer, StepClock]].concat()
        }
        (Kind::Single, Breaks::Memory) => &[RestartEmpty, Flush, Flush],
        (Kind::Sentinel, Breaks::Memory) => &[RestartEmpty, FailOver, Flush, Flush],
        (Kind::Cluster, Breaks::Memory) => &[RestartEmpty, TakeOver, Flush, Flush],
        (Kind::Quorum(_), Breaks::Nothing) => &[RestartEmpty, RestartServer, Save, StepClock],
        (Kind::Quorum(_), Breaks::Memory) => &[RestartEmpty, Flush, Flush, Flush],
    };
    // Those that break something are three of four.
    let times = match topology.breaks {
        Breaks::Nothing => 1,
        Breaks::Memory => 16,
        Breaks::Clocks => 48,
    };
    [servers, connections, &own.repeat(times), &WORKERS].concat()
}

/// What a fault is done to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Place {
    Server(usize),
    /// The connections of this slot's worker with this server.
    Connection(usize, usize),
    Worker(usize),
}

/// A fault that lasts.
struct Lasting {
    until: Instant,
    fault: Fault,
    places: Vec<Place>,
    failover: Option<Failover>,
}

pub(crate) struct Nemesis<'a> {
    topology: &'a mut Topology,
    pool: &'a mut Pool,
    rng: Rng,
    faults: Vec<Fault>,
    lasting: Vec<Lasting>,
    looked: Instant,
    harm: Harm,
}

/// What was done.
#[derive(Default)]
pub(crate) struct Harm {
    pub(crate) counts: BTreeMap<Fault, u64>,
    /// Replicas that were promoted because of a fault.
    pub(crate) failovers: u64,
    /// When a fault began or ended.
    pub(crate) log: Vec<(Nanos, String)>,
}

const AT_ONCE: usize = 2;
/// For how much less than this the clocks of a quorum's nodes may differ: the restart window.
const CLOCKS_APART: i64 = 800;

impl<'a> Nemesis<'a> {
    pub(crate) fn new(topology: &'a mut Topology, pool: &'a mut Pool, seed: u64) -> Self {
        let faults = faults(topology);
        let (rng, lasting, harm) = (Rng::with_seed(seed), Vec::new(), Harm::default());
        Self { topology, pool, rng, faults, lasting, looked: Instant::now(), harm }
    }

    /// Does harm for this long, and ends it.
    pub(crate) fn rage(mut self, length: Duration) -> Harm {
        let end = Instant::now() + length;
        let mut next = Instant::now();
        while Instant::now() < end && !self.pool.has_failed() {
            self.follow_failovers();
            self.heal(|lasting| lasting.until <= Instant::now());
            if next <= Instant::now() && self.lasting.len() < AT_ONCE {
                // Where one can't be done now, another can.
                let _done = (0..5).any(|_| self.strike());
                next = Instant::now() + self.millis(500..2_000);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.heal(|_| true);
        self.harm
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }

    fn note(&mut self, at: Nanos, line: String) {
        self.harm.log.push((at, line));
    }

    /// Returns false if that fault can't be done there now.
    fn strike(&mut self) -> bool {
        let fault = self.faults[self.rng.usize(..self.faults.len())];
        let Some((places, failover)) = self.places(fault) else { return false };
        if places.iter().any(|&place| self.is_busy(place)) {
            return false;
        }
        let length = match fault {
            FreezeWorker | FreezeServer | Partition | Silence => self.millis(50..2_000),
            PauseServer | Slow => self.millis(50..1_000),
            RestartServer | RestartEmpty => self.millis(20..800),
            _ if failover.is_some() => LONGEST,
            _ => Duration::ZERO,
        };
        let from = now();
        let is_done = match failover {
            Some(failover) => self.fail_over(fault, failover),
            None => places.iter().all(|&place| self.begin(fault, place, length)),
        };
        if !is_done {
            return false;
        }
        self.note(from, format!("{fault:?} {places:?} for {length:?}"));
        *self.harm.counts.entry(fault).or_default() += 1;
        if !length.is_zero() {
            self.lasting.push(Lasting { until: Instant::now() + length, fault, places, failover });
        }
        true
    }

    fn is_busy(&self, place: Place) -> bool {
        self.lasting.iter().any(|lasting| lasting.places.contains(&place))
    }

    fn places(&mut self, fault: Fault) -> Option<(Vec<Place>, Option<Failover>)> {
        let (slots, servers) = (self.pool.slots(), self.topology.servers().len());
        let (slot, server) = (self.rng.usize(..slots), self.rng.usize(..servers));
        let places = if WORKERS.contains(&fault) {
            vec![Place::Worker(slot)]
        } else if FAIL_OVERS.contains(&fault) {
            let failover = self.failover_of(server)?;
            // A primary that is asked may have another fault meanwhile.
            let places = if fault == FailOver { vec![failover.to] } else { vec![failover.from, failover.to] };
            return Some((places.into_iter().map(Place::Server).collect(), Some(failover)));
        } else if fault == StepClock && (self.topology.shares_clock() || self.topology.breaks == Breaks::Clocks) {
            (0..servers).map(Place::Server).collect()
        } else if !CONNECTIONS.contains(&fault) {
            vec![Place::Server(server)]
        } else {
            match self.rng.u8(..3) {
                0 => vec![Place::Connection(slot, server)],
                1 => (0..slots).map(|slot| Place::Connection(slot, server)).collect(),
                _ => (0..servers).map(|server| Place::Connection(slot, server)).collect(),
            }
        };
        Some((places, None))
    }

    /// Returns false if that can't be done there now.
    fn begin(&mut self, fault: Fault, place: Place, length: Duration) -> bool {
        match place {
            Place::Worker(slot) if fault == KillWorker => self.pool.replace(slot),
            Place::Worker(slot) => self.pool.freeze(slot),
            Place::Connection(slot, server) => self.disturb(fault, slot, server),
            Place::Server(server) => return self.attack(fault, server, length),
        }
        true
    }

    fn disturb(&mut self, fault: Fault, slot: usize, server: usize) {
        let delay = self.millis(5..250);
        let late = self.millis(50..3_000);
        let proxy = &self.topology.proxies()[slot][server];
        proxy.set(match fault {
            Partition => Mode::Hold,
            Silence => Mode::Silence,
            Slow => Mode::Delay(delay),
            Garble => Mode::GarbleNext,
            Swallow => Mode::SwallowNext,
            Lose => Mode::LoseNext,
            Late => Mode::DeliverNextLate(late),
            Cut => return proxy.cut(),
            HalfClose => return proxy.half_close(),
            _ => return,
        });
    }

    fn attack(&mut self, fault: Fault, place: usize, length: Duration) -> bool {
        let server = self.topology.server(place);
        match fault {
            FreezeServer => server.freeze(),
            PauseServer => return server.cli(&["CLIENT", "PAUSE", &length.as_millis().to_string()]) == "OK",
            KillConnections => {
                let kind = if self.rng.bool() { "normal" } else { "pubsub" };
                server.cli(&["CLIENT", "KILL", "TYPE", kind]);
            }
            RestartServer => server.kill(),
            RestartEmpty => {
                server.kill();
                self.topology.forget(place);
            }
            Save => return server.cli(&["SAVE"]) == "OK",
            Flush => return server.cli(&["FLUSHALL"]) == "OK",
            StepClock => self.step_clock(place),
            _ => return false,
        }
        true
    }

    /// Steps a clock by what is allowed, or by what is not.
    fn step_clock(&mut self, place: usize) {
        let is_first = place == 0;
        if self.topology.shares_clock() && !is_first {
            return;
        }
        // One hold sees at most one of these, and is renewed before the next. The drift is 6 ms.
        let within_drift = self.rng.i64(1..=3);
        let offset = self.topology.server(place).step_clock(0);
        let millis = match (self.topology.breaks, self.topology.kind) {
            (Breaks::Clocks, _) => self.rng.i64(100..=5_000) * if self.rng.u8(..4) == 0 { -1 } else { 1 },
            _ if self.rng.u8(..3) == 0 => within_drift,
            (_, Kind::Single) => -self.rng.i64(100..=5_000),
            (_, Kind::Quorum(_)) => match -self.rng.i64(50..=400) {
                back if offset + back > -CLOCKS_APART => back,
                _ => within_drift,
            },
            _ => -self.rng.i64(100..=1_000),
        };
        let offset = self.topology.server(place).step_clock(millis);
        self.note(now(), format!("the clock of server {place} was stepped by {millis} ms, to {offset} ms"));
    }

    fn heal(&mut self, is_due: impl Fn(&Lasting) -> bool) {
        let (due, lasting) = std::mem::take(&mut self.lasting).into_iter().partition(is_due);
        self.lasting = lasting;
        let due: Vec<Lasting> = due;
        for Lasting { fault, places, failover, .. } in due {
            if let Some(failover) = failover {
                self.end_failover(fault, failover);
            }
            for &place in &places {
                match place {
                    Place::Worker(slot) => self.pool.thaw(slot),
                    Place::Connection(slot, server) => self.topology.proxies()[slot][server].set(Mode::Pass),
                    Place::Server(server) if fault == FreezeServer => self.topology.server(server).thaw(),
                    Place::Server(server) if matches!(fault, RestartServer | RestartEmpty) => {
                        self.restart(server);
                    }
                    Place::Server(_) => {}
                }
            }
            self.note(now(), format!("end of {fault:?} {places:?}"));
        }
    }

    /// A node of a quorum doesn't vote for a while after this, so its clock may be set right.
    fn restart(&mut self, place: usize) {
        if self.topology.kind.is_quorum() && self.topology.breaks != Breaks::Clocks {
            let server = self.topology.server(place);
            let offset = server.step_clock(0);
            server.step_clock(-offset);
        }
        self.topology.restart(place);
    }
}
