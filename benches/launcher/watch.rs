//! Starts `benches/watch`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tenure_bench_launcher::start("watch")
}
