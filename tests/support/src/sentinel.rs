//! A primary that Sentinels watch over.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::{Clock, PATIENCE, Server};

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
    /// When that takes more than 60 seconds.
    pub fn start() -> Self {
        let primary = Server::start();
        let replica = primary.start_replica();
        Self::watch(primary, replica, tempfile::tempdir().expect("a temporary directory"))
    }

    /// The same with further arguments, and a clock, for the primary and its replica. Each has a configuration file, in
    /// which the Sentinel has it note its role, so it still has that when it is restarted.
    ///
    /// # Panics
    ///
    /// When that takes more than 60 seconds.
    pub fn start_with(args: &[&str], clock: Option<&Arc<Clock>>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let start = |name: &str| {
            let file = dir.path().join(name);
            std::fs::write(&file, "").expect("a file");
            Server::start_with_clock(&[&[&*file.display().to_string()], args].concat(), clock)
        };
        let (primary, replica) = (start("first.conf"), start("second.conf"));
        replica.cli(&["REPLICAOF", "127.0.0.1", &primary.port().to_string()]);
        primary.wait_until_followed_by(&replica);
        replica.cli(&["CONFIG", "REWRITE"]);
        Self::watch(primary, replica, dir)
    }

    fn watch(primary: Server, replica: Server, dir: tempfile::TempDir) -> Self {
        let sentinel = start_sentinel(&dir, &primary, 1, 1);
        let watched = Self { primary, replica, sentinel, _dir: dir };
        until("the Sentinel never found the replica", || {
            watched.sentinel.cli(&["SENTINEL", "REPLICAS", "locks"]).contains(&watched.replica.port().to_string())
        });
        watched
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=locks", self.sentinel.port())
    }
}

/// One primary, two replicas, and three Sentinels, two of which must agree.
#[derive(Debug)]
pub struct Sentinels {
    /// The server that locks are on at first.
    pub primary: Server,
    /// The servers of which one takes over.
    pub replicas: Vec<Server>,
    /// The Sentinels.
    pub sentinels: Vec<Server>,
    _dir: tempfile::TempDir,
}

impl Sentinels {
    /// Starts them and waits until all Sentinels know each other and the replicas.
    ///
    /// # Panics
    ///
    /// When that takes more than 60 seconds.
    pub fn start() -> Self {
        let primary = Server::start();
        let replicas = vec![primary.start_replica(), primary.start_replica()];
        let dir = tempfile::tempdir().expect("a temporary directory");
        let sentinels: Vec<Server> = (1..=3).map(|number| start_sentinel(&dir, &primary, number, 2)).collect();
        let watched = Self { primary, replicas, sentinels, _dir: dir };
        until("the Sentinels never found each other", || {
            watched.sentinels.iter().all(|sentinel| {
                let known = sentinel.cli(&["SENTINEL", "MASTER", "locks"]);
                let known: Vec<&str> = known.lines().collect();
                let is = |name, value| known.windows(2).any(|pair| pair == [name, value]);
                is("num-slaves", "2") && is("num-other-sentinels", "2")
            })
        });
        watched
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        let mut ports = self.sentinels.iter().map(Server::port);
        let first = ports.next().unwrap_or_default();
        let others: String = ports.map(|port| format!("&node=127.0.0.1:{port}")).collect();
        format!("redis-sentinel://127.0.0.1:{first}?sentinelServiceName=locks{others}")
    }

    /// The replica that has become the primary, if one has.
    pub fn promoted(&self) -> Option<&Server> {
        self.replicas.iter().find(|replica| replica.cli(&["ROLE"]).starts_with("master"))
    }
}

/// A primary is gone when it has been silent for two seconds: less would take one of a busy machine for gone.
fn start_sentinel(dir: &tempfile::TempDir, primary: &Server, number: usize, quorum: usize) -> Server {
    let file = dir.path().join(format!("sentinel-{number}.conf"));
    let settings = format!(
        "sentinel monitor locks 127.0.0.1 {} {quorum}\n\
         sentinel down-after-milliseconds locks 2000\n\
         sentinel failover-timeout locks 3000\n",
        primary.port()
    );
    std::fs::write(&file, settings).expect("a file");
    Server::start_with(&[&file.display().to_string(), "--sentinel"])
}

fn until(never: &str, holds: impl Fn() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < patience, "{never}");
        sleep(Duration::from_millis(50));
    }
}
