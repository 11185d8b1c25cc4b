//! What a lock costs: obtain + release pairs on keys of their own, beside the raw clients and the nearest rival.
//!
//! One server, one process, one run: each rival in turn, in rounds, so that a noisy machine is noisy for all of them.
//! What is printed are medians over the rounds; ratios are taken within a round. `-- --quick` runs a single short round.

#![allow(clippy::expect_used, reason = "a benchmark that can't measure has nothing else to say")]
#![allow(clippy::indexing_slicing, reason = "every round has a sample of every rival")]

use std::env;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;
use redis::aio::MultiplexedConnection;
use rslock::LockManager;
use tenure::fred::clients::Client;
use tenure::fred::prelude::{Builder, ClientLike, Config, ReconnectPolicy, Value};
use tenure::fred::types::{ClusterHash, CustomCommand};
use tenure::{Locker, Token};
use tenure_test_support::Server;
use tokio::task::JoinSet;

const TASKS: [usize; 4] = [1, 16, 64, 256];
const TTL: Duration = Duration::from_secs(30);
/// By their places in [`Rival::all`].
const FRED: usize = 2;
const RSLOCK: usize = 4;

/// What everybody but rslock, who brings its own, releases with.
const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

fn main() -> ExitCode {
    let mut rounds = (9, Duration::from_millis(300));
    for argument in env::args().skip(1) {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--quick" => rounds = (1, Duration::from_millis(100)),
            unknown => {
                eprintln!("unknown argument `{unknown}`; there is only `--quick`");
                return ExitCode::FAILURE;
            }
        }
    }
    tokio::runtime::Runtime::new().expect("a runtime").block_on(run(rounds.0, rounds.1));
    ExitCode::SUCCESS
}

async fn run(rounds: usize, length: Duration) {
    let server = Server::start();
    let rivals = Rival::all(&server).await;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let version = server.cli(&["INFO", "server"]);
    let version = version.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or("?");
    println!("obtain + release pairs on distinct keys, TCP on loopback, one connection each");
    println!("{cores} cores, redis-server {version}, {rounds} rounds of {length:?}, medians; ratios within a round\n");
    for tasks in TASKS {
        for rival in &rivals {
            // Connections, scripts and caches, warmed up.
            rival.measure(tasks, length / 4).await;
        }
        let mut results: Vec<Vec<Sample>> = Vec::new();
        for round in 0..rounds {
            // Another one begins each time.
            let mut samples = vec![Sample::default(); rivals.len()];
            for place in (0..rivals.len()).map(|n| (n + round) % rivals.len()) {
                samples[place] = rivals[place].measure(tasks, length).await;
            }
            results.push(samples);
        }
        print_table(tasks, &rivals, &results);
    }
}

