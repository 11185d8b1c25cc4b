use std::collections::BTreeMap;
use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tokio::time::{sleep, timeout};

use super::*;
use crate::{Error, Locker, Loss};

/// What is recorded from now on by this thread, and so by all tasks of a test's runtime.
struct Recorded {
    snapshotter: Snapshotter,
    sums: BTreeMap<String, f64>,
    _installed: metrics::LocalRecorderGuard<'static>,
}

impl Recorded {
    fn begin() -> Self {
        let recorder = Box::leak(Box::new(DebuggingRecorder::new()));
        let (snapshotter, sums) = (recorder.snapshotter(), BTreeMap::new());
        Self { snapshotter, sums, _installed: metrics::set_default_local_recorder(recorder) }
    }

    /// Returns, by `name{label=value}`, counters since the beginning, gauges as they are, and what was added to
    /// histograms since the last look.
    fn look(&mut self) -> BTreeMap<String, Vec<f64>> {
        let mut seen = BTreeMap::new();
        for (key, _unit, _description, value) in self.snapshotter.snapshot().into_vec() {
            let labels: Vec<_> = key.key().labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            let name = match labels.is_empty() {
                true => key.key().name().to_owned(),
                false => format!("{}{{{}}}", key.key().name(), labels.join(",")),
            };
            let values = match value {
                DebugValue::Counter(count) => vec![self.sum(&name, count as f64)],
                DebugValue::Gauge(change) => vec![self.sum(&name, change.into_inner())],
                DebugValue::Histogram(values) => values.into_iter().map(|value| value.into_inner()).collect(),
            };
            seen.insert(name, values);
        }
        seen
    }

    /// A look sets counters and gauges to zero.
    fn sum(&mut self, name: &str, change: f64) -> f64 {
        let sum = self.sums.entry(name.to_owned()).or_default();
        *sum += change;
        *sum
    }
}

/// Lets the tasks of the crate do what there is to do now.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

