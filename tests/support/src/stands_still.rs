//! A runtime that nobody drives.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::runtime::{Builder, Handle, Runtime};

/// A current-thread runtime that nobody drives: what is spawned on it never begins. It may be dropped anywhere.
pub struct StandsStill(Option<Runtime>);

impl StandsStill {
    /// # Panics
    ///
    /// When the system has no room for one.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it does something")]
    pub fn new() -> Self {
        Self(Some(Builder::new_current_thread().enable_all().build().expect("a runtime")))
    }

    /// # Panics
    ///
    /// Never.
    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is there until it is dropped").handle()
    }

    /// Polls the future once, as a task of this runtime that is polled no more after that.
    pub fn poll<T>(&self, future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        let _entered = self.handle().enter();
        future.poll(&mut Context::from_waker(Waker::noop()))
    }
}

impl Drop for StandsStill {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Doesn't block, which an async context would forbid.
            runtime.shutdown_background();
        }
    }
}
