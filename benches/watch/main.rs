//! The cost of holding many locks: processor time and memory of the client and the server, and whether renewals are in
//! time.
//!
//! The locks are obtained a fixed number at a time, and then held for a minute. Each contender has its own server and
//! process, so its processor time and its memory are its own: the program starts itself, and the copy prints its
//! figures. `-- --quick` leaves out the large number, and holds for a shorter time.

#![expect(clippy::expect_used, reason = "a benchmark that can't measure can only panic")]

#[path = "../common/counters.rs"]
mod counters;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/raw_fred.rs"]
mod raw_fred;
#[path = "../common/raw_redis.rs"]
mod raw_redis;
mod renewers;
mod watched;

use std::env;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use tenure_test_support::Server;

use self::renewers::Contender;
use self::watched::Figures;

/// The default ttl.
const TTL: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_secs(10);
/// How late a renewal may be before it counts as late.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Marks the copy. The other arguments are the contender, the number of locks, the seconds to hold them, the server's
/// URL.
const ALONE: &str = "--alone";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let done = match args.split_first() {
        Some((first, task)) if first == ALONE => watched::measure(task),
        _ => benchmark(args),
    };
    machine::exit_code(done)
}

/// What to hold, and for how long.
struct Plan {
    locks: &'static [u32],
    /// A multiple of the interval, which starts and ends between the renewals, so each lock is renewed equally often.
    seconds: u64,
}

impl Plan {
    const FULL: Self = Self { locks: &[10_000, 100_000], seconds: 60 };
    const QUICK: Self = Self { locks: &[10_000], seconds: 20 };
}

fn benchmark(args: Vec<String>) -> Result<(), String> {
    let plan = if machine::is_quick(args.into_iter())? { Plan::QUICK } else { Plan::FULL };
    print_header(&plan, &machine::describe()?);
    for &locks in plan.locks {
        print_heading(locks);
        let mut rows = Vec::new();
        for contender in Contender::ALL {
            let figures = measure_alone(contender, locks, plan.seconds)?;
            print_row(contender, &figures);
            rows.push((contender, figures));
        }
        print_targets(locks, &rows);
    }
    Ok(())
}

/// Runs one contender in its own process.
fn measure_alone(contender: Contender, locks: u32, seconds: u64) -> Result<Figures, String> {
    let server = Server::start();
    let mut copy = Command::new(env::current_exe().map_err(|error| error.to_string())?);
    copy.args([ALONE, contender.name(), &locks.to_string(), &seconds.to_string(), &server.url()]);
    let output = copy.stderr(Stdio::inherit()).output().map_err(|error| error.to_string())?;
    match serde_json::from_slice(&output.stdout) {
        Ok(figures) if output.status.success() => Ok(figures),
        _ => Err(format!("{} has no figures: its process ended with {}", contender.name(), output.status)),
    }
}

fn print_header(plan: &Plan, machine: &str) {
    println!("Locks held, ttl {TTL:?}, each renewed every {INTERVAL:?}, one connection each, TCP on loopback.");
    println!("{machine}");
    println!(
        "Measured for {} s each, in a process of its own and on a fresh server, from {:?} after the last lock.",
        plan.seconds,
        INTERVAL / 2
    );
    println!();
    println!("Obtained {} at a time, as fast as possible, so their renewals come in bursts,", renewers::AT_A_TIME);
    println!("as for a service that takes up all work at the start. Tickers are the pattern in the READMEs of Go's");
    println!("libraries: one task per lock, and one script call per renewal (compare the token, PEXPIRE).");
    println!();
    println!("  CPU         of one core, and per renewal. The client's excludes the thread that observes.");
    println!("  renewals    PEXPIREs that the server counts; likewise calls, the scripts that clients have sent,");
    println!("              and cmds, all commands, including those that scripts have run.");
    println!("  bytes/lock  VmRSS of /proc/self/status at the end, less the one before the first lock, divided by");
    println!("              the number of locks; less the key's own bytes.");
    println!("  late        renewals by more than {TOLERANCE:?}. For guards and leases, seen once a second from their");
    println!("              deadlines, which show when each renewal was sent and whether one is overdue. For tickers,");
    println!("              by their own clock when the reply arrives; or, instead of a reply, an error (the redis");
    println!("              crate's: no reply in 500 ms).");
    println!("  lost        locks that are no longer held at the end.");
}

fn print_heading(locks: u32) {
    println!("\n{locks} locks");
    println!(
        "  {:<17} | {:>10} | {:>8} | {:>10} {:>6} | {:>10} {:>6} | {:>7} | {:>7} | {:>10} | {:>5} | {:>4}",
        "",
        "obtained/s",
        "renewals",
        "client CPU",
        "us",
        "server CPU",
        "us",
        "calls/s",
        "cmds/s",
        "bytes/lock",
        "late",
        "lost"
    );
}

fn print_row(contender: Contender, figures: &Figures) {
    println!(
        "  {:<17} | {:>10.0} | {:>8} | {:>8.2} % {:>6.1} | {:>8.2} % {:>6.1} \
         | {:>7.0} | {:>7.0} | {:>10.0} | {:>5} | {:>4}",
        contender.name(),
        f64::from(figures.locks) / figures.obtaining_seconds,
        figures.renewals,
        figures.client_percent(),
        figures.client_micros(),
        figures.server_percent(),
        figures.server_micros(),
        figures.calls as f64 / figures.seconds,
        figures.commands as f64 / figures.seconds,
        figures.bytes_per_lock(),
        figures.late,
        figures.lost,
    );
}

/// Prints the most that guards may cost. The absolute targets are printed only for the large number.
fn print_targets(locks: u32, rows: &[(Contender, Figures)]) {
    let of = |wanted| rows.iter().find(|(contender, _)| *contender == wanted).map(|(_, figures)| figures);
    let (Some(guards), Some(tickers)) = (of(Contender::Guards), of(Contender::FredTickers)) else { return };
    println!("  targets for guards");
    print_target("lost", f64::from(guards.lost), "none", guards.lost == 0);
    let less = tickers.client_micros() / guards.client_micros();
    print_target("raw fred's client CPU per renewal / guards'", less, "4 or more", less >= 4.0);
    if locks >= 100_000 {
        let (client, server) = (guards.client_percent(), guards.server_percent());
        print_target("client CPU, % of one core", client, "below 10", client < 10.0);
        print_target("server CPU, % of one core", server, "below 5", server < 5.0);
        let kibibytes = guards.bytes_per_lock() / 1024.0;
        print_target("KiB per lock", kibibytes, "at most 1.5", kibibytes <= 1.5);
    }
}

fn print_target(what: &str, is: f64, wanted: &str, met: bool) {
    println!("    {what:<44} {is:>7.2}   {wanted:<11} {}", if met { "met" } else { "MISSED" });
}
