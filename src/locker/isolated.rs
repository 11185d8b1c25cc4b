//! A thread and a runtime of our own, so that no blocked worker of the user's can hold up a renewal.

use std::sync::mpsc;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::Error;

/// Runs until it is dropped. Its thread ends by itself then: nobody waits for it.
#[derive(Debug)]
pub(crate) struct Isolated {
    handle: Handle,
    _stop: DropGuard,
}

impl Isolated {
    /// # Errors
    ///
    /// [`Error::NoRuntime`] where the system has no thread left for it.
    pub(crate) fn start() -> Result<Self, Error> {
        Self::start_in(thread::Builder::new())
    }

    fn start_in(thread: thread::Builder) -> Result<Self, Error> {
        let (started, runtime) = mpsc::sync_channel(1);
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        // The runtime lives and dies in its thread: it must not be dropped in another, which may be a worker of the
        // user's.
        let run = move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            // Nobody listens any more: then there is nothing to run.
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than there is room for.
    fn no_thread() -> thread::Builder {
        thread::Builder::new().stack_size(1 << 60)
    }

    #[tokio::test]
    async fn where_there_is_no_thread_left_nothing_panics() {
        assert!(matches!(Isolated::start_in(no_thread()), Err(Error::NoRuntime)));
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
