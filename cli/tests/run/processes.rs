//! What becomes of processes: those that are stopped, orphaned, nested, or another user's; and of the watcher.

use std::fs::{File, Permissions};
use std::io::{PipeReader, Write, pipe};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::*;

fn stop(process: Pid) {
    kill(process, Signal::SIGSTOP).unwrap();
    eventually(|| (state(process) == Some('T')).then_some(()));
}

/// Returns the process that watches over this one.
fn watcher_of(running: &Running) -> Pid {
    let parent = format!("PPid:\t{}\n", running.pid());
    eventually(|| {
        let all = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        let read = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let mut watchers =
            all.filter(|path| read(path, "cmdline").contains("__watch") && read(path, "status").contains(&parent));
        watchers.next().map(|path| Pid::from_raw(path.file_name().unwrap().to_str().unwrap().parse().unwrap()))
    })
}

#[test]
fn a_command_that_is_stopped_is_ended_by_a_signal() {
    let server = Server::start();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let running = Running::start(&server, "job", &[], "echo $$ > child; while :; do sleep 0.05; done");
        stop(running.process_of("child"));
        assert_eq!(running.event("stopped")["signal"], "SIGSTOP");
        running.signal(signal);
        assert_eq!(running.ended().0, 128 + signal as i32);
        assert!(is_free(&server, "job"));
    }
}

#[test]
fn what_the_command_leaves_behind_is_reaped_while_it_runs() {
    let server = Server::start();
    let script = "echo > began; while ! [ -f go ]; do sleep 0.01; done; \
                  for i in 1 2 3 4 5; do (sh -c 'echo $$ >> orphans' &); done; while :; do sleep 0.05; done";
    let running = Running::start(&server, "job", &[], script);
    running.written("began");
    // It is a child as well, and stands before them.
    let watcher = watcher_of(&running);
    kill(watcher, Signal::SIGKILL).unwrap();
    fs::write(running.path("go"), "").unwrap();
    let orphans = eventually(|| {
        let orphans = fs::read_to_string(running.path("orphans")).unwrap_or_default();
        (orphans.lines().count() == 5 && orphans.ends_with('\n')).then_some(orphans)
    });
    let orphans = orphans.lines().map(|process| Pid::from_raw(process.parse().unwrap()));
    for process in orphans.chain([watcher]) {
        eventually(|| (kill(process, None) == Err(Errno::ESRCH)).then_some(()));
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.ended().0, 128 + 15);
}

/// Its watcher goes by the deadline before the last renewal, unless it was told in time of that one.
#[test]
fn a_command_that_the_watcher_ended_is_not_taken_for_one_that_ended_by_itself() {
    let server = Server::start();
    let running = Running::start(&server, "job", &["--ttl", "3s", "--grace", "200ms"], STUBBORN);
    let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
    renewed(&server, "job", 3_000);
    stop(running.pid());
    eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
    running.signal(Signal::SIGCONT);
    let (code, _, events) = running.ended();
    assert_eq!(code, 76, "{events:?}");
}

/// Runs this command, which leaves a process behind in its group. Stops tenure; and has it go on when that process is
/// asked to end, which the watcher does at half of the ttl: while the lock is still held. Before, this is done.
fn code_after_a_stop(server: &Server, command: &str, meanwhile: impl FnOnce(&Running)) -> (i32, Vec<Value>) {
    let script = "sh -c 'trap \"echo > asked; exit\" TERM; echo > up; while :; do sleep 0.05; done' & \
                  while ! [ -f up ]; do sleep 0.01; done; echo $$ > child; ";
    let running = Running::start(server, "job", &["--ttl", "8s", "--grace", "4s"], &format!("{script}{command}"));
    let child = running.process_of("child");
    running.event("started");
    stop(running.pid());
    meanwhile(&running);
    running.written("asked");
    eventually(|| is_gone(child).then_some(()));
    running.signal(Signal::SIGCONT);
    let (code, _, events) = running.ended();
    (code, events)
}

