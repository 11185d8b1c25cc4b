//! Contenders on a quorum whose nodes are frozen, killed and restarted, empty or with old data, at random never hold
//! one lock together, and their fencing tokens grow.
//!
//! The witness is a server apart from the quorum, with the mark and the ledger of `exclusion.rs`. For a minute; longer,
//! to look for what is rare, with
//!
//!     TENURE_SOAK_SECONDS=600 cargo test --release --test soak

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "this is a test")]

use std::env;
use std::time::Duration;

use tenure::fred::prelude::{Builder, Client, ClientLike, Config, Value};
use tenure::fred::types::{ClusterHash, CustomCommand};
use tenure::{LockGuard, Locker};
use tenure_test_support::Server;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const NODES: usize = 5;
const CLIENTS: usize = 12;
const KEYS: [&str; 4] = ["a", "b", "c", "d"];
const TTL: Duration = Duration::from_millis(1_500);
/// A node that was restarted is silent for so long: two at a time can be, and still there is a majority.
const WINDOW: Duration = Duration::from_secs(2);

fn seconds() -> u64 {
    env::var("TENURE_SOAK_SECONDS").map_or(60, |seconds| seconds.parse().expect("a number of seconds"))
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
        let locker = builder.quorum(&urls).await.unwrap();
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
                // Requests that are dropped on their way.
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
                // It will come back with this, once it is killed, and not empty.
                tokio::task::block_in_place(|| servers[place].cli(&["SAVE"]));
            }
            _ => {
                // A majority stands still, and thaws with everything still to do that was sent to it.
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
        "{held} held, {lost} of them lost; frozen {}, restarted empty or with old data {}, saved {}, majority frozen {}",
        faults[0], faults[1], faults[2], faults[3]
    );
    // Or nothing was shown.
    assert!(u64::from(held) > seconds(), "only {held} holders");
    assert!(lost > 0, "no fault was ever felt");
}

/// Works under the lock for so long or until it is lost, and answers whether it was held to the end.
///
/// The witness is told only while the lock is held for a while longer: what it hears is true when it hears it.
async fn hold(guard: &LockGuard, witness: &Client, key: &str, work: Duration) -> bool {
    const ROUND_TRIP: Duration = Duration::from_millis(300);
    if guard.remaining() < ROUND_TRIP {
        return false;
    }
    let fence = guard.fencing_token().unwrap().to_string();
    let (mark, ledger) = (format!("mark:{key}"), format!("ledger:{key}"));
    // In one step: whoever stands still in the middle of it must not be taken for inside. The mark ends with the
    // deadline.
    let until = guard.remaining().as_millis().to_string();
    let enter = "if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then redis.call('RPUSH', KEYS[2], ARGV[1])
        return 'alone' end return redis.call('GET', KEYS[1])";
    let alone = ask(witness, "EVAL", &[enter, "2", &mark, &ledger, &fence, &until]).await;
    let was_held = guard.is_held();
    assert!(!was_held || alone.as_str().as_deref() == Some("alone"), "{key}: {alone:?} is inside, and {fence} as well");
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
