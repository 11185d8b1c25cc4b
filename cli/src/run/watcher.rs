//! A process of our own that ends the group where we can't: when we are killed, or stopped for too long.
//!
//! It reads from a pipe, line by line, what it has to know; and learns of our end by the end of the pipe. It is in a
//! process group of its own, so that what is sent to ours doesn't reach it.
//!
//! 1. It starts before the command, and reports that it is ready; if it doesn't, the command doesn't run. It is told of
//!    the group as soon as the command has started.
//! 2. A line is written whole or not at all, and never waited for: a watcher that hangs must hold up nothing.
//! 3. It acts a little later than we would, so that it does nothing while we are well; but no later than we would kill
//!    the group.
//! 4. It goes by the last line that is in the pipe, also where it was stopped itself and finds many.
//! 5. One that is gone, or takes no more lines, is replaced: the lines that it has would be old when it wakes.
//! 6. Before it ends the group, it reports that, and whether the command is running: when we go on, we must not take
//!    that for an end of the command's own, nor the reverse.
//! 7. If we are killed while another `tenure run` runs us, that one's grace period is over: it kills us before its lock
//!    ends. The group was asked to end before, and gets no further grace period.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
#[cfg(any(target_os = "android", target_os = "linux"))]
use std::path::Path;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use tokio::time::Instant;

use super::KEY;
use super::ending::{LOOK_EVERY, Plan};
use super::group::Group;

/// The name of the hidden command that a watcher is.
pub(crate) const COMMAND: &str = "__watch";

/// What `ps` shows it as.
const NAME: &str = "tenure";

/// How much later than us it asks the group to end.
const LATER: Duration = Duration::from_millis(200);

/// How long a watcher may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(1);

/// What it reports when it is ready.
const READY: u8 = b'w';
/// What it reports when it begins to end the group while the command is running.
const RUNS: u8 = b'r';
/// What it reports when the command itself has ended already, or the system doesn't tell.
const ENDED: u8 = b'e';

/// What a watcher that has begun to end the group knew of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Acted {
    /// The command itself had ended already, if only by a moment; or the system doesn't tell.
    OnEnded,
    /// It was running.
    OnRunning,
}

/// A handle to the watcher process.
pub(super) struct Watcher {
    process: Child,
    pipe: Option<ChildStdin>,
    /// The pipe on which the watcher reports that it is ready, and that it has begun to end the group.
    reports: Option<ChildStdout>,
    is_ready: bool,
    acted: Option<Acted>,
    /// The deadline that it was told.
    told: Option<Instant>,
}

impl Watcher {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// Those of the system, such as where it has no process left for it.
    pub(super) fn start() -> io::Result<Self> {
        let mut command = Command::new(program()?);
        command.arg0(NAME).arg(COMMAND);
        // The URL may have a password, and it needs none.
        command.env_remove("TENURE_URL");
        Self::spawn(command)
    }

    pub(super) fn spawn(mut command: Command) -> io::Result<Self> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn()?;
        let pipe = process.stdin.take().filter(set_nonblocking);
        let reports = process.stdout.take().filter(set_nonblocking);
        Ok(Self { process, pipe, reports, is_ready: false, acted: None, told: None })
    }

    /// Waits until it is ready, as one may start and then hang or fail.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` if it has ended, `TimedOut` if it takes too long.
    pub(super) async fn ready(&mut self) -> io::Result<()> {
        let began = Instant::now();
        loop {
            self.read_reports().map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "it has ended"),
                _ => error,
            })?;
            if self.is_ready {
                return Ok(());
            }
            if began.elapsed() >= READY_WITHIN {
                let text = format!("it is not ready after {READY_WITHIN:?}");
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Tells it of the group, and until when that may run. Returns false if it is gone, or was stopped for so long that
    /// its pipe is full.
    pub(super) fn tell(&mut self, group: &Group, plan: &Plan, deadline: Instant) -> bool {
        if self.told != Some(deadline) && self.write(&Orders::new(group, plan, deadline).to_text()) {
            self.told = Some(deadline);
        }
        self.told == Some(deadline)
    }

    /// Returns whether it has begun to end the group, as it does where we are stopped for too long.
    pub(super) fn acted(&mut self) -> Option<Acted> {
        // What it has reported counts also where it has ended since.
        self.read_reports().ok();
        self.acted
    }

    /// Reads what it has reported by now.
    fn read_reports(&mut self) -> io::Result<()> {
        let mut byte = [0];
        loop {
            let reports = self.reports.as_mut().ok_or(ErrorKind::NotConnected)?;
            match reports.read_exact(&mut byte) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
                Ok(()) => match byte {
                    [READY] => self.is_ready = true,
                    [RUNS] => self.acted = self.acted.max(Some(Acted::OnRunning)),
                    _ => self.acted = self.acted.max(Some(Acted::OnEnded)),
                },
            }
        }
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        i32::try_from(self.process.id()).ok().map(Pid::from_raw)
    }

    /// Returns whether it has ended. Reaps it if so.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// Kills it, and doesn't wait for its end: it is reaped with the orphans. It may be stopped, so nothing is asked of
    /// it.
    pub(super) fn kill(mut self) {
        // While the pipe is open: at its end it would end the group, whose id may be another's by now.
        drop(self.process.kill());
        drop(self.process.try_wait());
    }

    /// Kills it, as the group is gone, and waits for its end.
    pub(super) fn done(mut self) {
        // While the pipe is open, as above.
        drop(self.process.kill());
        drop(self.process.wait());
    }

    fn write(&mut self, line: &str) -> bool {
        let Some(pipe) = &mut self.pipe else { return false };
        // A short line is written whole to a pipe, or not at all.
        pipe.write_all(format!("{line}\n").as_bytes()).is_ok()
    }
}

