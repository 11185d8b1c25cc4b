//! `tenure run`: runs a command while holding a lock.
//!
//! 1. The command starts when the lock is held, in a process group of its own (`run/group.rs`).
//! 2. The group gets SIGTERM so early that the grace period ends before the guard's deadline; then SIGKILL. The
//!    deadline is before the server frees the lock (`run/ending.rs`).
//! 3. Where we are killed or stopped ourselves, a watcher does that (`run/watcher.rs`). One that dies is replaced
//!    (`run/watchers.rs`).
//! 4. The lock is released when the group is gone, not when the command has ended.

mod ending;
mod group;
mod running;
mod signals;
mod terminal;
pub(crate) mod watcher;
mod watchers;

use std::io::ErrorKind;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tenure::{Error, LockGuard, LockRequest, Locker, Loss};
use tokio::select;
use tokio::time::Instant;

use self::ending::{Plan, Why};
use self::running::{Ended, Running};
use self::signals::Signals;
use self::watchers::Watchers;
use crate::args::RunOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;

/// In the environment of the command: the key of the lock.
const KEY: &str = "TENURE_KEY";
/// How long the releases may take that are left when the command has ended.
const CLOSING: Duration = Duration::from_secs(5);

pub(crate) async fn run(options: RunOptions, output: &Output) -> Exit {
    let plan = match Plan::new(&options) {
        Ok(plan) => plan,
        Err(why) => return output.fail(Exit::Usage, &why),
    };
    // Before anything that they could interrupt.
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return output.fail(Exit::Unavailable, &format_args!("could not handle signals: {error}")),
    };
    let connecting = connect(&options.server, Some(options.ttl), output);
    let locker = select! {
        locker = connecting => match locker {
            Ok(locker) => locker,
            Err(exit) => return exit,
        },
        signal = signals.next_deadly() => return interrupted(signal, output),
    };
    let began = Instant::now();
    let obtained = select! {
        obtained = request(&locker, &options) => obtained,
        // Dropping the request leaves nothing behind: close() waits for that.
        signal = signals.next_deadly() => {
            locker.close_within(CLOSING).await;
            return interrupted(signal, output);
        }
    };
    let guard = match obtained {
        Ok(guard) => guard,
        Err(error) => {
            locker.close_within(CLOSING).await;
            return match exit_of(&error) {
                Exit::NotObtained => not_obtained(options.not_obtained_code, &error, output),
                exit => output.fail(exit, &error),
            };
        }
    };
    let waited_ms = millis(began.elapsed());
    let fencing_token = guard.fencing_token();
    output.detail("obtained", json!({ "key": options.key, "fencing_token": fencing_token, "waited_ms": waited_ms }));
    let plan = plan.begun(Instant::now(), guard.deadline());
    let exit = hold(guard, &options, plan, &mut signals, output).await;
    locker.close_within(CLOSING).await;
    exit
}

/// Another has the lock. To those who chose 0 that is no failure, and nothing that cron should mail.
fn not_obtained(code: u8, error: &Error, output: &Output) -> Exit {
    let exit = Exit::OfCommand(code);
    if code != 0 {
        return output.fail(exit, error);
    }
    output.detail("failed", json!({ "error": error.to_string(), "exit_code": code }));
    exit
}

/// Ends before the command has started.
fn interrupted(signal: Signal, output: &Output) -> Exit {
    let exit = Exit::Signal(signal as i32);
    output.detail("ended", json!({ "reason": "interrupted", "exit_code": exit.code() }));
    exit
}

fn request(locker: &Locker, options: &RunOptions) -> LockRequest {
    let key = options.key.as_str();
    let permits = options.permits.map(|permits| usize::try_from(permits).unwrap_or(usize::MAX));
    let mut request = match (options.read, permits, options.no_wait) {
        (true, _, false) => locker.read(key),
        (true, _, true) => locker.try_read(key),
        (false, Some(permits), false) => locker.permit(key, permits),
        (false, Some(permits), true) => locker.try_permit(key, permits),
        (false, None, false) => locker.lock(key),
        (false, None, true) => locker.try_lock(key),
    };
    if let Some(wait) = options.wait {
        request = request.wait_at_most(wait);
    }
    if let Some(least) = options.at_least {
        request = request.hold_at_least(least);
    }
    if let Some(most) = options.at_most {
        request = request.hold_at_most(most);
    }
    let metadata = options.metadata.clone().unwrap_or_else(|| described(options));
    request.ttl(options.ttl).fair(options.fair).metadata(metadata)
}

