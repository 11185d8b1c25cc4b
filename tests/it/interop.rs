//! Locks of other libraries and of tenure exclude each other.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tenure::{Error, Locker};
use tenure_test_support::Server;

/// The `Lock` of redis-py, driven by lines on its standard input.
struct Python {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const PROGRAM: &str = "
import redis, sys
lock = redis.Redis(port=int(sys.argv[1])).lock('k', timeout=30)
for line in sys.stdin:
    if line == 'acquire\\n':
        print(lock.acquire(blocking=False), flush=True)
    elif line == 'owned\\n':
        print(lock.owned(), flush=True)
    elif line == 'release\\n':
        lock.release()
        print('released', flush=True)
";

impl Python {
    fn start(server: &Server) -> Self {
        let interpreter = std::env::var_os("TENURE_PYTHON")
            .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/target/redis-py/bin/python").into(), PathBuf::from);
        let mut command = Command::new(&interpreter);
        command.args(["-c", PROGRAM, &server.port().to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let hint = format!("{} with redis-py; `bash tests/run.sh` makes it", interpreter.display());
        let mut process = command.spawn().expect(&hint);
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, input, output }
    }

    fn tell(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[tokio::test]
async fn redis_py_and_tenure_exclude_each_other() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let mut python = Python::start(&server);

    let guard = locker.try_lock("k").metadata("ours").await.unwrap();
    assert_eq!(python.tell("acquire"), "False");
    guard.release().await.unwrap();

    assert_eq!(python.tell("acquire"), "True");
    assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
    assert!(locker.inspect("k").await.unwrap().unwrap().remaining.is_some());
    assert_eq!(python.tell("owned"), "True");
    assert_eq!(python.tell("release"), "released");

    locker.try_lock("k").await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_lock_of_another_library_that_holds_no_text_is_ended_by_the_holder_that_was_shown() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    // The last byte is that of no text, and both look the same as text.
    let set = |byte| server.cli(&["EVAL", &format!("redis.call('SET', 'k', 'by\\{byte}', 'PX', 60000)"), "0"]);
    set(254);
    let earlier = locker.inspect("k").await.unwrap().unwrap();
    set(255);
    let holder = locker.inspect("k").await.unwrap().unwrap();
    assert_eq!((holder.token.as_str(), earlier.token.as_str()), ("by\u{fffd}", "by\u{fffd}"));
    assert!(!locker.force_release_of("k", &[earlier.token]).await.unwrap());
    assert!(locker.force_release_of("k", &[holder.token]).await.unwrap());
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}
