//! Three primaries that share the slots of a cluster.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Server;
use crate::server::free_port;

/// A cluster of three primaries without replicas.
#[derive(Debug)]
pub struct Cluster {
    /// Its nodes, in the order of their slots.
    pub nodes: Vec<Server>,
}

impl Cluster {
    /// Starts three servers and makes them a cluster.
    ///
    /// # Panics
    ///
    /// When they don't agree within 20 seconds.
    pub fn start() -> Self {
        let (nodes, buses): (Vec<Server>, Vec<String>) = (0..3).map(|_| start_node()).unzip();
        for (node, (first, last)) in nodes.iter().zip([(0, 5460), (5461, 10922), (10923, 16383)]) {
            let added = node.cli(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
            assert_eq!(added, "OK");
        }
        for (node, (next, bus)) in nodes.iter().zip(nodes.iter().zip(&buses).skip(1)) {
            assert_eq!(node.cli(&["CLUSTER", "MEET", "127.0.0.1", &next.port().to_string(), bus]), "OK");
        }
        let cluster = Self { nodes };
        let patience = Instant::now() + Duration::from_secs(20);
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

    fn is_formed(&self) -> bool {
        self.nodes.iter().all(|node| {
            let info = node.cli(&["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
        })
    }
}

/// A node and the port of its bus, by default 10,000 above the other, where there may be none.
fn start_node() -> (Server, String) {
    let bus = free_port().to_string();
    let node = Server::start_with(&["--cluster-enabled", "yes", "--cluster-port", &bus]);
    (node, bus)
}
