//! What a locker shares with its requests, its guards and their background work.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::cleanups::Cleanups;
use super::isolated::Background;
use super::late_releases::LateReleases;
use crate::acquire::queue::Queues;
use crate::acquire::supervisor::Supervisor;
use crate::hold::scheduler::Schedulers;
use crate::hold::timing::{Drift, Renewal};
use crate::metrics::Labels;
use crate::store::Store;
use crate::{Error, Retry};

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Box<dyn Store>,
    pub(crate) command_timeout: Duration,
    /// Counts the releases in flight and all pending cleanups, so that closing can wait for them.
    pub(crate) releases: TaskTracker,
    pub(crate) cleanups: Cleanups,
    pub(crate) late_releases: LateReleases,
    /// The waiters of this process, by key.
    pub(crate) queues: Queues,
    pub(crate) supervisor: Supervisor,
    /// The start of the grid of renewal times.
    pub(crate) origin: Instant,
    /// The schedulers of renewals: one for each runtime.
    pub(crate) schedulers: Schedulers,
    /// Where renewers run.
    pub(crate) background: Background,
    pub(crate) settings: Settings,
    /// Fires when the locker is closed.
    pub(crate) closed: CancellationToken,
}

/// The settings that requests start from.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) ttl: Duration,
    pub(crate) renewal: Renewal,
    pub(crate) retry: Option<Retry>,
    pub(crate) drift: Drift,
    pub(crate) fenced: bool,
    /// Whether locks may be handed over in this process without asking the server.
    pub(crate) local_hand_over: bool,
    pub(crate) poll_every: Duration,
    pub(crate) metrics: Labels,
}

impl Shared {
    /// Returns the runtime for background work: our own, or the caller's.
    pub(crate) fn runtime(&self) -> Result<Handle, Error> {
        match &self.background {
            Background::Isolated(isolated) => Ok(isolated.handle().clone()),
            Background::WithCallers => Handle::try_current().map_err(|_| Error::NoRuntime),
            Background::NoThread => Err(Error::NoRuntime),
        }
    }

    /// Fails outside a tokio runtime. Every call uses the clock of the caller's runtime, even if background work has a
    /// runtime of its own, so every call checks this first.
    pub(crate) fn check_runtime() -> Result<(), Error> {
        Handle::try_current().map(drop).map_err(|_| Error::NoRuntime)
    }

    /// Returns how long after sending a request the server may still run it: the timeout of its call, and as much again
    /// for the drift of the server's clock since its last reply.
    pub(crate) fn may_run_for(&self) -> Duration {
        self.command_timeout.saturating_mul(2)
    }
}
