//! A thread and a runtime of our own, so that no blocked worker of the user's can hold up a renewal.

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
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|_| Error::NoRuntime)?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        thread::Builder::new()
            .name("tenure".into())
            .spawn(move || runtime.block_on(stopped))
            .map_err(|_| Error::NoRuntime)?;
        Ok(Self { handle, _stop: stop.drop_guard() })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}
