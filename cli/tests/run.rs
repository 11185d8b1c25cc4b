//! `tenure run` on real servers: one machine at a time, and nothing is left when the lock is.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "run/processes.rs"]
mod processes;
#[path = "run/terminal.rs"]
mod terminal;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tenure_test_support::Server;

const TENURE: &str = env!("CARGO_BIN_EXE_tenure");
const PATIENCE: Duration = Duration::from_secs(20);

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tenure(server: &Server) -> Command {
    // Whoever runs the tests may have all that they start ignore signals: SIGINT, as a shell does in the background, or
    // SIGHUP, as nohup does.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT,HUP", TENURE]);
    command.env_remove("TENURE_URL").env("TENURE_URL", server.url()).stdin(Stdio::null());
    command
}

/// Runs `tenure run KEY OPTIONS -- sh -c SCRIPT`, in a directory that the script writes to.
struct Running {
    process: Child,
    dir: TempDir,
    events: Arc<Mutex<Vec<Value>>>,
    reader: Option<JoinHandle<()>>,
}

impl Running {
    fn start(server: &Server, key: &str, options: &[&str], script: &str) -> Self {
        let mut command = tenure(server);
        command
            .args(["--json", "run", key])
            .args(options)
            // What the shell has to say about its children is no event.
            .args(["--", "sh", "-c", &format!("exec 2>/dev/null; {script}")])
            .env("STUBBORN", STUBBORN)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self::spawn(&mut command, tempfile::tempdir().unwrap())
    }

    fn spawn(command: &mut Command, dir: TempDir) -> Self {
        let mut process = command.current_dir(&dir).spawn().unwrap();
        let events = Arc::<Mutex<Vec<Value>>>::default();
        let reader = process.stderr.take().map(|stderr| {
            let events = events.clone();
            spawn(move || read(stderr, &events))
        });
        Self { process, dir, events, reader }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until the script has written a whole line to the file, and returns it.
    fn written(&self, name: &str) -> String {
        written(&self.path(name))
    }

    fn process_of(&self, name: &str) -> Pid {
        Pid::from_raw(self.written(name).parse().unwrap())
    }

    /// Waits for this event.
    fn event(&self, name: &str) -> Value {
        eventually(|| self.events.lock().unwrap().iter().find(|event| event["event"] == name).cloned())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process.id()).unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for the end. Returns the exit code, stdout, and the events on stderr.
    fn ended(mut self) -> (i32, String, Vec<Value>) {
        let status = eventually(|| self.process.try_wait().unwrap());
        let mut stdout = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        self.reader.take().unwrap().join().unwrap();
        (code(status), stdout, self.events.lock().unwrap().clone())
    }
}

fn read(stderr: ChildStderr, events: &Mutex<Vec<Value>>) {
    for line in BufReader::new(stderr).lines() {
        let event = serde_json::from_str(&line.unwrap()).unwrap();
        events.lock().unwrap().push(event);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap()
}

fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "never");
        sleep(ms(2));
    }
}

/// Waits until a whole line is in the file, and returns it.
fn written(path: &Path) -> String {
    eventually(|| fs::read_to_string(path).ok().filter(|text| text.ends_with('\n'))).trim().to_owned()
}

/// A process that has ended and waits to be reaped is gone: it does nothing any longer.
fn is_gone(process: Pid) -> bool {
    if kill(process, None) == Err(Errno::ESRCH) {
        return true;
    }
    state(process).is_none_or(|state| matches!(state, 'Z' | 'X'))
}

/// Returns the state of a process, as `ps` shows it.
fn state(process: Pid) -> Option<char> {
    let status = fs::read_to_string(Path::new("/proc").join(process.to_string()).join("stat")).ok()?;
    status.rsplit(')').next()?.trim_start().chars().next()
}

fn is_free(server: &Server, key: &str) -> bool {
    server.cli(&["EXISTS", key]) == "0"
}