#[test]
fn what_has_ended_before_the_watcher_acts_has_its_own_exit_code_and_what_ends_of_that_has_not() {
    let server = Server::start();
    let waits = "while ! [ -f end ]; do sleep 0.01; done; exit 3";
    let (code, events) = code_after_a_stop(&server, waits, |running| {
        fs::write(running.path("end"), "").unwrap();
        let child = running.process_of("child");
        eventually(|| is_gone(child).then_some(()));
    });
    assert_eq!(code, 3, "{events:?}");
    // A command that ends in good order when it is asked to has not done its work.
    let (code, events) = code_after_a_stop(&server, "trap 'exit 0' TERM; while :; do sleep 0.05; done", |_| {});
    assert_eq!(code, 76, "{events:?}");
}

#[test]
fn a_watcher_that_is_stopped_holds_up_nothing() {
    let server = Server::start();
    let running = Running::start(&server, "job", &[], "echo > began; while ! [ -f end ]; do sleep 0.01; done; exit 3");
    running.written("began");
    stop(watcher_of(&running));
    fs::write(running.path("end"), "").unwrap();
    assert_eq!(running.ended().0, 3);
    assert!(is_free(&server, "job"));
}

/// Returns how many bytes a process has read in all, or `None` if it is gone.
fn read_by(process: Pid) -> Option<u64> {
    let io = fs::read_to_string(Path::new("/proc").join(process.to_string()).join("io")).ok()?;
    io.lines().find_map(|line| line.strip_prefix("rchar: "))?.parse().ok()
}

/// Stops tenure soon after a renewal: beyond the deadline before that renewal, and well within the present one.
/// Returns whether the command still runs; or `None` if this machine was so busy that tenure itself had to end it.
fn survives_a_stop(running: &mut Running, server: &Server) -> Option<bool> {
    let watcher = watcher_of(running);
    renewed(server, "job", 2_000);
    let (at_renewal, renewed_at) = (read_by(watcher), Instant::now());
    // The deadline before allows the command to run until 1.26 s after this renewal.
    while read_by(watcher) == at_renewal && renewed_at.elapsed() < ms(550) {
        sleep(ms(5));
    }
    let at_stop = read_by(watcher);
    stop(running.pid());
    sleep(ms(1_400).saturating_sub(renewed_at.elapsed()));
    running.signal(Signal::SIGCONT);
    let goes_on = eventually(|| match running.process.try_wait().unwrap() {
        Some(_) => Some(false),
        None => read_by(watcher).is_some_and(|bytes| Some(bytes) > at_stop).then_some(true),
    });
    // From 1.72 s after the renewal on, tenure itself would end it, as the grace period has to end before the deadline.
    let was_in_time = renewed_at.elapsed() < ms(1_700);
    (goes_on || was_in_time).then_some(goes_on)
}

#[test]
fn a_command_survives_while_tenure_is_stopped_for_less_than_the_time_that_its_last_renewal_gave_it() {
    let server = Server::start();
    let start = || {
        let running = Running::start(&server, "job", &["--ttl", "2s", "--grace", "200ms"], "echo > began; sleep 1000");
        running.written("began");
        running
    };
    let (mut running, mut survived) = (start(), 0);
    while survived < 4 {
        match survives_a_stop(&mut running, &server) {
            Some(true) => survived += 1,
            Some(false) => panic!("after {survived} stops: {:?}", running.ended()),
            // The machine was too busy.
            None => running = start(),
        }
    }
    running.signal(Signal::SIGTERM);
    assert_eq!(running.ended().0, 128 + 15);
}

/// Puts a copy of tenure beside what the script writes.
fn copy_of_tenure(dir: &TempDir) -> PathBuf {
    let copy = dir.path().join("tenure");
    // By another process: a program that any thread's child has open for writing can't be run.
    assert!(Command::new("install").args(["-m", "755", TENURE]).arg(&copy).status().unwrap().success());
    copy
}

