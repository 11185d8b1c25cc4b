//! The cost of a lock: obtain + release pairs on distinct keys, compared to the raw clients and the nearest rival.
//!
//! One server, one process, one run: each rival in turn, in rounds and in random order, so that a noisy machine affects
//! all of them alike. The server has a core of its own. The program prints medians over the rounds; ratios are taken
//! within a round. `-- --quick` runs one short round, and `-- --svg FILE` draws the pairs per second.

#![expect(clippy::expect_used, reason = "a benchmark that can't measure can only panic")]

#[path = "../common/chart.rs"]
mod chart;
mod cores;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/raw_fred.rs"]
mod raw_fred;
#[path = "../common/raw_redis.rs"]
mod raw_redis;
mod rivals;
#[path = "../common/statistics.rs"]
mod statistics;
mod targets;

use std::collections::HashMap;
use std::env;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;
use tenure_test_support::Server;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::sleep;

use self::chart::{Chart, Panel};
use self::cores::Cores;
use self::rivals::{CONTROL, RAW_FRED, RSLOCK, Rival};
use self::statistics::median;
use self::targets::TARGETS;

/// How many tasks obtain and release at a time.
const TASKS: [usize; 4] = [1, 16, 64, 256];

fn main() -> ExitCode {
    machine::exit_code(benchmark())
}

fn benchmark() -> Result<(), String> {
    let (is_quick, svg) = chart::arguments(env::args().skip(1))?;
    let plan = if is_quick { Plan::QUICK } else { Plan::FULL };
    let machine = machine::describe()?;
    let cores = Cores::of_this_process();
    cores.keep_to_the_last();
    let server = Server::start();
    cores.keep_to_the_others();
    let chart = Runtime::new().expect("a runtime").block_on(compare(plan, &machine, &server.url()));
    svg.map_or(Ok(()), |file| chart.write(&file))
}

/// How long to measure.
#[derive(Clone, Copy)]
struct Plan {
    /// The number of rounds: an odd number has a median.
    rounds: usize,
    /// The length of one measurement. Each round measures every rival once.
    length: Duration,
    /// The seed of the order within each round.
    seed: u64,
}

impl Plan {
    const FULL: Self = Self { rounds: 31, length: Duration::from_millis(150), seed: 1 };
    const QUICK: Self = Self { rounds: 1, length: Duration::from_millis(100), seed: 1 };
}

/// Measures all rivals, and prints a table for each number of tasks. Returns the same as a chart.
async fn compare(plan: Plan, machine: &str, url: &str) -> Chart {
    let rivals = Rival::all(url).await;
    print_header(plan, machine);
    let mut chart = Chart {
        title: "Locks obtained and released per second, each task with a key of its own",
        notes: vec![
            machine.to_owned(),
            format!("Longer is better. Medians; rounds: {} of {:?} each, in turn.", plan.rounds, plan.length),
            "Unfenced: without a fencing token, as the others. Raw: SET NX PX, then a script that deletes.".to_owned(),
        ],
        panels: Vec::new(),
    };
    for tasks in TASKS {
        let samples = measure_in_turn(&rivals, tasks, plan).await;
        print_table(&rivals, tasks, &samples);
        print_targets(tasks, &samples);
        chart.panels.push(panel(&rivals, tasks, &samples));
    }
    chart
}

fn panel(rivals: &[Rival], tasks: usize, samples: &Samples) -> Panel {
    let shown = rivals.iter().map(Rival::name).filter(|name| *name != CONTROL);
    let bars = shown.map(|name| (name, median(samples[name].iter().map(|sample| sample.rate))));
    Panel { title: of_tasks(tasks), bars: bars.collect() }
}

fn of_tasks(tasks: usize) -> String {
    format!("{tasks} task{}", if tasks == 1 { "" } else { "s" })
}

/// The samples of each rival, in the order of the rounds: the nth samples of all rivals belong together.
type Samples = HashMap<&'static str, Vec<Sample>>;

