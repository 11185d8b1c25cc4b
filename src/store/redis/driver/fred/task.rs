//! The task that drives a connection, and where it runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, FredResult};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::Error;

/// Knows the runtime that a connection is driven on. Doesn't keep the connection open.
pub(super) struct Home(Option<(Weak<DriverTask>, Client)>);

impl Home {
    pub(super) fn of(driver: Option<&Arc<DriverTask>>, client: &Client) -> Self {
        Self(driver.map(|driver| (Arc::downgrade(driver), client.clone())))
    }

    /// Returns the runtime that the connection is driven on, if the connection is ours and still exists.
    pub(super) fn runtime(&self) -> Option<Handle> {
        let (driver, client) = self.0.as_ref()?;
        Some(driver.upgrade()?.go_on(client))
    }
}

/// The task that drives a connection, on the runtime that first needed it.
pub(super) struct DriverTask(Mutex<Driving>);

struct Driving {
    task: AbortOnDropHandle<FredResult<()>>,
    runtime: Handle,
    /// A task that shows whether that runtime runs its tasks, and when it was spawned.
    probe: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl DriverTask {
    pub(super) fn new(task: AbortOnDropHandle<FredResult<()>>) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(Self(Mutex::new(Driving { task, runtime, probe: None })))
    }

    /// Starts the task again if fred has ended it, as it does after some errors, or if its runtime has ended: then on
    /// the runtime of the caller. Otherwise every call would fail. Returns the runtime that it runs on.
    pub(super) fn go_on(&self, client: &Client) -> Handle {
        let mut driving = self.driving();
        if driving.task.is_finished() {
            driving.start_again(client);
        }
        driving.runtime.clone()
    }

    /// Moves the task to the runtime of the caller, whose call has had no reply, if the task's own runtime stands
    /// still: a current-thread runtime outside of `block_on`, or one that is blocked.
    pub(super) fn go_on_here_if_stalled(&self, client: &Client, patience: Duration) {
        let mut driving = self.driving();
        let here = match Handle::try_current() {
            Ok(here) if here.id() != driving.runtime.id() => here,
            _ => return,
        };
        match &driving.probe {
            Some((since, probe)) if !probe.is_finished() => {
                if since.elapsed() >= patience {
                    tracing::debug!(name: "tenure.revive", "the connection's runtime stands still");
                    driving.start(client, here);
                }
            }
            _ => {
                let probe = AbortOnDropHandle::new(driving.runtime.spawn(async {}));
                driving.probe = Some((Instant::now(), probe));
            }
        }
    }

    fn driving(&self) -> MutexGuard<'_, Driving> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driving {
    fn start_again(&mut self, client: &Client) {
        tracing::debug!(name: "tenure.revive", "nothing drives the connection any more; it begins again");
        self.start(client, self.runtime.clone());
        // A runtime that has ended drops at once what is spawned on it.
        if let (true, Ok(here)) = (self.task.is_finished(), Handle::try_current()) {
            self.start(client, here);
        }
    }

    fn start(&mut self, client: &Client, runtime: Handle) {
        let entered = runtime.enter();
        self.task = AbortOnDropHandle::new(client.connect());
        drop(entered);
        (self.runtime, self.probe) = (runtime, None);
    }
}
