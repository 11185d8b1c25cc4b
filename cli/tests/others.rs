//! `tenure status`, `list`, `break`, `doctor` and `completions` on real servers.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use serde_json::Value;
use tenure_test_support::Server;

const TENURE: &str = env!("CARGO_BIN_EXE_tenure");

fn tenure(server: &Server, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(TENURE).env("TENURE_URL", server.url()).stdin(Stdio::null()).args(args).output();
    let Output { status, stdout, stderr } = output.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn json(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Locks, as tenure keeps them on the server.
fn lock(server: &Server, key: &str, value: &str) {
    server.cli(&["SET", key, value, "PX", "60000"]);
    server.cli(&["SET", &format!("{{{key}}}:fence"), "1790000000000000", "PX", "60000"]);
}

#[test]
fn status_shows_holders_and_no_tokens() {
    let server = Server::start();
    lock(&server, "held", "secret-token\nhost-3\u{1b}[31m");
    server.cli(&["SET", "foreign", "another-secret"]);
    let (code, text, _) = tenure(&server, &["status", "held", "free", "foreign"]);
    assert_eq!(code, 0);
    let lines: Vec<_> = text.lines().collect();
    assert!(
        lines[0].starts_with("held  held by host-3") && lines[0].contains("fencing token 1790000000000000"),
        "{text}"
    );
    assert!(lines[1] == "free  no holder" && lines[2].contains("without a ttl"), "{text}");
    assert!(!text.contains("secret") && !text.contains('\u{1b}'), "{text}");
    let (code, text, _) = tenure(&server, &["status", "--json", "--exit-code", "held", "free"]);
    assert_eq!(code, 75);
    let [held, free] = &json(&text)[..] else { panic!("{text}") };
    let holder = &held["holders"][0];
    assert!(held["held"] == true && holder["remaining_ms"].as_u64().is_some_and(|ms| ms > 50_000), "{held}");
    assert_eq!(free["held"], false);
    assert_eq!(tenure(&server, &["status", "--exit-code", "free"]).0, 0);
}

#[test]
fn list_shows_locks_and_nothing_else_and_the_server_runs_no_keys() {
    let server = Server::start();
    for n in 0..5 {
        lock(&server, &format!("app:{n}"), "chosen");
    }
    server.cli(&["SET", "app:unfenced", "0123456789abcdef0123456789abcdef", "PX", "60000"]);
    server.cli(&["SET", "app:cache", "value", "PX", "60000"]);
    server.cli(&["SET", "app:for-ever", "0123456789abcdef0123456789abcdef"]);
    server.cli(&["RPUSH", "app:list", "1"]);
    lock(&server, "other", "chosen");
    server.cli(&["CONFIG", "RESETSTAT"]);
    let (code, text, _) = tenure(&server, &["list", "app:", "--json"]);
    let keys: Vec<_> = json(&text).iter().map(|lock| lock["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!((code, keys.join(" ")), (0, "app:0 app:1 app:2 app:3 app:4 app:unfenced".to_owned()));
    let stats = server.cli(&["INFO", "commandstats"]);
    assert!(stats.contains("cmdstat_scan") && !stats.contains("cmdstat_keys"), "{stats}");
    let (_, text, told) = tenure(&server, &["list", "app:", "--limit", "2"]);
    assert!(text.lines().count() == 2 && told.contains("more than 2"), "{text}{told}");
    let (_, text, _) = tenure(&server, &["list", "--prefix", "app:"]);
    assert!(text.starts_with("0  held"), "{text}");
}

#[test]
fn break_ends_a_lock_and_asks_first() {
    let server = Server::start();
    lock(&server, "held", "token");
    let (code, _, told) = tenure(&server, &["break", "held"]);
    assert!(code == 64 && told.contains("--yes") && server.cli(&["EXISTS", "held"]) == "1", "{told}");
    let (code, text, _) = tenure(&server, &["break", "held", "--yes", "--json"]);
    assert_eq!(
        (code, &json(&text)[0]["ended"], server.cli(&["EXISTS", "held"]).as_str()),
        (0, &Value::Bool(true), "0")
    );
    assert_eq!(tenure(&server, &["break", "held", "--yes"]).0, 1);
    server.cli(&["RPUSH", "list", "1"]);
    let (code, _, told) = tenure(&server, &["break", "list", "--yes"]);
    assert!(code == 69 && told.contains("WRONGTYPE"), "{told}");
}

#[test]
fn break_ends_the_lock_that_it_has_shown_and_no_later_one() {
    let server = Server::start();
    let answer_after = |meanwhile: &[&str]| {
        let pty = openpty(None, None).unwrap();
        let mut process = Command::new(TENURE)
            .args(["break", "held"])
            .env("TENURE_URL", server.url())
            .stdin(pty.slave)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stderr, mut told) = (process.stderr.take().unwrap(), Vec::new());
        while !told.ends_with(b"[y/N] ") {
            let mut byte = [0];
            stderr.read_exact(&mut byte).unwrap();
            told.extend(byte);
        }
        server.cli(meanwhile);
        let mut terminal = File::from(pty.master);
        terminal.write_all(b"y\n").unwrap();
        stderr.read_to_end(&mut told).unwrap();
        (process.wait().unwrap().code().unwrap(), String::from_utf8(told).unwrap())
    };
    lock(&server, "held", "token\nhost-3");
    let (code, told) = answer_after(&["SET", "held", "another", "PX", "60000"]);
    assert!(code == 1 && told.contains("host-3") && told.contains("another holds it now"), "{code}: {told}");
    assert_eq!(server.cli(&["GET", "held"]), "another");
    assert_eq!(answer_after(&["PING"]).0, 0);
    assert_eq!(server.cli(&["EXISTS", "held"]), "0");
}

#[test]
fn doctor_tells_by_its_exit_code_how_bad_it_is() {
    let server = Server::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let (code, text, _) = tenure(&server, &["doctor", &server.url()]);
    assert!(code == 0 && text.contains("nothing was found"), "{text}");
    server.cli(&["CONFIG", "SET", "appendonly", "no"]);
    assert_eq!(tenure(&server, &["doctor"]).0, 1);
    server.cli(&["CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru"]);
    let (code, text, _) = tenure(&server, &["doctor", "--json"]);
    assert_eq!((code, json(&text)[0]["findings"][0]["topic"].as_str()), (2, Some("memory")));
    assert_eq!(tenure(&server, &["doctor", "http://nonsense"]).0, 64);
}

#[test]
fn what_is_wrong_with_the_arguments_is_json_too() {
    let server = Server::start();
    for args in [&["status", "--json"][..], &["--json", "nonsense"], &["run", "--json", "job"]] {
        let (code, text, told) = tenure(&server, args);
        let [failed] = &json(&told)[..] else { panic!("{args:?}: {told}") };
        assert_eq!((code, text.as_str()), (64, ""), "{args:?}");
        assert_eq!((failed["event"].as_str(), failed["exit_code"].as_u64()), (Some("failed"), Some(64)), "{args:?}");
    }
    let (_, _, told) = tenure(&server, &["status", "--json"]);
    assert_eq!(json(&told)[0]["error"], "the following required arguments were not provided: <KEYS>...");
    // An option of the command is none of ours.
    let (code, _, told) = tenure(&server, &["run", "job", "--nonsense", "--", "true", "--json"]);
    assert!(code == 64 && told.starts_with("error: "), "{told}");
}

#[test]
fn completions_and_help_are_there_for_every_command() {
    let server = Server::start();
    for shell in ["bash", "zsh", "fish"] {
        let (code, text, _) = tenure(&server, &["completions", shell]);
        assert!(code == 0 && text.contains("no-wait"), "{shell}: {text}");
    }
    for command in ["run", "status", "list", "break", "doctor", "completions"] {
        let (code, text, _) = tenure(&server, &[command, "--help"]);
        assert!(code == 0 && text.contains("--json"), "{command}: {text}");
    }
    let (_, text, _) = tenure(&server, &["run", "--help"]);
    assert!(text.contains("TENURE_FENCING_TOKEN") && text.contains("Exit codes:"), "{text}");
    assert!(!text.contains(&server.url()), "{text}");
}

/// Otherwise the one that is left would be a quorum of its own.
#[test]
fn of_several_urls_none_is_empty() {
    let server = Server::start();
    let urls = format!("{},,", server.url());
    let (code, _, told) = tenure(&server, &["run", "job", "--no-wait", "--url", &urls, "--", "true"]);
    assert!(code == 64 && told.contains("invalid URL"), "{code}: {told}");
    assert_eq!(server.cli(&["DBSIZE"]), "0");
}

/// The default ttl is longer than this window, and no command but `run` has a ttl.
#[test]
fn a_short_restart_window_of_a_quorum_is_no_error() {
    let servers = [(); 3].map(|()| Server::start());
    let urls = servers.iter().map(Server::url).collect::<Vec<_>>().join(",");
    // Whatever else becomes of it: nodes may be too slow to vote, and a quorum has no list of locks.
    let is_refused = |args: &[&str]| {
        let (command, args) = args.split_first().unwrap();
        let args = [&[*command, "--restart-window", "10s", "--url", &urls], args].concat();
        let (_, _, told) = tenure(&servers[0], &args);
        told.contains("invalid ttl")
    };
    for args in [&["status", "job"][..], &["list"], &["break", "job", "--yes"], &["doctor"]] {
        assert!(!is_refused(args), "{args:?}");
    }
    let run = |ttl| is_refused(&["run", "job", "--no-wait", "--ttl", ttl, "--", "true"]);
    assert!(!run("10s") && run("11s"));
}

/// A single server has no restart window, and no command but `run` has a ttl.
#[test]
fn a_restart_window_does_not_limit_the_time_for_a_connection_to_one_server() {
    // It accepts connections, and never replies.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", silent.local_addr().unwrap());
    let began = Instant::now();
    let status = Command::new(TENURE)
        .args(["status", "job", "--url", &url, "--restart-window", "1s", "--command-timeout", "1s"])
        .stderr(Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(69));
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_nobody_takes_is_no_panic() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let server = Server::start();
    lock(&server, "job", "chosen");
    let mut command = Command::new(TENURE);
    command.env("TENURE_URL", server.url()).args(["break", "job"]).stdin(Stdio::null()).stderr(full());
    assert_ne!(command.status().unwrap().code(), Some(101));
    assert_eq!(server.cli(&["EXISTS", "job"]), "1");
}

/// The commands that print results, and what each exits with.
fn all_that_print(server: &Server) -> Vec<(Vec<&'static str>, i32)> {
    lock(server, "job", "chosen");
    vec![
        (vec!["status", "job"], 0),
        (vec!["status", "job", "--exit-code", "--json"], 75),
        (vec!["list"], 0),
        (vec!["list", "--json"], 0),
        (vec!["doctor"], 1),
        (vec!["completions", "bash"], 0),
        (vec!["--help"], 0),
        (vec!["help", "run"], 0),
        (vec!["--version"], 0),
        // The last, as nothing is left to look at.
        (vec!["break", "job", "--yes"], 0),
    ]
}

fn printing_to(stdout: Stdio, server: &Server, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(TENURE);
    command.env("TENURE_URL", server.url()).args(args).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[cfg(target_os = "linux")]
#[test]
fn results_that_a_full_disk_does_not_take_are_a_failure() {
    let server = Server::start();
    for (args, _) in all_that_print(&server) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (code, told) = printing_to(full.into(), &server, &args);
        assert_eq!(code, 74, "{args:?}: {told}");
        assert!(told.contains("could not print") && told.contains("No space left"), "{args:?}: {told}");
        if args.contains(&"--json") {
            assert_eq!(json(&told)[0]["exit_code"], 74, "{told}");
        }
    }
    // It was done all the same.
    assert_eq!(server.cli(&["EXISTS", "job"]), "0");
}

#[test]
fn results_that_a_reader_has_enough_of_are_no_failure() {
    let server = Server::start();
    for (args, expected) in all_that_print(&server) {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (code, told) = printing_to(writer.into(), &server, &args);
        assert_eq!((code, told.as_str()), (expected, ""), "{args:?}");
    }
}
