//! The servers of a run, and the proxies between them and the workers.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tenure_test_support::{Clock, Cluster, Proxy, Sentinel, Server};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Single,
    Sentinel,
    Cluster,
    Quorum(usize),
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [Self::Single, Self::Sentinel, Self::Cluster, Self::Quorum(3), Self::Quorum(5)];

    pub(crate) fn is_quorum(self) -> bool {
        matches!(self, Self::Quorum(_))
    }

    /// How long a waiter may wait when there are no more faults. It includes the time in which the servers agree on who
    /// they are, and that of the waiters before.
    pub(crate) fn patience(self) -> Duration {
        // A Sentinel waits for ten seconds before it demotes a server that has come back as a primary.
        Duration::from_secs(if self == Self::Sentinel { 60 } else { 30 })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let named = |kind: &Self| kind.to_string() == name;
        Self::ALL.into_iter().find(named).ok_or_else(|| format!("no topology is called {name}"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Single => f.write_str("single"),
            Self::Sentinel => f.write_str("sentinel"),
            Self::Cluster => f.write_str("cluster"),
            Self::Quorum(nodes) => write!(f, "quorum{nodes}"),
        }
    }
}

/// What is written is on the disk before a reply is sent. So a server that is killed forgets nothing.
const REMEMBERS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];
/// A primary that is away is not replaced by a replica that may lack what it has granted. A failover that somebody asks
/// for loses nothing: the primary waits for the replica.
const NO_ELECTION: [&str; 2] = ["--cluster-replica-no-failover", "yes"];
const CLUSTER: [&str; 4] = ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "1000"];
/// A primary sends its data at once to a replica that comes back, and not in five seconds together with others.
const SYNC_AT_ONCE: [&str; 2] = ["--repl-diskless-sync-delay", "0"];

/// What the faults break of that on which locks rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Breaks {
    Nothing,
    /// The servers forget when they are killed, and are replaced by others that lack what they have granted.
    Memory,
    /// Clocks of servers are set forward by more than the drift.
    Clocks,
}

pub(crate) struct Topology {
    pub(crate) kind: Kind,
    pub(crate) breaks: Breaks,
    servers: Servers,
    /// By worker's slot and server.
    proxies: Vec<Vec<Proxy>>,
}

enum Servers {
    Alone(Vec<Server>),
    Watched(Box<Sentinel>),
    Sharded { cluster: Cluster, replicas: Vec<Server> },
}

impl Topology {
    pub(crate) async fn start(kind: Kind, slots: usize, breaks: Breaks) -> Self {
        let forgets = breaks == Breaks::Memory;
        let remembers: &[&str] = if forgets { &[] } else { &REMEMBERS };
        let start = move || {
            let clock = Arc::new(Clock::new());
            match kind {
                Kind::Single => Servers::Alone(vec![Server::start_with_clock(remembers, Some(&clock))]),
                // They may forget.
                Kind::Quorum(nodes) => {
                    let start = |_| Server::start_with_clock(&[], Some(&Arc::new(Clock::new())));
                    Servers::Alone((0..nodes).map(start).collect())
                }
                Kind::Sentinel => {
                    let sentinel = Sentinel::start_with(&[remembers, &SYNC_AT_ONCE].concat(), Some(&clock));
                    for (option, value) in [("down-after-milliseconds", "1000"), ("failover-timeout", "1000")] {
                        assert_eq!(sentinel.sentinel.cli(&["SENTINEL", "SET", "locks", option, value]), "OK");
                    }
                    Servers::Watched(Box::new(sentinel))
                }
                Kind::Cluster => {
                    let no_election: &[&str] = if forgets { &[] } else { &NO_ELECTION };
                    let args = [&CLUSTER, remembers, no_election, &SYNC_AT_ONCE].concat();
                    let cluster = Cluster::start_with(&args, Some(&clock));
                    let replicas = (0..cluster.nodes.len()).map(|place| cluster.start_replica(place)).collect();
                    Servers::Sharded { cluster, replicas }
                }
            }
        };
        let servers = tokio::task::block_in_place(start);
        let mut topology = Self { kind, breaks, servers, proxies: Vec::new() };
        if let Servers::Alone(servers) = &topology.servers {
            for _ in 0..slots {
                let mut proxies = Vec::new();
                for server in servers {
                    proxies.push(Proxy::start(server.port()).await);
                }
                topology.proxies.push(proxies);
            }
        }
        topology
    }

    /// The URLs for the worker in this slot.
    pub(crate) fn urls(&self, slot: usize) -> Vec<String> {
        match &self.servers {
            Servers::Alone(_) => self.proxies[slot].iter().map(Proxy::url).collect(),
            Servers::Watched(sentinel) => vec![sentinel.url()],
            Servers::Sharded { cluster, .. } => vec![cluster.url()],
        }
    }

    /// How many replicas have to have a lock. With one of them, and no more, a failover forgets nothing.
    pub(crate) fn min_replicas(&self) -> usize {
        usize::from(self.kind == Kind::Sentinel && self.breaks != Breaks::Memory)
    }

    pub(crate) fn servers(&self) -> Vec<&Server> {
        match &self.servers {
            Servers::Alone(servers) => servers.iter().collect(),
            Servers::Watched(sentinel) => vec![&sentinel.primary, &sentinel.replica],
            Servers::Sharded { cluster, replicas } => cluster.nodes.iter().chain(replicas).collect(),
        }
    }

