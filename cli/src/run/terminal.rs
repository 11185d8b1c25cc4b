//! The terminal: a group that is not in its foreground could not read from it, nor get Ctrl-C.

use std::io::{self, IsTerminal};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use super::group::Group;

/// The terminal that we are in the foreground of.
pub(super) struct Terminal {
    ours: Pid,
}

/// Takes the terminal back when dropped.
pub(super) struct Foreground(Terminal);

impl Terminal {
    pub(super) fn ours() -> Option<Self> {
        let stdin = io::stdin();
        let ours = getpgrp();
        (stdin.is_terminal() && tcgetpgrp(&stdin) == Ok(ours)).then_some(Self { ours })
    }

    /// Puts the group into the foreground.
    pub(super) fn give_to(self, group: &Group) -> Foreground {
        set(group.pid());
        // It may have been stopped because it read too early.
        group.signal(Signal::SIGCONT);
        Foreground(self)
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        set(self.0.ours);
    }
}

/// Puts a group into the foreground. Whoever does so from the background is stopped, unless it blocks that signal.
fn set(group: Pid) {
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTTOU);
    let Ok(before) = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK) else { return };
    // A terminal that is gone has no foreground.
    tcsetpgrp(io::stdin(), group).ok();
    before.thread_set_mask().ok();
}
