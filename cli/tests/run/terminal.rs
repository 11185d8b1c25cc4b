//! In a terminal: which group is in the foreground.
//!
//! Each test has a session of its own, with a pseudoterminal. Its first shell has no parent in the session, so the
//! system fails what uses the terminal from the background of that shell's group, rather than stop it.

use std::fs::File;
use std::io::Write;

use nix::pty::openpty;

use super::*;

struct Session {
    process: Child,
    /// The other end. When it is closed, the system hangs up on all that is left of the session.
    _terminal: File,
    dir: TempDir,
}

impl Session {
    /// Runs a script in a shell whose terminal already has these lines to read.
    fn start(server: &Server, shell: &str, script: &str, lines: &str) -> Self {
        let (dir, pty) = (tempfile::tempdir().unwrap(), openpty(None, None).unwrap());
        let mut terminal = File::from(pty.master);
        terminal.write_all(lines.as_bytes()).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        let process = Command::new("setsid")
            .args(["--ctty", shell, "-c", script])
            .env("TENURE", TENURE)
            .env("TENURE_URL", server.url())
            .current_dir(&dir)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        Self { process, _terminal: terminal, dir }
    }

    fn written(&self, name: &str) -> String {
        written(&self.dir.path().join(name))
    }

    /// Waits for the end of the script. Returns its exit code.
    fn ended(mut self) -> i32 {
        code(eventually(|| self.process.try_wait().unwrap()))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn a_command_has_the_terminal_and_whoever_comes_next_has_it_again() {
    let server = Server::start();
    let script = r#"
        "$TENURE" run job -- sh -c 'read line </dev/tty && echo "$line" > line'
        read line && echo "$line" > next"#;
    let session = Session::start(&server, "sh", script, "one\nanother\n");
    assert_eq!((session.written("line").as_str(), session.written("next").as_str()), ("one", "another"));
    assert_eq!(session.ended(), 0);
}

#[test]
fn what_reads_the_output_keeps_the_terminal() {
    let server = Server::start();
    // A pager changes the terminal's settings, which only the foreground may do.
    let script = r#"
        "$TENURE" run job -- sh -c 'echo > began; while ! [ -f end ]; do sleep 0.01; done' | sh -c '
            while ! [ -f began ]; do sleep 0.01; done
            stty -echo </dev/tty && echo set > set
            cat'"#;
    let session = Session::start(&server, "sh", script, "");
    assert_eq!(session.written("set"), "set");
    fs::write(session.dir.path().join("end"), "").unwrap();
    assert_eq!(session.ended(), 0);
}

#[test]
fn a_command_whose_output_is_read_has_the_terminal_when_it_asks() {
    let server = Server::start();
    let script = r#"
        "$TENURE" run job -- sh -c 'read line </dev/tty && echo "$line" > line' | cat
        read line && echo "$line" > next"#;
    let session = Session::start(&server, "sh", script, "one\nanother\n");
    assert_eq!((session.written("line").as_str(), session.written("next").as_str()), ("one", "another"));
    assert_eq!(session.ended(), 0);
}

#[test]
fn a_command_in_the_background_has_the_terminal_when_its_job_comes_to_the_foreground() {
    let server = Server::start();
    let script = r#"
        set -m
        "$TENURE" --json run job -- sh -c 'read line </dev/tty && echo "$line" > line' 2> events &
        while ! grep -q '"stopped".*SIGTTIN' events; do sleep 0.01; done
        fg"#;
    let session = Session::start(&server, "bash", script, "one\n");
    assert_eq!(session.written("line"), "one");
    assert_eq!(session.ended(), 0);
}
