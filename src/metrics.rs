//! What the crate counts and measures; with the feature `metrics`.
//!
//! Everything goes to the recorder of the [`metrics`](https://docs.rs/metrics/0.24) facade (0.24): to Prometheus,
//! StatsD, or whatever the program has installed. Install the recorder before the first lock is requested, and then
//! call [`describe`]. With no recorder, or without the feature, nothing is measured.
//!
//! | metric | kind | labels | what it is |
//! | --- | --- | --- | --- |
//! | [`tenure_requests_total`](REQUESTS) | counter | `outcome` | requests for a lock that have ended |
//! | [`tenure_wait_seconds`](WAIT) | histogram | `outcome` | how long each of them took |
//! | [`tenure_waiting`](WAITING) | gauge | | requests that are under way now |
//! | [`tenure_held`](HELD) | gauge | | locks that are held now |
//! | [`tenure_hold_seconds`](HOLD) | histogram | | how long locks were held |
//! | [`tenure_lost_total`](LOST) | counter | `loss` | locks that were lost |
//! | [`tenure_renewals_total`](RENEWALS) | counter | `outcome` | renewals |
//! | [`tenure_renewal_seconds`](RENEWAL) | histogram | | how long a renewal took |
//! | [`tenure_renewal_left_seconds`](RENEWAL_LEFT) | histogram | | how long the lock would have been held without it |
//! | [`tenure_batch_size`](BATCH_SIZE) | histogram | | operations in one call to a server |
//!
//! Labels have few values, and no metric shows a key. To tell kinds of locks apart, give the locker a function from
//! keys to labels: [`LockerBuilder::metrics_label`](crate::LockerBuilder::metrics_label).
//!
//! # Alerts worth having
//!
//! For Prometheus; `recipes/prometheus` in the repository is a program that exports all of this, with these rules as a
//! file and a dashboard for Grafana.
//!
//! 1. Work was cut off, or was not exclusive:
//!    `sum by (instance, loss) (increase(tenure_lost_total{loss!="limit_reached"}[10m])) > 0`. The first loss of its
//!    kind in a process is no increase: the counter appears, and is 1. So add `or sum by (instance, loss)
//!    (tenure_lost_total{loss!="limit_reached"} unless tenure_lost_total offset 10m) > 0`.
//! 2. Locks will be lost if it gets any worse: less than half of the usual time, which is two thirds of the ttl, is
//!    left when renewals arrive. `histogram_quantile(0.01, sum by (instance, lock, le)
//!    (rate(tenure_renewal_left_seconds_bucket[5m]))) < 0.5 * histogram_quantile(0.5, sum by (instance, lock, le)
//!    (rate(tenure_renewal_left_seconds_bucket[1d])))`. Locks with different ttls need labels of their own. After half
//!    a day, slow renewals are the usual ones; the file compares with the day before, where there was one.
//! 3. Waiters don't get their turn:
//!    `histogram_quantile(0.99, sum by (le) (rate(tenure_wait_seconds_bucket[5m]))) > 60`, with the longest wait that
//!    your callers accept; or, for requests that wait without a limit, `sum by (instance, lock)
//!    (max_over_time(tenure_waiting[10m])) > 0 unless on (instance, lock) sum by (instance, lock)
//!    (increase(tenure_requests_total[10m])) > 0`.
//!
//! # Examples
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use metrics_util::debugging::DebuggingRecorder; // or, say, metrics_exporter_prometheus
//!
//! let recorder = DebuggingRecorder::new();
//! let snapshotter = recorder.snapshotter();
//! recorder.install()?;
//! tenure::metrics::describe();
//!
//! let locker = tenure::Locker::in_memory();
//! locker.lock("invoices:42").await?.release().await?;
//!
//! let seen = snapshotter.snapshot().into_vec();
//! assert!(seen.iter().any(|(key, ..)| key.key().name() == tenure::metrics::HOLD));
//! # Ok(())
//! # }
//! ```

mod record;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub(crate) use self::record::{Held, Label, Labels, Waiting, called, lost, renewal_failed, renewed};

/// Counts requests for a lock that have ended. `outcome` is one of
///
/// - `obtained`: the lock was obtained;
/// - `not_obtained`: another held it, for as long as the request would wait;
/// - `failed`: any other error, such as a server that can't be reached;
/// - `dropped`: the request's future was dropped before.
pub const REQUESTS: &str = "tenure_requests_total";

/// A histogram of how long requests took from their first poll to their end, in seconds; with the labels of
/// [`REQUESTS`].
pub const WAIT: &str = "tenure_wait_seconds";

/// The number of requests for a lock that are under way.
pub const WAITING: &str = "tenure_waiting";

/// The number of locks that are held: obtained or adopted, and not yet released, lost or turned into a lease.
pub const HELD: &str = "tenure_held";

/// A histogram of how long locks were held, in seconds: from the moment a guard had the lock to its release or its
/// loss.
pub const HOLD: &str = "tenure_hold_seconds";

/// Counts locks that were lost, also where only the release has found that. `loss` is the [`Loss`](crate::Loss):
/// `expired`, `taken`, `missing` or `limit_reached`.
pub const LOST: &str = "tenure_lost_total";

/// Counts renewals, in the background and by calls of a guard. `outcome` is `renewed`, or `failed` if it is not known
/// whether the server has renewed the lock. A failed renewal is tried again until the lock's deadline.
pub const RENEWALS: &str = "tenure_renewals_total";

/// A histogram of how long successful renewals took, in seconds: from the moment before one was sent until the reply
/// counted.
pub const RENEWAL: &str = "tenure_renewal_seconds";

/// A histogram of how much time was left until the lock's deadline when a renewal had succeeded, in seconds. It is how
/// close the lock was to being lost: usually two thirds of the ttl.
pub const RENEWAL_LEFT: &str = "tenure_renewal_left_seconds";

/// A histogram of how many operations one call to a server had: those of many tasks share calls.
pub const BATCH_SIZE: &str = "tenure_batch_size";

/// Gives the recorder the unit and a description of each metric. Call it once, after the recorder is installed. The
/// [module](self) has an example.
pub fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "Requests for a lock that have ended, by outcome");
    describe_histogram!(WAIT, Unit::Seconds, "How long requests for a lock took, by outcome");
    describe_gauge!(WAITING, Unit::Count, "Requests for a lock that are under way");
    describe_gauge!(HELD, Unit::Count, "Locks that are held");
    describe_histogram!(HOLD, Unit::Seconds, "How long locks were held");
    describe_counter!(LOST, Unit::Count, "Locks that were lost, by loss");
    describe_counter!(RENEWALS, Unit::Count, "Renewals, by outcome");
    describe_histogram!(RENEWAL, Unit::Seconds, "How long successful renewals took");
    describe_histogram!(RENEWAL_LEFT, Unit::Seconds, "Time left until the deadline when a renewal had succeeded");
    describe_histogram!(BATCH_SIZE, Unit::Count, "Operations in one call to a server");
}

#[cfg(test)]
mod tests;
