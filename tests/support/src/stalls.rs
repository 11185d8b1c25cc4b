use std::fs;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// By how many microseconds the thread that measures it has woken late.
static LATE: AtomicU64 = AtomicU64::new(0);

/// Measures for how long a busy machine holds this process up, for bounds that must hold by the clock: a thread sleeps
/// a few milliseconds at a time, and sums by how much it wakes late. Where the system tells, it is also known for how
/// long the thread of the test itself waited for a processor.
#[derive(Debug)]
pub struct Stalls {
    /// [`LATE`] when the measurement began.
    late: u64,
    /// The thread that began it, and what that had waited for a processor by then.
    thread: ThreadId,
    waited: Duration,
}

impl Stalls {
    /// Measures from now on.
    #[must_use]
    pub fn watch() -> Self {
        // One for all: a test may measure hundreds of things at once.
        static BEGUN: Once = Once::new();
        BEGUN.call_once(|| drop(thread::spawn(measure)));
        Self { late: LATE.load(Ordering::Relaxed), thread: thread::current().id(), waited: waited() }
    }

    /// Returns this limit, and twice what the machine was late until now, as the servers may be late as well. On
    /// another thread than the one that called `watch`, what that one waited is not known, and doesn't count.
    #[must_use]
    pub fn added_to(&self, limit: Duration) -> Duration {
        let late = Duration::from_micros(LATE.load(Ordering::Relaxed).saturating_sub(self.late)) * 2;
        let is_same = thread::current().id() == self.thread;
        let waited = if is_same { waited().saturating_sub(self.waited) } else { Duration::ZERO };
        limit + late + waited
    }
}

fn measure() {
    const STEP: Duration = Duration::from_millis(5);
    loop {
        let asleep = Instant::now();
        thread::sleep(STEP);
        // Less than a step is how precisely any machine wakes.
        let late = asleep.elapsed().saturating_sub(STEP * 2);
        LATE.fetch_add(late.as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Returns for how long this thread has been ready to run without a processor: on Linux, the second number here. The
/// kernel's documentation has it under "Scheduler Statistics".
fn waited() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split(' ').nth(1).and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}