/// Returns the program that we are. While we waited for the lock, its file may have been replaced or deleted, as an
/// update does.
fn program() -> io::Result<PathBuf> {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    {
        let ours = Path::new("/proc/self/exe");
        if ours.exists() {
            return Ok(ours.to_owned());
        }
    }
    std::env::current_exe()
}

/// Puts the pipe into non-blocking mode. Returns whether that succeeded.
fn set_nonblocking(pipe: &impl AsFd) -> bool {
    fcntl(pipe.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok()
}

/// What a watcher has to do: times are in ms by its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Orders {
    group: i32,
    grace_ms: u128,
    end_at_ms: u128,
    kill_at_ms: u128,
}

impl Orders {
    fn new(group: &Group, plan: &Plan, deadline: Instant) -> Self {
        let (now, clock) = (Instant::now(), clock());
        let at = |instant: Instant| (clock + instant.saturating_duration_since(now)).as_millis();
        let end_at = plan.end_at(deadline);
        let kill_at = plan.kill_at(deadline, end_at);
        Self {
            group: group.id(),
            grace_ms: plan.grace().as_millis(),
            // With a short grace period, that much later would be after the deadline.
            end_at_ms: at(kill_at.min(end_at + LATER)),
            kill_at_ms: at(kill_at),
        }
    }

    fn to_text(self) -> String {
        format!("{} {} {} {}", self.group, self.grace_ms, self.end_at_ms, self.kill_at_ms)
    }

    fn read(line: &str) -> Option<Self> {
        let mut parts = line.split(' ');
        let group = parts.next()?.parse().ok()?;
        let mut next = || parts.next()?.parse().ok();
        Some(Self { group, grace_ms: next()?, end_at_ms: next()?, kill_at_ms: next()? })
    }
}

/// What every process of the machine sees alike. It counts the time of a suspension.
fn clock() -> Duration {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    let id = ClockId::CLOCK_BOOTTIME;
    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    let id = ClockId::CLOCK_MONOTONIC;
    clock_gettime(id).map(Duration::from).unwrap_or_default()
}

/// Watches, as a process of its own.
pub(crate) fn watch() {
    // It would have the name of its path, which is "exe".
    #[cfg(any(target_os = "android", target_os = "linux"))]
    nix::sys::prctl::set_name(c"tenure").ok();
    report(READY);
    let is_nested = || std::env::var_os(KEY).is_some();
    match follow(io::stdin().as_fd()) {
        (Some(orders), Why::WriterGone) if is_nested() => end(Orders { grace_ms: 0, ..orders }),
        (Some(orders), _) => end(orders),
        (None, _) => {}
    }
}

/// Reports this to the process that started us. Where that is gone, nobody reads it.
fn report(byte: u8) {
    let mut stdout = io::stdout();
    stdout.write_all(&[byte]).and_then(|()| stdout.flush()).ok();
}

/// Why the group has to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The time of the last orders is over, or no others can be received.
    TimeIsOver,
    /// We have ended without a word.
    WriterGone,
}

/// What a look at the pipe has found.
enum Found {
    Bytes,
    Nothing,
    End,
}

