//! Measures one contender, in its own process.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use cpu_time::{ProcessTime, ThreadTime};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::INTERVAL;
use crate::counters::Observer;
use crate::renewers::{Contender, Looks, key};

/// The time between two checks of all locks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The scripts that clients send.
const CALLS: [&str; 2] = ["evalsha", "eval"];

/// The figures of one contender, from a while after it obtained its last lock to the end.
#[derive(Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) locks: u32,
    /// The time that it took to obtain the locks.
    pub(crate) obtaining_seconds: f64,
    pub(crate) seconds: f64,
    client_cpu_seconds: f64,
    server_cpu_seconds: f64,
    pub(crate) renewals: u64,
    pub(crate) calls: u64,
    pub(crate) commands: u64,
    /// The growth of the resident memory since before the first lock.
    grown_bytes: f64,
    key_bytes: f64,
    pub(crate) late: u32,
    pub(crate) lost: u32,
}

impl Figures {
    pub(crate) fn client_percent(&self) -> f64 {
        100.0 * self.client_cpu_seconds / self.seconds
    }

    pub(crate) fn client_micros(&self) -> f64 {
        1e6 * self.client_cpu_seconds / self.renewals as f64
    }

    pub(crate) fn server_percent(&self) -> f64 {
        100.0 * self.server_cpu_seconds / self.seconds
    }

    pub(crate) fn server_micros(&self) -> f64 {
        1e6 * self.server_cpu_seconds / self.renewals as f64
    }

    pub(crate) fn bytes_per_lock(&self) -> f64 {
        self.grown_bytes / f64::from(self.locks) - self.key_bytes
    }
}

/// Measures what the arguments describe, and prints the figures as one line.
pub(crate) fn measure(args: &[String]) -> Result<(), String> {
    let [contender, locks, seconds, url] = args else { return Err("four arguments are needed".to_owned()) };
    let known = Contender::ALL.into_iter().find(|known| known.name() == contender);
    let contender = known.ok_or_else(|| format!("unknown contender `{contender}`"))?;
    let locks = locks.parse().map_err(|_| format!("`{locks}` is not a number of locks"))?;
    let seconds = seconds.parse().map_err(|_| format!("`{seconds}` is not a number of seconds"))?;
    let figures = hold(contender, locks, Duration::from_secs(seconds), url);
    println!("{}", serde_json::to_string(&figures).map_err(|error| error.to_string())?);
    Ok(())
}

fn hold(contender: Contender, locks: u32, length: Duration, url: &str) -> Figures {
    let runtime = Runtime::new().expect("a runtime");
    let mut observer = Observer::connect(url);
    let mut looks = Looks::new(locks);
    let mut renewer = runtime.block_on(contender.start(url));

    let resident_before = resident_bytes();
    let obtaining = Instant::now();
    runtime.block_on(renewer.obtain(locks));
    let obtaining_seconds = obtaining.elapsed().as_secs_f64();

    thread::sleep(INTERVAL / 2);

    // From now on the runtime's threads do the work, and this thread only observes: its time is subtracted.
    let before = observer.look();
    let (started, client, onlooker) = (Instant::now(), ProcessTime::now(), ThreadTime::now());
    while started.elapsed() < length {
        thread::sleep(LOOK_EVERY.min(length.saturating_sub(started.elapsed())));
        renewer.look(&mut looks);
    }
    let (client, onlooker, seconds) = (client.elapsed(), onlooker.elapsed(), started.elapsed().as_secs_f64());
    let after = observer.look();

    Figures {
        locks,
        obtaining_seconds,
        seconds,
        client_cpu_seconds: client.saturating_sub(onlooker).as_secs_f64(),
        server_cpu_seconds: after.cpu_seconds() - before.cpu_seconds(),
        renewals: after.calls(&["pexpire"]) - before.calls(&["pexpire"]),
        calls: after.calls(&CALLS) - before.calls(&CALLS),
        commands: after.commands() - before.commands(),
        grown_bytes: resident_bytes() - resident_before,
        key_bytes: key(0).len() as f64,
        late: renewer.late(&looks),
        lost: renewer.lost(locks),
    }
}

/// Returns the resident memory of the process.
fn resident_bytes() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    kibibytes.and_then(|count| count.parse::<f64>().ok()).expect("a number") * 1024.0
}