#[test]
fn a_command_runs_under_the_lock_and_is_told_its_key_and_its_fencing_token() {
    let server = Server::start();
    let script = r#"echo "$TENURE_KEY $TENURE_FENCING_TOKEN"; cat > held; exit 7"#;
    let script = script.replace("cat > held", &format!("redis-cli -p {} EXISTS job > held", server.port()));
    let running = Running::start(&server, "job", &[], &script);
    let held = running.written("held");
    let (code, stdout, events) = running.ended();
    assert_eq!((code, held.as_str()), (7, "1"));
    let obtained = &events[0];
    assert_eq!(stdout.trim(), format!("job {}", obtained["fencing_token"]));
    assert_eq!(events.last().unwrap()["reason"], "ended");
    assert!(is_free(&server, "job"));
}

#[test]
fn one_runs_at_a_time_and_who_does_not_wait_is_told_so() {
    let server = Server::start();
    let first = Running::start(&server, "job", &[], "echo > began; while ! [ -f end ]; do sleep 0.02; done");
    first.written("began");
    let (code, _, events) = Running::start(&server, "job", &["--no-wait"], "exit 0").ended();
    assert_eq!((code, events.last().unwrap()["event"].as_str()), (75, Some("failed")));
    // Unless no reply came in so short a time.
    eventually(|| {
        let options = ["--wait", "100ms", "--not-obtained-code", "9"];
        let (code, ..) = Running::start(&server, "job", &options, "exit 0").ended();
        assert!(code == 9 || code == 69, "{code}");
        (code == 9).then_some(())
    });
    let next = Running::start(&server, "job", &["--fair"], "echo > began; exit 3");
    eventually(|| (server.cli(&["EXISTS", "{job}:queue"]) == "1").then_some(()));
    assert!(!next.path("began").exists());
    fs::write(first.path("end"), "").unwrap();
    assert_eq!((first.ended().0, next.ended().0), (0, 3));
    // For a while after it has ended.
    let once = || Running::start(&server, "period", &["--no-wait", "--at-least", "60s"], "exit 0").ended().0;
    assert_eq!((once(), once()), (0, 75));
}

#[test]
fn signals_are_passed_on_to_the_whole_group_and_end_a_wait() {
    let server = Server::start();
    let script = "trap 'echo usr1 >> heard' USR1; trap 'echo term >> heard; exit 4' TERM; \
                  sh -c 'trap \"\" USR1; trap \"echo term > grandchild; exit\" TERM; echo > up; \
                  while :; do sleep 0.05; done' & \
                  while ! [ -f up ]; do sleep 0.01; done; echo > began; while :; do sleep 0.05; done";
    let running = Running::start(&server, "job", &[], script);
    running.written("began");
    let waiting = Running::start(&server, "job", &[], "exit 0");
    eventually(|| (server.cli(&["EXISTS", "{job}:queue"]) == "1").then_some(()));
    waiting.signal(Signal::SIGTERM);
    assert_eq!(waiting.ended().0, 128 + 15);
    assert_eq!(server.cli(&["EXISTS", "{job}:queue"]), "0");
    running.signal(Signal::SIGUSR1);
    assert_eq!(running.written("heard"), "usr1");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.written("grandchild"), "term");
    let (code, ..) = running.ended();
    assert_eq!(code, 4);
    assert!(is_free(&server, "job"));
    // What the command dies of.
    let running = Running::start(&server, "job", &[], "echo > began; sleep 100 & wait");
    running.written("began");
    running.signal(Signal::SIGINT);
    assert_eq!(running.ended().0, 128 + 2);
}

