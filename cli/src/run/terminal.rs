//! The terminal: a group that is not in its foreground can't read from it, and gets no Ctrl-C.
//!
//! 1. The command gets the foreground when it starts, unless stdin or stdout is something else. If stdout is a pipe,
//!    there may be a pager at its other end, in our group, which needs the foreground.
//! 2. Otherwise it gets the foreground when the system has stopped it because it used the terminal.
//! 3. It gets it from our group only. While another group has it, the shell decides.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use super::group::Group;

/// The terminal that we were started from. Takes the foreground back from the command when dropped.
pub(super) struct Terminal {
    file: File,
    ours: Pid,
    commands: Pid,
    /// The command has had the foreground.
    was_given: bool,
}

impl Terminal {
    /// Returns `None` if we have no terminal.
    pub(super) fn of(command: &Group) -> Option<Self> {
        let mut options = OpenOptions::new();
        // A terminal that is gone must not hold us up.
        options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
        let file = options.open("/dev/tty").ok()?;
        Some(Self { file, ours: getpgrp(), commands: command.pid(), was_given: false })
    }

    /// Puts a command that has just started into the foreground, unless it shares the terminal with others.
    pub(super) fn give_at_start(&mut self, command: &Group) {
        if io::stdin().is_terminal() && io::stdout().is_terminal() && self.give() {
            // It may have been stopped because it read too early.
            command.signal(Signal::SIGCONT);
        }
    }

    /// Puts the command into the foreground if our group is there. Returns whether it is in the foreground.
    pub(super) fn give(&mut self) -> bool {
        if tcgetpgrp(&self.file) == Ok(self.ours) {
            self.was_given = true;
            self.set(self.commands);
        }
        self.is_given()
    }

    /// Returns whether the command is in the foreground.
    pub(super) fn is_given(&self) -> bool {
        tcgetpgrp(&self.file) == Ok(self.commands)
    }

    /// Puts a group into the foreground. Whoever does so from the background is stopped, unless it blocks that signal.
    fn set(&self, group: Pid) {
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTTOU);
        let Ok(before) = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK) else { return };
        // A terminal that is gone has no foreground.
        tcsetpgrp(&self.file, group).ok();
        before.thread_set_mask().ok();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Where the group is gone, some systems say so, and others still return its id.
        let is_gone = |group| killpg(group, None) == Err(Errno::ESRCH);
        let is_left = |group| group == self.commands || is_gone(group);
        if self.was_given && tcgetpgrp(&self.file).is_ok_and(is_left) {
            self.set(self.ours);
        }
    }
}
