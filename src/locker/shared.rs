//! What a locker shares with its requests, its guards and everything that works for them in the background.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::cleanups::Cleanups;
use super::isolated::Isolated;
use crate::acquire::queue::Queues;
use crate::acquire::supervisor::Supervisor;
use crate::hold::scheduler::Schedulers;
use crate::hold::timing::{Drift, Renewal};
use crate::store::Store;
use crate::{Error, Retry};

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Box<dyn Store>,
    pub(crate) command_timeout: Duration,
    /// Counts the releases that are in flight, and all that is pending, so that closing can wait for them.
    pub(crate) releases: TaskTracker,
    pub(crate) cleanups: Cleanups,
    /// Who waits for what in this process.
    pub(crate) queues: Queues,
    pub(crate) supervisor: Supervisor,
    /// Where the grid of renewals begins.
    pub(crate) origin: Instant,
    /// Keepers that have nothing to do for now.
    pub(crate) schedulers: Schedulers,
    /// The runtime of their own that renewers run on, where the user wants one.
    pub(crate) isolated: Option<Isolated>,
    pub(crate) settings: Settings,
    /// Fires when the locker is closed.
    pub(crate) closed: CancellationToken,
}

/// What requests start from.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) ttl: Duration,
    pub(crate) renewal: Renewal,
    pub(crate) retry: Option<Retry>,
    pub(crate) drift: Drift,
    pub(crate) fenced: bool,
    pub(crate) poll_every: Duration,
}

impl Shared {
    /// The runtime that background work belongs on: our own, or the caller's.
    pub(crate) fn runtime(&self) -> Result<Handle, Error> {
        match &self.isolated {
            Some(isolated) => Ok(isolated.handle().clone()),
            None => Handle::try_current().map_err(|_| Error::NoRuntime),
        }
    }

    /// Every call waits by the clock of a tokio runtime, also where background work has one of its own: to be asked
    /// first.
    pub(crate) fn check_runtime() -> Result<(), Error> {
        Handle::try_current().map(drop).map_err(|_| Error::NoRuntime)
    }

    /// For how long the server may run a request after it was sent: the timeout of its call, and as much again for what
    /// our idea of the server's clock has drifted by since it last answered.
    pub(crate) fn patience(&self) -> Duration {
        self.command_timeout.saturating_mul(2)
    }
}
