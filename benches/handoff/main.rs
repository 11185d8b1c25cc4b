//! Handing over a contended lock: how fast, how fairly, and at what cost to the server.
//!
//! A few waiters want one key, each again as soon as it has released it, in one process or in several. The program
//! starts itself for every process. The copies log their turns by a clock that all of them share; all logs together
//! show how long each hand-off took. Contenders take turns, in rounds and in random order. The program prints medians
//! over the rounds. `-- --quick` runs one short round, and `-- --svg FILE` draws how often per second the lock passes
//! from one waiter to another.

#![expect(clippy::expect_used, reason = "a benchmark that can't measure can only panic")]

#[path = "../common/chart.rs"]
mod chart;
#[path = "../common/counters.rs"]
mod counters;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/raw_fred.rs"]
mod raw_fred;
#[path = "../common/statistics.rs"]
mod statistics;
mod turns;
mod waiters;

use std::env;
use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use tenure_test_support::Server;

use self::chart::{Chart, Panel};
use self::counters::Observer;
use self::statistics::median;
use self::turns::Sample;
use self::waiters::Contender;

/// Marks the copies. The other arguments are the contender, the number of waiters, the microseconds to hold the lock,
/// the server's URL, the key.
const WAIT: &str = "--wait";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let done = match args.split_first() {
        Some((first, task)) if first == WAIT => waiters::take_turns(task),
        _ => benchmark(args),
    };
    machine::exit_code(done)
}

/// How long to measure.
#[derive(Clone, Copy)]
struct Plan {
    /// The number of rounds: an odd number has a median.
    rounds: usize,
    /// The length of one measurement. Each round measures every contender once.
    length: Duration,
    /// The seed of the order within each round.
    seed: u64,
}

impl Plan {
    const FULL: Self = Self { rounds: 5, length: Duration::from_secs(3), seed: 1 };
    const QUICK: Self = Self { rounds: 1, length: Duration::from_secs(1), seed: 1 };
}

/// The waiters for the key.
#[derive(Clone, Copy)]
struct Crowd {
    processes: usize,
    /// The number of waiters in each process.
    waiters: usize,
    hold: Duration,
}

impl fmt::Display for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processes, waiters, hold } = self;
        write!(f, "{waiters} waiters in ")?;
        match processes {
            1 => write!(f, "one process")?,
            _ => write!(f, "each of {processes} processes")?,
        }
        match hold.is_zero() {
            true => write!(f, " that release the lock at once"),
            false => write!(f, " that hold the lock for {hold:?}"),
        }
    }
}

const HOLDS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(1)];
const SIZES: [(usize, usize); 3] = [(1, 8), (1, 64), (4, 8)];
const CROWDS: [usize; 2] = [10, 100_000];

fn benchmark(args: Vec<String>) -> Result<(), String> {
    let (is_quick, svg) = chart::arguments(args.into_iter())?;
    let plan = if is_quick { Plan::QUICK } else { Plan::FULL };
    let machine = machine::describe()?;
    print_header(plan, &machine);
    let mut chart = Chart {
        title: "How often per second a contended lock passes from one waiter to another",
        notes: vec![
            machine,
            format!("Longer is better. Medians; rounds: {} of {:?} each, in turn.", plan.rounds, plan.length),
            "By server: the server does each hand-over. Raw fred: SET NX PX again and again, with these pauses."
                .to_owned(),
        ],
        panels: Vec::new(),
    };
    let server = Server::start();
    let mut observer = Observer::connect(&server.url());
    let mut random = fastrand::Rng::with_seed(plan.seed);
    for (processes, waiters) in SIZES {
        for hold in HOLDS {
            let crowd = Crowd { processes, waiters, hold };
            let mut samples: Vec<Vec<Sample>> = Contender::ALL.iter().map(|_| Vec::new()).collect();
            for _ in 0..plan.rounds {
                // In another order each time: the contender before leaves its mark on a small machine.
                let mut order: Vec<(&Contender, &mut Vec<Sample>)> = Contender::ALL.iter().zip(&mut samples).collect();
                random.shuffle(&mut order);
                for (contender, samples) in order {
                    samples.push(turns::measure(contender, crowd, plan.length, &server, &mut observer)?);
                }
            }
            print_table(crowd, &samples);
            let bars = Contender::ALL
                .iter()
                .zip(&samples)
                .map(|(contender, samples)| (contender.name, median(samples.iter().map(Sample::handed_over_a_second))));
            chart.panels.push(Panel { title: crowd.to_string(), bars: bars.collect() });
        }
    }
    svg.map_or(Ok(()), |file| chart.write(&file))?;
    compare_crowds(plan, &server, &mut observer)
}

