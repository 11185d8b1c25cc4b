//! Contenders on a quorum whose nodes are frozen, killed and restarted at random, empty or with old data, never hold
//! one lock together, and their fencing tokens grow.
//!
//! The witness is a server apart from the quorum, with the mark and the ledger of `exclusion.rs`. The soak lasts for a
//! minute; to find rare failures, run it for longer with
//!
//!     TENURE_SOAK_SECONDS=600 cargo test --release --test soak

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "this is a test")]

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fred::prelude::{Builder, Client, ClientLike, Config, Value};
use fred::types::{ClusterHash, CustomCommand};
use tenure::{Key, LockGuard, Locker, LockerBuilder};
use tenure_test_support::{Mode, Proxy, Server, eventually};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const NODES: usize = 5;
const CLIENTS: usize = 12;
const KEYS: [&str; 4] = ["a", "b", "c", "d"];
const TTL: Duration = Duration::from_millis(1_500);
/// How long a restarted node is silent: two nodes can be silent at a time, and a majority remains.
const WINDOW: Duration = Duration::from_secs(2);

fn seconds() -> u64 {
    env::var("TENURE_SOAK_SECONDS").map_or(60, |seconds| seconds.parse().expect("a number of seconds"))
}

/// Tries until nodes on a busy machine are quick enough for a short timeout.
async fn connect(builder: &LockerBuilder, urls: &[String]) -> Locker {
    eventually("a majority is connected to", async || builder.clone().quorum(urls).await.ok()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_two_hold_a_lock_while_nodes_freeze_die_and_forget() {
    let seed = env::var("TENURE_SOAK_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("a number"));
    eprintln!("TENURE_SOAK_SEED={seed}");
    let mut servers = [(); NODES].map(|()| Server::start());
    let urls: Vec<String> = servers.iter().map(Server::url).collect();
    let witness = Server::start();
    let end = Instant::now() + Duration::from_secs(seconds());

    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let builder = Locker::builder().ttl(TTL).restart_window(WINDOW).command_timeout(Duration::from_millis(500));
        let locker = connect(&builder, &urls).await;
        let witness = Builder::from_config(Config::from_url(&witness.url()).unwrap()).build().unwrap();
        witness.init().await.unwrap();
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(client as u64));
        clients.spawn(async move {
            let (mut held, mut lost) = (0_u32, 0_u32);
            while Instant::now() < end {
                let key = KEYS[rng.usize(..KEYS.len())];
                let Ok(guard) = locker.lock(key).wait_at_most(Duration::from_secs(2)).await else { continue };
                let work = Duration::from_millis(if rng.u8(..8) == 0 { 3_000 } else { rng.u64(..20) });
                held += 1;
                lost += u32::from(!hold(&guard, &witness, key, work).await);
                if rng.bool() {
                    drop(guard.release().await);
                } else if rng.bool() {
                    drop(timeout(Duration::from_micros(rng.u64(..500)), guard.release()).await);
                }
                // Some requests are dropped in flight.
                if rng.u8(..4) == 0 {
                    drop(timeout(Duration::from_micros(rng.u64(..2_000)), locker.lock(key)).await);
                }
            }
            locker.close().await;
            (held, lost)
        });
    }

    let mut rng = fastrand::Rng::with_seed(seed);
    let mut faults = [0; 4];
    while Instant::now() < end {
        sleep(Duration::from_millis(rng.u64(100..1_200))).await;
        let fault = rng.usize(..4);
        faults[fault] += 1;
        let place = rng.usize(..NODES);
        match fault {
            0 => {
                servers[place].freeze();
                sleep(Duration::from_millis(rng.u64(50..2_500))).await;
                servers[place].thaw();
            }
            1 => {
                servers[place].kill();
                sleep(Duration::from_millis(rng.u64(50..1_000))).await;
                tokio::task::block_in_place(|| servers[place].restart());
            }
            2 => {
                // The node comes back with this data when it is killed, and not empty.
                tokio::task::block_in_place(|| servers[place].cli(&["SAVE"]));
            }
            _ => {
                // A majority freezes, and thaws with all the requests that were sent meanwhile still to run.
                let frozen: Vec<usize> = (0..3).map(|n| (place + n) % NODES).collect();
                frozen.iter().for_each(|&node| servers[node].freeze());
                sleep(Duration::from_millis(rng.u64(50..2_500))).await;
                frozen.iter().for_each(|&node| servers[node].thaw());
            }
        }
    }
    let counts = clients.join_all().await;
    let (held, lost) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));

    for key in KEYS {
        let ledger = witness.cli(&["LRANGE", &format!("ledger:{key}"), "0", "-1"]);
        let fences: Vec<u64> = ledger.lines().map(|fence| fence.parse().unwrap()).collect();
        assert!(
            fences.is_sorted_by(|earlier, later| earlier < later),
            "fencing tokens of {key} don't grow, seed {seed}"
        );
        eprintln!("{key}: {} holders, one after the other", fences.len());
    }
    eprintln!(
        "{held} held, {lost} of them lost; frozen {}, restarted empty or with old data {}, saved {}, \
         majority frozen {}",
        faults[0], faults[1], faults[2], faults[3]
    );
    // Otherwise nothing was shown.
    assert!(u64::from(held) > seconds(), "only {held} holders");
    assert!(lost > 0, "no fault had an effect");
}

