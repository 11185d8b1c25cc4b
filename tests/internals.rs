//! Runs the crate's own tests that need a server.
//!
//! They show what private parts do on a real server: a connection that falls silent between two calls, a batch of
//! operations beside the same operations one by one, a client of a quorum whose clock is wrong. The public API reaches
//! none of these at the moment that counts, so the tests stay in `src`, beside those parts. There they are ignored, and
//! `cargo test --lib` needs no server. This program runs them, so that `cargo test` leaves none out. By hand:
//!
//!     cargo test --lib -- --ignored

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::env;
use std::process::Command;

#[test]
fn the_crates_own_tests_that_need_a_server_pass() {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["test", "--package", "tenure", "--lib"]);
    // As this program was compiled, so that nothing has to be compiled once more.
    let features = [
        ("default", cfg!(feature = "default")),
        ("fred", cfg!(feature = "fred")),
        ("redis", cfg!(feature = "redis")),
        ("rustls", cfg!(feature = "rustls")),
        ("native-tls", cfg!(feature = "native-tls")),
        ("serde", cfg!(feature = "serde")),
    ];
    let features: Vec<_> = features.into_iter().filter(|(_, enabled)| *enabled).map(|(name, _)| name).collect();
    cargo.args(["--no-default-features", "--features", &features.join(",")]);
    // Cargo describes this package to this program. Build scripts that look at that would run once more.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let status = cargo.args(["--", "--ignored"]).status().unwrap();
    assert!(status.success(), "{status}; the output above names what failed");
}
