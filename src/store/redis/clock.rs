//! An estimate of the server's clock, good enough to tell the server until when it may run a request.
//!
//! Every reply carries the server's time, which the server read before the reply arrived. So the estimate is never
//! ahead of the server's clock, and behind it by at most the time that the reply took. A request that the server
//! refuses for that reason, or because its clock was set forward, or because another server replies now, has not run.
//! Its reply carries the time as well, and the request is sent again.
//!
//! Undoing an attempt doesn't depend on the estimate: it goes on until the server's own clock has passed the time that
//! the request carried. An exact ttl of unknown outcome does (`hold.rs`). For it we assume that a reading is not older
//! than [`TRUSTED`], that clocks are not set back, and that the clocks of a cluster's nodes differ by less than the
//! command timeout.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long the best reading is kept. Clocks drift by less than a millisecond in this time.
const KEPT: Duration = Duration::from_secs(1);

/// How long a reading is valid. Clocks that are wrong by 500 ppm, the most that is corrected for, drift by 0.3 s in
/// this time.
const TRUSTED: Duration = Duration::from_secs(600);

/// A server's clock, as its replies show it.
#[derive(Debug)]
pub(super) struct ServerClock {
    /// The instant that times are counted from.
    origin: Instant,
    reading: Mutex<Option<Reading>>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// The server's time, less ours.
    offset: i64,
    taken: Instant,
}

impl ServerClock {
    pub(super) fn new() -> Self {
        Self { origin: Instant::now(), reading: Mutex::new(None) }
    }

    /// Notes the server's time from a reply that has just arrived.
    pub(super) fn learn(&self, server_ms: u64) -> Reading {
        let taken = Instant::now();
        let offset = i64::try_from(server_ms).unwrap_or(i64::MAX).saturating_sub(self.millis(taken));
        let new = Reading { offset, taken };
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        // Keeps the reading of the reply that arrived fastest.
        let is_better = |old: &Reading| offset >= old.offset || taken.saturating_duration_since(old.taken) > KEPT;
        if reading.as_ref().is_none_or(is_better) {
            *reading = Some(new);
        }
        new
    }

    pub(super) fn reading(&self, now: Instant) -> Option<Reading> {
        let reading = *self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        reading.filter(|reading| now.saturating_duration_since(reading.taken) < TRUSTED)
    }

    /// Returns what the server's clock shows at that instant, by this reading; 0, which is long ago, without a reading.
    pub(super) fn at(&self, instant: Instant, reading: Option<Reading>) -> u64 {
        let shown = reading.map(|reading| self.millis(instant).saturating_add(reading.offset));
        shown.map_or(0, |shown| u64::try_from(shown).unwrap_or(0))
    }

    fn millis(&self, instant: Instant) -> i64 {
        i64::try_from(instant.saturating_duration_since(self.origin).as_millis()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_whose_clock_is_unknown_runs_nothing() {
        let clock = ServerClock::new();
        assert_eq!(clock.at(Instant::now() + ms(5_000), clock.reading(Instant::now())), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn time_passes_at_the_server_as_it_does_here() {
        let clock = ServerClock::new();
        advance(ms(700)).await;
        clock.learn(1_000_000);
        advance(ms(50)).await;
        assert_eq!(clock.at(Instant::now() + ms(300), clock.reading(Instant::now())), 1_000_350);
    }

    #[tokio::test(start_paused = true)]
    async fn the_reply_that_came_fastest_counts_for_a_while_and_then_a_clock_that_was_set_back() {
        let clock = ServerClock::new();
        clock.learn(1_000_000);
        advance(ms(400)).await;
        // Read 300 ms before it arrived.
        clock.learn(1_000_100);
        assert_eq!(clock.at(Instant::now(), clock.reading(Instant::now())), 1_000_400);
        advance(ms(700)).await;
        clock.learn(900_000);
        assert_eq!(clock.at(Instant::now(), clock.reading(Instant::now())), 900_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_forward_counts_at_once() {
        let clock = ServerClock::new();
        clock.learn(1_000_000);
        clock.learn(5_000_000);
        assert_eq!(clock.at(Instant::now(), clock.reading(Instant::now())), 5_000_000);
    }
}