/// Works under the lock for `work` or until it is lost. Returns whether it was held to the end.
///
/// The lock is reported to the witness only if it is held for a while longer, so the report is hardly ever late. The
/// mark ends with the deadline, however late it is.
async fn hold(guard: &LockGuard, witness: &Client, key: &str, work: Duration) -> bool {
    const ROUND_TRIP: Duration = Duration::from_millis(300);
    if guard.remaining() < ROUND_TRIP {
        return false;
    }
    let fence = guard.fencing_token().unwrap().to_string();
    let (mark, ledger) = (format!("mark:{key}"), format!("ledger:{key}"));
    // In one step: a holder that pauses in the middle must not count as inside. The witness has the clock of this
    // machine.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let until = (now + guard.remaining()).as_millis().to_string();
    let enter = "local now = redis.call('TIME')
        local left = ARGV[2] - now[1] * 1000 - math.floor(now[2] / 1000)
        if left < 1 then return 'late' end
        if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', string.format('%d', left)) then
            redis.call('RPUSH', KEYS[2], ARGV[1])
            return 'alone'
        end
        return redis.call('GET', KEYS[1])";
    let alone = ask(witness, "EVAL", &[enter, "2", &mark, &ledger, &fence, &until]).await;
    let was_held = guard.is_held();
    let is_well = matches!(alone.as_str().as_deref(), Some("alone" | "late"));
    assert!(!was_held || is_well, "{key}: {alone:?} is inside, and {fence} as well");
    let kept = guard.protect(sleep(work)).await.is_ok();
    let leave = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";
    ask(witness, "EVAL", &[leave, "1", &mark, &fence]).await;
    kept
}

async fn ask(witness: &Client, command: &'static str, args: &[&str]) -> Value {
    let command = CustomCommand::new_static(command, ClusterHash::FirstKey, false);
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    witness.custom(command, args).await.unwrap()
}

/// What a holder keeps for the whole soak.
const HELD: [&str; 8] = ["held0", "held1", "held2", "held3", "held4", "held5", "held6", "held7"];

/// Nodes are frozen, cut off and restarted empty one after another, each back before the next one goes: no lock is
/// lost, no two holders are inside together, and fencing tokens grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_guard_is_lost_while_nodes_are_away_one_after_another() {
    let (three, five) = tokio::join!(one_after_another(3), one_after_another(5));
    // Print everything before an assertion can fail.
    eprintln!("three nodes: {three:?}\nfive nodes: {five:?}");
    for seen in [three, five] {
        assert_eq!((seen.lost, seen.together, seen.falls), (0, 0, 0), "{seen:?}");
        assert!(seen.turns > seconds() && seen.faults.iter().sum::<u64>() > seconds() / 20, "{seen:?}");
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// The numbers of nodes that were frozen, cut off, and restarted empty.
    faults: [u64; 3],
    turns: u64,
    lost: u64,
    together: u64,
    falls: u64,
    /// How often a node was not back within 20 s.
    stuck: u64,
}

