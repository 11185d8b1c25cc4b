use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Measures for how long a busy machine holds this process up, for bounds that must hold by the clock: a thread sleeps
/// a few milliseconds at a time, and sums by how much it wakes late. Where the system tells, it is also known for how
/// long the thread of the test itself waited for a processor.
#[derive(Debug)]
pub struct Stalls {
    late: Arc<AtomicU64>,
    /// What this thread had waited for a processor when the measurement began.
    waited: Duration,
}

impl Stalls {
    /// Measures from now on, until this is dropped.
    #[must_use]
    pub fn watch() -> Self {
        const STEP: Duration = Duration::from_millis(5);
        let late = Arc::<AtomicU64>::default();
        let sum = Arc::downgrade(&late);
        thread::spawn(move || {
            loop {
                let asleep = Instant::now();
                thread::sleep(STEP);
                let Some(sum) = sum.upgrade() else { return };
                // Less than a step is how precisely any machine wakes.
                let late = asleep.elapsed().saturating_sub(STEP * 2);
                sum.fetch_add(late.as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
            }
        });
        Self { late, waited: waited() }
    }

    /// Returns this limit, and twice what the machine was late until now, as the servers may be late as well. Call it on
    /// the thread that called `watch`.
    #[must_use]
    pub fn added_to(&self, limit: Duration) -> Duration {
        let late = Duration::from_micros(self.late.load(Ordering::Relaxed)) * 2;
        limit + late + waited().saturating_sub(self.waited)
    }
}

/// Returns for how long this thread has been ready to run without a processor: on Linux, the second number here. The
/// kernel's documentation has it under "Scheduler Statistics".
fn waited() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split(' ').nth(1).and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}
