//! A primary that a Sentinel watches over.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Server;

/// One primary, its replica, and one Sentinel, which alone decides.
#[derive(Debug)]
pub struct Sentinel {
    /// The server that locks are on at first.
    pub primary: Server,
    /// The server that takes over.
    pub replica: Server,
    /// The Sentinel.
    pub sentinel: Server,
    _dir: tempfile::TempDir,
}

impl Sentinel {
    /// Starts them and waits until the Sentinel knows the replica.
    ///
    /// # Panics
    ///
    /// When that takes more than 20 seconds.
    pub fn start() -> Self {
        let primary = Server::start();
        let port = primary.port().to_string();
        let replica = primary.start_replica();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("sentinel.conf");
        let settings = format!(
            "sentinel monitor locks 127.0.0.1 {port} 1\n\
             sentinel down-after-milliseconds locks 500\n\
             sentinel failover-timeout locks 3000\n"
        );
        std::fs::write(&file, settings).expect("a file");
        let sentinel = Server::start_with(&[&file.display().to_string(), "--sentinel"]);
        let watched = Self { primary, replica, sentinel, _dir: dir };
        let patience = Instant::now() + Duration::from_secs(20);
        while !watched.sentinel.cli(&["SENTINEL", "REPLICAS", "locks"]).contains(&watched.replica.port().to_string()) {
            assert!(Instant::now() < patience, "the Sentinel never found the replica");
            sleep(Duration::from_millis(50));
        }
        watched
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=locks", self.sentinel.port())
    }
}
