//! A plain connection to one node of a cluster, opened when it is needed and closed when it has been idle for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, Server, ServerConfig};
use fred::types::{ClusterHash, CustomCommand, Value};
use tokio::join;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::super::script::into_ours;
use super::{once, options};
use crate::Error;

/// A connection on which a call has timed out is replaced if the node has not replied to anything for so long.
const SILENCE: Duration = Duration::from_millis(500);
/// The longest that connecting may take.
const CONNECTING: Duration = Duration::from_secs(2);

/// Whether a connection carries only commands behind `ASKING`, or only commands without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Asking {
    No,
    Yes,
}

impl Asking {
    /// How long an idle connection is kept.
    fn lingers(self) -> Duration {
        match self {
            // These carry almost everything.
            Self::No => Duration::from_secs(60),
            Self::Yes => Duration::from_secs(10),
        }
    }
}

/// A connection to one node; it is closed on drop.
pub(super) struct NodeConnection {
    client: Client,
    state: watch::Receiver<State>,
    pub(super) usage: Arc<Usage>,
    _driver: AbortOnDropHandle<()>,
}

/// The state of a connection.
#[derive(Clone)]
enum State {
    Opening,
    Open,
    Failed(fred::error::Error),
}

impl NodeConnection {
    /// Connects in the background, on that runtime, with the settings of `client`.
    pub(super) fn open(client: &Client, config: &Config, server: &Server, asking: Asking, runtime: &Handle) -> Self {
        let server = ServerConfig::Centralized { server: server.clone() };
        let config = Config { server, fail_fast: true, ..config.clone() };
        let mut connection = client.connection_config().clone();
        connection.connection_timeout = connection.connection_timeout.min(CONNECTING);
        connection.internal_command_timeout = connection.internal_command_timeout.min(CONNECTING);
        connection.max_command_attempts = 1;
        // A refusal concerns its own command, not all that are in flight.
        connection.reconnect_errors = Vec::new();
        connection.max_command_buffer_len = 0;
        let patience = connection.connection_timeout * 2;
        // Without a policy it never reconnects (invariant 4).
        let client = Client::new(config, Some(client.perf_config()), Some(connection), None);
        let usage = Arc::new(Usage(Mutex::new(Uses { now: 0, last: Instant::now(), heard: None, over: false })));
        let (sender, state) = watch::channel(State::Opening);
        let driver = runtime.spawn(drive(client.clone(), patience, asking.lingers(), sender, End(usage.clone())));
        Self { client, state, usage, _driver: AbortOnDropHandle::new(driver) }
    }

    /// Sends a command and returns the node's reply.
    pub(super) async fn ask(
        &self,
        asking: Asking,
        command: &'static str,
        args: Vec<Value>,
        until: Instant,
    ) -> Result<Value, Error> {
        self.is_open(until).await?;
        let mut answer = match asking {
            Asking::No => once(&self.client, command, args, until).await,
            Asking::Yes => self.ask_behind_asking(command, args, until).await,
        };
        if let Err(Error::Redis(error)) = &mut answer {
            // fred closes the connection then, and gives this error to all that is in flight. Some of it may have run.
            if error.details().starts_with("CLUSTERDOWN") {
                error.change_kind(ErrorKind::Timeout);
            }
        }
        if !unanswered(&answer) {
            self.usage.uses().heard = Some(Instant::now());
        }
        answer
    }

    /// fred writes the commands of a pipeline in one go, so nothing comes in between (invariant 3).
    async fn ask_behind_asking(&self, command: &'static str, args: Vec<Value>, until: Instant) -> Result<Value, Error> {
        let calls = self.client.pipeline().with_options(&options(until)?);
        let queued = |name| CustomCommand::new_static(name, ClusterHash::FirstKey, false);
        let _: Value = calls.custom(queued("ASKING"), Vec::<Value>::new()).await?;
        let _: Value = calls.custom(queued(command), args).await?;
        let mut answers = calls.try_all::<Value>().await.into_iter();
        // Either one error for both, or a reply to each.
        match (answers.next(), answers.next()) {
            (Some(Ok(_)), Some(answer)) => answer.map_err(into_ours),
            (Some(Err(error)), _) => Err(into_ours(error)),
            _ => Err(Error::timeout()),
        }
    }