#[test]
fn what_the_command_leaves_behind_is_gone_before_the_lock_is_released() {
    let server = Server::start();
    let script = "(trap '' TERM; echo $$ > ignored; \
                  sh -c 'echo $$ > left; trap \"\" TERM; while :; do sleep 0.05; done') & \
                  while ! [ -s left ]; do sleep 0.01; done; exit 5";
    let running = Running::start(&server, "job", &["--grace", "2s"], script);
    let left = running.process_of("left");
    let mut was_held = false;
    eventually(|| {
        let gone = is_gone(left);
        was_held |= !gone && !is_free(&server, "job");
        gone.then_some(())
    });
    let (code, _, events) = running.ended();
    assert!(was_held && code == 5, "{code}");
    assert!(events.iter().any(|event| event["event"] == "killed"), "{events:?}");
    assert!(is_free(&server, "job"));
}

/// A command that ignores SIGTERM, and so does its child: nothing but SIGKILL ends them.
const STUBBORN: &str = "trap '' TERM; sh -c 'trap \"\" TERM; echo $$ > grandchild; while :; do sleep 0.05; done' & \
                        echo $$ > child; while :; do sleep 0.05; done";

/// Waits for a renewal, and returns how long the key lives after it. The next one is a third of a ttl away.
fn renewed(server: &Server, key: &str, ttl: u64) -> Duration {
    let mut last = u64::MAX;
    eventually(|| {
        let left = server.cli(&["PTTL", key]).parse().unwrap();
        let is_renewed = left > last && left > ttl * 9 / 10;
        last = left;
        is_renewed.then(|| ms(left))
    })
}

#[test]
fn when_the_server_hangs_the_whole_group_is_gone_before_the_key_is_free() {
    for (script, at_least_left) in [
        (STUBBORN, Duration::ZERO),
        // It ends when it is asked to, so well before.
        ("sleep 1000 & echo $! > grandchild; echo $$ > child; wait", ms(500)),
    ] {
        let server = Server::start();
        let running = Running::start(&server, "job", &["--ttl", "15s", "--grace", "2s"], script);
        let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
        let left = renewed(&server, "job", 15_000);
        server.freeze();
        let frozen = Instant::now();
        eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
        let gone = frozen.elapsed();
        // The key was free this long after the server was asked for its ttl, at the earliest.
        let free = left;
        eprintln!("gone after {gone:?}, {:?} before the key is free", free.saturating_sub(gone));
        assert!(gone + at_least_left < free, "gone after {gone:?}, free after {free:?}");
        server.thaw();
        let (code, _, events) = running.ended();
        let ending = events.iter().find(|event| event["event"] == "ending").unwrap();
        assert_eq!((code, ending["reason"].as_str()), (76, Some("not_renewed")), "{events:?}");
        eventually(|| is_free(&server, "job").then_some(()));
    }
}

#[test]
fn when_the_lock_is_taken_or_gone_the_group_is_ended_at_once() {
    let server = Server::start();
    for (break_it, reason) in [(&["DEL", "job"][..], "missing"), (&["SET", "job", "other", "PX", "60000"], "taken")] {
        let options = ["--ttl", "6s", "--grace", "300ms", "--lost-code", "33"];
        let running = Running::start(&server, "job", &options, STUBBORN);
        let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
        server.cli(break_it);
        let began = Instant::now();
        eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
        // The next renewal finds it out, and the grace period follows.
        assert!(began.elapsed() < ms(5_000), "{:?}", began.elapsed());
        let (code, _, events) = running.ended();
        let ending = events.iter().find(|event| event["event"] == "ending").unwrap();
        assert_eq!((code, ending["reason"].as_str()), (33, Some(reason)), "{events:?}");
        // What another has is left alone.
        assert_eq!(is_free(&server, "job"), reason == "missing");
        server.cli(&["DEL", "job"]);
    }
}

/// Runs a command that ends by itself, well before the next renewal, and does this before.
fn ends_after(server: &Server, options: &[&str], meanwhile: impl FnOnce()) -> (i32, Vec<Value>) {
    let script = "echo > began; while ! [ -f end ]; do sleep 0.02; done; exit 3";
    let running = Running::start(server, "job", options, script);
    running.written("began");
    meanwhile();
    fs::write(running.path("end"), "").unwrap();
    let (code, _, events) = running.ended();
    (code, events)
}

