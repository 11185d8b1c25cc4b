//! Sentinels and clusters in which servers change roles, move slots and die, while locks are held and contended. A
//! program of its own, because each test starts several servers, and their elections take long on a busy machine.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "topologies/half_moved.rs"]
mod half_moved;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenure::{Driver, LockGuard, Locker, LockerBuilder, Loss};
use tenure_test_support::{Cluster, Sentinels, Server, elected, eventually, soon, within};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const TTL: Duration = ms(3_000);

fn builder() -> LockerBuilder {
    Locker::builder().ttl(TTL).command_timeout(ms(500)).wait_for_server(ms(20_000))
}

/// Records which contender has held which key. All contenders are in this process, so they share one clock.
#[derive(Default)]
struct Witness {
    /// By key: until when its last holder believed that it held the lock, and the fencing token.
    last: Mutex<HashMap<String, (Instant, u64)>>,
    turns: AtomicU64,
}

impl Witness {
    /// Holds the lock for a moment. By then no earlier holder may believe that it holds it, or have a greater fencing
    /// token.
    async fn hold(&self, key: &str, guard: LockGuard) {
        let fence = guard.fencing_token().unwrap();
        let began = Instant::now();
        if guard.is_held() {
            let mut last = self.last.lock().unwrap();
            if let Some((until, earlier)) = last.insert(key.to_owned(), (guard.deadline(), fence)) {
                assert!(until <= began, "{key} is held twice: {:?} too early", until - began);
                assert!(earlier < fence, "{key}: {fence} after {earlier}");
            }
        }
        let kept = guard.protect(sleep(ms(3))).await;
        // Held until now, or until the guard's deadline.
        if let Some((until, by)) = self.last.lock().unwrap().get_mut(key) {
            if *by == fence {
                *until = if kept.is_ok() { Instant::now() } else { *until };
            }
        }
        drop(guard.release().await);
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    fn contends(self: Arc<Self>, contenders: &mut JoinSet<()>, locker: Locker, key: &str) {
        let key = key.to_owned();
        contenders.spawn(async move {
            loop {
                if let Ok(guard) = locker.lock(key.as_str()).await {
                    self.hold(&key, guard).await;
                }
            }
        });
    }

    fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Waits until more locks have been held. Returns the total number.
    async fn goes_on(&self, turns: u64) -> u64 {
        let since = self.turns();
        eventually("locks change hands", async || (self.turns() > since + turns).then_some(())).await;
        self.turns()
    }
}

/// Starts contenders for each of the keys, each with its own connection, until they are dropped.
async fn contend(url: &str, builder: LockerBuilder, keys: &[&str]) -> (Arc<Witness>, JoinSet<()>) {
    let (witness, mut contenders) = (Arc::<Witness>::default(), JoinSet::new());
    for key in keys {
        for _ in 0..2 {
            let locker = builder.clone().connect(url).await.unwrap();
            witness.clone().contends(&mut contenders, locker, key);
        }
    }
    (witness, contenders)
}

/// Ends the contenders. Panics if one of them has failed.
async fn end(mut contenders: JoinSet<()>) {
    contenders.abort_all();
    while let Some(ended) = contenders.join_next().await {
        if let Err(error) = ended {
            assert!(error.is_cancelled(), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_that_a_replica_has_stay_exclusive_through_the_death_of_their_primary() {
    let mut watched = Sentinels::start();
    let builder = builder().min_replicas(1);
    let (witness, contenders) = contend(&watched.url(), builder.clone(), &["a", "b", "c"]).await;
    let locker = builder.connect(&watched.url()).await.unwrap();
    let long = soon(locker.lock("long").ttl(ms(60_000)).renew_every(ms(300))).await.unwrap();
    let short = soon(locker.lock("short").ttl(ms(600))).await.unwrap();
    witness.goes_on(20).await;
    watched.primary.kill();
    assert_eq!(within(ms(1_000), short.lost()).await, Loss::Expired);
    elected("one is promoted", async || watched.promoted().map(|_| ())).await;
    witness.goes_on(20).await;
    // A replica had acknowledged the lock, and the most advanced replica is promoted.
    let deadline = long.deadline();
    eventually("renewed there", async || (long.deadline() > deadline).then_some(())).await;
    assert_eq!(long.check(), Ok(()));
    assert!(locker.try_lock("long").await.is_err());
    long.release().await.unwrap();
    end(contenders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_failover_ends_guards_by_their_deadlines_or_is_survived_and_hangs_nothing() {
    let watched = Sentinels::start();
    let locker = builder().connect(&watched.url()).await.unwrap();
    let held = soon(locker.lock("held").ttl(ms(60_000)).renew_every(ms(300))).await.unwrap();
    let waiter = tokio::spawn(locker.lock("held").into_future());
    for replica in &watched.replicas {
        eventually("replicated", async || (replica.cli(&["EXISTS", "held"]) == "1").then_some(())).await;
    }
    assert_eq!(watched.sentinels[0].cli(&["SENTINEL", "FAILOVER", "locks"]), "OK");
    let promoted = elected("one is promoted", async || watched.promoted()).await;
    // The old primary still accepts writes until the Sentinels make it a replica.
    elected("the other is demoted", async || watched.primary.cli(&["ROLE"]).starts_with("slave").then_some(())).await;
    let deadline = held.deadline();
    eventually("renewed", async || (held.deadline() > deadline).then_some(())).await;
    assert!(promoted.cli(&["PTTL", "held"]).parse::<u64>().unwrap() > 30_000, "on the new primary");
    assert!(!waiter.is_finished());
    let fence = held.fencing_token();
    held.release().await.unwrap();
    let next = soon(waiter).await.unwrap().unwrap();
    assert!(next.fencing_token() > fence);
    assert_eq!(promoted.cli(&["EXISTS", "held"]), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_in_a_slot_that_migrates_stay_held_and_exclusive() {
    let cluster = Cluster::start();
    let (witness, contenders) = contend(&cluster.url(), builder(), &["{moves}:a", "{moves}:b", "stays"]).await;
    let locker = builder().connect(&cluster.url()).await.unwrap();
    let guard = soon(locker.lock("{moves}:held").ttl(ms(60_000)).renew_every(ms(200))).await.unwrap();
    #[cfg(feature = "fred")]
    let other = builder().client(half_moved::client_of_the_user(&cluster).await);
    #[cfg(not(feature = "fred"))]
    let other = builder().connect(&cluster.url()).await.unwrap();
    let theirs = soon(other.lock("{moves}:theirs").ttl(ms(60_000)).renew_every(ms(200))).await.unwrap();
    witness.goes_on(20).await;
    let from = cluster.place_of("{moves}:held");
    let to = (from + 1) % 3;
    let moved = tokio::task::spawn_blocking(move || {
        cluster.migrate("{moves}:held", from, to, || std::thread::sleep(ms(300)));
        cluster
    });
    let cluster = soon(moved).await.unwrap();
    witness.goes_on(50).await;
    assert_eq!(cluster.nodes[to].cli(&["EXISTS", "{moves}:held"]), "1");
    for guard in [&guard, &theirs] {
        let deadline = guard.deadline();
        eventually("renewed there", async || (guard.deadline() > deadline).then_some(())).await;
    }
    let fence = guard.fencing_token();
    guard.release().await.unwrap();
    assert!(soon(locker.lock("{moves}:held")).await.unwrap().fencing_token() > fence);
    end(contenders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_primary_of_a_cluster_dies_locks_on_the_others_are_kept_and_its_own_are_lost_or_kept_by_its_replica() {
    let mut cluster = Cluster::start();
    let replica = cluster.start_replica(1);
    cluster.tolerate_loss(&replica);
    let key_on =
        |place| ["a", "b", "c", "d", "e", "f", "g", "h"].into_iter().find(|key| cluster.place_of(key) == place);
    let keys = [0, 1, 2].map(|place| key_on(place).unwrap());
    let (witness, contenders) = contend(&cluster.url(), builder(), &[keys[0], keys[2]]).await;
    let locker = builder().connect(&cluster.url()).await.unwrap();
    let mut guards = Vec::new();
    for key in keys {
        let key = format!("{{{key}}}:held");
        guards.push(soon(locker.lock(key).ttl(ms(60_000)).renew_every(ms(200))).await.unwrap());
    }
    let short = soon(locker.lock(format!("{{{}}}:short", keys[1])).ttl(ms(500))).await.unwrap();
    eventually("replicated", async || (replica.cli(&["DBSIZE"]) == "4").then_some(())).await;
    witness.goes_on(20).await;
    cluster.nodes[1].kill();
    assert_eq!(within(ms(1_000), short.lost()).await, Loss::Expired);
    elected("promoted", async || replica.cli(&["ROLE"]).starts_with("master").then_some(())).await;
    for guard in &guards {
        let deadline = guard.deadline();
        eventually("renewed", async || (guard.deadline() > deadline).then_some(())).await;
        assert_eq!(guard.check(), Ok(()));
    }
    witness.goes_on(20).await;
    let fence = guards[1].fencing_token();
    guards.remove(1).release().await.unwrap();
    let again = soon(locker.lock(format!("{{{}}}:held", keys[1]))).await.unwrap();
    assert!(again.fencing_token() > fence);
    end(contenders).await;
}

/// Locks on the other nodes survive with a ttl that is shorter than what the failover takes, and the primary's locks
/// are found on its replica.
async fn one_primary_away(mut cluster: Cluster, locker: Locker, go_away: impl FnOnce(&mut Cluster)) {
    /// A busy machine may pause for seconds.
    const SHORT: Duration = ms(5_000);
    let replica = cluster.start_replica(1);
    cluster.tolerate_loss(&replica);
    assert_eq!(replica.cli(&["CONFIG", "SET", "cluster-replica-no-failover", "yes"]), "OK");
    let key_on = |place| (0..).map(|n| format!("{{{n}}}")).find(|key| cluster.place_of(key) == place).unwrap();
    let keys = [0, 1, 2].map(key_on);
    let mut guards = Vec::new();
    for (place, key) in keys.iter().enumerate() {
        let ttl = if place == 1 { ms(60_000) } else { SHORT };
        guards.push(soon(locker.lock(format!("{key}:held")).ttl(ttl).renew_every(ms(150))).await.unwrap());
    }
    eventually("replicated", async || (replica.cli(&["DBSIZE"]) == "2").then_some(())).await;
    go_away(&mut cluster);
    let (gone, others) = (Instant::now(), [&guards[0], &guards[2]]);
    eventually("the others are renewed for longer than their ttl meanwhile", async || {
        assert_eq!(others.map(LockGuard::check), [Ok(()), Ok(())]);
        others.iter().all(|guard| guard.deadline() > gone + 2 * SHORT).then_some(())
    })
    .await;
    assert!(replica.cli(&["ROLE"]).starts_with("slave"));
    replica.cli(&["CONFIG", "SET", "cluster-replica-no-failover", "no"]);
    elected("promoted", async || {
        assert_eq!(others.map(LockGuard::check), [Ok(()), Ok(())]);
        replica.cli(&["ROLE"]).starts_with("master").then_some(())
    })
    .await;
    let deadline = guards[1].deadline();
    eventually("renewed", async || (guards[1].deadline() > deadline).then_some(())).await;
    assert_eq!(others.map(LockGuard::check), [Ok(()), Ok(())]);
    let fence = guards[1].fencing_token();
    guards.remove(1).release().await.unwrap();
    assert!(soon(locker.lock(format!("{}:held", keys[1]))).await.unwrap().fencing_token() > fence);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_primary_holds_up_no_lock_on_the_others() {
    let cluster = Cluster::start();
    let locker = builder().connect(&cluster.url()).await.unwrap();
    one_primary_away(cluster, locker, |cluster| cluster.nodes[1].kill()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_does_a_frozen_primary() {
    let cluster = Cluster::start();
    let locker = builder().connect(&cluster.url()).await.unwrap();
    one_primary_away(cluster, locker, |cluster| cluster.nodes[1].freeze()).await;
}

/// The replica takes over from the first node, which begins anew.
async fn first_forgets(cluster: &Cluster, replica: &Server) {
    assert_eq!(replica.cli(&["CLUSTER", "FAILOVER", "TAKEOVER"]), "OK");
    elected("the others know", async || {
        let address = format!("127.0.0.1:{}@", replica.port());
        let is_owner = |line: &str| line.contains(&address) && line.contains("master") && line.ends_with("0-5460");
        let know = |node: &Server| node.cli(&["CLUSTER", "NODES"]).lines().any(is_owner);
        cluster.nodes.iter().all(know).then_some(())
    })
    .await;
    // It becomes a replica, or stays a primary without slots, which may begin anew without keys.
    elected("it begins anew", async || {
        cluster.nodes[0].cli(&["FLUSHALL"]);
        (cluster.nodes[0].cli(&["CLUSTER", "RESET", "HARD"]) == "OK").then_some(())
    })
    .await;
}

/// A node that begins anew knows no other, so it redirects nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_forgotten_its_slots_is_left_for_their_new_owner() {
    let cluster = Cluster::start();
    let keys: Vec<_> = (0..).map(|n| n.to_string()).filter(|key| cluster.place_of(key) == 0).take(2).collect();
    let replica = cluster.start_replica(0);
    let drivers = [(Driver::Fred, cfg!(feature = "fred")), (Driver::Redis, cfg!(feature = "redis"))];
    let mut lockers = Vec::new();
    for (driver, _) in drivers.into_iter().filter(|(_, is_compiled)| *is_compiled) {
        let locker = builder().driver(driver).connect(&cluster.url()).await.unwrap();
        soon(locker.lock(keys[0].as_str())).await.unwrap().release().await.unwrap();
        lockers.push(locker);
    }
    first_forgets(&cluster, &replica).await;
    for locker in lockers {
        // The second one's slot has not been used before.
        for key in &keys {
            soon(locker.lock(key.as_str())).await.unwrap().release().await.unwrap();
        }
    }
}

#[cfg(feature = "fred")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_does_a_dead_one_with_a_client_of_the_user() {
    let cluster = Cluster::start();
    let locker = builder().client(half_moved::client_of_the_user(&cluster).await);
    one_primary_away(cluster, locker, |cluster| cluster.nodes[1].kill()).await;
}

/// Without its check of the nodes, fred takes the empty map of one that begins anew, and asks no other: the user has
/// named no other.
#[cfg(feature = "fred")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_forgotten_its_slots_is_left_although_the_client_of_the_user_takes_its_map() {
    use fred::interfaces::{ClientLike, ClusterInterface};

    let cluster = Cluster::start();
    let keys: Vec<_> = (0..).map(|n| n.to_string()).filter(|key| cluster.place_of(key) == 0).take(2).collect();
    let replica = cluster.start_replica(0);
    let config = fred::types::config::Config::from_url(&cluster.url()).unwrap();
    let mut client = fred::types::Builder::from_config(config);
    client.with_connection_config(|connection| connection.disable_cluster_health_check = true);
    let client = client.build().unwrap();
    client.init().await.unwrap();
    let locker = builder().client(client.clone());
    soon(locker.lock(keys[0].as_str())).await.unwrap().release().await.unwrap();
    first_forgets(&cluster, &replica).await;
    soon(locker.lock(keys[0].as_str())).await.unwrap().release().await.unwrap();
    let is_empty = async || client.cached_cluster_state().is_some_and(|map| map.slots().is_empty()).then_some(());
    eventually("the map is empty", is_empty).await;
    // Its slot has not been used before.
    soon(locker.lock(keys[1].as_str())).await.unwrap().release().await.unwrap();
}

/// The locker's connections to single nodes are on the runtime that first needed them.
#[cfg(feature = "fred")]
#[test]
fn a_locker_with_a_client_of_the_user_outlives_the_runtime_that_used_it_first() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cluster = Cluster::start();
    let home = runtime();
    let locker = builder().client(home.block_on(half_moved::client_of_the_user(&cluster)));
    for _ in 0..3 {
        let guest = runtime();
        guest.block_on(async {
            let guard = soon(locker.try_lock("a")).await.unwrap();
            soon(guard.release()).await.unwrap();
        });
    }
}
