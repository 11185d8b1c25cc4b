//! The task that drives a connection, and where it runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::Error;

/// Knows the runtime that a connection is driven on. Doesn't keep the connection open.
pub(super) struct Home<T>(Option<Weak<DriverTask<T>>>);

impl<T: Send + 'static> Home<T> {
    pub(super) fn of(driver: Option<&Arc<DriverTask<T>>>) -> Self {
        Self(driver.map(Arc::downgrade))
    }

    /// Returns the runtime that the connection is driven on, if the connection is ours and still exists.
    pub(super) fn runtime(&self) -> Option<Handle> {
        Some(self.0.as_ref()?.upgrade()?.go_on())
    }
}

/// The task that drives a connection, on the runtime that first needed it.
pub(super) struct DriverTask<T> {
    driving: Mutex<Driving<T>>,
    /// Spawns the task on the runtime that it is called in.
    start: Box<dyn Fn() -> JoinHandle<T> + Send + Sync>,
}

struct Driving<T> {
    task: AbortOnDropHandle<T>,
    runtime: Handle,
    /// A task that shows whether that runtime runs its tasks, and when it was spawned.
    probe: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl<T: Send + 'static> DriverTask<T> {
    /// Owns the task, which runs on the caller's runtime, and starts it again with `start` when it has ended.
    pub(super) fn new(
        task: AbortOnDropHandle<T>,
        start: impl Fn() -> JoinHandle<T> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(Self { driving: Mutex::new(Driving { task, runtime, probe: None }), start: Box::new(start) })
    }

    /// Starts the task again if it has ended, as fred's does after some errors, or if its runtime has ended: then on
    /// the runtime of the caller. Otherwise every call would fail. Returns the runtime that it runs on.
    pub(super) fn go_on(&self) -> Handle {
        let mut driving = self.driving();
        if driving.task.is_finished() {
            crate::report::debug!(name: "tenure.revive", "the connection's task ended; restarting it");
            let runtime = driving.runtime.clone();
            self.start(&mut driving, runtime);
            // A runtime that has ended drops at once what is spawned on it.
            if let (true, Ok(here)) = (driving.task.is_finished(), Handle::try_current()) {
                self.start(&mut driving, here);
            }
        }
        driving.runtime.clone()
    }

    /// Moves the task to the runtime of the caller, whose call has had no reply, if the task's own runtime stands
    /// still: a current-thread runtime outside of `block_on`, or one that is blocked.
    pub(super) fn go_on_here_if_stalled(&self, patience: Duration) {
        let mut driving = self.driving();
        let here = match Handle::try_current() {
            Ok(here) if here.id() != driving.runtime.id() => here,
            _ => return,
        };
        match &driving.probe {
            Some((since, probe)) if !probe.is_finished() => {
                if since.elapsed() >= patience {
                    crate::report::debug!(
                        name: "tenure.revive",
                        "the connection's runtime is stalled; moving the connection"
                    );
                    self.start(&mut driving, here);
                }
            }
            _ => {
                let probe = AbortOnDropHandle::new(driving.runtime.spawn(async {}));
                driving.probe = Some((Instant::now(), probe));
            }
        }
    }

    fn start(&self, driving: &mut Driving<T>, runtime: Handle) {
        let entered = runtime.enter();
        driving.task = AbortOnDropHandle::new((self.start)());
        drop(entered);
        (driving.runtime, driving.probe) = (runtime, None);
    }

    fn driving(&self) -> MutexGuard<'_, Driving<T>> {
        self.driving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
