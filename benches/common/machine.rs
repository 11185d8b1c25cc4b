//! What all benchmarks have in common: their arguments, and the description of the machine.

use std::io::ErrorKind;
use std::process::{Command, ExitCode};
use std::{fs, thread};

/// Returns whether `--quick` was given.
pub(crate) fn is_quick(args: impl Iterator<Item = String>) -> Result<bool, String> {
    let mut quick = false;
    for arg in args {
        match arg.as_str() {
            // Added by Cargo.
            "--bench" => {}
            "--quick" => quick = true,
            unknown => return Err(format!("unknown argument `{unknown}`; this benchmark's main.rs lists them")),
        }
    }
    Ok(quick)
}

/// Returns the exit code of the program. Prints an error as plain text.
pub(crate) fn exit_code(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            eprintln!("{refusal}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the machine and the server's version, in one line. It is called before anything is started: without a server
/// there is nothing to measure.
pub(crate) fn describe() -> Result<String, String> {
    let version = server_version()?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let facts = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = facts.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    let model = model.unwrap_or("of an unknown make");
    Ok(format!("{cores} cores ({model}), shared with the server: redis-server {version}."))
}

/// Returns the version that the server's binary reports, as `7.0.15`.
fn server_version() -> Result<String, String> {
    let output = match Command::new("redis-server").arg("--version").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err("redis-server is not installed; `bash tests/run.sh` installs it".to_owned());
        }
        Err(error) => return Err(format!("redis-server can't be run: {error}")),
    };
    let version = output.split_whitespace().find_map(|word| word.strip_prefix("v="));
    Ok(version.unwrap_or("of an unknown version").to_owned())
}