#[test]
fn a_command_is_watched_though_the_program_was_replaced_or_deleted_while_it_waited() {
    let server = Server::start();
    // What is left of it where this fails ends with its directory.
    let script = "trap '' TERM; echo $$ > child; while [ -f child ]; do sleep 0.05; done";
    for is_replaced in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let program = copy_of_tenure(&dir);
        server.cli(&["SET", "job", "another", "PX", "60000"]);
        let mut command = Command::new(&program);
        command
            .env("TENURE_URL", server.url())
            .args(["--json", "run", "job", "--grace", "200ms", "--", "sh", "-c", script]);
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let running = Running::spawn(&mut command, dir);
        eventually(|| (server.cli(&["EXISTS", "{job}:queue"]) == "1").then_some(()));
        match is_replaced {
            true => {
                fs::copy("/bin/true", running.path("new")).unwrap();
                fs::rename(running.path("new"), &program).unwrap();
            }
            false => fs::remove_file(&program).unwrap(),
        }
        server.cli(&["DEL", "job"]);
        let child = running.process_of("child");
        watcher_of(&running);
        // Its watcher knows of the command by then.
        running.event("started");
        running.signal(Signal::SIGKILL);
        eventually(|| is_gone(child).then_some(()));
        server.cli(&["DEL", "job"]);
    }
}

/// Stops a watcher, and fills the pipe that it reads from with empty lines.
fn stop_for_long(watcher: Pid) {
    stop(watcher);
    let pipe = Path::new("/proc").join(watcher.to_string()).join("fd/0");
    let mut pipe = File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(pipe).unwrap();
    while pipe.write(b"\n").is_ok() {}
}

#[test]
fn a_watcher_that_is_gone_or_takes_no_more_lines_is_replaced() {
    let server = Server::start();
    let script = "trap '' TERM; echo $$ > child; while [ -f child ]; do sleep 0.05; done";
    for end in [|watcher| kill(watcher, Signal::SIGKILL).unwrap(), stop_for_long] {
        let running = Running::start(&server, "job", &["--ttl", "2s", "--grace", "200ms"], script);
        let child = running.process_of("child");
        let first = watcher_of(&running);
        end(first);
        eventually(|| (kill(first, None) == Err(Errno::ESRCH)).then_some(()));
        watcher_of(&running);
        // It is told of the group as soon as it has started.
        renewed(&server, "job", 2_000);
        running.signal(Signal::SIGKILL);
        eventually(|| is_gone(child).then_some(()));
        server.cli(&["DEL", "job"]);
    }
}

