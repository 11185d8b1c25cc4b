//! A command that runs: it is watched, gets signals, and is ended when it is time.

use std::pin::pin;
use std::process::ExitStatus;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde_json::json;
use tenure::LockGuard;
use tokio::process::Child;
use tokio::select;
use tokio::time::{Instant, sleep_until};

use super::ending::{self, Plan, Why};
use super::group::{self, Group, Look};
use super::signals::{self, Received, Signals};
use super::terminal::Terminal;
use super::watchers::{Told, Watchers};
use super::{CLOSING, millis};
use crate::output::Output;

/// How often the deadline is compared with the clock at least: no timer counts the time of a machine's suspension. More
/// often where [`Plan::tell_every`] is shorter.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The shortest pause between two looks at a group that ends.
const MINIMUM: Duration = Duration::from_millis(1);

/// The command, and what it has started.
pub(super) struct Running {
    child: Child,
    group: Group,
    plan: Plan,
    /// The guard's deadline while it was last held.
    deadline: Instant,
    /// End the group if we can't.
    watchers: Watchers,
    /// Whether we have said that nobody would.
    is_unwatched: bool,
    terminal: Option<Terminal>,
    /// The signal that has stopped the command, while it is stopped.
    stopped: Option<Signal>,
}

/// Why the command ends.
pub(super) enum Ended {
    ByItself(ExitStatus),
    Because(Why),
}

impl Running {
    /// Takes charge of a command that has just started.
    pub(super) fn new(
        child: Child,
        group: Group,
        plan: Plan,
        deadline: Instant,
        watchers: Watchers,
        output: &Output,
    ) -> Self {
        let mut running =
            Self { child, group, plan, deadline, watchers, is_unwatched: false, terminal: None, stopped: None };
        // First of all: until then, nobody ends the group if we are killed or stopped.
        running.tell_watcher(output);
        running.give_terminal();
        running
    }

    pub(super) fn id(&self) -> i32 {
        self.group.id()
    }

    /// Waits until the command has ended, or has to be ended. Passes signals on meanwhile.
    pub(super) async fn attend(&mut self, guard: &LockGuard, signals: &mut Signals, output: &Output) -> Ended {
        let mut lost = pin!(guard.lost());
        loop {
            if guard.is_held() {
                self.deadline = guard.deadline();
            }
            self.tell_watcher(output);
            self.continue_if_stopped();
            let now = Instant::now();
            if guard.is_held() && self.plan.is_over(self.deadline, now) {
                // It may have ended while we were stopped: after that, timers fire before the runtime notices.
                return match self.child.try_wait() {
                    Ok(Some(status)) => self.ended_with(status),
                    _ => Ended::Because(self.plan.why(self.deadline, now)),
                };
            }
            let look_at = self.plan.end_at(self.deadline).min(now + LOOK_EVERY.min(self.plan.tell_every()));
            select! {
                // A loss comes first: what has ended meanwhile may have gone on without the lock.
                biased;
                loss = &mut lost => return Ended::Because(Why::from(loss)),
                status = self.child.wait() => match status {
                    Ok(status) => return self.ended_with(status),
                    Err(error) => return Ended::Because(Why::Unknown(error.to_string())),
                },
                received = signals.next() => match received {
                    Received::PassOn(signal) if signals::is_deadly(signal) => self.group.interrupt(signal),
                    Received::PassOn(signal) => self.group.signal(signal),
                    Received::ChildChanged => {
                        self.look_for_stops(output);
                        self.reap_orphans();
                    }
                },
                () = sleep_until(look_at) => {}
            }
        }
    }

    /// Returns why the command has ended with this status.
    fn ended_with(&mut self, status: ExitStatus) -> Ended {
        // While we were stopped.
        if self.watchers.have_ended(status) {
            return Ended::Because(self.plan.why(self.deadline, Instant::now()));
        }
        Ended::ByItself(status)
    }