    async fn is_open(&self, until: Instant) -> Result<(), Error> {
        let mut state = self.state.clone();
        let known = state.wait_for(|state| !matches!(state, State::Opening));
        match timeout_at(until, known).await.map_err(|_| Error::timeout())?.as_deref() {
            Ok(State::Open) => Ok(()),
            Ok(State::Failed(error)) => Err(Error::Redis(error.clone())),
            // The runtime of the connection has ended.
            _ => Err(closed().into()),
        }
    }

    /// Returns whether the connection could be opened, whatever has become of it.
    pub(super) fn was_open(&self) -> bool {
        self.usage.uses().heard.is_some()
    }

    /// Returns whether the connection can't be used any more, judging by the result of a call.
    pub(super) fn has_failed(&self, answer: &Result<Value, Error>) -> bool {
        let Err(error) = answer else { return false };
        let timed_out = matches!(error, Error::Redis(error) if *error.kind() == ErrorKind::Timeout);
        match timed_out {
            // A slow node still replies to others.
            true => self.usage.is_silent(),
            // Also a refusal with which it could not be opened.
            false => unanswered(answer) || self.usage.is_over(),
        }
    }
}

/// Returns whether a call failed without a reply.
fn unanswered(answer: &Result<Value, Error>) -> bool {
    matches!(answer, Err(error @ Error::Redis(_)) if error.code().is_none())
}

fn closed() -> fred::error::Error {
    fred::error::Error::new(ErrorKind::IO, "the connection to a node of the cluster was closed")
}

/// Connects, and keeps the connection until it fails or has been idle for long enough.
#[expect(clippy::async_yields_async, reason = "the handle is what is wanted; it ends with this task")]
async fn drive(client: Client, patience: Duration, lingers: Duration, state: watch::Sender<State>, end: End) {
    let (connected, mut driver) = join!(
        // Polled first: it misses what happens before its first poll.
        biased;
        timeout(patience, client.wait_for_connect()),
        async { AbortOnDropHandle::new(client.connect()) },
    );
    let late =
        |_| Err(fred::error::Error::new(ErrorKind::Timeout, "a node of the cluster could not be reached in time"));
    if let Err(error) = connected.unwrap_or_else(late) {
        state.send_replace(State::Failed(error));
        return;
    }
    end.0.uses().heard = Some(Instant::now());
    state.send_replace(State::Open);
    loop {
        select! {
            _ = &mut driver => break,
            () = sleep(lingers) => if end.0.end_if_unused(lingers) { break },
        }
    }
    state.send_replace(State::Failed(closed()));
}

/// Marks the connection as closed when its task ends, also when that is dropped with its runtime.
struct End(Arc<Usage>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.uses().over = true;
    }
}

/// How a connection is used.
pub(super) struct Usage(Mutex<Uses>);

struct Uses {
    now: usize,
    last: Instant,
    /// When the node last replied.
    heard: Option<Instant>,
    over: bool,
}

/// A call in progress.
pub(super) struct InUse(Arc<Usage>);

impl Usage {
    /// Begins a call. Returns `None` if the connection is closed, or is being closed.
    pub(super) fn begin(self: &Arc<Self>) -> Option<InUse> {
        let mut uses = self.uses();
        if uses.over {
            return None;
        }
        uses.now += 1;
        uses.last = Instant::now();
        Some(InUse(self.clone()))
    }

    pub(super) fn is_over(&self) -> bool {
        self.uses().over
    }

    pub(super) fn last_used(&self) -> Instant {
        self.uses().last
    }

    fn is_silent(&self) -> bool {
        let uses = self.uses();
        uses.heard.is_none_or(|heard| heard.elapsed() >= SILENCE)
    }