/// Follows the orders until it is time to end the group. Returns the last ones.
fn follow(pipe: BorrowedFd<'_>) -> (Option<Orders>, Why) {
    let (mut orders, mut unread) = (None::<Orders>, Vec::new());
    loop {
        let left = orders.map(|orders| orders.end_at_ms.saturating_sub(clock().as_millis()));
        match read(pipe, &mut unread, left) {
            Ok(Found::End) => return (orders, Why::WriterGone),
            // Only where nothing is left to read: after we were stopped, there may be newer orders behind old ones.
            Ok(Found::Nothing) if left == Some(0) => return (orders, Why::TimeIsOver),
            Ok(Found::Bytes | Found::Nothing) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(_) => return (orders, Why::TimeIsOver),
        }
        while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            orders = Orders::read(std::str::from_utf8(&line).unwrap_or_default().trim_end()).or(orders);
        }
    }
}

/// Waits for what is written to the pipe, but no longer than this.
fn read(pipe: BorrowedFd<'_>, unread: &mut Vec<u8>, limit_ms: Option<u128>) -> io::Result<Found> {
    let timeout = limit_ms.map_or(PollTimeout::NONE, |ms| {
        // In steps: a suspension of the machine doesn't count for this timeout.
        PollTimeout::from(u16::try_from(ms.min(1_000)).unwrap_or(1_000))
    });
    let mut polled = [PollFd::new(pipe, PollFlags::POLLIN)];
    if poll(&mut polled, timeout)? == 0 {
        return Ok(Found::Nothing);
    }
    let mut bytes = [0; 512];
    let count = nix::unistd::read(pipe, &mut bytes)?;
    unread.extend_from_slice(bytes.get(..count).unwrap_or_default());
    Ok(if count > 0 { Found::Bytes } else { Found::End })
}

/// Ends the group: as we would, but that nobody renews the lock.
fn end(orders: Orders) {
    let group = Group::of(orders.group);
    let now = clock().as_millis();
    let kill_at = orders.kill_at_ms.min(now + orders.grace_ms);
    // Before the command can end of it.
    report(if group.command_runs() { RUNS } else { ENDED });
    group.terminate();
    while group.exists() {
        let now = clock().as_millis();
        if now >= kill_at {
            group.kill().ok();
        }
        if now >= kill_at + 5_000 {
            return;
        }
        sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_are_written() {
        let orders = Orders { group: 7, grace_ms: 5_000, end_at_ms: 123_456_789, kill_at_ms: 123_461_789 };
        assert_eq!(Orders::read(&orders.to_text()), Some(orders));
        for line in ["", "7 1 2", "7 1 2 x", "x 1 2 3"] {
            assert_eq!(Orders::read(line), None, "{line}");
        }
    }

    fn orders(end_at_ms: u128) -> Orders {
        Orders { group: 7, grace_ms: 100, end_at_ms, kill_at_ms: end_at_ms + 100 }
    }

    #[tokio::test(start_paused = true)]
    async fn the_group_is_ended_before_the_deadline_however_short_the_grace_time_is() {
        for options in [&["--grace", "0s"][..], &["--ttl", "1s", "--grace", "0s"], &["--ttl", "2s", "--grace", "100ms"]]
        {
            let plan = crate::run::ending::tests::plan(options).unwrap();
            let (now, deadline) = (clock().as_millis(), Instant::now() + Duration::from_secs(30));
            let orders = Orders::new(&Group::of(7), &plan, deadline);
            // Both are at least 50 ms before it.
            let latest = now + 29_950 + 20;
            assert!(orders.end_at_ms <= latest && orders.kill_at_ms <= latest, "{options:?}: {orders:?} {latest}");
        }
    }

    /// As if it had been stopped while these were written.
    #[test]
    fn the_last_orders_count_however_many_are_waiting_and_however_old_the_others_are() {
        let (reader, mut writer) = io::pipe().unwrap();
        let now = clock().as_millis();
        let last = orders(now + 1_000_000);
        for old in (0..200).map(|n| orders(now - 1_000 + n)).chain([last]) {
            writeln!(writer, "{}", old.to_text()).unwrap();
        }
        drop(writer);
        assert_eq!(follow(reader.as_fd()), (Some(last), Why::WriterGone));
    }

    /// As if we had been stopped.
    #[test]
    fn when_the_time_of_the_last_orders_is_over_the_group_is_ended() {
        let (reader, mut writer) = io::pipe().unwrap();
        let last = orders(clock().as_millis() + 50);
        for orders in [orders(1), last] {
            writeln!(writer, "{}", orders.to_text()).unwrap();
        }
        assert_eq!(follow(reader.as_fd()), (Some(last), Why::TimeIsOver));
        assert!(clock().as_millis() >= last.end_at_ms);
    }
}
