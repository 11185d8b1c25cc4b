//! Starts `benches/shared`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tenure_bench_launcher::start("shared")
}
