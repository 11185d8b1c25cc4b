//! Three primaries that share the slots of a cluster.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::port::BUS;
use crate::{Clock, PATIENCE, Proxy, Server, elected};

/// A cluster of three primaries without replicas.
#[derive(Debug)]
pub struct Cluster {
    /// Its nodes, in the order of their slots.
    pub nodes: Vec<Server>,
    args: Vec<String>,
    clock: Option<Arc<Clock>>,
}

impl Cluster {
    /// Starts three servers and makes them a cluster.
    ///
    /// # Panics
    ///
    /// When they don't agree within 60 seconds.
    pub fn start() -> Self {
        Self::start_with(&[], None)
    }

    /// The same with further arguments, and a clock, for replicas as well.
    ///
    /// # Panics
    ///
    /// When they don't agree within 60 seconds.
    pub fn start_with(args: &[&str], clock: Option<&Arc<Clock>>) -> Self {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let (nodes, buses): (Vec<Server>, Vec<String>) = (0..3).map(|_| start_node(&args, clock)).unzip();
        for (epoch, (node, (first, last))) in
            (1_u16..).zip(nodes.iter().zip([(0_u16, 5460_u16), (5461, 10922), (10923, 16383)]))
        {
            // ADDSLOTSRANGE does the same, from Redis 7 on.
            let slots: Vec<String> = (first..=last).map(|slot| slot.to_string()).collect();
            let command: Vec<&str> =
                ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
            assert_eq!(node.cli(&command), "OK");
            // Otherwise they would raise their epochs until no two are the same, up to seconds later. A primary that
            // dies before its replica knows of the new one is never replaced: the others refuse the replica's old
            // epoch.
            assert_eq!(node.cli(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch.to_string()]), "OK");
        }
        for (node, (next, bus)) in nodes.iter().zip(nodes.iter().zip(&buses).skip(1)) {
            assert_eq!(node.cli(&["CLUSTER", "MEET", "127.0.0.1", &next.port().to_string(), bus]), "OK");
        }
        let cluster = Self { nodes, args, clock: clock.cloned() };
        let patience = Instant::now() + PATIENCE;
        while !cluster.is_formed() {
            assert!(Instant::now() < patience, "the nodes never became a cluster");
            sleep(Duration::from_millis(50));
        }
        cluster
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        let port = self.nodes.first().map_or(0, Server::port);
        format!("redis-cluster://127.0.0.1:{port}")
    }

    /// Starts a proxy for each node, and has the nodes announce these. Clients connect to the proxies from then on.
    ///
    /// # Panics
    ///
    /// When the nodes don't agree within 60 seconds.
    pub async fn announce_proxies(&self) -> Vec<Proxy> {
        let (mut proxies, mut ports) = (Vec::new(), Vec::new());
        for node in &self.nodes {
            let proxy = Proxy::start(node.port()).await;
            let port = proxy.url().rsplit(':').next().unwrap_or_default().to_owned();
            assert_eq!(node.cli(&["CONFIG", "SET", "cluster-announce-port", &port]), "OK");
            proxies.push(proxy);
            ports.push(port);
        }
        elected("all know of the proxies", async || {
            let knows = |node: &Server| {
                let slots = node.cli(&["CLUSTER", "SLOTS"]);
                ports.iter().all(|port| slots.lines().any(|line| line == port))
            };
            self.nodes.iter().all(knows).then_some(())
        })
        .await;
        proxies
    }

    /// Starts a node that follows the one at this place, and waits until it has caught up.
    ///
    /// # Panics
    ///
    /// When that takes more than 60 seconds.
    pub fn start_replica(&self, place: usize) -> Server {
        let primary = self.nodes.get(place).expect("a node");
        primary.cli(&["CONFIG", "SET", "repl-diskless-sync-delay", "0"]);
        let (replica, bus) = start_node(&self.args, self.clock.as_ref());
        assert_eq!(primary.cli(&["CLUSTER", "MEET", "127.0.0.1", &replica.port().to_string(), &bus]), "OK");
        let id = primary.cli(&["CLUSTER", "MYID"]);
        let patience = Instant::now() + PATIENCE;
        let wait_until = |holds: &dyn Fn() -> bool| {
            while !holds() {
                assert!(Instant::now() < patience, "the replica never caught up");
                sleep(Duration::from_millis(50));
            }
        };
        // It has to learn of the primary by gossip first. Once only: older servers begin anew when it is repeated.
        wait_until(&|| replica.cli(&["CLUSTER", "REPLICATE", &id]) == "OK");
        wait_until(&|| replica.cli(&["INFO", "replication"]).contains("master_link_status:up"));
        wait_until(&|| self.nodes.iter().all(|node| node.cli(&["CLUSTER", "REPLICAS", &id]).contains("connected")));
        // Only what it knows of its primary's slots can it take over.
        wait_until(&|| replica.cli(&["CLUSTER", "INFO"]).contains("cluster_slots_ok:16384"));
        replica
    }

    /// The place of the node that has the key.
    ///
    /// # Panics
    ///
    /// When no node has.
    pub fn place_of(&self, key: &str) -> usize {
        let slot = self.slot(key).parse().unwrap_or(0);
        [5460, 10922, 16383].iter().position(|last| slot <= *last).expect("a node for every slot")
    }

    /// Goes on with the slots that are left when a node is gone, and notices that within two seconds. Less would take
    /// nodes of a busy machine for gone.
    pub fn tolerate_loss(&self, replica: &Server) {
        for node in self.nodes.iter().chain([replica]) {
            node.cli(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]);
            node.cli(&["CONFIG", "SET", "cluster-node-timeout", "2000"]);
            node.cli(&["CONFIG", "SET", "cluster-replica-validity-factor", "0"]);
        }
    }

    /// Moves the slot of a key, with all that is in it, to another node, as `redis-cli --cluster reshard` does. Calls
    /// `midway` when the keys have moved and the slot has not.
    ///
    /// # Panics
    ///
    /// When a node refuses.
    pub fn migrate(&self, key: &str, from: usize, to: usize, midway: impl FnOnce()) {
        let migration = self.begin_migration(key, from, to);
        // Key after key, with time in between to find some here and some there.
        migration.move_all(Duration::from_millis(100));
        midway();
        migration.finish();
    }

    /// Begins to move the slot of a key to another node. No key has moved yet.
    ///
    /// # Panics
    ///
    /// When a node refuses.
    pub fn begin_migration(&self, key: &str, from: usize, to: usize) -> Migration<'_> {
        let (slot, Some((source, target))) = (self.slot(key), self.nodes.get(from).zip(self.nodes.get(to))) else {
            panic!("there are nodes {from} and {to}");
        };
        let (source_id, target_id) = (source.cli(&["CLUSTER", "MYID"]), target.cli(&["CLUSTER", "MYID"]));
        assert_eq!(target.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source_id]), "OK");
        assert_eq!(source.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target_id]), "OK");
        Migration { cluster: self, slot, source, target }
    }

    fn slot(&self, key: &str) -> String {
        self.nodes.first().map(|node| node.cli(&["CLUSTER", "KEYSLOT", key])).unwrap_or_default()
    }

    fn is_formed(&self) -> bool {
        self.nodes.iter().all(|node| {
            let info = node.cli(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
        })
    }
}

