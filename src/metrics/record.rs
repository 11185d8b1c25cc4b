//! Calls the recorder. None of these functions may be called under a mutex, as a recorder is foreign code.
//!
//! `none.rs` has the same items, which do nothing, for when the feature is off.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tokio::time::Instant;

use super::{BATCH_SIZE, HELD, HOLD, LOST, RENEWAL, RENEWAL_LEFT, RENEWALS, REQUESTS, WAIT, WAITING};
use crate::{Error, Key, Loss};

/// The name of the label that [`Labels`] gives.
const LOCK: &str = "lock";

/// The user's function from keys to labels, if there is one.
#[derive(Clone, Default)]
pub(crate) struct Labels(Option<Arc<LabelOf>>);

type LabelOf = dyn Fn(&Key) -> String + Send + Sync;

impl Labels {
    pub(crate) fn new(label: impl Fn(&Key) -> String + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(label)))
    }

    /// Returns the label of a lock, which its first key has. A function that panics gives none: its panic would come
    /// in the midst of obtaining a lock.
    fn of(&self, keys: &[Key]) -> Label {
        let (Some(label), Some(key)) = (&self.0, keys.first()) else { return Label::default() };
        Label(catch_unwind(AssertUnwindSafe(|| label(key).into())).ok())
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Labels").field(&self.0.is_some()).finish()
    }
}

/// The label of one lock.
#[derive(Clone, Default)]
pub(crate) struct Label(Option<Arc<str>>);

impl Label {
    fn labels(&self) -> Vec<metrics::Label> {
        self.0.iter().map(|label| metrics::Label::new(LOCK, label.clone())).collect()
    }

    fn with(&self, name: &'static str, value: &'static str) -> Vec<metrics::Label> {
        let mut labels = self.labels();
        labels.push(metrics::Label::from_static_parts(name, value));
        labels
    }
}

/// A request for a lock that is under way.
pub(crate) struct Waiting {
    began: Instant,
    label: Label,
    outcome: &'static str,
}

impl Waiting {
    pub(crate) fn begin(labels: &Labels, keys: &[Key]) -> Self {
        let label = labels.of(keys);
        gauge!(WAITING, label.labels()).increment(1.0);
        Self { began: Instant::now(), label, outcome: "dropped" }
    }

    pub(crate) fn end<T>(mut self, result: &Result<T, Error>) {
        self.outcome = match result {
            Ok(_) => "obtained",
            Err(Error::NotObtained { .. }) => "not_obtained",
            Err(_) => "failed",
        };
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        gauge!(WAITING, self.label.labels()).decrement(1.0);
        let labels = self.label.with("outcome", self.outcome);
        counter!(REQUESTS, labels.clone()).increment(1);
        histogram!(WAIT, labels).record(self.began.elapsed());
    }
}

/// A lock that is held; by default, one that isn't counted.
#[derive(Default)]
pub(crate) struct Held {
    since: Option<Instant>,
    label: Label,
}

impl Held {
    pub(crate) fn begin(labels: &Labels, keys: &[Key]) -> Self {
        let label = labels.of(keys);
        gauge!(HELD, label.labels()).increment(1.0);
        Self { since: Some(Instant::now()), label }
    }

    pub(crate) fn label(&self) -> Label {
        self.label.clone()
    }

    pub(crate) fn end(self, loss: Loss) {
        if self.since.is_some() {
            lost(&self.label, loss);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(since) = self.since {
            gauge!(HELD, self.label.labels()).decrement(1.0);
            histogram!(HOLD, self.label.labels()).record(since.elapsed());
        }
    }
}

/// A lock that was held has ended so.
pub(crate) fn lost(label: &Label, loss: Loss) {
    let loss = match loss {
        Loss::Expired => "expired",
        Loss::Taken => "taken",
        Loss::Missing => "missing",
        Loss::LimitReached => "limit_reached",
        Loss::Released => return,
    };
    counter!(LOST, label.with("loss", loss)).increment(1);
}

/// A renewal that took so long has succeeded, when so much time was left until the deadline.
pub(crate) fn renewed(label: &Label, took: Duration, left: Duration) {
    counter!(RENEWALS, label.with("outcome", "renewed")).increment(1);
    histogram!(RENEWAL, label.labels()).record(took);
    histogram!(RENEWAL_LEFT, label.labels()).record(left);
}

/// A renewal has failed.
pub(crate) fn renewal_failed(label: &Label) {
    counter!(RENEWALS, label.with("outcome", "failed")).increment(1);
}

/// A call with this many operations is sent to a server.
#[allow(clippy::cast_precision_loss, reason = "a batch is small")]
pub(crate) fn called(operations: usize) {
    histogram!(BATCH_SIZE).record(operations as f64);
}
