//! The signals that are passed on.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind};

/// The signals that the command gets, too. The first four end a wait for the lock.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
const DEADLY: usize = 4;

/// Returns whether the signal ends a process that doesn't handle it, as its sender knows.
pub(super) fn is_deadly(signal: Signal) -> bool {
    PASSED_ON.iter().take(DEADLY).any(|deadly| *deadly == signal)
}

/// What was received.
pub(super) enum Received {
    /// A signal that the command gets, too.
    PassOn(Signal),
    /// A child has ended, was stopped, or goes on.
    ChildChanged,
}

/// Receives the signals.
pub(super) struct Signals {
    passed_on: Vec<(Signal, unix::Signal)>,
    child: unix::Signal,
}

impl Signals {
    /// Receives them from now on, except for those that whoever started us wants to be ignored, as `nohup` does.
    pub(super) fn new() -> io::Result<Self> {
        let ignored = ignored();
        let passed_on = PASSED_ON.into_iter().filter(|signal| ignored & (1 << (*signal as u32 - 1)) == 0);
        let receive = |signal: Signal| Ok((signal, unix::signal(SignalKind::from_raw(signal as i32))?));
        let passed_on = passed_on.map(receive).collect::<io::Result<_>>()?;
        Ok(Self { passed_on, child: unix::signal(SignalKind::child())? })
    }

    /// Returns what comes next. Cancel safe.
    pub(super) async fn next(&mut self) -> Received {
        poll_fn(|context| {
            for (signal, received) in &mut self.passed_on {
                if received.poll_recv(context).is_ready() {
                    return Poll::Ready(Received::PassOn(*signal));
                }
            }
            self.child.poll_recv(context).map(|_| Received::ChildChanged)
        })
        .await
    }

    /// Returns the next signal that ends a process which doesn't handle it by waiting. Cancel safe.
    pub(super) async fn next_deadly(&mut self) -> Signal {
        loop {
            match self.next().await {
                Received::PassOn(signal) if is_deadly(signal) => return signal,
                _ => {}
            }
        }
    }

    /// Returns such a signal if one has come already, and leaves all others to be received.
    pub(super) async fn deadly_by_now(&mut self) -> Option<Signal> {
        let mut deadly = self.passed_on.iter_mut().filter(|(signal, _)| is_deadly(*signal));
        poll_fn(|context| {
            let come = deadly.find_map(|(signal, received)| received.poll_recv(context).is_ready().then_some(*signal));
            Poll::Ready(come)
        })
        .await
    }
}

/// Returns the set of signals that are ignored, as far as the system tells.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