async fn one_after_another(nodes: usize) -> Seen {
    // A machine that pauses for some seconds loses no guard.
    let (ttl, window) = (Duration::from_secs(6), Duration::from_secs(6));
    let mut servers: Vec<Server> = (0..nodes).map(|_| Server::start()).collect();
    let mut proxies = Vec::new();
    for server in &servers {
        proxies.push(Proxy::start(server.port()).await);
    }
    let locker = async || {
        let builder = Locker::builder().ttl(ttl).restart_window(window).command_timeout(Duration::from_millis(500));
        connect(&builder, &proxies.iter().map(Proxy::url).collect::<Vec<_>>()).await
    };
    let holder = locker().await;
    let mut held = Vec::new();
    let hold = async |key: Key| holder.lock(key).renew_every(Duration::from_millis(300)).await.unwrap();
    for key in HELD {
        held.push(hold(key.into()).await);
    }
    // A node that was too slow to vote is healed first.
    let everywhere = async || servers.iter().all(is_back).then_some(());
    eventually("all nodes have every held lock", everywhere).await;
    let end = Instant::now() + Duration::from_secs(seconds());
    let (inside, last, counts) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::<[AtomicU64; 4]>::default());
    let mut tasks = JoinSet::new();
    for _ in 0..2 {
        let locker = locker().await;
        for _ in 0..2 {
            let (locker, inside, last, counts) = (locker.clone(), inside.clone(), last.clone(), counts.clone());
            tasks.spawn(async move {
                let [turns, lost, together, falls] = &*counts;
                while Instant::now() < end {
                    let Ok(guard) = locker.lock("turns").wait_at_most(Duration::from_secs(5)).await else { continue };
                    let others = inside.fetch_add(1, Ordering::SeqCst);
                    let fence = guard.fencing_token().unwrap();
                    if guard.is_held() {
                        together.fetch_add(u64::from(others > 0), Ordering::SeqCst);
                        falls.fetch_add(u64::from(last.fetch_max(fence, Ordering::SeqCst) >= fence), Ordering::SeqCst);
                    }
                    sleep(Duration::from_millis(fastrand::u64(..30))).await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    lost.fetch_add(u64::from(!guard.is_held()), Ordering::SeqCst);
                    turns.fetch_add(1, Ordering::SeqCst);
                    drop(guard.release().await);
                }
            });
        }
    }
    let mut seen = Seen::default();
    let mut place = 0;
    let mut lost = 0;
    while Instant::now() < end {
        let fault = fastrand::usize(..3);
        seen.faults[fault] += 1;
        let began = Instant::now();
        // Away for long: its ttl has ended what it has.
        let forget = || tokio::task::block_in_place(|| servers[place].cli(&[&["DEL"], &HELD[..]].concat()));
        match fault {
            0 => {
                forget();
                servers[place].freeze();
                sleep(Duration::from_millis(1_500)).await;
                servers[place].thaw();
            }
            1 => {
                proxies[place].set(Mode::Silence);
                forget();
                sleep(Duration::from_millis(1_500)).await;
                proxies[place].set(Mode::Pass);
            }
            _ => tokio::task::block_in_place(|| servers[place].restart_empty()),
        }
        // A loss is counted once, and the lock is obtained again.
        let back_by = Instant::now() + Duration::from_secs(20);
        while !is_back(&servers[place]) {
            for guard in &mut held {
                if let Err(loss) = guard.check() {
                    lost += 1;
                    let (key, why, since) = (guard.key(), guard.last_error(), began.elapsed());
                    eprintln!("{nodes} nodes, fault {fault} at {place} for {since:?}: {key}: {loss}: {why:?}");
                    *guard = hold(guard.key().clone()).await;
                }
            }
            if Instant::now() > back_by {
                seen.stuck += 1;
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
        place = (place + 1) % nodes;
    }
    tasks.join_all().await;
    lost += held.iter().filter(|guard| !guard.is_held()).count() as u64;
    let [turns, turns_lost, together, falls] = [0, 1, 2, 3].map(|index: usize| counts[index].load(Ordering::SeqCst));
    Seen { turns, lost: lost + turns_lost, together, falls, ..seen }
}

/// Returns whether the node votes and has every held lock.
fn is_back(server: &Server) -> bool {
    tokio::task::block_in_place(|| server.cli(&[&["EXISTS"], &HELD[..]].concat())) == HELD.len().to_string()
}

/// Traffic leaves no tasks and no memory behind while one of five nodes is dead and one replies late.
///
///     TENURE_SOAK_SECONDS=600 cargo test --release --test soak tasks_and_memory -- --nocapture
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_and_memory_stay_bounded_beside_a_dead_and_a_slow_node() {
    const LATE: Duration = Duration::from_millis(150);
    const CLIENTS: usize = 8;
    /// Two nodes may each miss this many locks (`quorum/catch_up.rs`).
    const BEHIND: usize = 2 * 1_024;
    /// Each turn leaves a few calls in flight for up to their timeout: this number, times seconds.
    const ON_THE_WAY: u64 = 4;
    let length = Duration::from_secs(env::var("TENURE_SOAK_SECONDS").map_or(20, |_| seconds()));
    let mut servers = [(); NODES].map(|()| Server::start());
    let late = Proxy::start(servers[1].port()).await;
    let urls: Vec<String> =
        servers.iter().enumerate().map(|(place, server)| if place == 1 { late.url() } else { server.url() }).collect();
    let builder = Locker::builder().ttl(TTL).restart_window(WINDOW).command_timeout(Duration::from_millis(500));
    let locker = connect(&builder, &urls).await;
    late.set(Mode::Delay(LATE));
    servers[0].kill();
    let alive = || Handle::current().metrics().num_alive_tasks();
    let idle = alive();

    let end = Instant::now() + length;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let locker = locker.clone();
        clients.spawn(async move {
            let mut turns = 0_u64;
            while Instant::now() < end {
                // Half of the clients have their own keys, half share one key; locks are released, dropped, and given
                // up on.
                let key = if client % 2 == 0 { format!("own{client}") } else { "shared".to_owned() };
                let Ok(guard) = locker.lock(key.clone()).wait_at_most(Duration::from_secs(2)).await else { continue };
                turns += 1;
                match fastrand::u8(..4) {
                    0 => drop(guard),
                    1 => drop(timeout(Duration::from_micros(300), guard.release()).await),
                    _ => drop(guard.release().await),
                }
                if fastrand::u8(..8) == 0 {
                    drop(timeout(Duration::from_micros(300), locker.lock(key)).await);
                }
            }
            turns
        });
    }
    let started = Instant::now();
    let (mut most, mut tenths) = (0, 0);
    let mut seen = Vec::new();
    while Instant::now() < end {
        sleep(Duration::from_millis(100)).await;
        most = most.max(alive());
        if started.elapsed().as_millis() / (length.as_millis() / 10) > tenths {
            tenths += 1;
            seen.push((alive(), resident_kib()));
        }
    }
    let turns: u64 = clients.join_all().await.into_iter().sum();
    // Each call ends by its own timeout. The calls to the dead node end soon after the locker is closed.
    locker.close().await;
    let end = Instant::now() + Duration::from_secs(10);
    while alive() > idle && Instant::now() < end {
        sleep(Duration::from_millis(50)).await;
    }
    eprintln!("{turns} turns in {length:?}; tasks: {idle} idle, {most} at most, {} in the end", alive());
    eprintln!("tasks and KiB, ten times in all: {seen:?}");
    let memory = |tenth: usize| seen.get(tenth).map_or(0, |&(_, kib)| kib);
    assert!(memory(8) <= memory(2) + 65_536, "the memory grows: {seen:?}");
    assert!(turns > 2 * length.as_secs(), "only {turns} turns");
    let on_the_way = (ON_THE_WAY * turns / length.as_secs()) as usize;
    assert!(most <= idle + BEHIND + on_the_way + 64 * CLIENTS, "{most} tasks, {on_the_way} for calls in flight");
    assert!(alive() <= idle, "{} tasks are left of {most}, {idle} before", alive());
}

/// Returns the resident memory of this process.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
