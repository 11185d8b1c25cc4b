use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Measures for how long a busy machine holds this process up, for bounds that must hold by the clock: a thread sleeps
/// a few milliseconds at a time, and sums by how much it wakes late.
#[derive(Debug)]
pub struct Stalls(Arc<AtomicU64>);

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
        Self(late)
    }

    /// Returns this limit, and twice what the machine was late until now: the servers may be late as well.
    #[must_use]
    pub fn added_to(&self, limit: Duration) -> Duration {
        limit + Duration::from_micros(self.0.load(Ordering::Relaxed)) * 2
    }
}
