//! Chaos: worker processes contend for locks while servers, connections and workers fail at random, and a checker
//! decides from what they have recorded whether the promises were kept.
//!
//!     cargo test --release --all-features --test chaos -- --topology quorum5 --seed 7 --seconds 60
//!     cargo test --release --all-features --test chaos -- --topology single --break-assumptions
//!     cargo test --release --all-features --test chaos -- --topology single --break-clocks
//!     cargo test --test chaos                         # a short share of each
//!
//! - [`topology`]: the servers, and proxies before them
//! - [`nemesis`]: the faults, and what each may break
//! - [`pool`], [`worker`]: the processes, and what they do
//! - [`register`]: what the locks protect
//! - [`history`]: what is recorded
//! - [`checker`]: what must hold; `tests/chaos_checker.rs` tests it
//!
//! The seed decides on the faults and on what each task does. The processes run as the machine lets them, so a run can
//! only be repeated with the same faults, and not step by step.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "this is a test")]

mod checker;
mod history;
mod nemesis;
mod pool;
mod register;
mod topology;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use self::checker::{Report, Run, Violation};
use self::history::{Event, Nanos, nanos, now};
use self::nemesis::{Harm, Nemesis};
use self::pool::{Pool, WORKER};
use self::register::{Phase, Register};
use self::topology::{Breaks, Kind, Topology};
use self::worker::Work;

const WORKERS: usize = 4;

#[derive(Clone, Debug)]
struct Options {
    /// All of them, one beside the other, unless one is chosen.
    topology: Option<Kind>,
    seed: u64,
    seconds: u64,
    breaks: Breaks,
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if let [is_worker, work] = &args[..] {
        if is_worker == WORKER {
            worker::run(serde_json::from_str(work).expect("work"));
            return ExitCode::SUCCESS;
        }
    }
    let options = match Options::parse(args) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let passed = match options.topology {
        Some(topology) => run(topology, &options),
        None => run_share_of_each(&options),
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Options {
    /// Returns `None` if there is nothing to run: Cargo passes the filters and options of libtest to all test programs.
    fn parse(args: Vec<String>) -> Result<Option<Self>, String> {
        let has_client = cfg!(any(feature = "fred", feature = "redis"));
        let mut options = Self { topology: None, seed: 1, seconds: 15, breaks: Breaks::Nothing };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            let number = |text: String| text.parse().map_err(|_| format!("{text} is no number"));
            match arg.as_str() {
                "--topology" => options.topology = Some(value()?.parse()?),
                "--seed" => options.seed = number(value()?)?,
                "--seconds" => options.seconds = number(value()?)?,
                BREAK_MEMORY => options.breaks = Breaks::Memory,
                BREAK_CLOCKS => options.breaks = Breaks::Clocks,
                "--list" | "--ignored" => return Ok(None),
                "--nocapture" | "--include-ignored" | "--quiet" => {}
                filter if filter.starts_with('-') => return Err(format!("unknown option {filter}")),
                filter if "chaos".contains(filter) => {}
                _ => return Ok(None),
            }
        }
        Ok(has_client.then_some(options))
    }

    fn command(&self, topology: Kind) -> String {
        let Self { seed, seconds, breaks, .. } = self;
        let breaks = breaks.option().map(|option| format!(" {option}")).unwrap_or_default();
        format!(
            "cargo test --release --all-features --test chaos -- --topology {topology} --seed {seed} \
             --seconds {seconds}{breaks}"
        )
    }
}

const BREAK_MEMORY: &str = "--break-assumptions";
const BREAK_CLOCKS: &str = "--break-clocks";

impl Breaks {
    fn option(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Memory => Some(BREAK_MEMORY),
            Self::Clocks => Some(BREAK_CLOCKS),
        }
    }
}

/// Runs all topologies at the same time, as their workers mostly wait, and two more whose faults break the assumptions.
fn run_share_of_each(options: &Options) -> bool {
    let start = |topology: Kind, breaks: Breaks| {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--topology", &topology.to_string()]);
        command.args(["--seed", &options.seed.to_string(), "--seconds", &options.seconds.to_string()]);
        command.args(breaks.option());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("this program")
    };
    let broken = [Breaks::Memory, Breaks::Clocks].map(|breaks| (Kind::Single, breaks));
    let runs = Kind::ALL.map(|topology| (topology, Breaks::Nothing)).into_iter().chain(broken);
    let runs: Vec<_> = runs.map(|(topology, breaks)| start(topology, breaks)).collect();
    let mut passed = true;
    for run in runs {
        let output = run.wait_with_output().expect("it was started by us");
        print!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        passed &= output.status.success();
    }
    passed
}

