//! Two hundred tasks in four processes never hold one lock together.
//!
//! Two witnesses, both on the server and apart from the locks, check that: a mark that every holder sets when it enters
//! and removes when it leaves, and a ledger of fencing tokens in order of entry. A program of its own, as it starts
//! itself four times as a worker.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

use std::env;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fred::prelude::{Builder, Client, ClientLike, Config, Value};
use fred::types::{ClusterHash, CustomCommand};
use tenure::Locker;
use tenure_test_support::Server;

const PROCESSES: usize = 4;
const TASKS: usize = 50;
const KEYS: [&str; 3] = ["a", "b", "c"];
const RUN: Duration = Duration::from_secs(30);
/// Tells a worker from the test: the server's URL.
const WORKER: &str = "TENURE_EXCLUSION_WORKER";

/// What a process does that was started as a worker. In the test program itself it has nothing to do.
#[test]
fn worker() {
    if let Ok(url) = env::var(WORKER) {
        tokio::runtime::Runtime::new().unwrap().block_on(work(&url));
    }
}

#[test]
fn two_hundred_tasks_in_four_processes_never_hold_one_lock_together() {
    let server = Server::start();
    let workers: Vec<Child> = (0..PROCESSES).map(|_| start_worker(&server)).collect();
    for worker in workers {
        let output = worker.wait_with_output().unwrap();
        assert!(output.status.success(), "a worker failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    for key in KEYS {
        assert_eq!(server.cli(&["EXISTS", key]), "0", "{key} is still locked");
        let ledger = server.cli(&["LRANGE", &format!("ledger:{key}"), "0", "-1"]);
        let fences: Vec<u64> = ledger.lines().map(|fence| fence.parse().unwrap()).collect();
        assert!(fences.is_sorted_by(|earlier, later| earlier < later), "fencing tokens of {key} don't grow");
        // Every task had its turn several times, or nothing was shown.
        assert!(fences.len() > PROCESSES * TASKS, "only {} holders of {key}", fences.len());
        eprintln!("{key}: {} holders, one after the other", fences.len());
    }
}

fn start_worker(server: &Server) -> Child {
    let mut worker = Command::new(env::current_exe().unwrap());
    worker.args(["--exact", "worker", "--nocapture"]).env(WORKER, server.url());
    worker.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

async fn work(url: &str) {
    let locker = Locker::builder().ttl(Duration::from_secs(5)).connect(url).await.unwrap();
    let witness = Builder::from_config(Config::from_url(url).unwrap()).build().unwrap();
    witness.init().await.unwrap();
    let end = Instant::now() + RUN;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (locker, witness) = (locker.clone(), witness.clone());
            tokio::spawn(async move {
                for round in 0.. {
                    if Instant::now() > end {
                        return;
                    }
                    hold(&locker, &witness, KEYS.get((task + round) % KEYS.len()).unwrap(), round).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    locker.close().await;
}

async fn hold(locker: &Locker, witness: &Client, key: &str, round: usize) {
    let guard = locker.lock(key).await.unwrap();
    let fence = guard.fencing_token().unwrap().to_string();
    let (mark, ledger) = (format!("mark:{key}"), format!("ledger:{key}"));
    let alone = ask(witness, "SET", [mark.as_str(), fence.as_str(), "NX"]).await;
    assert!(alone.as_str().is_some(), "{key}: somebody else is inside");
    ask(witness, "RPUSH", [ledger.as_str(), fence.as_str()]).await;
    let left = ask(witness, "DEL", [mark.as_str()]).await;
    assert_eq!(left.as_i64(), Some(1), "{key}: somebody else has left in our name");
    // Both ways to end a guard.
    if round % 2 == 0 {
        guard.release().await.unwrap();
    } else {
        drop(guard);
    }
}

async fn ask<const N: usize>(witness: &Client, command: &'static str, args: [&str; N]) -> Value {
    let command = CustomCommand::new_static(command, ClusterHash::FirstKey, false);
    witness.custom(command, args.to_vec()).await.unwrap()
}