    fn end_if_unused(&self, lingers: Duration) -> bool {
        let mut uses = self.uses();
        uses.over |= uses.now == 0 && uses.last.elapsed() >= lingers;
        uses.over
    }

    /// Nothing panics while it holds this mutex, so a poisoned one is still valid.
    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut uses = self.0.uses();
        uses.now -= 1;
        uses.last = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use fred::types::Builder;
    use tenure_test_support::{Server as TestServer, eventually, soon};

    use super::*;

    const LONG: Duration = Duration::from_secs(5);

    /// As for a server that is no cluster, which takes ASKING for an error.
    fn open(server: &TestServer, asking: Asking) -> NodeConnection {
        let client = Builder::from_config(Config::from_url(&server.url()).unwrap()).build().unwrap();
        let config = client.client_config();
        let at = Server::new("127.0.0.1", server.port());
        NodeConnection::open(&client, &config, &at, asking, &Handle::current())
    }

    async fn ping(node: &NodeConnection, asking: Asking) -> Result<Value, Error> {
        soon(node.ask(asking, "PING", Vec::new(), Instant::now() + LONG)).await
    }

    fn connections(server: &TestServer) -> usize {
        server.cli(&["CLIENT", "LIST", "TYPE", "normal"]).lines().filter(|line| !line.contains("cmd=client")).count()
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn an_idle_connection_is_closed_and_one_in_use_is_not() {
        let server = TestServer::start();
        let node = open(&server, Asking::Yes);
        let in_use = node.usage.begin().unwrap();
        ping(&node, Asking::No).await.unwrap();
        assert_eq!(connections(&server), 1);
        tokio::time::pause();
        for _ in 0..5 {
            tokio::time::advance(Asking::Yes.lingers()).await;
        }
        tokio::time::resume();
        ping(&node, Asking::No).await.unwrap();
        drop(in_use);
        tokio::time::pause();
        for _ in 0..5 {
            tokio::time::advance(Asking::Yes.lingers()).await;
        }
        tokio::time::resume();
        eventually("it is closed", async || (connections(&server) == 0).then_some(())).await;
        assert!(node.usage.begin().is_none());
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_connection_ends_with_its_owner() {
        let server = TestServer::start();
        let node = open(&server, Asking::No);
        ping(&node, Asking::No).await.unwrap();
        assert_eq!(connections(&server), 1);
        drop(node);
        eventually("it is closed", async || (connections(&server) == 0).then_some(())).await;
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn what_goes_wrong_with_a_connection_is_told_and_ends_it() {
        let mut server = TestServer::start();
        let node = open(&server, Asking::No);
        ping(&node, Asking::No).await.unwrap();
        server.kill();
        let answer = ping(&node, Asking::No).await;
        assert!(answer.as_ref().is_err_and(Error::is_transient), "{answer:?}");
        assert!(node.has_failed(&answer));
        // There is nobody to connect to.
        let node = open(&server, Asking::No);
        let answer = ping(&node, Asking::No).await;
        assert!(answer.as_ref().is_err_and(Error::is_transient), "{answer:?}");
        assert!(node.has_failed(&answer));
        assert!(node.usage.begin().is_none());
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_refusal_ends_no_connection_and_that_of_asking_is_told() {
        let server = TestServer::start();
        let node = open(&server, Asking::Yes);
        let refused = ping(&node, Asking::Yes).await;
        // This server is no cluster.
        assert_eq!(refused.as_ref().unwrap_err().code(), Some("ERR"));
        assert!(!node.has_failed(&refused));
        ping(&node, Asking::No).await.unwrap();
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_silent_node_is_left_and_a_slow_one_is_not() {
        let server = TestServer::start();
        let node = open(&server, Asking::No);
        ping(&node, Asking::No).await.unwrap();
        server.freeze();
        let short = || node.ask(Asking::No, "PING", Vec::new(), Instant::now() + Duration::from_millis(20));
        let answer = short().await;
        assert!(!node.has_failed(&answer), "{answer:?}");
        sleep(SILENCE).await;
        let answer = short().await;
        assert!(node.has_failed(&answer), "{answer:?}");
    }
}