/// Compares the cost of a hand-over in a small crowd and in a large one, in turn.
fn compare_crowds(plan: Plan, server: &Server, observer: &mut Observer) -> Result<(), String> {
    let Some(tenure) = Contender::ALL.first() else { return Ok(()) };
    let mut samples = CROWDS.map(|_| Vec::new());
    for _ in 0..plan.rounds {
        for (waiters, samples) in CROWDS.into_iter().zip(&mut samples) {
            let crowd = Crowd { processes: 1, waiters, hold: Duration::ZERO };
            samples.push(turns::measure(tenure, crowd, plan.length, server, observer)?);
        }
    }
    println!("\nCrowds in one process that hold the lock for 0ns");
    for (waiters, samples) in CROWDS.iter().zip(&samples) {
        let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure));
        let (turns, p50) = (of(|sample| sample.turns_a_second), of(|sample| sample.p50_micros));
        println!("  {waiters:>7} waiters | {turns:>7.0} turns/s | p50 {}", in_unit(p50));
    }
    let [few, many] = &samples;
    let ratios = few.iter().zip(many).map(|(few, many)| many.p50_micros / few.p50_micros);
    print_target("p50", median(ratios), 2.0);
    Ok(())
}

fn print_header(plan: Plan, machine: &str) {
    let Plan { rounds, length, .. } = plan;
    println!("Many waiters for one key, ttl 30 s, one connection per process, TCP on loopback.");
    println!("{machine}");
    println!(
        "{rounds} round(s) of {length:?} for each contender, in turn. Medians over the rounds; ratios within a round."
    );
    println!();
    println!("  turns/s      how often the lock was obtained.");
    println!(
        "  handed over  turns that went to another waiter than the last one. The next two figures are of these only."
    );
    println!("  p50, p99     from the call of release to the return of the next obtain, by CLOCK_MONOTONIC.");
    println!(
        "  PING         median round trip on the same kind of connection, just before; p50/PING is the ratio to it."
    );
    println!("  calls/turn   commands that clients have sent: calls of scripts, SET, SUBSCRIBE. Messages don't count.");
    println!("  cmds/turn    all commands that the server has run, including those of scripts.");
    println!("  max/min      the most turns of a waiter, divided by the fewest.");
    println!("  longest      the longest wait in any round, ended or not; no more than a round.");
    println!("  CPU us/turn  the server's.");
}

fn print_table(crowd: Crowd, samples: &[Vec<Sample>]) {
    println!("\n{crowd}");
    println!(
        "  {:<21} | {:>7} | {:>11} | {:>8} | {:>8} | {:>6} | {:>8} | {:>10} | {:>9} | {:>8} | {:>9} | {:>11}",
        "",
        "turns/s",
        "handed over",
        "p50",
        "p99",
        "PING",
        "p50/PING",
        "calls/turn",
        "cmds/turn",
        "max/min",
        "longest",
        "CPU us/turn"
    );
    for (contender, samples) in Contender::ALL.iter().zip(samples) {
        let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure));
        let longest = samples.iter().map(|sample| sample.longest_wait_millis).fold(0.0, f64::max);
        println!(
            "  {:<21} | {:>7.0} | {:>9.1} % | {:>8} | {:>8} | {:>6} | {:>8.2} | {:>10.2} \
             | {:>9.2} | {:>8.2} | {:>6.0} ms | {:>11.1}",
            contender.name,
            of(|sample| sample.turns_a_second),
            of(|sample| sample.handed_over_percent),
            in_unit(of(|sample| sample.p50_micros)),
            in_unit(of(|sample| sample.p99_micros)),
            in_unit(of(|sample| sample.ping_micros)),
            of(Sample::p50_to_ping),
            of(|sample| sample.calls_a_turn),
            of(|sample| sample.commands_a_turn),
            of(|sample| sample.most_to_fewest),
            longest,
            of(|sample| sample.server_micros_a_turn),
        );
    }
    for (contender, samples) in Contender::ALL.iter().zip(samples) {
        print_targets(contender, crowd, samples);
    }
}

fn in_unit(micros: f64) -> String {
    if micros.is_nan() {
        return "none".to_owned();
    }
    if micros < 10_000.0 { format!("{micros:.0} us") } else { format!("{:.0} ms", micros / 1e3) }
}

/// Prints the least that tenure must achieve.
fn print_targets(contender: &Contender, crowd: Crowd, samples: &[Sample]) {
    let Some(most_to_fewest) = contender.most_to_fewest else { return };
    let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure));
    let (to_ping, calls) = match crowd.processes {
        1 => (2.0, 2.0),
        _ => (3.0, 4.0),
    };
    println!("  targets for {}", contender.name);
    print_target("p50/PING", of(Sample::p50_to_ping), to_ping);
    print_target("calls/turn", of(|sample| sample.calls_a_turn), calls);
    if crowd.processes > 1 {
        print_target("max/min", of(|sample| sample.most_to_fewest), most_to_fewest);
    }
}

/// Compares the figures as printed: at the edges of a measurement, the counts can differ by one.
fn print_target(what: &str, is: f64, at_most: f64) {
    let verdict = if (100.0 * is).round() <= 100.0 * at_most { "met" } else { "MISSED" };
    println!("    {what:<10} {is:>7.2}   at most {at_most:<4} {verdict}");
}