/// Returns who holds the lock: no arguments, as they may be secret.
fn described(options: &RunOptions) -> String {
    let host = nix::unistd::gethostname().map(|host| host.to_string_lossy().into_owned()).unwrap_or_default();
    let program = options.command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
    format!("{host}, process {}: {program}", std::process::id())
}

/// Runs the command for as long as the lock is held, and releases the lock when all of its group is gone.
async fn hold(guard: LockGuard, options: &RunOptions, plan: Plan, signals: &mut Signals, output: &Output) -> Exit {
    let watchers = match Watchers::start().await {
        Ok(watchers) => watchers,
        Err(error) => {
            drop(guard.release().await);
            return output.fail(Exit::Unavailable, &format_args!("could not start the watcher: {error}"));
        }
    };
    // Also one that came with the lock, or while the watcher was started.
    if let Some(signal) = signals.deadly_by_now().await {
        watchers.done();
        drop(guard.release().await);
        return interrupted(signal, output);
    }
    if let Err(loss) = guard.check() {
        watchers.done();
        drop(guard.release().await);
        return output.fail(Exit::Unavailable, &format_args!("the lock was lost before the command started: {loss}"));
    }
    let (child, group) = match group::start(&options.command, &environment(&guard, options)) {
        Ok(started) => started,
        Err(error) => {
            watchers.done();
            drop(guard.release().await);
            let is_missing = error.kind() == ErrorKind::NotFound;
            let exit = if is_missing { Exit::NotFound } else { Exit::NotExecutable };
            let program = options.command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
            return output.fail(exit, &format_args!("could not run {program}: {error}"));
        }
    };
    let deadline = guard.deadline();
    let mut running = Running::new(child, group, plan, deadline, watchers, output);
    output.detail("started", json!({ "process": running.id() }));
    let (why, status) = match running.attend(&guard, signals, output).await {
        Ended::ByItself(status) => (None, Some(status)),
        Ended::Because(why) => {
            output.event("ending", format_args!("{why}: ending the command"), json!({ "reason": why.name() }));
            (Some(why), None)
        }
    };
    let (status, is_gone) = running.end(status, output).await;
    let of_command = status.map_or(Exit::Lost, of_status);
    let loss = give_back(guard, is_gone, output).await;
    let why = why.or_else(|| Some(lost_at_the_end(loss?, of_command, output)));
    let exit = match &why {
        None => of_command,
        Some(Why::LimitReached) => Exit::LimitReached,
        Some(_) => Exit::OfCommand(options.lost_code),
    };
    let reason = why.as_ref().map_or("ended", Why::name);
    output.detail("ended", json!({ "reason": reason, "exit_code": exit.code() }));
    exit
}

fn environment(guard: &LockGuard, options: &RunOptions) -> Vec<(&'static str, String)> {
    let fencing_token = guard.fencing_token().map(|token| ("TENURE_FENCING_TOKEN", token.to_string()));
    [(KEY, options.key.clone())].into_iter().chain(fencing_token).collect()
}

/// Releases the lock if the command is gone. Returns how it was lost, if it was.
async fn give_back(guard: LockGuard, is_gone: bool, output: &Output) -> Option<Loss> {
    if !is_gone {
        let loss = guard.check().err();
        // The command goes on, so nobody else gets the lock earlier than its ttl ends.
        drop(guard.into_lease());
        return loss;
    }
    match guard.release().await {
        Ok(()) => None,
        Err(Error::NotHeld { loss, .. }) => Some(loss),
        // Not known: the server may have released it, and has not said that it was lost.
        Err(error) => {
            output.event(
                "release_failed",
                format_args!("the lock may stay taken until its ttl ends: {error}"),
                json!({ "error": error.to_string() }),
            );
            None
        }
    }
}

/// Tells that the lock was lost while the command ran, which nobody knew before it had ended by itself.
fn lost_at_the_end(loss: Loss, of_command: Exit, output: &Output) -> Why {
    let why = Why::from(loss);
    let code = of_command.code();
    output.event(
        "lost",
        format_args!("{why}, which was found when the command had ended with {code}: another may have run beside it"),
        json!({ "reason": why.name(), "command_exit_code": code }),
    );
    why
}

fn of_status(status: ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::OfCommand(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::OfCommand(u8::MAX),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<Loss> for Why {
    fn from(loss: Loss) -> Self {
        match loss {
            Loss::LimitReached => Self::LimitReached,
            loss => Self::Lost(loss),
        }
    }
}