#[test]
fn a_loss_that_only_the_release_finds_is_a_loss_and_an_unknown_outcome_is_not() {
    let server = Server::start();
    let event = |events: &[Value], name: &str| events.iter().find(|event| event["event"] == name).cloned();
    for (break_it, options, expected, reason) in [
        (&["DEL", "job"][..], &[][..], 76, "missing"),
        (&["SET", "job", "other", "PX", "60000"], &["--lost-code", "33"], 33, "taken"),
    ] {
        let (code, events) = ends_after(&server, options, || drop(server.cli(break_it)));
        let lost = event(&events, "lost").unwrap_or_else(|| panic!("{events:?}"));
        assert_eq!((lost["reason"].as_str(), lost["command_exit_code"].as_u64()), (Some(reason), Some(3)));
        let ended = event(&events, "ended").unwrap();
        assert_eq!(
            (code, ended["reason"].as_str(), ended["exit_code"].as_i64()),
            (expected, Some(reason), Some(i64::from(expected)))
        );
        assert!(event(&events, "release_failed").is_none(), "{events:?}");
        // What another has is left alone.
        assert_eq!(is_free(&server, "job"), reason == "missing");
        server.cli(&["DEL", "job"]);
    }
    let (code, events) = ends_after(&server, &["--command-timeout", "300ms"], || server.freeze());
    assert!(event(&events, "release_failed").is_some() && event(&events, "lost").is_none(), "{events:?}");
    assert_eq!((code, event(&events, "ended").unwrap()["reason"].as_str()), (3, Some("ended")));
}

#[test]
fn when_tenure_itself_is_killed_or_stopped_the_group_is_gone_before_the_key_is_free() {
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let server = Server::start();
        let running = Running::start(&server, "job", &["--ttl", "6s", "--grace", "2s"], STUBBORN);
        let (child, grandchild) = (running.process_of("child"), running.process_of("grandchild"));
        let left = renewed(&server, "job", 6_000);
        running.signal(signal);
        let ended = Instant::now();
        eventually(|| (is_gone(child) && is_gone(grandchild)).then_some(()));
        let gone = ended.elapsed();
        eprintln!("{signal}: gone after {gone:?}, {:?} before the key is free", left.saturating_sub(gone));
        assert!(gone < left, "{signal}: gone after {gone:?}, free after {left:?}");
        if signal == Signal::SIGSTOP {
            running.signal(Signal::SIGCONT);
            assert_eq!(running.ended().0, 76);
            eventually(|| is_free(&server, "job").then_some(()));
        }
    }
}

#[test]
fn a_command_that_runs_for_too_long_is_ended_and_its_lock_is_free() {
    let server = Server::start();
    let began = Instant::now();
    let running = Running::start(&server, "job", &["--at-most", "1s", "--grace", "200ms"], STUBBORN);
    let (code, _, events) = running.ended();
    assert_eq!(code, 124, "{events:?}");
    assert!(began.elapsed() > ms(600) && is_free(&server, "job"), "{:?}", began.elapsed());
}

