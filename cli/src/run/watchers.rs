//! The watcher of a command, and those that take its place.
//!
//! 1. A watcher that is gone, or takes no more lines, is replaced at once; but no more often than every [`PACE`], also
//!    where none can be started.
//! 2. The old one is killed first, so that no old line of it can end the group.

use std::io::{self, ErrorKind};
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::Instant;

use super::ending::Plan;
use super::group::Group;
use super::watcher::Watcher;

/// The shortest time between two replacements.
pub(super) const PACE: Duration = Duration::from_secs(1);

/// What became of telling the watcher.
#[derive(Debug)]
pub(super) enum Told {
    /// A watcher knows the deadline.
    Yes,
    /// No watcher knows it. Another is started when it is time.
    Later,
    /// No watcher knows it, as no other could be started now.
    Failed(io::Error),
}

/// The watcher, and what is known of those before it.
pub(super) struct Watchers {
    start: fn() -> io::Result<Watcher>,
    /// `None` while it is gone and could not be replaced.
    watcher: Option<Watcher>,
    /// When a watcher was last replaced, or should have been.
    replaced_at: Option<Instant>,
}

impl Watchers {
    /// Starts the first one.
    ///
    /// # Errors
    ///
    /// Those of [`Watcher::start`].
    pub(super) fn start() -> io::Result<Self> {
        Self::start_by(Watcher::start)
    }

    fn start_by(start: fn() -> io::Result<Watcher>) -> io::Result<Self> {
        Ok(Self { start, watcher: Some(start()?), replaced_at: None })
    }

    /// Tells the watcher of the group, and until when that may run. Replaces a watcher that can't be told.
    pub(super) fn tell(&mut self, group: &Group, plan: &Plan, deadline: Instant) -> Told {
        if self.watcher.as_mut().is_some_and(|watcher| watcher.tell(group, plan, deadline)) {
            return Told::Yes;
        }
        if let Some(watcher) = self.watcher.take() {
            watcher.done();
        }
        let now = Instant::now();
        if self.replaced_at.is_some_and(|last| now < last + PACE) {
            return Told::Later;
        }
        self.replaced_at = Some(now);
        let started = (self.start)().and_then(|mut watcher| match watcher.tell(group, plan, deadline) {
            true => Ok(watcher),
            false => {
                watcher.done();
                Err(ErrorKind::BrokenPipe.into())
            }
        });
        match started {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                Told::Yes
            }
            Err(error) => Told::Failed(error),
        }
    }

    /// Returns whether the watcher has begun to end the group, as it does where we are stopped for too long.
    pub(super) fn has_acted(&mut self) -> bool {
        self.watcher.as_mut().is_some_and(Watcher::has_acted)
    }

    /// Reaps the watcher if it has ended, so that the next [`tell`](Self::tell) replaces it.
    pub(super) fn reap(&mut self) {
        if self.watcher.as_mut().is_some_and(Watcher::has_ended) {
            self.watcher = None;
        }
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        self.watcher.as_ref().and_then(Watcher::pid)
    }

    /// Ends the watcher, as the group is gone.
    pub(super) fn done(self) {
        if let Some(watcher) = self.watcher {
            watcher.done();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nix::sys::signal::{Signal, kill};
    use tokio::time::advance;

    use super::*;
    use crate::run::ending::tests::plan;

    fn shell(script: &str) -> io::Result<Watcher> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Watcher::spawn(command)
    }

    fn tell(watchers: &mut Watchers, deadline: Instant) -> Told {
        watchers.tell(&Group::of(7), &plan(&[]).unwrap(), deadline)
    }

    /// Waits until the watcher has ended, without having it replaced.
    fn wait_for_its_end(watchers: &mut Watchers) {
        while watchers.watcher.as_mut().is_some_and(|watcher| !watcher.has_ended()) {
            std::thread::yield_now();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_that_has_ended_is_replaced_though_it_was_told_the_deadline() {
        let mut watchers = Watchers::start_by(|| shell("exec cat")).unwrap();
        let deadline = Instant::now() + PACE;
        assert!(matches!(tell(&mut watchers, deadline), Told::Yes));
        let first = watchers.pid();
        watchers.reap();
        assert_eq!(watchers.pid(), first);
        kill(first.unwrap(), Signal::SIGKILL).unwrap();
        wait_for_its_end(&mut watchers);
        watchers.reap();
        assert!(watchers.pid().is_none());
        assert!(matches!(tell(&mut watchers, deadline), Told::Yes));
        assert!(watchers.pid().is_some_and(|second| Some(second) != first));
        assert!(!watchers.has_acted());
        watchers.done();
    }

    #[tokio::test(start_paused = true)]
    async fn watchers_that_end_at_once_or_cannot_be_started_are_replaced_once_per_second() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let mut watchers = Watchers::start_by(|| shell("exec cat")).unwrap();
        for start in [
            || {
                STARTED.fetch_add(1, Ordering::Relaxed);
                shell("read line")
            },
            || {
                STARTED.fetch_add(1, Ordering::Relaxed);
                Err(ErrorKind::WouldBlock.into())
            },
        ] {
            STARTED.store(0, Ordering::Relaxed);
            watchers.start = start;
            advance(PACE).await;
            for _ in 0..30 {
                watchers.watcher.take().into_iter().for_each(Watcher::done);
                tell(&mut watchers, Instant::now());
                advance(PACE / 10).await;
            }
            assert_eq!(STARTED.load(Ordering::Relaxed), 3);
        }
        assert!(matches!(tell(&mut watchers, Instant::now()), Told::Failed(_)));
        assert!(matches!(tell(&mut watchers, Instant::now()), Told::Later));
    }
}
