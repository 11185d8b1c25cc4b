//! A thread and a runtime of our own, so that no blocked worker of the application can hold up a renewal.

use std::sync::mpsc;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::Error;

/// Where a locker's background work runs.
#[derive(Debug)]
pub(crate) enum Background {
    /// On the runtime of each caller.
    WithCallers,
    Isolated(Isolated),
    /// Nowhere: the locker was to be isolated, and there is no thread for it. Every request fails.
    NoThread,
}

impl Background {
    /// Returns where it runs after what the start of a thread has returned, if one was wanted.
    pub(crate) fn after(started: Option<Result<Isolated, Error>>) -> Self {
        match started {
            None => Self::WithCallers,
            Some(Ok(isolated)) => Self::Isolated(isolated),
            Some(Err(_)) => Self::NoThread,
        }
    }
}

/// A runtime that runs until this is dropped. Its thread then ends by itself: nobody waits for it.
#[derive(Debug)]
pub(crate) struct Isolated {
    handle: Handle,
    _stop: DropGuard,
}

impl Isolated {
    /// Starts the thread and its runtime.
    ///
    /// # Errors
    ///
    /// [`Error::NoRuntime`] if the system has no thread left for it.
    pub(crate) fn start() -> Result<Self, Error> {
        Self::start_in(thread::Builder::new())
    }

    fn start_in(thread: thread::Builder) -> Result<Self, Error> {
        let (started, runtime) = mpsc::sync_channel(1);
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        // The runtime is created and dropped in its own thread: another thread may be a worker of the application.
        let run = move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            // If nobody receives the handle any longer, there is nothing to run.
            let is_wanted = started.send(runtime.as_ref().ok().map(|runtime| runtime.handle().clone())).is_ok();
            if let (Ok(runtime), true) = (runtime, is_wanted) {
                runtime.block_on(stopped);
            }
        };
        thread.name("tenure".into()).spawn(run).map_err(|_| Error::NoRuntime)?;
        let handle = runtime.recv().ok().flatten().ok_or(Error::NoRuntime)?;
        Ok(Self { handle, _stop: stop.drop_guard() })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Returns whether the caller runs on this thread.
    pub(crate) fn is_here(&self) -> bool {
        Handle::try_current().is_ok_and(|here| here.id() == self.handle.id())
    }

    /// Starts where there is no thread left.
    #[cfg(test)]
    pub(crate) fn start_without_a_thread() -> Result<Self, Error> {
        // It needs more memory than there is.
        Self::start_in(thread::Builder::new().stack_size(1 << 60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_there_is_no_thread_left_nothing_panics() {
        assert!(matches!(Isolated::start_without_a_thread(), Err(Error::NoRuntime)));
    }

    #[tokio::test]
    async fn it_runs_tasks_until_it_is_dropped() {
        let isolated = Isolated::start().unwrap();
        assert_eq!(isolated.handle().spawn(async { 42 }).await.unwrap(), 42);
        let cut_off = isolated.handle().spawn(std::future::pending::<()>());
        drop(isolated);
        assert!(cut_off.await.unwrap_err().is_cancelled());
    }
}
