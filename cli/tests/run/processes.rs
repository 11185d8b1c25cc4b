//! What becomes of processes where tenure, or what watches over them, is held up.

use std::io::{PipeReader, Write, pipe};

use nix::fcntl::{FcntlArg, fcntl};

use super::*;

/// Returns a pipe that nothing fits into.
fn full_pipe() -> (PipeReader, Stdio) {
    let (reader, mut writer) = pipe().unwrap();
    let size = usize::try_from(fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap()).unwrap();
    writer.write_all(&vec![b'\n'; size]).unwrap();
    (reader, writer.into())
}

#[test]
fn a_lock_is_kept_and_its_loss_ends_the_command_while_nobody_reads_stderr() {
    let server = Server::start();
    let (mut unread, stderr) = full_pipe();
    let mut command = tenure(&server);
    command.args(["--json", "run", "job", "--ttl", "9s", "--grace", "300ms", "--", "sh", "-c", STUBBORN]);
    let mut running = Running::spawn(command.stderr(stderr), tempfile::tempdir().unwrap());
    // It has the other end of the pipe.
    drop(command);
    let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
    renewed(&server, "job", 9_000);
    server.cli(&["DEL", "job"]);
    let deleted = Instant::now();
    eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
    // The next renewal finds it out within 3 s. The deadline, at which the watcher would end it, is later.
    assert!(deleted.elapsed() < ms(6_500), "{:?}", deleted.elapsed());
    let mut printed = String::new();
    unread.read_to_string(&mut printed).unwrap();
    let events: Vec<Value> = printed.trim().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["obtained", "started", "ending", "killed", "gone", "ended"]);
    assert_eq!(code(eventually(|| running.process.try_wait().unwrap())), 76);
}

