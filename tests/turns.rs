//! Turns between processes: nobody starves, whether near or far, fair or not, alive or dead.
//!
//! A program of its own, because it starts itself as workers. They take the lock as often as they can, and report how
//! often that was.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "this is a test")]

use std::env;
use std::io::{BufRead, BufReader, Lines, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use tenure::{Error, Locker};
use tenure_test_support::{Mode, Proxy, Server, soon};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

/// The environment variable that marks a worker: its [`Work`], as text.
const WORKER: &str = "TENURE_TURNS_WORKER";

/// The line that a worker prints when it is connected.
const READY: &str = "ready";

/// The beginning of the line in which a worker prints what it has [`Done`]. libtest prints other lines.
const DONE: &str = "done: ";

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Runs a worker. In the test program itself it does nothing.
#[test]
fn worker() {
    if let Ok(work) = env::var(WORKER) {
        Runtime::new().unwrap().block_on(Work::from_text(&work).run());
    }
}

/// The task of a worker.
#[derive(Clone, Debug)]
struct Work {
    url: String,
    tasks: usize,
    hold: Duration,
    fair: bool,
    length: Duration,
    /// How long it waits for a turn.
    patience: Duration,
}

/// The result of a worker.
#[derive(Clone, Copy, Debug)]
struct Done {
    turns: u32,
    /// How often it waited in vain.
    in_vain: u32,
}

impl Work {
    fn new(url: &str, hold: Duration) -> Self {
        Self { url: url.to_owned(), tasks: 1, hold, fair: false, length: ms(4_000), patience: ms(1_000) }
    }

    fn to_text(&self) -> String {
        let Self { url, tasks, hold, fair, length, patience } = self;
        format!("{url} {tasks} {} {fair} {} {}", hold.as_micros(), length.as_millis(), patience.as_millis())
    }

    fn from_text(text: &str) -> Self {
        let parts: Vec<&str> = text.split(' ').collect();
        let [url, tasks, hold, fair, length, patience] = parts[..] else { panic!("{text}") };
        Self {
            url: url.to_owned(),
            tasks: tasks.parse().unwrap(),
            hold: Duration::from_micros(hold.parse().unwrap()),
            fair: fair.parse().unwrap(),
            length: ms(length.parse().unwrap()),
            patience: ms(patience.parse().unwrap()),
        }
    }

    fn start(&self) -> Worker {
        let mut worker = Command::new(env::current_exe().unwrap());
        worker.args(["--exact", "worker", "--nocapture"]).env(WORKER, self.to_text());
        let mut process = worker.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap()).lines();
        Worker { process, output }
    }

    async fn run(self) {
        let locker = Locker::connect(&self.url).await.unwrap();
        println!("\n{READY}");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        let end = tokio::time::Instant::now() + self.length;
        let mut tasks = JoinSet::new();
        for _ in 0..self.tasks {
            let (locker, work) = (locker.clone(), self.clone());
            tasks.spawn(async move {
                let mut done = Done { turns: 0, in_vain: 0 };
                while tokio::time::Instant::now() < end {
                    match locker.lock("k").fair(work.fair).wait_at_most(work.patience).await {
                        Ok(guard) => {
                            sleep_until(tokio::time::Instant::now() + work.hold).await;
                            guard.release().await.unwrap();
                            done.turns += 1;
                        }
                        Err(Error::NotObtained { .. }) => done.in_vain += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
                done
            });
        }
        let done = tasks.join_all().await;
        locker.close().await;
        let all = |count: fn(&Done) -> u32| done.iter().map(count).sum::<u32>();
        println!("\n{DONE}{} {}", all(|done| done.turns), all(|done| done.in_vain));
    }
}

/// A process that works once it is told to begin.
struct Worker {
    process: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn line(&mut self, beginning: &str) -> String {
        let mut lines = self.output.by_ref().map(Result::unwrap);
        lines.find_map(|line| line.strip_prefix(beginning).map(str::to_owned)).unwrap()
    }

    fn wait_until_ready(&mut self) {
        self.line(READY);
    }

    fn begin(&mut self) {
        drop(self.process.stdin.take());
    }

    fn done(mut self) -> Done {
        let line = self.line(DONE);
        assert!(self.process.wait().unwrap().success());
        let numbers: Vec<u32> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        Done { turns: numbers[0], in_vain: numbers[1] }
    }
}

/// All begin at the same time, however long one of them takes to start.
fn run_all(works: &[Work]) -> Vec<Done> {
    let mut workers: Vec<Worker> = works.iter().map(Work::start).collect();
    workers.iter_mut().for_each(Worker::wait_until_ready);
    workers.iter_mut().for_each(Worker::begin);
    workers.into_iter().map(Worker::done).collect()
}

/// Lets them work until their turns are as they should be: a busy machine may take a process its turns, but not so
/// every time.
fn have_turns(works: &[Work], are_fair: impl Fn(&[Done]) -> bool) {
    for _ in 0..5 {
        let done = run_all(works);
        eprintln!("{works:?}: {done:?}");
        if are_fair(&done) {
            return;
        }
    }
    panic!("never: the turns of each are as they should be");
}

#[test]
fn processes_of_one_task_have_as_many_turns_each() {
    for hold in [Duration::from_micros(500), ms(5)] {
        let server = Server::start();
        have_turns(&vec![Work::new(&server.url(), hold); 8], |done| {
            let turns = || done.iter().map(|done| done.turns);
            let (most, fewest) = (turns().max().unwrap(), turns().min().unwrap());
            // At the end, some have had a turn more.
            let as_many = fewest > 5 && f64::from(most) <= 1.3 * f64::from(fewest) + 1.0;
            as_many && done.iter().all(|done| done.in_vain == 0)
        });
    }
}

#[test]
fn a_process_that_is_far_has_its_share() {
    for (fair, share) in [(false, 17.0), (true, 2.0)] {
        let server = Server::start();
        let runtime = Runtime::new().unwrap();
        let proxy = runtime.block_on(Proxy::start(server.port()));
        proxy.set(Mode::Delay(ms(3)));
        // In strict order the far worker is back in the line before the near one's turn is over.
        let hold = if fair { ms(10) } else { ms(1) };
        let near = Work { tasks: if fair { 1 } else { 4 }, fair, ..Work::new(&server.url(), hold) };
        let far = Work { url: proxy.url(), tasks: 1, ..near.clone() };
        have_turns(&[near, far], |done| {
            let [near, far] = [0, 1].map(|n| f64::from(done[n].turns));
            far * 1.1 >= (near + far) / share && done[1].in_vain == 0
        });
    }
}

#[test]
fn plain_waiters_have_turns_beside_a_stream_of_fair_ones() {
    let server = Server::start();
    let plain = Work { tasks: 2, ..Work::new(&server.url(), ms(1)) };
    let fair = Work { tasks: 4, fair: true, ..plain.clone() };
    have_turns(&[plain, fair], |done| {
        let [plain, fair] = [0, 1].map(|n| f64::from(done[n].turns));
        // Turns go round: one for each fair worker, and up to sixteen for the plain ones.
        plain >= (plain + fair) / 6.0 && fair >= (plain + fair) / 8.0
    });
}

#[test]
fn a_process_that_dies_in_the_line_costs_a_moment() {
    let server = Server::start();
    Runtime::new().unwrap().block_on(async {
        let locker = Locker::connect(&server.url()).await.unwrap();
        let guard = locker.lock("k").await.unwrap();
        // It is in the line when it dies.
        let mut dead = Work { patience: ms(60_000), ..Work::new(&server.url(), ms(1)) }.start();
        dead.begin();
        let other = Locker::connect(&server.url()).await.unwrap();
        wait_for_places(&server, 1).await;
        let waiter = tokio::spawn(other.lock("k").into_future());
        wait_for_places(&server, 2).await;
        dead.process.kill().unwrap();
        dead.process.wait().unwrap();
        guard.release().await.unwrap();
        // A second for the reservation, half a second until the next heartbeat: not the ttl of half a minute.
        soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    });
}

#[test]
fn fair_waiters_of_different_processes_keep_their_order() {
    let server = Server::start();
    Runtime::new().unwrap().block_on(async {
        let [here, there] =
            [Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap()];
        let guard = here.lock("k").fair(true).await.unwrap();
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut waiters = JoinSet::new();
        for n in 0..23 {
            let request = if n < 20 { &here } else { &there }.lock("k").fair(true);
            let sender = sender.clone();
            waiters.spawn(async move {
                let guard = request.await.unwrap();
                sender.send(n).unwrap();
                // Shorter than the time between heartbeats.
                sleep(ms(200)).await;
                guard.release().await.unwrap();
            });
            wait_for_places(&server, n + 1).await;
        }
        guard.release().await.unwrap();
        waiters.join_all().await;
        for n in 0..23 {
            assert_eq!(order.recv().await, Some(n));
        }
    });
}

#[test]
fn nothing_is_left_of_any_line() {
    let server = Server::start();
    let plain = Work { tasks: 3, length: ms(1_500), ..Work::new(&server.url(), Duration::ZERO) };
    let fair = Work { fair: true, ..plain.clone() };
    run_all(&[plain.clone(), fair.clone(), plain, fair]);
    assert_eq!(server.cli(&["KEYS", "*"]), "{k}:fence");
    assert_eq!(server.cli(&["PUBSUB", "CHANNELS"]), "");
}

async fn wait_for_places(server: &Server, count: usize) {
    let count = count.to_string();
    tenure_test_support::eventually("it is in line", async || {
        (server.cli(&["ZCARD", "{k}:queue"]) == count).then_some(())
    })
    .await;
}