/// The result of one rival in one round.
#[derive(Clone, Copy)]
struct Sample {
    /// Pairs a second.
    rate: f64,
    /// Processor time of this process for one pair, without the server's.
    cpu_micros: f64,
}

async fn measure_in_turn(rivals: &[Rival], tasks: usize, plan: Plan) -> Samples {
    for rival in rivals {
        // Warms up connections, scripts and caches.
        measure(rival, tasks, plan.length / 4).await;
    }
    let mut samples = Samples::new();
    let mut random = fastrand::Rng::with_seed(plan.seed);
    for _ in 0..plan.rounds {
        // In another order each time: the rival before leaves its mark on a small machine.
        let mut order: Vec<&Rival> = rivals.iter().collect();
        random.shuffle(&mut order);
        for rival in order {
            let sample = measure(rival, tasks, plan.length).await;
            samples.entry(rival.name()).or_default().push(sample);
        }
    }
    samples
}

/// Lets this many tasks obtain and release, each with its own key, for `length`.
async fn measure(rival: &Rival, tasks: usize, length: Duration) -> Sample {
    let over = Arc::new(AtomicBool::new(false));
    let mut running = JoinSet::new();
    let (started, cpu) = (Instant::now(), ProcessTime::now());
    for task in 0..tasks {
        running.spawn(repeat_pairs(rival.clone(), format!("versus:{task}"), over.clone()));
    }
    sleep(length).await;
    over.store(true, Ordering::Relaxed);
    let pairs = running.join_all().await.into_iter().sum::<u32>();
    // Measured after the last pair has ended, so all pairs are within the time.
    let (elapsed, cpu) = (started.elapsed(), cpu.elapsed());
    let pairs = f64::from(pairs);
    Sample { rate: pairs / elapsed.as_secs_f64(), cpu_micros: cpu.as_secs_f64() * 1e6 / pairs }
}

/// Returns the number of pairs.
async fn repeat_pairs(rival: Rival, key: String, over: Arc<AtomicBool>) -> u32 {
    let mut pairs = 0;
    while !over.load(Ordering::Relaxed) {
        rival.obtain_and_release(&key).await;
        pairs += 1;
    }
    pairs
}

fn print_header(plan: Plan, machine: &str) {
    let Plan { rounds, length, .. } = plan;
    println!("Obtain + release pairs on distinct keys, one connection each, TCP on loopback.");
    println!("{machine} It has the last core to itself.");
    println!(
        "{rounds} round(s) of {length:?} for each rival, in turn. Medians over the rounds; ratios within a round."
    );
}

fn print_table(rivals: &[Rival], tasks: usize, samples: &Samples) {
    println!("\n{}", of_tasks(tasks));
    println!(
        "  rival                     |  pairs/s | us/pair | time / raw fred | pairs/s / rslock | client CPU us/pair"
    );
    for rival in rivals {
        let name = rival.name();
        let own = &samples[name];
        let rate = median(own.iter().map(|sample| sample.rate));
        let micros = 1e6 * tasks as f64 / rate;
        // The time of a pair is inversely proportional to the rate.
        let time_to_fred = median_ratio(&samples[RAW_FRED], own);
        let rate_to_rslock = median_ratio(own, &samples[RSLOCK]);
        let cpu = median(own.iter().map(|sample| sample.cpu_micros));
        println!(
            "  {name:<25} | {rate:>8.0} | {micros:>7.1} | {time_to_fred:>15.2} | {rate_to_rslock:>16.2} | {cpu:>18.1}"
        );
    }
}

fn print_targets(tasks: usize, samples: &Samples) {
    for target in TARGETS.iter().filter(|target| target.tasks == tasks) {
        println!("  {}", target.judge(median_ratio(&samples[target.rival], &samples[target.to])));
    }
}

/// Returns the median ratio of the rates of two rivals, round by round.
fn median_ratio(of: &[Sample], to: &[Sample]) -> f64 {
    median(of.iter().zip(to).map(|(of, to)| of.rate / to.rate))
}