/// A slot on its way from one node to another.
#[derive(Debug)]
#[must_use = "a slot stays half moved until its migration is finished"]
pub struct Migration<'a> {
    cluster: &'a Cluster,
    slot: String,
    source: &'a Server,
    target: &'a Server,
}

impl Migration<'_> {
    /// The keys that have not moved yet.
    pub fn left(&self) -> Vec<String> {
        let keys = self.source.cli(&["CLUSTER", "GETKEYSINSLOT", &self.slot, "1000"]);
        keys.lines().filter(|key| !key.is_empty()).map(str::to_owned).collect()
    }

    /// Moves one key, if it is there.
    ///
    /// # Panics
    ///
    /// When the node refuses.
    pub fn move_key(&self, key: &str) {
        let port = self.target.port().to_string();
        let moved = self.source.cli(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
        assert!(moved == "OK" || moved == "NOKEY", "{moved}");
    }

    /// Moves all keys, with a pause after each.
    ///
    /// # Panics
    ///
    /// When the node refuses.
    pub fn move_all(&self, pause: Duration) {
        let mut left = self.left();
        while !left.is_empty() {
            for key in &left {
                self.move_key(key);
                sleep(pause);
            }
            left = self.left();
        }
    }

    /// Moves the slot.
    ///
    /// # Panics
    ///
    /// When a node refuses.
    pub fn finish(self) {
        let target_id = self.target.cli(&["CLUSTER", "MYID"]);
        for node in [self.target, self.source].into_iter().chain(&self.cluster.nodes) {
            assert_eq!(node.cli(&["CLUSTER", "SETSLOT", &self.slot, "NODE", &target_id]), "OK");
        }
    }
}

/// A node and the port of its bus.
fn start_node(args: &[String], clock: Option<&Arc<Clock>>) -> (Server, String) {
    let args: Vec<&str> = ["--cluster-enabled", "yes"].into_iter().chain(args.iter().map(String::as_str)).collect();
    let node = Server::start_with_clock(&args, clock);
    let bus = node.port() + BUS;
    (node, bus.to_string())
}