#[test]
fn a_watcher_that_dies_is_replaced_at_once_and_not_at_the_next_renewal() {
    let server = Server::start();
    let script = "trap '' TERM; echo $$ > child; while [ -f child ]; do sleep 0.05; done";
    let running = Running::start(&server, "job", &["--ttl", "60s", "--grace", "200ms"], script);
    let child = running.process_of("child");
    let first = watcher_of(&running);
    kill(first, Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    eventually(|| (kill(first, None) == Err(Errno::ESRCH)).then_some(()));
    // It knows of the command by then.
    running.event("watched");
    assert!(killed.elapsed() < ms(5_000), "{:?}", killed.elapsed());
    watcher_of(&running);
    running.signal(Signal::SIGKILL);
    eventually(|| is_gone(child).then_some(()));
}

/// Starts tenure where this shell command has changed /proc, which tenure finds its own program in. Returns `None` where
/// that can't be done.
fn start_with_other_proc(server: &Server, change: &str) -> Option<Running> {
    let change = format!("mount -t tmpfs none /proc && {change} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &change, "sh"]);
    let mut changes = Command::new("unshare");
    changes.args(["--mount", "sh", "-c", &change, "sh", "true"]).stderr(Stdio::null());
    if !changes.status().unwrap().success() {
        eprintln!("left out: it needs root, and a system that lets it hide /proc");
        return None;
    }
    command.args([TENURE, "--json", "run", "job", "--ttl", "1s", "--", "sh", "-c", "echo > began"]);
    command.env("TENURE_URL", server.url()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(Running::spawn(&mut command, tempfile::tempdir().unwrap()))
}

/// Returns the shell command that makes a shell script the program that tenure starts as its watcher.
fn watcher_is(script: &str) -> String {
    format!("mkdir /proc/self && printf '#!/bin/sh\\n{script}\\n' > /proc/self/exe && chmod 755 /proc/self/exe")
}

/// Returns the error of a tenure that is started so.
fn failure_with_other_proc(server: &Server, change: &str) -> Option<String> {
    let running = start_with_other_proc(server, change)?;
    let began = running.path("began");
    let failed = running.event("failed");
    assert_eq!(running.ended().0, 69);
    assert!(!began.exists() && is_free(server, "job"));
    Some(failed["error"].as_str().unwrap().to_owned())
}

#[test]
fn no_command_runs_unwatched() {
    let server = Server::start();
    let Some(error) = failure_with_other_proc(&server, "true") else { return };
    assert!(error.contains("watcher"), "{error}");
}

#[test]
fn no_command_runs_before_its_watcher_is_ready_or_after_a_loss() {
    let server = Server::start();
    let loses = format!("redis-cli -p {} DEL job >/dev/null; sleep 0.7; printf w; exec cat", server.port());
    for (watcher, expected) in [("exit 0", "it has ended"), ("exec sleep 1000", "not ready"), (loses.as_str(), "lost")]
    {
        let Some(error) = failure_with_other_proc(&server, &watcher_is(watcher)) else { return };
        eprintln!("{watcher}: {error}");
        // On a busy machine, the last one may take too long as well.
        let is_late = expected == "lost" && error.contains("not ready");
        assert!(error.contains(expected) || is_late, "{watcher}: {error}");
    }
}

#[test]
fn a_signal_that_comes_while_the_watcher_is_started_keeps_the_command_from_starting() {
    let server = Server::start();
    let called_off = watcher_is("kill -TERM $PPID; sleep 0.3; printf w; exec cat");
    let Some(running) = start_with_other_proc(&server, &called_off) else { return };
    let began = running.path("began");
    let ended = running.event("ended");
    assert_eq!(ended["reason"], "interrupted");
    assert_eq!(running.ended().0, 143);
    assert!(!began.exists() && is_free(&server, "job"));
}

/// The inner one is killed when the outer's grace period is over. Its own one is longer, and doesn't count then.
#[test]
fn a_command_under_two_locks_has_the_grace_time_of_the_outer_one() {
    let server = Server::start();
    let script = format!("exec '{TENURE}' run inner --ttl 40s --grace 20s -- sh -c \"$STUBBORN\"");
    let running = Running::start(&server, "outer", &["--ttl", "3s", "--grace", "500ms"], &script);
    let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
    server.cli(&["DEL", "outer"]);
    let began = Instant::now();
    assert_eq!(running.ended().0, 76);
    eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
    assert!(began.elapsed() < ms(10_000), "{:?}", began.elapsed());
}

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

/// Runs where tests run as root, as nobody else can have a process of another user.
#[test]
fn the_lock_of_what_cannot_be_killed_is_left_to_its_ttl() {
    const NOBODY: u32 = 65_534;
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return eprintln!("left out: it needs root");
    }
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    // What a user other than root can reach, and a program that becomes root, as sudo does.
    let (ours, becomes_root) = (dir.path().join("tenure"), dir.path().join("becomes-root"));
    for (mode, from, to) in [("755", TENURE, &ours), ("4755", "/usr/bin/setpriv", &becomes_root)] {
        // By another process: a program that any thread's child has open for writing can't be run.
        assert!(Command::new("install").args(["-m", mode, from]).arg(to).status().unwrap().success());
    }
    fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
    let script = "exec >/dev/null 2>&1; ./becomes-root --reuid 0 sh -c 'echo $$ > left; exec sleep 1000' & \
                  while ! [ -s left ]; do sleep 0.01; done; exit 3";
    let mut command = Command::new(ours);
    command
        .args([
            "--json",
            "run",
            "job",
            "--ttl",
            "4s",
            "--grace",
            "200ms",
            "--url",
            &server.url(),
            "--",
            "sh",
            "-c",
            script,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .uid(NOBODY)
        .gid(NOBODY);
    let running = Running::spawn(&mut command, dir);
    let left = running.process_of("left");
    let not_gone = running.event("not_gone");
    let (code, _, events) = running.ended();
    let (is_left, is_held) = (!is_gone(left), !is_free(&server, "job"));
    kill(left, Signal::SIGKILL).unwrap();
    assert!(code == 3 && is_left && is_held, "{code} {is_left} {is_held}: {events:?}");
    assert!(not_gone["error"].as_str().unwrap().contains("EPERM"), "{events:?}");
    eventually(|| is_free(&server, "job").then_some(()));
}
