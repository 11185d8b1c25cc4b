//! What the command exits with. `args.rs` documents it.

use std::process::ExitCode;

/// Why the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Success,
    /// `doctor` has found something to warn of; `break` has found no lock, or was told not to.
    Minor,
    /// `doctor` has found a danger.
    Danger,
    /// The arguments are wrong.
    Usage,
    /// A server can't be reached, or has failed.
    Unavailable,
    /// The result can't be printed, for example because the disk is full.
    NotPrinted,
    /// Another has the lock.
    NotObtained,
    /// The lock was lost while the command ran, which was ended.
    Lost,
    /// The command ran for as long as it may, and was ended.
    LimitReached,
    /// The command can't be executed, or doesn't exist.
    NotExecutable,
    NotFound,
    /// What the command itself has exited with.
    OfCommand(u8),
    /// By this signal: the command's, or ours.
    Signal(i32),
}

impl Exit {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Minor => 1,
            Self::Danger => 2,
            Self::Usage => 64,
            Self::Unavailable => 69,
            Self::NotPrinted => 74,
            Self::NotObtained => 75,
            Self::Lost => 76,
            Self::LimitReached => 124,
            Self::NotExecutable => 126,
            Self::NotFound => 127,
            Self::OfCommand(code) => code,
            Self::Signal(signal) => u8::try_from(signal).map_or(u8::MAX, |signal| signal.saturating_add(128)),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}