fn print_table(tasks: usize, rivals: &[Rival], results: &[Vec<Sample>]) {
    println!("{tasks} task{}", if tasks == 1 { "" } else { "s" });
    println!("  rival             |  pairs/s | us/pair | time / raw fred | pairs/s / rslock | client CPU us/pair");
    for (place, rival) in rivals.iter().enumerate() {
        let of = |figure: &dyn Fn(&[Sample]) -> f64| median(results.iter().map(|samples| figure(samples)).collect());
        let rate = of(&|samples| samples[place].rate);
        let to_fred = of(&|samples| samples[FRED].rate / samples[place].rate);
        let to_rslock = of(&|samples| samples[place].rate / samples[RSLOCK].rate);
        let cpu = of(&|samples| samples[place].cpu_micros);
        let micros = 1e6 * tasks as f64 / rate;
        let name = rival.name();
        println!("  {name:<17} | {rate:>8.0} | {micros:>7.1} | {to_fred:>15.2} | {to_rslock:>16.2} | {cpu:>18.1}");
    }
    println!();
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

#[derive(Clone, Copy, Default)]
struct Sample {
    /// Pairs a second.
    rate: f64,
    /// Of this process, for one pair.
    cpu_micros: f64,
}

#[derive(Clone)]
enum Rival {
    Tenure(Locker),
    TenureUnfenced(Locker),
    Fred { client: Client, release: String },
    Redis { connection: MultiplexedConnection, release: Arc<redis::Script> },
    Rslock(LockManager),
}

impl Rival {
    async fn all(server: &Server) -> Vec<Self> {
        let url = server.url();
        let locker = Locker::connect(&url).await.expect("a connection");

        let client = Builder::from_config(Config::from_url(&url).expect("a URL"))
            .set_policy(ReconnectPolicy::new_constant(0, 100))
            .build()
            .expect("a client");
        client.init().await.expect("a connection");
        let release = server.cli(&["SCRIPT", "LOAD", COMPARE_AND_DELETE]);

        let redis = redis::Client::open(url.as_str()).expect("a URL");
        let connection = redis.get_multiplexed_async_connection().await.expect("a connection");
        let script = Arc::new(redis::Script::new(COMPARE_AND_DELETE));

        vec![
            Self::Tenure(locker.clone()),
            Self::TenureUnfenced(locker),
            Self::Fred { client, release },
            Self::Redis { connection, release: script },
            Self::Rslock(LockManager::new(vec![url])),
        ]
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Tenure(_) => "tenure",
            Self::TenureUnfenced(_) => "tenure, unfenced",
            Self::Fred { .. } => "raw fred",
            Self::Redis { .. } => "raw redis",
            Self::Rslock(_) => "rslock",
        }
    }

    /// Lets so many tasks obtain and release, each its own key, for so long.
    async fn measure(&self, tasks: usize, length: Duration) -> Sample {
        let (over, pairs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut running = JoinSet::new();
        let (started, cpu) = (Instant::now(), ProcessTime::now());
        for task in 0..tasks {
            let (rival, over, pairs) = (self.clone(), over.clone(), pairs.clone());
            running.spawn(async move {
                let key = format!("versus:{task}");
                let mut own = 0;
                while !over.load(Ordering::Relaxed) {
                    rival.pair(&key).await;
                    own += 1;
                }
                pairs.fetch_add(own, Ordering::Relaxed);
            });
        }
        tokio::time::sleep(length).await;
        over.store(true, Ordering::Relaxed);
        running.join_all().await;
        let pairs = pairs.load(Ordering::Relaxed) as f64;
        Sample { rate: pairs / started.elapsed().as_secs_f64(), cpu_micros: cpu.elapsed().as_secs_f64() * 1e6 / pairs }
    }

    async fn pair(&self, key: &str) {
        match self {
            Self::Tenure(locker) => {
                locker.try_lock(key).ttl(TTL).await.expect("free").release().await.expect("held");
            }
            Self::TenureUnfenced(locker) => {
                locker.try_lock(key).ttl(TTL).fenced(false).await.expect("free").release().await.expect("held");
            }
            Self::Fred { client, release } => {
                let token = Token::random();
                let set = CustomCommand::new_static("SET", ClusterHash::FirstKey, false);
                let args = vec![key, token.as_str(), "NX", "PX", "30000"];
                let granted: Value = client.custom(set, args).await.expect("an answer");
                assert!(granted.is_string(), "free");
                let evalsha = CustomCommand::new_static("EVALSHA", ClusterHash::FirstKey, false);
                let args = vec![release, "1", key, token.as_str()];
                let freed: i64 = client.custom(evalsha, args).await.expect("an answer");
                assert_eq!(freed, 1, "held");
            }
            Self::Redis { connection, release } => {
                let token = Token::random();
                let mut connection = connection.clone();
                let mut set = redis::cmd("SET");
                set.arg(key).arg(token.as_str()).arg("NX").arg("PX").arg(30_000);
                let granted: Option<String> = set.query_async(&mut connection).await.expect("an answer");
                assert!(granted.is_some(), "free");
                let mut release = release.key(key);
                let freed: i64 = release.arg(token.as_str()).invoke_async(&mut connection).await.expect("an answer");
                assert_eq!(freed, 1, "held");
            }
            Self::Rslock(manager) => {
                let lock = manager.lock(key, TTL).await.expect("free");
                manager.unlock(&lock).await;
            }
        }
    }
}
