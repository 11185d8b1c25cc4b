//! Readers and permits: how long a writer waits among busy readers, and what a permit costs.
//!
//! 64 readers hold one key again and again, and one writer wants it now and then; 16 tasks share four permits. Each
//! contender has the server for itself, one after the other. The readers have four connections, as four processes
//! would have, and the writer has one of its own. `-- --quick` measures for a shorter time.

#![expect(clippy::expect_used, reason = "a benchmark that can't measure can only panic")]

mod contenders;
#[path = "../common/counters.rs"]
#[allow(dead_code)] // other benchmarks count more
mod counters;
#[path = "../common/machine.rs"]
mod machine;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use hdrhistogram::Histogram;
use tenure_test_support::Server;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::contenders::{Contender, Share};
use self::counters::Observer;

const READERS: usize = 64;
/// The number of connections that the readers share.
const CONNECTIONS: usize = 4;
const TASKS: usize = 16;
const PERMITS: usize = 4;
const KEY: &str = "k";
/// How long readers and writers hold the key, and how long permits are held.
const HOLDS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(50)];
const PERMIT_HOLDS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(5)];

fn main() -> ExitCode {
    machine::exit_code(benchmark())
}

fn benchmark() -> Result<(), String> {
    let length = match machine::is_quick(env::args().skip(1))? {
        true => Duration::from_secs(2),
        false => Duration::from_secs(10),
    };
    println!("{}", machine::describe()?);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for hold in HOLDS {
        println!("\n{READERS} readers and a writer that hold a key for {hold:?}, for {length:?} each");
        println!(
            "  {:<26} {:>9} {:>9} {:>28} {:>9}",
            "", "reads/s", "writes", "writer's waits in hold times", "server"
        );
        println!("  {:<26} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9}", "", "", "", "median", "p99", "longest", "us/turn");
        for contender in Contender::ALL.into_iter().filter(|contender| contender.has_readers()) {
            runtime.block_on(read_and_write(contender, hold, length));
        }
    }
    for hold in PERMIT_HOLDS {
        println!("\n{TASKS} tasks that hold one of {PERMITS} permits for {hold:?}, for {length:?} each");
        println!("  {:<26} {:>9} {:>19} {:>9}", "", "turns/s", "wait, p99 and longest", "us/turn");
        for contender in Contender::ALL {
            runtime.block_on(share_permits(contender, hold, length));
        }
    }
    Ok(())
}

/// The turns of one task, and its waits in microseconds.
struct Turns {
    count: u64,
    waits: Histogram<u64>,
}

impl Turns {
    fn new() -> Self {
        // Up to an hour. One without bounds would record what is longer than two milliseconds as that.
        Self { count: 0, waits: Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("sound bounds") }
    }

    fn add(&mut self, wait: Duration) {
        self.count += 1;
        self.waits.saturating_record(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX));
    }

    fn join(mut self, other: &Self) -> Self {
        self.count += other.count;
        self.waits.add(&other.waits).expect("as many digits");
        self
    }

    /// Returns a wait in ms: the one that this part of the waits doesn't exceed.
    fn wait(&self, part: f64) -> f64 {
        self.waits.value_at_quantile(part) as f64 / 1_000.0
    }
}

/// Obtains what it wants again and again until the end. One that still waits then counts as a wait that is as long.
async fn take_turns(contender: contenders::Client, share: Share, hold: Duration, pause: u64, end: Instant) -> Turns {
    let mut turns = Turns::new();
    while Instant::now() < end {
        sleep(Duration::from_millis(fastrand::u64(..=pause))).await;
        let asked = Instant::now();
        let obtained = timeout(end + hold - asked, contender.obtain(KEY, share)).await;
        turns.add(asked.elapsed());
        let Ok(guard) = obtained else { break };
        if !hold.is_zero() {
            sleep(hold).await;
        }
        guard.release().await;
    }
    turns
}

async fn read_and_write(contender: Contender, hold: Duration, length: Duration) {
    let server = Server::start();
    let (mut observer, end) = (Observer::connect(&server.url()), Instant::now() + length);
    let before = observer.look();
    let mut readers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let client = contender.connect(&server.url()).await;
        for _ in 0..READERS / CONNECTIONS {
            readers.spawn(take_turns(client.clone(), Share::Read, hold, 0, end));
        }
    }
    let writer = contender.connect(&server.url()).await;
    let pause = u64::try_from(hold.as_millis()).unwrap_or(u64::MAX) * 4;
    let writes = take_turns(writer, Share::Write, hold, pause, end).await;
    let reads = readers.join_all().await.iter().fold(Turns::new(), Turns::join);
    let cpu = observer.look().cpu_seconds() - before.cpu_seconds();
    let in_holds = |ms: f64| ms / (hold.as_secs_f64() * 1_000.0);
    println!(
        "  {:<26} {:>9.0} {:>9} {:>9.1} {:>9.1} {:>8.1} {:>9.0}",
        contender.name(),
        reads.count as f64 / length.as_secs_f64(),
        writes.count,
        in_holds(writes.wait(0.5)),
        in_holds(writes.wait(0.99)),
        in_holds(writes.wait(1.0)),
        cpu * 1e6 / (reads.count + writes.count) as f64,
    );
}

async fn share_permits(contender: Contender, hold: Duration, length: Duration) {
    let server = Server::start();
    let (mut observer, end) = (Observer::connect(&server.url()), Instant::now() + length);
    let before = observer.look();
    let mut tasks = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let client = contender.connect(&server.url()).await;
        for _ in 0..TASKS / CONNECTIONS {
            tasks.spawn(take_turns(client.clone(), Share::Permit(PERMITS), hold, 0, end));
        }
    }
    let all = tasks.join_all().await.iter().fold(Turns::new(), Turns::join);
    let cpu = observer.look().cpu_seconds() - before.cpu_seconds();
    println!(
        "  {:<26} {:>9.0} {:>8.1} ms {:>8.1} ms {:>9.0}",
        contender.name(),
        all.count as f64 / length.as_secs_f64(),
        all.wait(0.99),
        all.wait(1.0),
        cpu * 1e6 / all.count as f64,
    );
}