#[test]
fn where_a_held_lock_is_no_failure_nothing_is_said_of_it() {
    let mut server = Server::start();
    server.cli(&["SET", "job", "another", "PX", "60000"]);
    let run = |server: &Server, more: &[&str]| {
        let args = ["run", "job", "--no-wait", "--not-obtained-code", "0"];
        let output = tenure(server).args(args).args(more).args(["--", "true"]).output().unwrap();
        (code(output.status), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    assert_eq!(run(&server, &[]), (0, String::new()));
    let (status, told) = run(&server, &["--json"]);
    assert!(status == 0 && told.contains("held by another"), "{told}");
    server.kill();
    let (status, told) = run(&server, &[]);
    assert!(status == 69 && !told.is_empty(), "{told}");
}

#[test]
fn what_cannot_run_is_told_apart() {
    let server = Server::start();
    let run = |command: &str| {
        let status = tenure(&server).args(["run", "job", "--", command]).stderr(Stdio::null()).status().unwrap();
        (code(status), is_free(&server, "job"))
    };
    assert_eq!(run("/there/is/no/such/program"), (127, true));
    assert_eq!(run("/etc/hostname"), (126, true));
    let mut dead = Server::start();
    dead.kill();
    let status = |server: &Server, args: &[&str]| {
        code(tenure(server).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap())
    };
    assert_eq!(status(&dead, &["run", "job", "--", "true"]), 69);
    assert_eq!(status(&server, &["run", "job", "--nonsense", "--", "true"]), 64);
    assert_eq!(status(&server, &["run", "job", "--ttl", "1s", "--grace", "1s", "--", "true"]), 64);
    assert_eq!(status(&server, &["run", "", "--", "true"]), 64);
    assert_eq!(status(&server, &["--help"]), 0);
}

#[test]
fn a_quorum_is_used_where_several_urls_are_given() {
    let servers = [(); 3].map(|()| Server::start());
    let urls = servers.iter().map(Server::url).collect::<Vec<_>>().join(",");
    let run = |servers: &[Server]| {
        let mut command = tenure(&servers[0]);
        command.env("TENURE_URL", &urls).args(["run", "job", "--restart-window", "0s", "--no-wait", "--", "true"]);
        code(command.status().unwrap())
    };
    // Unless nodes were too slow to vote.
    eventually(|| (run(&servers) == 0).then_some(()));
    servers.iter().take(2).for_each(|server| drop(server.cli(&["SET", "job", "another"])));
    eventually(|| {
        let code = run(&servers);
        assert!(code == 75 || code == 69, "{code}");
        (code == 75).then_some(())
    });
}

#[test]
fn a_short_ttl_limits_the_time_for_a_connection() {
    // It accepts connections, and never replies.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", silent.local_addr().unwrap());
    let began = Instant::now();
    let status = Command::new(TENURE)
        .args(["run", "job", "--url", &url, "--ttl", "3s", "--command-timeout", "30s", "--", "true"])
        .stderr(Stdio::null())
        .status();
    assert_eq!(code(status.unwrap()), 69);
    // Less than a third of the default ttl.
    assert!(began.elapsed() < ms(8_000), "{:?}", began.elapsed());
}

#[test]
fn readers_and_permits_run_together() {
    let server = Server::start();
    let began = |options: &[&str]| {
        let running =
            Running::start(&server, "shared", options, "echo > began; while ! [ -f end ]; do sleep 0.02; done");
        running.written("began");
        running
    };
    let end = |running: Running| {
        fs::write(running.path("end"), "").unwrap();
        assert_eq!(running.ended().0, 0);
    };
    let refused = |options: &[&str]| Running::start(&server, "shared", options, "exit 0").ended().0 == 75;
    let readers = [began(&["--read", "--metadata", "one"]), began(&["--read", "--no-wait", "--metadata", "another"])];
    assert!(refused(&["--no-wait"]));
    let status = tenure(&server).args(["status", "shared"]).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.lines().count() == 2 && status.contains("by one") && status.contains("by another"), "{status}");
    readers.into_iter().for_each(end);
    let permits = [began(&["--permits", "2"]), began(&["--permits", "2"])];
    assert!(refused(&["--permits", "2", "--no-wait"]) && !refused(&["--permits", "3", "--no-wait"]));
    permits.into_iter().for_each(end);
    assert!(is_free(&server, "shared"));
    // A loss ends readers as well.
    let reader = Running::start(&server, "shared", &["--read", "--ttl", "2s", "--grace", "300ms"], STUBBORN);
    let child = reader.process_of("child");
    server.cli(&["DEL", "shared"]);
    eventually(|| is_gone(child).then_some(()));
    assert_eq!(reader.ended().0, 76);
}
