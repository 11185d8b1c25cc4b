//! The cost of a lock on a quorum: obtaining alone, and obtain + release pairs, by one task on three and on five nodes,
//! compared to one server.
//!
//! All nodes are on one machine, which does their work one after the other; on separate machines they would work at the
//! same time. So everything is measured a second time with every reply delayed, as by a network: then the number of
//! round trips counts, and not the number of nodes. As in `versus`, the rivals take turns in rounds and in random
//! order; the program prints medians over the rounds, and ratios are taken within a round. `-- --quick` runs one short
//! round.

#![expect(clippy::expect_used, reason = "a benchmark that can't measure can only panic")]

mod crowd;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/statistics.rs"]
mod statistics;

use std::collections::HashMap;
use std::env;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;
use tenure::{LockGuard, Locker};
use tenure_test_support::{Mode, Proxy, Server};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use self::statistics::median;

/// A quorum of one shows the cost of the protocol without other nodes to wait for.
const NODES: [usize; 3] = [1, 3, 5];
const SINGLE: &str = "one server";
/// One server, once more. The distance of its ratio from 1 shows how precise the other ratios are.
const CONTROL: &str = "one server, again";

/// The most that obtaining on more nodes may take, as a multiple of one server.
const TARGET: f64 = 1.5;

/// The delay of a network's replies.
const AWAY: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    machine::exit_code(benchmark())
}

fn benchmark() -> Result<(), String> {
    let (rounds, length) = match machine::is_quick(env::args().skip(1))? {
        true => (1, Duration::from_millis(100)),
        false => (15, Duration::from_millis(400)),
    };
    println!("Obtain, and obtain + release, by one task on one key; TCP on loopback.");
    println!("{}", machine::describe()?);
    println!("{rounds} round(s) of {length:?} for each, in turn. Medians over the rounds; ratios within a round.");
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    runtime.block_on(compare(rounds, length, None));
    runtime.block_on(compare(rounds, length, Some(AWAY)));
    runtime.block_on(crowd::measure(length * 10));
    println!("\nTarget: obtaining on five nodes takes at most {TARGET} times as long as on one server.");
    Ok(())
}

async fn compare(rounds: usize, length: Duration, away: Option<Duration>) {
    let servers = [(); 5].map(|()| Server::start());
    let mut proxies = Vec::new();
    if let Some(away) = away {
        for server in &servers {
            let proxy = Proxy::start(server.port()).await;
            proxy.set(Mode::Delay(away));
            proxies.push(proxy);
        }
    }
    let urls: Vec<String> = match away {
        None => servers.iter().map(Server::url).collect(),
        Some(_) => proxies.iter().map(Proxy::url).collect(),
    };
    let mut rivals = Vec::new();
    for name in [SINGLE, CONTROL] {
        rivals.push(Rival { name: name.to_owned(), nodes: 1, locker: single(&urls).await });
    }
    for nodes in NODES {
        let name = format!("quorum of {nodes}");
        let locker = quorum(urls.iter().take(nodes)).await;
        rivals.push(Rival { name, nodes, locker });
    }
    for rival in &rivals {
        rival.measure(&servers, length / 4).await;
    }
    let mut samples: HashMap<&str, Vec<Sample>> = HashMap::new();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..rounds {
        let mut order: Vec<&Rival> = rivals.iter().collect();
        random.shuffle(&mut order);
        for rival in order {
            let sample = rival.measure(&servers, length).await;
            samples.entry(&rival.name).or_default().push(sample);
        }
    }
    print_table(&rivals, &samples, away);
}

async fn single(urls: &[String]) -> Locker {
    let url = urls.first().expect("a server");
    Locker::connect(url).await.expect("a connection")
}

/// Returns a quorum whose nodes vote at once, although they have only just been started.
async fn quorum(urls: impl Iterator<Item = &String>) -> Locker {
    let builder = Locker::builder().restart_window(Duration::ZERO);
    builder.quorum(urls).await.expect("a majority")
}

struct Rival {
    name: String,
    nodes: usize,
    locker: Locker,
}

/// The result of one rival in one round; times in microseconds.
#[derive(Clone, Copy)]
struct Sample {
    obtain: f64,
    pair: f64,
    /// Processor time of this process for one pair, without the servers'.
    cpu: f64,
    /// Calls to each node for each lock, without its release: 1 if one ballot is enough and nothing is taken back.
    calls: f64,
}

impl Rival {
    /// Measures in a task of its own, like an application: `block_on` polls on a separate thread, and wakes late.
    async fn measure(&self, servers: &[Server], length: Duration) -> Sample {
        let scripts = scripts_run(servers.iter().take(self.nodes));
        let mut running = JoinSet::new();
        running.spawn(pairs(self.locker.clone(), length));
        let (obtain, pair, cpu, locks) = running.join_next().await.expect("one task").expect("no panic");
        // One of the calls to each node is the release, which doesn't count.
        let calls = (scripts_run(servers.iter().take(self.nodes)) - scripts) / self.nodes as f64;
        Sample { obtain, pair, cpu, calls: calls / locks - 1.0 }
    }
}

async fn pairs(locker: Locker, length: Duration) -> (f64, f64, f64, f64) {
    let (started, cpu) = (Instant::now(), ProcessTime::now());
    let (mut obtaining, mut locks) = (Duration::ZERO, 0_u32);
    while started.elapsed() < length {
        let asked = Instant::now();
        let guard: LockGuard = locker.try_lock("k").await.expect("free");
        obtaining += asked.elapsed();
        guard.release().await.expect("held");
        locks += 1;
    }
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(locks);
    (micros(obtaining), micros(started.elapsed()), micros(cpu.elapsed()), f64::from(locks))
}

/// Returns how many scripts these servers have run since they were started.
fn scripts_run<'a>(servers: impl Iterator<Item = &'a Server>) -> f64 {
    let of_one = |server: &Server| {
        let stats = server.cli(&["INFO", "commandstats"]);
        let evalsha = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
        evalsha.and_then(|calls| calls.split(',').next()).and_then(|calls| calls.parse::<f64>().ok()).unwrap_or(0.0)
    };
    servers.map(of_one).sum()
}

fn print_table(rivals: &[Rival], samples: &HashMap<&str, Vec<Sample>>, away: Option<Duration>) {
    match away {
        None => println!("\nThe servers without delay"),
        Some(away) => println!("\nEvery reply {away:?} late, and a little more, as timers are coarse"),
    }
    println!(
        "                    | obtain us | / one server | pair us | / one server | client CPU us/pair | calls/obtain"
    );
    let Some(single) = samples.get(SINGLE) else { return };
    for Rival { name, .. } in rivals {
        let Some(own) = samples.get(name.as_str()) else { continue };
        let column = |of: fn(&Sample) -> f64| median(own.iter().map(of));
        let ratio = |of: fn(&Sample) -> f64| median(own.iter().zip(single).map(|(own, one)| of(own) / of(one)));
        println!(
            "  {name:<17} | {:>9.1} | {:>12.2} | {:>7.1} | {:>12.2} | {:>18.1} | {:>12.2}",
            column(|sample| sample.obtain),
            ratio(|sample| sample.obtain),
            column(|sample| sample.pair),
            ratio(|sample| sample.pair),
            column(|sample| sample.cpu),
            column(|sample| sample.calls),
        );
    }
}
