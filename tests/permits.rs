//! Four processes of eight tasks share three permits, and are killed at random: never a fourth holder, and all permits
//! come back.
//!
//! The witness is a file apart from the server, to which every holder appends a line after it has obtained a permit,
//! and another one before it releases it. The order of the lines is that in which they were written. Before the test
//! kills a process, it appends that this one no longer counts.
//!
//! A program of its own, as it starts itself as workers. `TENURE_PERMITS_SECONDS=60` runs it for longer.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "this is a test")]

use std::collections::HashSet;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tenure::Locker;
use tenure_test_support::{Server, soon};
use tokio::runtime::Runtime;

const PROCESSES: usize = 4;
const TASKS: usize = 8;
const PERMITS: usize = 3;
const KEY: &str = "licences";
const TTL: Duration = Duration::from_secs(5);
/// Tells a worker from the test: the server's URL, how many permits it asks for, and the file of the witness.
const WORKER: &str = "TENURE_PERMITS_WORKER";

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What a process does that was started as a worker. In the test program itself it has nothing to do.
#[test]
fn worker() {
    if let Ok(work) = env::var(WORKER) {
        let [url, permits, witness] = work.split(' ').collect::<Vec<_>>()[..] else { panic!("{work}") };
        Runtime::new().unwrap().block_on(work_for_ever(url, permits.parse().unwrap(), Path::new(witness)));
    }
}

async fn work_for_ever(url: &str, permits: usize, witness: &Path) {
    let locker = Locker::builder().ttl(TTL).connect(url).await.unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (locker, witness) = (locker.clone(), Witness::open(witness));
            tokio::spawn(async move {
                for round in 0.. {
                    let permit = locker.permit(KEY, permits).await.unwrap();
                    witness.write(&format!("enters {task}"));
                    // Some hold it for as long as others need to come and go.
                    let time = ms(fastrand::u64(..if round % 8 == 0 { 40 } else { 4 }));
                    let done = permit.protect(tokio::time::sleep(time)).await;
                    witness.write(&format!("leaves {task}"));
                    done.expect("a machine that is not away for seconds");
                    // Both ways to end a guard.
                    if round % 2 == 0 {
                        permit.release().await.unwrap();
                    } else {
                        drop(permit);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// The file to which all processes append lines.
struct Witness(File);

impl Witness {
    fn open(path: &Path) -> Self {
        Self(OpenOptions::new().append(true).create(true).open(path).unwrap())
    }

    /// Appends a line: in one call, so that no other one comes in between.
    fn write(&self, what: &str) {
        self.write_for(std::process::id(), what);
    }

    fn write_for(&self, process: u32, what: &str) {
        (&self.0).write_all(format!("{process} {what}\n").as_bytes()).unwrap();
    }
}

/// What the witness has seen.
#[derive(Debug, Default)]
struct Seen {
    turns: usize,
    /// The most holders at a time.
    most: usize,
    /// How many held a permit when they were killed.
    killed: usize,
    processes: HashSet<u32>,
}

fn read(path: &Path) -> Seen {
    let (text, mut seen) = (fs::read_to_string(path).unwrap(), Seen::default());
    let (mut inside, mut dead) = (HashSet::new(), HashSet::new());
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let process: u32 = words[0].parse().unwrap();
        match words[1..] {
            // It went on for a moment.
            _ if dead.contains(&process) => {}
            ["enters", task] => {
                assert!(inside.insert((process, task)), "{line}");
                seen.turns += 1;
                seen.processes.insert(process);
            }
            ["leaves", task] => assert!(inside.remove(&(process, task)), "{line}"),
            ["dies"] => {
                dead.insert(process);
                let before = inside.len();
                inside.retain(|(holder, _)| *holder != process);
                seen.killed += before - inside.len();
            }
            _ => panic!("{line}"),
        }
        seen.most = seen.most.max(inside.len());
    }
    seen
}

/// Lets workers share permits for some time, and on a busy machine until enough is seen. Kills one of them now and
/// then, and all of them at the end.
fn play(server: &Server, permits: usize, path: &Path, time: Duration, enough: impl Fn(&Seen) -> bool) -> Seen {
    let witness = Witness::open(path);
    let start = || -> Child {
        let mut worker = Command::new(env::current_exe().unwrap());
        let work = format!("{} {permits} {}", server.url(), path.display());
        worker.args(["--exact", "worker", "--nocapture"]).env(WORKER, work);
        worker.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap()
    };
    let kill = |worker: &mut Child| {
        witness.write_for(worker.id(), "dies");
        // Without a warning.
        worker.kill().unwrap();
        worker.wait().unwrap();
    };
    let mut workers: Vec<Child> = (0..PROCESSES).map(|_| start()).collect();
    let (end, patience) = (Instant::now() + time, Instant::now() + time + ms(60_000));
    while Instant::now() < end || (!enough(&read(path)) && Instant::now() < patience) {
        // Each time, the others wait for up to two seconds until the dead process has lost its place in the line.
        sleep(ms(fastrand::u64(1_500..3_500)));
        for worker in &mut workers {
            assert!(worker.try_wait().unwrap().is_none(), "a worker has failed");
        }
        let place = fastrand::usize(..PROCESSES);
        kill(&mut workers[place]);
        workers[place] = start();
    }
    workers.iter_mut().for_each(kill);
    read(path)
}

#[test]
fn four_processes_that_are_killed_never_have_a_fourth_permit_and_all_come_back() {
    let seconds = env::var("TENURE_PERMITS_SECONDS").map_or(10, |seconds| seconds.parse().unwrap());
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    // Holders were killed, and others went on.
    let enough =
        |seen: &Seen| seen.most >= PERMITS && seen.killed > 0 && seen.processes.len() > PROCESSES && seen.turns > 100;
    let seen = play(&server, PERMITS, &dir.path().join("witness"), Duration::from_secs(seconds), enough);
    let died = Instant::now();
    eprintln!("{seen:?}");
    assert_eq!(seen.most, PERMITS, "of {PERMITS} permits: {seen:?}");
    assert!(enough(&seen), "{seen:?}");
    Runtime::new().unwrap().block_on(async {
        let locker = Locker::builder().ttl(TTL).connect(&server.url()).await.unwrap();
        let mut permits = Vec::new();
        for _ in 0..PERMITS {
            permits.push(soon(locker.permit(KEY, PERMITS)).await.unwrap());
        }
        eprintln!("all permits were back after {:?}", died.elapsed());
        assert_eq!(locker.holders(KEY).await.unwrap().len(), PERMITS);
        assert!(locker.try_permit(KEY, PERMITS).await.is_err());
        drop(permits);
        locker.close().await;
        assert_eq!(locker_keys(&server), "");
    });
}

/// Without this, the witness would prove nothing.
#[test]
fn the_witness_sees_a_permit_too_many() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let enough = |seen: &Seen| seen.most > PERMITS;
    let seen = play(&server, PERMITS + 1, &dir.path().join("witness"), ms(1_000), enough);
    assert_eq!(seen.most, PERMITS + 1, "{seen:?}");
}

/// Returns what is left at the server, but for the last fencing token.
fn locker_keys(server: &Server) -> String {
    let keys = server.cli(&["KEYS", "*"]);
    keys.lines().filter(|key| !key.ends_with(":fence") && !key.contains("alive")).collect::<Vec<_>>().join(" ")
}