    fn tell_watcher(&mut self, output: &Output) {
        match self.watchers.tell(&self.group, &self.plan, self.deadline) {
            Told::Yes | Told::Later => {}
            Told::Replaced if self.is_unwatched => {
                self.is_unwatched = false;
                output.event("watched", "another watcher was started", json!({}));
            }
            Told::Replaced => output.detail("watched", json!({})),
            // It is tried again and again, and said once.
            Told::Failed(_) if self.is_unwatched => {}
            // To end a command that is well would be worse.
            Told::Failed(error) => {
                self.is_unwatched = true;
                output.event(
                    "unwatched",
                    format_args!(
                        "the watcher is gone, and another could not be started: {error}. Until one is, the command \
                         goes on if tenure is killed or stopped"
                    ),
                    json!({ "error": error.to_string() }),
                );
            }
        }
    }

    fn give_terminal(&mut self) {
        self.terminal = Terminal::of(&self.group);
        if let Some(terminal) = &mut self.terminal {
            terminal.give_at_start(&self.group);
        }
    }

    /// Looks whether the command was stopped, or goes on. Says so if it stays stopped.
    fn look_for_stops(&mut self, output: &Output) {
        let mut is_new = false;
        while let Some(look) = self.group.look() {
            (self.stopped, is_new) = match look {
                Look::Stopped(signal) => (Some(signal), true),
                Look::GoesOn => (None, false),
            };
        }
        self.continue_if_stopped();
        if let (Some(signal), true) = (self.stopped, is_new) {
            output.event(
                "stopped",
                format_args!("the command was stopped by {signal}, and keeps the lock"),
                json!({ "signal": signal.as_str() }),
            );
        }
    }

    /// Has a stopped command go on where only we can.
    fn continue_if_stopped(&mut self) {
        let (Some(signal), Some(terminal)) = (self.stopped, &mut self.terminal) else { return };
        let goes_on = match signal {
            // It used the terminal from the background. If it went on there, it would be stopped again.
            Signal::SIGTTIN | Signal::SIGTTOU => terminal.give(),
            // Ctrl-Z. The shell doesn't notice, as we are not stopped.
            _ => terminal.is_given(),
        };
        if goes_on {
            self.stopped = None;
            self.group.signal(Signal::SIGCONT);
        }
    }

    /// Reaps what the command has left behind: in a container, there may be nobody else who does.
    fn reap_orphans(&mut self) {
        self.watchers.reap();
        let children: Vec<_> = [Some(self.group.pid()), self.watchers.pid()].into_iter().flatten().collect();
        group::reap_orphans(&children);
    }

    /// Ends what is left of the group. Returns the status of the command, and whether the group is gone.
    pub(super) async fn end(mut self, mut status: Option<ExitStatus>, output: &Output) -> (Option<ExitStatus>, bool) {
        let began = Instant::now();
        let kill_at = self.plan.kill_at(self.deadline, began);
        let (mut was_asked, mut was_killed) = (false, false);
        let is_gone = loop {
            if status.is_none() {
                status = self.child.try_wait().ok().flatten();
            }
            if status.is_some() {
                // Those that it has left behind are ours since then, and nobody else reaps them.
                self.group.reap();
                if !self.group.exists() {
                    break true;
                }
            }
            let now = Instant::now();
            if !was_asked {
                self.group.terminate();
                was_asked = true;
            }
            if now >= kill_at {
                let killed = self.group.kill();
                if now >= kill_at + CLOSING {
                    not_gone(killed, output);
                    break false;
                }
                if !was_killed {
                    let after = began.elapsed();
                    output.event(
                        "killed",
                        format_args!("what is left of the command did not end within {after:.1?}: killed"),
                        json!({ "after_ms": millis(after) }),
                    );
                }
                was_killed = true;
            }
            sleep_until((now + ending::LOOK_EVERY).min(kill_at.max(now + MINIMUM))).await;
        };
        if was_asked && is_gone {
            output.detail("gone", json!({ "killed": was_killed, "after_ms": millis(began.elapsed()) }));
        }
        self.watchers.done();
        (status, is_gone)
    }
}

/// Tells that some processes of the command can't be killed. `killed` is what became of the last try.
fn not_gone(killed: nix::Result<()>, output: &Output) {
    let why = match killed {
        Err(Errno::EPERM) => "they run as another user (EPERM)",
        _ => "the system doesn't end them",
    };
    output.event(
        "not_gone",
        format_args!(
            "some processes of the command can't be killed: {why}. They go on, and the lock is left to its ttl"
        ),
        json!({ "error": why }),
    );
}
