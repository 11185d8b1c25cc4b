//! Starts the benchmarks, which are in a package that is no default member of the workspace. If it were one, cargo
//! would count the features that they need of tenure whenever it compiles an example: those of a second client, which
//! takes twice as long.

use std::env;
use std::process::{Command, ExitCode};

/// Compiles the benchmark of this name, and runs it with the arguments of this process.
#[must_use]
pub fn start(name: &str) -> ExitCode {
    // cargo says which it is. Then the inner one is of the same toolchain.
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // cargo adds `--bench` to the arguments of both.
    let arguments = env::args_os().skip(1).filter(|argument| argument != "--bench");
    command.args(["bench", "--package", "tenure-benches", "--bench", name, "--"]).args(arguments);
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("could not run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