fn run(kind: Kind, options: &Options) -> bool {
    println!("\n{}", options.command(kind));
    let started = Instant::now();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = Runtime::new().expect("a runtime");
    let mut topology = runtime.block_on(Topology::start(kind, WORKERS, options.breaks));
    let breaks = options.breaks != Breaks::Nothing;
    let register = runtime.block_on(async { Register::start(dir.path()) });
    let work = (0..WORKERS).map(|slot| Work {
        number: 0,
        seed: 0,
        urls: topology.urls(slot),
        is_quorum: kind.is_quorum(),
        min_replicas: topology.min_replicas(),
        register: register.path().to_owned(),
        history: dir.path().join("history"),
    });
    let mut pool = Pool::start(work.collect(), options.seed);
    let nemesis = Nemesis::new(&mut topology, &mut pool, options.seed);
    let harm = nemesis.rage(Duration::from_secs(options.seconds));

    let calm = now();
    register.enter(Phase::Calm);
    let mut violations = wait_for_calm(&register, &mut pool, kind.patience());
    let is_calm = violations.is_empty();
    if !is_calm {
        topology.contents().iter().for_each(|line| println!("  {line}"));
    }
    if is_calm {
        violations.extend(topology.left(Duration::from_secs(10)).into_iter().map(Violation::Left));
    }
    register.enter(Phase::Over);
    if is_calm {
        violations.extend(pool.join(Duration::from_secs(10)).into_iter().map(Violation::Broken));
    }

    let nobody_forgets = !breaks && !kind.is_quorum();
    let run = Run { nobody_forgets, calm, patience: nanos(kind.patience()), killed: pool.killed.clone() };
    let events = pool.histories().into_iter().flat_map(|path| history::read(&path));
    let mut report = checker::check(events, &register.accepted(), &run);
    report.violations.extend(violations);
    let overlaps = report.violations.iter().filter(|violation| matches!(violation, Violation::Overlap { .. })).count();
    let broken: Vec<&Violation> =
        report.violations.iter().filter(|violation| !(breaks && violation.is_expected(kind.is_quorum()))).collect();
    print(&report, &harm, started);
    if broken.is_empty() && breaks == (overlaps > 0) {
        return true;
    }
    if overlaps == 0 && breaks {
        println!("no overlap was found: the faults are toothless, or the checker is blind");
    }
    let mut explained = BTreeSet::new();
    for violation in broken {
        if explained.len() < 4 && explained.insert(violation.guards()) {
            explain(violation, &harm.log, &pool);
        }
    }
    println!("the histories are in {}\nFAILED: {}", dir.keep().display(), options.command(kind));
    false
}

/// Waits until all workers have ended their tasks and closed their lockers.
fn wait_for_calm(register: &Register, pool: &mut Pool, patience: Duration) -> Vec<Violation> {
    let end = Instant::now() + patience;
    loop {
        let tasks: Vec<(u64, Option<usize>)> =
            pool.numbers().into_iter().map(|number| (number, register.closed(number))).collect();
        if tasks.iter().all(|(_, tasks)| tasks.is_some()) {
            let left = tasks.iter().filter(|(_, tasks)| tasks.is_some_and(|tasks| tasks > 0));
            return left.map(|(number, tasks)| Violation::Left(format!("worker {number}: {tasks:?} tasks"))).collect();
        }
        if pool.has_failed() || Instant::now() > end {
            let open = tasks.iter().filter(|(_, tasks)| tasks.is_none());
            return open.map(|(number, _)| Violation::Broken(format!("worker {number} doesn't end"))).collect();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn print(report: &Report, Harm { counts, failovers, .. }: &Harm, started: Instant) {
    let Report { attempts, grants, failures, renewals, ends, accepted, refused, .. } = report;
    let Report { after_expiry, waited_for_expiry, .. } = report;
    println!("  faults: {} {counts:?}; {failovers} failovers", counts.values().sum::<u64>());
    println!(
        "  {attempts} requests, {grants} grants, {after_expiry} of them after an expiry, for which {waited_for_expiry} \
         had waited; {renewals} renewals seen"
    );
    println!("  not granted: {failures:?}");
    println!("  ended: {ends:?}");
    println!(
        "  register: {accepted} writes, and {refused} refused as stale; longest wait after the faults {} ms; {} s in \
         all",
        report.longest_wait / 1_000_000,
        started.elapsed().as_secs()
    );
    let mut violations: BTreeMap<&str, u64> = BTreeMap::new();
    for violation in &report.violations {
        *violations.entry(violation.name()).or_default() += 1;
    }
    println!("  violations: {} {violations:?}", report.violations.len());
}

/// Prints what was recorded of the guards of a violation, and the faults at that time.
fn explain(violation: &Violation, faults: &[(Nanos, String)], pool: &Pool) {
    println!("\n  {violation:?}");
    let guards = violation.guards();
    let events = pool.histories().into_iter().flat_map(|path| history::read(&path));
    let events: Vec<Event> = events.filter(|event| guards.contains(&event.guard())).collect();
    let Some(first) = events.iter().map(Event::at).min() else { return };
    let last = events.iter().map(Event::at).max().unwrap_or(first);
    let around = faults.iter().filter(|(at, _)| (first.saturating_sub(2_000_000_000)..last).contains(at));
    let mut lines: Vec<(Nanos, String)> = around.cloned().collect();
    lines.extend(events.iter().map(|event| (event.at(), format!("{event:?}"))));
    lines.sort();
    for (at, line) in lines {
        println!("    {:>12.3} ms {line}", (at as f64 - first as f64) / 1e6);
    }
}