fn assert_about(values: &[f64], expected: &[f64]) {
    let is_close = values.iter().zip(expected).all(|(value, expected)| (value - expected).abs() < 0.01);
    assert!(is_close && values.len() == expected.len(), "{values:?} instead of {expected:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_counts_by_its_outcome_and_time() {
    let mut recorded = Recorded::begin();
    let locker = Locker::in_memory();
    let guard = locker.lock("k").await.unwrap();
    assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
    assert!(timeout(Duration::from_secs(3), locker.lock("k")).await.is_err());
    assert!(locker.lock("k").ttl(Duration::ZERO).await.is_err());
    let waiter = tokio::spawn({
        let locker = locker.clone();
        async move { locker.lock("k").await.unwrap().release().await.unwrap() }
    });
    sleep(Duration::from_secs(2)).await;
    let seen = recorded.look();
    assert_eq!(seen[WAITING], [1.0]);
    assert_eq!(seen["tenure_requests_total{outcome=obtained}"], [1.0]);
    assert_eq!(seen["tenure_requests_total{outcome=not_obtained}"], [1.0]);
    assert_eq!(seen["tenure_requests_total{outcome=dropped}"], [1.0]);
    assert_eq!(seen["tenure_requests_total{outcome=failed}"], [1.0]);
    assert_about(&seen["tenure_wait_seconds{outcome=dropped}"], &[3.0]);
    guard.release().await.unwrap();
    waiter.await.unwrap();
    let seen = recorded.look();
    assert_eq!(seen[WAITING], [0.0]);
    assert_eq!(seen["tenure_requests_total{outcome=obtained}"], [2.0]);
    assert_about(&seen["tenure_wait_seconds{outcome=obtained}"], &[2.0]);
}

#[tokio::test(start_paused = true)]
async fn a_lock_counts_as_held_until_its_guard_has_ended_in_whatever_way() {
    let mut recorded = Recorded::begin();
    let locker = Locker::in_memory();
    let released = locker.lock("a").await.unwrap();
    let dropped = locker.lock("b").await.unwrap();
    let detached = locker.lock("c").await.unwrap();
    let handed_over = locker.lock("d").await.unwrap();
    let expires = locker.lock("e").no_renewal().ttl(Duration::from_secs(5)).await.unwrap();
    let limited = locker.lock("f").hold_at_most(Duration::from_secs(6)).await.unwrap();
    let waiter = tokio::spawn({
        let locker = locker.clone();
        async move { locker.lock("d").await.unwrap() }
    });
    settle().await;
    assert_eq!(recorded.look()[HELD], [6.0]);
    sleep(Duration::from_secs(2)).await;
    released.release().await.unwrap();
    drop(dropped);
    let lease = detached.into_lease();
    settle().await;
    let seen = recorded.look();
    assert_eq!(seen[HELD], [3.0]);
    assert_about(&seen[HOLD], &[2.0, 2.0, 2.0]);
    let adopted = locker.adopt(lease).await.unwrap();
    drop(handed_over);
    let successor = waiter.await.unwrap();
    assert_eq!(recorded.look()[HELD], [4.0], "the lease was adopted, and d is handed over");
    assert_eq!(expires.lost().await, Loss::Expired);
    assert_eq!(limited.lost().await, Loss::LimitReached);
    drop((adopted, successor, expires, limited));
    settle().await;
    let seen = recorded.look();
    assert_eq!(seen[HELD], [0.0]);
    assert_eq!(seen["tenure_lost_total{loss=expired}"], [1.0]);
    assert_eq!(seen["tenure_lost_total{loss=limit_reached}"], [1.0]);
    assert!(!seen.keys().any(|name| name.contains("released")), "a release is no loss");
}

#[tokio::test(start_paused = true)]
async fn a_loss_that_only_the_release_finds_is_counted() {
    let mut recorded = Recorded::begin();
    let server = crate::testing::EmbeddedServer::new();
    let locker = Locker::builder().in_memory_with(&server);
    let [released, dropped, kept] = [(); 3].map(|()| locker.lock("k"));
    let released = released.await.unwrap();
    assert!(server.lose("k"));
    assert!(matches!(released.release().await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    settle().await;
    assert_eq!(recorded.look()["tenure_lost_total{loss=missing}"], [1.0]);
    let dropped = dropped.await.unwrap();
    server.give("k", "another".parse().unwrap(), Duration::from_millis(1));
    drop(dropped);
    settle().await;
    assert_eq!(recorded.look()["tenure_lost_total{loss=taken}"], [1.0]);
    // What a later call of a release finds may have happened since.
    let refused = kept.await.unwrap();
    server.go_away();
    let releasing = tokio::spawn(refused.release());
    sleep(Duration::from_millis(2_500)).await;
    server.lose("k");
    server.come_back();
    drop(releasing.await.unwrap());
    sleep(Duration::from_secs(60)).await;
    settle().await;
    let lost: f64 = recorded.look().iter().filter(|(name, _)| name.starts_with(LOST)).map(|(_, of)| of[0]).sum();
    assert!((lost - 2.0).abs() < 0.1, "{lost}");
}

#[tokio::test(start_paused = true)]
async fn a_renewal_tells_how_long_it_took_and_how_close_the_lock_was_to_its_end() {
    let mut recorded = Recorded::begin();
    let locker = Locker::builder().drift(0.0, Duration::ZERO).in_memory();
    let guard = locker.lock("k").ttl(Duration::from_secs(30)).no_renewal().await.unwrap();
    sleep(Duration::from_secs(12)).await;
    guard.renew().await.unwrap();
    let seen = recorded.look();
    assert_eq!(seen["tenure_renewals_total{outcome=renewed}"], [1.0]);
    assert_about(&seen[RENEWAL], &[0.0]);
    assert_about(&seen[RENEWAL_LEFT], &[18.0]);
    guard.release().await.unwrap();

    let guard = locker.lock("k").ttl(Duration::from_secs(30)).renew_every(Duration::from_secs(10)).await.unwrap();
    sleep(Duration::from_secs(25)).await;
    let seen = recorded.look();
    assert_eq!(seen["tenure_renewals_total{outcome=renewed}"], [3.0]);
    // Renewals of all locks fall on a grid, so the first may be early.
    assert!(seen[RENEWAL_LEFT].iter().all(|&left| (19.5..=21.5).contains(&left)), "{seen:?}");
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn labels_are_those_of_the_users_function_and_there_are_none_without() {
    let mut recorded = Recorded::begin();
    let kind = |key: &crate::Key| key.to_string().split(':').next().unwrap_or_default().to_owned();
    let locker = Locker::builder().metrics_label(kind).in_memory();
    for key in ["invoices:1", "invoices:2", "orders:1"] {
        let guard = locker.lock(key).await.unwrap();
        guard.renew().await.unwrap();
        guard.release().await.unwrap();
    }
    let seen = recorded.look();
    assert_eq!(seen["tenure_requests_total{lock=invoices,outcome=obtained}"], [2.0]);
    assert_eq!(seen["tenure_renewals_total{lock=orders,outcome=renewed}"], [1.0]);
    assert_eq!(seen["tenure_held{lock=invoices}"], [0.0]);
    assert_eq!(seen["tenure_hold_seconds{lock=orders}"].len(), 1);

    let mut recorded = Recorded::begin();
    let panics = Locker::builder().metrics_label(|_| panic!("a fault of the user's")).in_memory();
    panics.lock("k").await.unwrap().release().await.unwrap();
    Locker::in_memory().lock("k").await.unwrap().release().await.unwrap();
    let seen = recorded.look();
    assert_eq!(seen["tenure_requests_total{outcome=obtained}"], [2.0]);
    assert!(!seen.keys().any(|name| name.contains("lock=")), "{seen:?}");
}

#[test]
fn every_metric_has_a_description_and_a_row_in_the_table() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        describe();
        [WAITING, HELD].into_iter().for_each(|name| metrics::gauge!(name).set(1.0));
        [REQUESTS, LOST, RENEWALS].into_iter().for_each(|name| metrics::counter!(name).increment(1));
        let histograms = [WAIT, HOLD, RENEWAL, RENEWAL_LEFT, BATCH_SIZE];
        histograms.into_iter().for_each(|name| metrics::histogram!(name).record(1.0));
    });
    let seen = snapshotter.snapshot().into_vec();
    assert_eq!(seen.len(), 10);
    let source = include_str!("../metrics.rs");
    for (key, unit, description, _) in seen {
        let name = key.key().name();
        assert!(unit.is_some() && description.is_some(), "{name}");
        assert!(source.contains(&format!("//! | [`{name}`](")), "{name} has no row");
    }
    assert_eq!(source.matches("\npub const ").count(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_counted() {
    let mut recorded = Recorded::begin();
    let locker = Locker::in_memory();
    let guard = locker.lock("k").no_renewal().await.unwrap();
    guard.hold().failed(&std::sync::Arc::new(Error::timeout()));
    assert_eq!(recorded.look()["tenure_renewals_total{outcome=failed}"], [1.0]);
}
