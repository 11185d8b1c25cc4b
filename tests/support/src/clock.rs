//! The wall clock of servers, stepped while they run.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

/// A wall clock for one server, or for several that share it. At first it shows the time.
///
/// Servers that are started with it are preloaded with a library, `clock.c`, which adds an offset to what they read.
/// Their monotonic clock is that of the machine.
#[derive(Debug)]
pub struct Clock {
    dir: TempDir,
    file: File,
    /// In nanoseconds.
    offset: Mutex<i64>,
}

impl Clock {
    /// Compiles the library, with `cc`.
    ///
    /// # Panics
    ///
    /// When there is no C compiler, or the system isn't Linux.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("clock.c");
        std::fs::write(&source, include_str!("clock.c")).expect("a file");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O2", "-o"]).arg(dir.path().join(LIBRARY)).arg(source);
        let compiled = compiler.status().expect("a C compiler; `bash tests/run.sh` installs it");
        assert!(compiled.success(), "the library that shows servers another time doesn't compile");
        let file = File::create(dir.path().join(OFFSET)).expect("a file");
        let clock = Self { dir, file, offset: Mutex::new(0) };
        clock.step(0);
        clock
    }

    /// Sets the clock forward by this many milliseconds, or back if there are fewer than none. Returns by how many it
    /// is ahead now.
    ///
    /// # Panics
    ///
    /// When its file can't be written.
    pub fn step(&self, millis: i64) -> i64 {
        let mut offset = self.offset.lock().unwrap_or_else(PoisonError::into_inner);
        *offset += millis * NANOS;
        // In one piece, as a processor writes eight bytes of a page that servers have mapped.
        self.file.write_all_at(&offset.to_ne_bytes(), 0).expect("a file of eight bytes");
        *offset / NANOS
    }

    /// Has a server show this clock.
    pub(crate) fn wind(&self, server: &mut Command) {
        server.env("LD_PRELOAD", self.dir.path().join(LIBRARY)).env("TENURE_CLOCK", self.dir.path().join(OFFSET));
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

const LIBRARY: &str = "clock.so";
const OFFSET: &str = "offset";
const NANOS: i64 = 1_000_000;
