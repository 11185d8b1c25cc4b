//! The watcher of a command, and those that take its place.
//!
//! 1. A watcher that is gone, or takes no more lines, is replaced at once; but no more often than every [`PACE`], also
//!    where none can be started.
//! 2. The old one is killed first, so that no old line of it can end the group. Nothing waits for its end.
//! 3. Whether any of them has begun to end the group is remembered: its process may be gone when we ask.

use std::io::{self, ErrorKind};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::time::Instant;

use super::ending::Plan;
use super::group::Group;
use super::watcher::{Acted, Watcher};

/// The shortest time between two replacements.
pub(super) const PACE: Duration = Duration::from_secs(1);

/// What a watcher sends to the group.
const SENT: [i32; 2] = [Signal::SIGTERM as i32, Signal::SIGKILL as i32];

/// What became of telling the watcher.
#[derive(Debug)]
pub(super) enum Told {
    /// The watcher knows the deadline.
    Yes,
    /// Another was started, and knows it.
    Replaced,
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
    /// Whether one of them has begun to end the group, as far as we have asked.
    acted: Option<Acted>,
}

impl Watchers {
    /// Starts the first one, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Those of [`Watcher::start`] and [`Watcher::ready`].
    pub(super) async fn start() -> io::Result<Self> {
        Self::start_by(Watcher::start)?.ready().await
    }

    async fn ready(mut self) -> io::Result<Self> {
        if let Some(watcher) = &mut self.watcher
            && let Err(error) = watcher.ready().await
        {
            self.done();
            return Err(error);
        }
        Ok(self)
    }

    fn start_by(start: fn() -> io::Result<Watcher>) -> io::Result<Self> {
        Ok(Self { start, watcher: Some(start()?), replaced_at: None, acted: None })
    }

    /// Tells the watcher of the group, and until when that may run. Replaces a watcher that can't be told.
    pub(super) fn tell(&mut self, group: &Group, plan: &Plan, deadline: Instant) -> Told {
        if self.watcher.as_mut().is_some_and(|watcher| watcher.tell(group, plan, deadline)) {
            return Told::Yes;
        }
        if let Some(mut watcher) = self.watcher.take() {
            self.acted = self.acted.max(watcher.acted());
            watcher.kill();
        }
        let now = Instant::now();
        if self.replaced_at.is_some_and(|last| now < last + PACE) {
            return Told::Later;
        }
        self.replaced_at = Some(now);
        let started = (self.start)().and_then(|mut watcher| match watcher.tell(group, plan, deadline) {
            true => Ok(watcher),
            false => {
                watcher.kill();
                Err(ErrorKind::BrokenPipe.into())
            }
        });
        match started {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                Told::Replaced
            }
            Err(error) => Told::Failed(error),
        }
    }

    /// Returns whether one of them has ended the command, whose status is this: as they do where we are stopped for too
    /// long.
    pub(super) fn have_ended(&mut self, status: ExitStatus) -> bool {
        match self.acted() {
            None => false,
            Some(Acted::OnRunning) => true,
            // It may have run a little longer than was known. What exits with a code has not ended of a signal.
            Some(Acted::OnEnded) => status.signal().is_some_and(|signal| SENT.contains(&signal)),
        }
    }

    fn acted(&mut self) -> Option<Acted> {
        self.acted = self.acted.max(self.watcher.as_mut().and_then(Watcher::acted));
        self.acted
    }

    /// Reaps the watcher if it has ended, so that the next [`tell`](Self::tell) replaces it.
    pub(super) fn reap(&mut self) {
        if self.watcher.as_mut().is_some_and(Watcher::has_ended) {
            self.acted();
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

    use nix::sys::signal::kill;
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
    async fn what_a_watcher_has_done_is_known_when_it_was_replaced() {
        let killed = ExitStatus::from_raw(Signal::SIGKILL as i32);
        let mut watchers = Watchers::start_by(|| shell("exec cat")).unwrap();
        assert!(!watchers.have_ended(killed));
        let first = watchers.watcher.replace(shell("printf r").unwrap());
        first.into_iter().for_each(Watcher::done);
        wait_for_its_end(&mut watchers);
        // Its pipe is broken.
        assert!(matches!(tell(&mut watchers, Instant::now()), Told::Replaced));
        assert!(watchers.have_ended(killed));
        watchers.done();
        // Also where its end was noticed before.
        let mut watchers = Watchers::start_by(|| shell("printf r")).unwrap();
        wait_for_its_end(&mut watchers);
        watchers.reap();
        assert!(watchers.pid().is_none() && watchers.have_ended(killed));
    }

    #[tokio::test]
    async fn a_watcher_that_ends_or_hangs_before_it_is_ready_is_an_error() {
        let kind = async |start: fn() -> io::Result<Watcher>| {
            let ready = Watchers::start_by(start).unwrap().ready().await;
            ready.map(Watchers::done).map_err(|error| error.kind())
        };
        assert_eq!(kind(|| shell("printf w; exec cat")).await, Ok(()));
        assert_eq!(kind(|| shell("exit")).await, Err(ErrorKind::UnexpectedEof));
        assert_eq!(kind(|| shell("exec sleep 1000")).await, Err(ErrorKind::TimedOut));
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_has_ended_what_was_running_and_what_has_ended_by_its_signals() {
        let status = |of: Signal| ExitStatus::from_raw(of as i32);
        let (exited, failed) = (ExitStatus::from_raw(0), ExitStatus::from_raw(3 << 8));
        for (script, expected) in
            [("printf r", [true; 5]), ("printf e", [false, false, true, true, false]), (":", [false; 5])]
        {
            let mut watchers = Watchers::start_by(|| shell("exec cat")).unwrap();
            let first = watchers.watcher.replace(shell(script).unwrap());
            first.into_iter().for_each(Watcher::done);
            wait_for_its_end(&mut watchers);
            let all = [exited, failed, status(Signal::SIGTERM), status(Signal::SIGKILL), status(Signal::SIGSEGV)];
            assert_eq!(all.map(|status| watchers.have_ended(status)), expected, "{script}");
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
        assert!(matches!(tell(&mut watchers, deadline), Told::Replaced));
        assert!(watchers.pid().is_some_and(|second| Some(second) != first));
        assert!(!watchers.have_ended(ExitStatus::from_raw(Signal::SIGKILL as i32)));
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
