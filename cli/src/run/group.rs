//! The process group of the command: the command, and whatever it starts that doesn't leave the group.

use std::ffi::OsString;
use std::io;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// A process group.
#[derive(Debug)]
pub(super) struct Group(Pid);

/// Starts the command in a process group of its own.
///
/// # Errors
///
/// Those of the system, where the command doesn't exist or can't be executed.
pub(super) fn start(command: &[OsString], environment: &[(&'static str, String)]) -> io::Result<(Child, Group)> {
    let Some((program, args)) = command.split_first() else { return Err(io::ErrorKind::InvalidInput.into()) };
    adopt_orphans();
    let child = Command::new(program).args(args).envs(environment.iter().cloned()).process_group(0).spawn()?;
    // It has ended already if it has no id, but it was not waited for: so the id is not another's.
    let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(io::ErrorKind::Other)?;
    Ok((child, Group(Pid::from_raw(id))))
}

/// Has the system give us the processes that the command leaves behind, so that we notice when they are gone: in a
/// container, there may be nobody else who reaps them.
fn adopt_orphans() {
    #[cfg(target_os = "linux")]
    // Without it, it works where there is an init.
    nix::sys::prctl::set_child_subreaper(true).ok();
}

impl Group {
    /// The group with this id.
    pub(super) fn of(id: i32) -> Self {
        Self(Pid::from_raw(id))
    }

    pub(super) fn id(&self) -> i32 {
        self.0.as_raw()
    }

    pub(super) fn pid(&self) -> Pid {
        self.0
    }

    /// Sends a signal to all of its processes. Those that are gone need none.
    pub(super) fn signal(&self, signal: Signal) {
        killpg(self.0, signal).ok();
    }

    /// Passes on a signal that may end its processes, also to those that are stopped: they get it when they go on.
    pub(super) fn interrupt(&self, signal: Signal) {
        self.signal(signal);
        self.signal(Signal::SIGCONT);
    }

    /// Asks all of its processes to end, also those that are stopped.
    pub(super) fn terminate(&self) {
        self.interrupt(Signal::SIGTERM);
    }

    /// Kills all of its processes. Those of other users are not ours to kill.
    ///
    /// # Errors
    ///
    /// `EPERM` if only such are left, `ESRCH` if none is.
    pub(super) fn kill(&self) -> nix::Result<()> {
        killpg(self.0, Signal::SIGKILL)
    }

    /// Returns whether any of its processes is left, if only to be reaped.
    pub(super) fn exists(&self) -> bool {
        killpg(self.0, None) != Err(Errno::ESRCH)
    }

    /// Returns whether the command itself is known to run. Also those may ask who are not its parent, on Linux.
    pub(super) fn command_runs(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        // Behind its name, which may contain anything.
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        !state.is_empty() && !state.starts_with(['Z', 'X'])
    }

    /// Reaps those of its processes that have become ours and have ended. Only when the command itself has been waited
    /// for, whose status would be lost.
    pub(super) fn reap(&self) {
        let any = Pid::from_raw(-self.0.as_raw());
        while let Ok(status) = waitpid(any, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                return;
            }
        }
    }

    /// Returns whether the command was stopped or goes on since the last look.
    pub(super) fn look(&self) -> Option<Look> {
        let changes = WaitPidFlag::WSTOPPED | WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG;
        match waitid(Id::Pid(self.0), changes) {
            Ok(WaitStatus::Stopped(_, signal)) => Some(Look::Stopped(signal)),
            Ok(WaitStatus::Continued(_)) => Some(Look::GoesOn),
            _ => None,
        }
    }
}

/// What has become of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Stopped(Signal),
    GoesOn,
}

/// Reaps the orphans that have ended and became ours, but none of these children, whose status others wait for.
pub(super) fn reap_orphans(children: &[Pid]) {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, ended) {
        match status.pid() {
            Some(orphan) if !children.contains(&orphan) => drop(waitpid(orphan, Some(WaitPidFlag::WNOHANG))),
            // Nobody has ended, or one of these. The system shows no other before that one is reaped.
            _ => return,
        }
    }
}
