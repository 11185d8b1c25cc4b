//! The worker processes.

use std::collections::BTreeSet;
use std::env;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::worker::Work;

/// Tells the program that it is a worker.
pub(crate) const WORKER: &str = "--worker";

/// Slots of workers. A worker that is killed is followed by another, with a number of its own.
pub(crate) struct Pool {
    slots: Vec<Slot>,
    /// The numbers of the workers that were killed.
    pub(crate) killed: BTreeSet<u64>,
    started: u64,
    seed: u64,
}

struct Slot {
    work: Work,
    process: Child,
}

impl Pool {
    /// Starts a worker for each slot. Their numbers and histories are set here.
    pub(crate) fn start(work: Vec<Work>, seed: u64) -> Self {
        let mut pool = Self { slots: Vec::new(), killed: BTreeSet::new(), started: 0, seed };
        for work in work {
            let slot = pool.start_worker(work);
            pool.slots.push(slot);
        }
        pool
    }

    fn start_worker(&mut self, mut work: Work) -> Slot {
        self.started += 1;
        work.number = self.started;
        work.seed = self.seed.wrapping_add(self.started * 1_000);
        work.history.set_file_name(format!("worker-{}.jsonl", work.number));
        let text = serde_json::to_string(&work).expect("plain data");
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args([WORKER, &text]).stdin(Stdio::null()).stdout(Stdio::null());
        Slot { work, process: command.spawn().expect("a worker") }
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The numbers of the workers that are there now.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.slots.iter().map(|slot| slot.work.number).collect()
    }

    pub(crate) fn histories(&self) -> Vec<PathBuf> {
        let path = |number| self.slots[0].work.history.with_file_name(format!("worker-{number}.jsonl"));
        (1..=self.started).map(path).collect()
    }

    pub(crate) fn freeze(&self, slot: usize) {
        self.signal(slot, Signal::SIGSTOP);
    }

    pub(crate) fn thaw(&self, slot: usize) {
        self.signal(slot, Signal::SIGCONT);
    }

    /// Kills a worker and starts the next one.
    pub(crate) fn replace(&mut self, slot: usize) {
        self.signal(slot, Signal::SIGKILL);
        let status = self.slots[slot].process.wait().expect("it was started by us");
        if status.signal() == Some(Signal::SIGKILL as i32) {
            self.killed.insert(self.slots[slot].work.number);
        }
        let work = self.slots[slot].work.clone();
        self.slots[slot] = self.start_worker(work);
    }

    fn signal(&self, slot: usize, signal: Signal) {
        let pid = i32::try_from(self.slots[slot].process.id()).expect("a process id");
        // One that has failed may be gone. Its failure is found at the end.
        kill(Pid::from_raw(pid), signal).ok();
    }

    /// Waits for the end of all, and returns those that have failed.
    pub(crate) fn join(&mut self, patience: Duration) -> Vec<String> {
        let end = Instant::now() + patience;
        let mut failed = Vec::new();
        for Slot { work, process } in &mut self.slots {
            loop {
                match process.try_wait().expect("it was started by us") {
                    Some(status) if status.success() => break,
                    Some(status) => failed.push(format!("worker {}: {status}", work.number)),
                    None if Instant::now() > end => failed.push(format!("worker {} doesn't end", work.number)),
                    None => {
                        std::thread::sleep(Duration::from_millis(10));
                        continue;
                    }
                }
                break;
            }
        }
        failed
    }

    /// Whether one has ended, which none should by itself.
    pub(crate) fn has_failed(&mut self) -> bool {
        self.slots.iter_mut().any(|slot| !matches!(slot.process.try_wait(), Ok(None)))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            // It may have ended, which is as well.
            drop(slot.process.kill());
            drop(slot.process.wait());
        }
    }
}
