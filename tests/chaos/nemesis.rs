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
//! | failover | Sentinel: allowed with `min_replicas` and one replica, otherwise **breaks**; cluster: allowed if the primary takes part | there is none |
//!
//! After a fault that breaks something, two guards may both be held until the older one's next renewal. Runs with
//! `--break-assumptions` have these faults, and must show overlaps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use fastrand::Rng;
use tenure_test_support::Mode;

use crate::history::{Nanos, now};
use crate::pool::Pool;
use crate::topology::{Kind, Topology};

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
    FailOver,
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
const WORKERS: [Fault; 3] = [FreezeWorker, FreezeWorker, KillWorker];

/// Returns all faults for a topology. Those that are more frequent are there twice.
fn faults(topology: &Topology) -> Vec<Fault> {
    let servers: &[Fault] = &[FreezeServer, FreezeServer, PauseServer, KillConnections];
    let connections: &[Fault] = if topology.proxies().is_empty() { &[KillConnections] } else { &CONNECTIONS };
    let own: &[Fault] = match (topology.kind, topology.breaks_assumptions) {
        (Kind::Single, false) => &[RestartServer, RestartServer, RestartServer],
        (Kind::Sentinel | Kind::Cluster, false) => &[RestartServer, FailOver, FailOver],
        (Kind::Single, true) => &[RestartEmpty, Flush, Flush],
        (Kind::Sentinel | Kind::Cluster, true) => &[RestartEmpty, FailOver, Flush, Flush],
        (Kind::Quorum(_), false) => &[RestartEmpty, RestartServer, Save],
        (Kind::Quorum(_), true) => &[RestartEmpty, Flush, Flush, Flush],
    };
    // Those that break something are three of four.
    let times = if topology.breaks_assumptions { 16 } else { 1 };
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
}

pub(crate) struct Nemesis<'a> {
    topology: &'a mut Topology,
    pool: &'a mut Pool,
    rng: Rng,
    faults: Vec<Fault>,
    lasting: Vec<Lasting>,
    failed_over: Option<Instant>,
    pub(crate) counts: BTreeMap<Fault, u64>,
    /// When a fault began or ended.
    pub(crate) log: Vec<(Nanos, String)>,
}

const AT_ONCE: usize = 2;

impl<'a> Nemesis<'a> {
    pub(crate) fn new(topology: &'a mut Topology, pool: &'a mut Pool, seed: u64) -> Self {
        let faults = faults(topology);
        let (counts, log, lasting) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { topology, pool, rng: Rng::with_seed(seed), faults, lasting, failed_over: None, counts, log }
    }

    /// Does harm for this long, and ends it.
    pub(crate) fn rage(mut self, length: Duration) -> (BTreeMap<Fault, u64>, Vec<(Nanos, String)>) {
        let end = Instant::now() + length;
        let mut next = Instant::now();
        while Instant::now() < end && !self.pool.has_failed() {
            self.heal(|lasting| lasting.until <= Instant::now());
            if next <= Instant::now() && self.lasting.len() < AT_ONCE {
                self.strike();
                next = Instant::now() + self.millis(500..2_000);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.heal(|_| true);
        (self.counts, self.log)
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }

    fn strike(&mut self) {
        let fault = self.faults[self.rng.usize(..self.faults.len())];
        let places = self.places(fault);
        let busy: BTreeSet<Place> = self.lasting.iter().flat_map(|lasting| lasting.places.clone()).collect();
        if places.iter().any(|place| busy.contains(place)) {
            return;
        }
        let length = match fault {
            FreezeWorker | FreezeServer | Partition | Silence => self.millis(50..2_000),
            PauseServer | Slow => self.millis(50..1_000),
            RestartServer | RestartEmpty => self.millis(20..800),
            _ => Duration::ZERO,
        };
        let from = now();
        if !places.iter().all(|&place| self.begin(fault, place, length)) {
            return;
        }
        self.log.push((from, format!("{fault:?} {places:?} for {length:?}")));
        *self.counts.entry(fault).or_default() += 1;
        if !length.is_zero() {
            self.lasting.push(Lasting { until: Instant::now() + length, fault, places });
        }
    }

    fn places(&mut self, fault: Fault) -> Vec<Place> {
        let (slots, servers) = (self.pool.slots(), self.topology.servers().len());
        let (slot, server) = (self.rng.usize(..slots), self.rng.usize(..servers));
        if WORKERS.contains(&fault) {
            return vec![Place::Worker(slot)];
        }
        if !CONNECTIONS.contains(&fault) {
            return vec![Place::Server(server)];
        }
        match self.rng.u8(..3) {
            0 => vec![Place::Connection(slot, server)],
            1 => (0..slots).map(|slot| Place::Connection(slot, server)).collect(),
            _ => (0..servers).map(|server| Place::Connection(slot, server)).collect(),
        }
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
            FailOver => return self.fail_over(place),
            _ => return false,
        }
        true
    }

    /// Promotes a replica, if it is one.
    fn fail_over(&mut self, place: usize) -> bool {
        if let Some(sentinel) = self.topology.sentinel() {
            // The Sentinel takes ten seconds to make the old primary a replica, and there are no locks without one.
            if self.failed_over.is_some_and(|last| last.elapsed() < Duration::from_secs(20)) {
                return false;
            }
            self.failed_over = Some(Instant::now());
            return sentinel.cli(&["SENTINEL", "FAILOVER", "locks"]) == "OK";
        }
        let how: &[&str] = if self.topology.breaks_assumptions { &["TAKEOVER"] } else { &[] };
        let server = self.topology.server(place);
        server.cli(&["ROLE"]).starts_with("slave") && server.cli(&[&["CLUSTER", "FAILOVER"], how].concat()) == "OK"
    }

    fn heal(&mut self, is_due: impl Fn(&Lasting) -> bool) {
        let (due, lasting) = std::mem::take(&mut self.lasting).into_iter().partition(is_due);
        self.lasting = lasting;
        let due: Vec<Lasting> = due;
        for Lasting { fault, places, .. } in due {
            for &place in &places {
                match place {
                    Place::Worker(slot) => self.pool.thaw(slot),
                    Place::Connection(slot, server) => self.topology.proxies()[slot][server].set(Mode::Pass),
                    Place::Server(server) if fault == FreezeServer => self.topology.server(server).thaw(),
                    Place::Server(server) if matches!(fault, RestartServer | RestartEmpty) => {
                        self.topology.restart(server);
                    }
                    Place::Server(_) => {}
                }
            }
            self.log.push((now(), format!("end of {fault:?} {places:?}")));
        }
    }
}