    pub(crate) fn server(&mut self, place: usize) -> &mut Server {
        match &mut self.servers {
            Servers::Alone(servers) => &mut servers[place],
            Servers::Watched(sentinel) => match place {
                0 => &mut sentinel.primary,
                _ => &mut sentinel.replica,
            },
            Servers::Sharded { cluster, replicas } => {
                let nodes = cluster.nodes.len();
                if place < nodes { &mut cluster.nodes[place] } else { &mut replicas[place - nodes] }
            }
        }
    }

    /// Whether all servers have one clock: a replica knows until when keys live by that of its primary.
    pub(crate) fn shares_clock(&self) -> bool {
        !matches!(self.servers, Servers::Alone(_))
    }

    /// The server that has the same data: a primary's replica, or a replica's primary.
    pub(crate) fn partner(&self, place: usize) -> Option<usize> {
        let servers = self.servers().len();
        let is_replicated = !matches!(self.servers, Servers::Alone(_));
        is_replicated.then_some((place + servers / 2) % servers)
    }

    /// Returns whether locks are on this server, as far as it knows, or the Sentinel does. It must not be frozen.
    pub(crate) fn is_primary(&self, place: usize) -> bool {
        let server = self.servers()[place];
        match self.sentinel() {
            Some(sentinel) => {
                let address = sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "locks"]);
                address.ends_with(&server.port().to_string())
            }
            None => server.cli(&["ROLE"]).starts_with("master"),
        }
    }

    /// Returns whether this replica has what its primary has. Neither may be frozen.
    pub(crate) fn has_caught_up(&self, replica: usize, primary: usize) -> bool {
        let of = |place: usize, field: &str| {
            let replication = self.servers()[place].cli(&["INFO", "replication"]);
            let value = replication.lines().find_map(|line| line.strip_prefix(field).map(str::trim));
            value.and_then(|value| value.parse::<u64>().ok())
        };
        // The primary's first: it may go on.
        let (sent, received) = (of(primary, "master_repl_offset:"), of(replica, "slave_repl_offset:"));
        sent.is_some_and(|sent| received.is_some_and(|received| received >= sent))
            && self.servers()[replica].cli(&["INFO", "replication"]).contains("master_link_status:up")
    }

    pub(crate) fn sentinel(&self) -> Option<&Server> {
        match &self.servers {
            Servers::Watched(sentinel) => Some(&sentinel.sentinel),
            _ => None,
        }
    }

    pub(crate) fn proxies(&self) -> &[Vec<Proxy>] {
        &self.proxies
    }

    /// Starts a server again that was killed; with what it had persisted, if anything.
    pub(crate) fn restart(&mut self, place: usize) {
        self.server(place).restart();
    }

    /// Deletes what a dead server had persisted, except who it is in a cluster.
    pub(crate) fn forget(&mut self, place: usize) {
        let dir = self.server(place).dir();
        for name in ["dump.rdb", "appendonly.aof"] {
            // There may be none.
            drop(fs::remove_file(dir.join(name)));
        }
        drop(fs::remove_dir_all(dir.join("appendonlydir")));
    }

    /// Waits until all workers' connections are closed and the servers hold no more than they may keep, and returns
    /// what is left otherwise. No server may be frozen.
    pub(crate) fn left(&self, patience: Duration) -> Vec<String> {
        let end = Instant::now() + patience;
        loop {
            let left: Vec<String> = self.servers().into_iter().flat_map(left_on).collect();
            if left.is_empty() || Instant::now() > end {
                return left;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Topology {
    /// Returns what the servers hold, to find out why somebody isn't served. No server may be frozen.
    pub(crate) fn contents(&self) -> Vec<String> {
        let contents_of = |server: &Server| {
            let keys = server.cli(&["KEYS", "*"]);
            let keys = keys.lines().filter(|key| !key.is_empty() && !key.ends_with(":fence"));
            let describe = |key: &str| {
                let read: &[&str] = match server.cli(&["TYPE", key]).as_str() {
                    "zset" => &["ZRANGE", key, "0", "-1", "WITHSCORES"],
                    "hash" => &["HGETALL", key],
                    _ => &["GET", key],
                };
                format!(
                    "server {}: {key} = {:?}, ttl {} ms",
                    server.port(),
                    server.cli(read),
                    server.cli(&["PTTL", key])
                )
            };
            keys.map(describe).collect::<Vec<_>>()
        };
        self.servers().into_iter().flat_map(contents_of).collect()
    }
}

/// What may stay: the last fencing tokens, and which guards had relied on a token when they died.
const STAYS: [&str; 2] = [":fence", ":grants"];

fn left_on(server: &Server) -> Vec<String> {
    let port = server.port();
    let keys = server.cli(&["KEYS", "*"]);
    let keys = keys.lines().filter(|key| !key.is_empty() && !STAYS.iter().any(|end| key.ends_with(end)));
    let channels = [server.cli(&["PUBSUB", "CHANNELS"]), server.cli(&["PUBSUB", "SHARDCHANNELS"])].join("\n");
    // The second command is unknown before Redis 7. Sentinels have a channel.
    let foreign = |channel: &str| channel.is_empty() || channel.starts_with("ERR") || channel.contains("__sentinel__");
    let channels = channels.lines().filter(|channel| !foreign(channel));
    // Not this one, those of replicas and primaries (S, M), and those of Sentinels, whose names say so.
    let connections = server.cli(&["CLIENT", "LIST"]);
    let own = |line: &str| ["cmd=client", "flags=S", "flags=M", "name=sentinel"].iter().any(|part| line.contains(part));
    let connections = connections.lines().filter(|line| !line.is_empty() && !own(line));
    let say = |what: &str, name: &str| format!("server {port}: {what} {name}");
    keys.map(|key| say("key", key))
        .chain(channels.map(|channel| say("subscription", channel)))
        .chain(connections.map(|line| say("connection", line)))
        .collect()
}
