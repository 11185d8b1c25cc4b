//! What the workers share apart from the locks, in the parent process: the fenced register, which a lock protects, and
//! a letter box for leases that are handed over. It also tells the workers which part of the run this is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::history::Mode;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Write under the protection of a lock.
    Write {
        key: String,
        fence: u64,
    },
    /// Leave a lease for whoever takes it first.
    Give(Letter),
    Take,
    Phase,
    /// A worker has closed its lockers, and has so many tasks left.
    Closed {
        worker: u64,
        tasks: usize,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Accepted(bool),
    Letter(Option<Letter>),
    Phase(Phase),
    Noted,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Letter {
    pub(crate) lease: String,
    pub(crate) holder: String,
    pub(crate) mode: Mode,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// There are faults.
    Chaos,
    /// There are no more. Each task obtains a last lock, and ends.
    Calm,
    /// The servers have been looked at.
    Over,
}

/// The parent's end.
pub(crate) struct Register {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    _tasks: JoinSet<()>,
}

struct State {
    phase: Phase,
    tokens: HashMap<String, u64>,
    /// What was accepted, in order.
    accepted: Vec<(String, u64)>,
    letters: Vec<Letter>,
    /// By worker: how many tasks it has left.
    closed: HashMap<u64, usize>,
}

/// Leases that nobody takes expire, and make room.
const LETTERS: usize = 4;

impl Register {
    pub(crate) fn start(dir: &Path) -> Self {
        let path = dir.join("register");
        let listener = UnixListener::bind(&path).expect("a socket");
        let state = Arc::new(Mutex::new(State {
            phase: Phase::Chaos,
            tokens: HashMap::new(),
            accepted: Vec::new(),
            letters: Vec::new(),
            closed: HashMap::new(),
        }));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, state.clone()));
        Self { state, path, _tasks: tasks }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn enter(&self, phase: Phase) {
        lock(&self.state).phase = phase;
    }

    /// Returns how many tasks the worker has left, once it has closed its lockers.
    pub(crate) fn closed(&self, worker: u64) -> Option<usize> {
        lock(&self.state).closed.get(&worker).copied()
    }

    pub(crate) fn accepted(&self) -> Vec<(String, u64)> {
        lock(&self.state).accepted.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: UnixListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve(stream, state.clone()));
    }
}

/// Serves a worker until it is gone.
async fn serve(stream: UnixStream, state: Arc<Mutex<State>>) {
    let (from, mut to) = stream.into_split();
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // Of a worker that was killed.
        let Ok(ask) = serde_json::from_str(&line) else { return };
        let answer = lock(&state).answer(ask);
        let mut line = serde_json::to_string(&answer).expect("plain data");
        line.push('\n');
        if to.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

impl State {
    fn answer(&mut self, ask: Ask) -> Answer {
        match ask {
            Ask::Write { key, fence } => {
                let last = self.tokens.entry(key.clone()).or_default();
                let is_accepted = *last <= fence;
                if is_accepted {
                    *last = fence;
                    self.accepted.push((key, fence));
                }
                Answer::Accepted(is_accepted)
            }
            Ask::Give(letter) => {
                self.letters.push(letter);
                if self.letters.len() > LETTERS {
                    self.letters.remove(0);
                }
                Answer::Noted
            }
            Ask::Take => Answer::Letter(self.letters.pop()),
            Ask::Phase => Answer::Phase(self.phase),
            Ask::Closed { worker, tasks } => {
                self.closed.insert(worker, tasks);
                Answer::Noted
            }
        }
    }
}

/// A worker's end.
pub(crate) struct Client {
    stream: tokio::sync::Mutex<BufReader<UnixStream>>,
}

impl Client {
    pub(crate) async fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).await.expect("the parent is there");
        Self { stream: tokio::sync::Mutex::new(BufReader::new(stream)) }
    }

    pub(crate) async fn ask(&self, ask: &Ask) -> Answer {
        let mut line = serde_json::to_string(ask).expect("plain data");
        line.push('\n');
        let mut stream = self.stream.lock().await;
        stream.get_mut().write_all(line.as_bytes()).await.expect("the parent is there");
        let mut answer = String::new();
        stream.read_line(&mut answer).await.expect("the parent is there");
        serde_json::from_str(&answer).expect("an answer")
    }
}
