//! One server process.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::log;
use crate::port::Port;
use crate::version::{Version, binary};
use crate::{Certificate, Clock, PATIENCE};

/// A server of the test's own, on a free port of the loopback interface. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    process: Child,
    port: Port,
    tls_port: Option<Port>,
    dir: TempDir,
    args: Vec<String>,
    clock: Option<Arc<Clock>>,
}

impl Server {
    /// Starts an empty server that persists nothing.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with further arguments, as on the server's command line.
    ///
    /// # Panics
    ///
    /// When there is no such server, or it won't start.
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_with_clock(args, None)
    }

    /// The same with a clock that isn't the machine's.
    ///
    /// # Panics
    ///
    /// As [`start_with`](Server::start_with).
    pub fn start_with_clock(args: &[&str], clock: Option<&Arc<Clock>>) -> Self {
        // Something that is no test may take the port between the look and the start: then it's another port.
        (0..20).find_map(|_| Self::try_start(args, clock)).expect("a free port for the server")
    }

    fn try_start(args: &[&str], clock: Option<&Arc<Clock>>) -> Option<Self> {
        log::begin();
        // Asserts that it is the one that the run is for.
        Version::of_this_run();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let port = Port::find();
        let process = spawn(port.number(), &dir, &args, clock);
        let mut server = Self { process, port, tls_port: None, dir, args, clock: clock.cloned() };
        if server.answers() {
            return Some(server);
        }
        let log = server.log();
        assert!(log.contains("in use"), "the server did not start: {log}");
        None
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }

    /// The same server by its unix socket.
    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.dir.path().join("socket").display())
    }

    /// Its working directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Runs a command by redis-cli, which shares no code with what is tested. Lines of an array are joined by newlines.
    ///
    /// # Panics
    ///
    /// When there is no redis-cli.
    pub fn cli(&self, command: &[&str]) -> String {
        let port = self.port().to_string();
        let output = Command::new("redis-cli").args(["-p", &port, "--no-auth-warning"]).args(command).output();
        let output = output.expect("redis-cli, which comes with redis-server");
        String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned()
    }

    /// Starts an empty server that follows this one, and waits until it has caught up.
    ///
    /// # Panics
    ///
    /// When that takes more than 60 seconds.
    pub fn start_replica(&self) -> Self {
        // At once, and not in five seconds together with others that may come.
        self.cli(&["CONFIG", "SET", "repl-diskless-sync-delay", "0"]);
        let port = self.port().to_string();
        let replica = Self::start_with(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]);
        self.wait_until_followed_by(&replica);
        replica
    }

    pub(crate) fn wait_until_followed_by(&self, replica: &Self) {
        // It is called online up to a second before it is sent anything. So: until it has what was written after that.
        let patience = Instant::now() + PATIENCE;
        let wait_until = |caught_up: &dyn Fn() -> bool| {
            while !caught_up() {
                assert!(Instant::now() < patience, "the replica never caught up: {}", replica.log());
                sleep(Duration::from_millis(10));
            }
        };
        wait_until(&|| self.cli(&["INFO", "replication"]).contains(&format!("port={},state=online", replica.port())));
        self.cli(&["SET", "caught-up", "1"]);
        wait_until(&|| replica.cli(&["EXISTS", "caught-up"]) == "1");
        self.cli(&["DEL", "caught-up"]);
    }

    /// Stops the process where it stands: it accepts connections and replies nothing.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Kills it without a warning, as a power cut would.
    ///
    /// # Panics
    ///
    /// When it can't be waited for.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.process.wait().expect("it was started by us");
    }

    /// Starts it again on the same port, after [`kill`](Server::kill); with what it had persisted, if anything.
    ///
    /// # Panics
    ///
    /// When it won't start.
    pub fn restart(&mut self) {
        self.restart_without_waiting(&[]);
        assert!(self.answers(), "the server did not start again: {}", self.log());
    }

    /// Starts it again with further arguments, and does not wait until it replies.
    pub fn restart_without_waiting(&mut self, args: &[&str]) {
        let args: Vec<String> = self.args.iter().cloned().chain(args.iter().map(|&arg| arg.to_owned())).collect();
        self.process = spawn(self.port(), &self.dir, &args, self.clock.as_ref());
    }

    /// Kills it and starts it again, empty.
    pub fn restart_empty(&mut self) {
        self.kill();
        self.restart();
    }

    /// Starts a server that also speaks TLS, on the port that is returned, with this certificate.
    ///
    /// # Panics
    ///
    /// As [`start_with`](Server::start_with); and where it was built without TLS.
    pub fn start_tls(certificate: &Certificate) -> (Self, u16) {
        let tls_port = Port::find();
        let port = tls_port.number();
        let [file, key] = [&certificate.certificate, &certificate.key].map(|path| path.display().to_string());
        let tls = ["--tls-port", &port.to_string(), "--tls-cert-file", &file, "--tls-key-file", &key];
        // Clients need no certificate of their own; the server wants to know an authority all the same.
        let mut server =
            Self::start_with(&[&tls[..], &["--tls-auth-clients", "no", "--tls-ca-cert-file", &file]].concat());
        server.tls_port = Some(tls_port);
        (server, port)
    }

    /// Shows this certificate to whoever connects from now on, and cuts the connections that there are.
    ///
    /// # Panics
    ///
    /// When the server refuses it.
    pub fn replace_certificate(&self, certificate: &Certificate) {
        let [file, key] = [&certificate.certificate, &certificate.key].map(|path| path.display().to_string());
        assert_eq!(self.cli(&["CONFIG", "SET", "tls-cert-file", &file, "tls-key-file", &key]), "OK");
        self.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    }

    /// Steps its clock, which it was started with, by this many milliseconds. Returns by how many it is ahead now.
    ///
    /// # Panics
    ///
    /// When it was started with the machine's.
    pub fn step_clock(&self, millis: i64) -> i64 {
        self.clock.as_ref().expect("a clock of its own").step(millis)
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("it was started by us");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until the server replies, or has ended.
    fn answers(&mut self) -> bool {
        let patience = Instant::now() + PATIENCE;
        while Instant::now() < patience {
            if ping(self.port()) {
                // Ours, and not another that has the port: that one would have kept ours from starting.
                return self.process.try_wait().expect("it was started by us").is_none();
            }
            if self.process.try_wait().expect("it was started by us").is_some() {
                return false;
            }
            sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already, which is as well.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn spawn(port: u16, dir: &TempDir, args: &[String], clock: Option<&Arc<Clock>>) -> Child {
    let path = dir.path();
    let mut command = Command::new(binary());
    if let Some(clock) = clock {
        clock.wind(&mut command);
    }
    // A configuration file comes first, where there is one.
    let (file, options): (Vec<_>, Vec<_>) = args.iter().partition(|arg| arg.ends_with(".conf"));
    command.args(file);
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    command.arg("--dir").arg(path).arg("--logfile").arg(path.join("log"));
    if !options.iter().any(|arg| arg.as_str() == "--sentinel") {
        command.arg("--unixsocket").arg(path.join("socket"));
        command.args(["--save", "", "--appendonly", "no"]);
    }
    command.args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("a server; `bash tests/run.sh` installs it")
}

/// Returns whether a server replies there, be it with a refusal.
fn ping(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut answer = [0; 1];
    stream.set_read_timeout(Some(Duration::from_secs(1))).is_ok()
        && stream.write_all(b"PING\r\n").is_ok()
        && stream.read_exact(&mut answer).is_ok()
}
