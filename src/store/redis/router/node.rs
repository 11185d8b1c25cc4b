//! A plain connection to one node of a cluster, opened when it is needed and closed when it has been idle for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::super::driver::{Calling, Ended, Liveness, NodeConnection, Sent, Value};
use super::super::script::into_ours;
use crate::{Error, RedisError, RedisErrorKind};

/// A connection is replaced if the node has not replied to anything for so long while calls wait.
const SILENCE: Duration = Duration::from_millis(500);

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
pub(super) struct Node {
    state: watch::Receiver<State>,
    pub(super) usage: Arc<Usage>,
    _driver: AbortOnDropHandle<()>,
}

/// The state of a connection.
#[derive(Clone)]
enum State {
    Opening,
    Open(Arc<dyn NodeConnection>),
    Failed(RedisError),
}

/// A connection that is being opened, and what drives it then.
type Opening = Calling<'static, (Arc<dyn NodeConnection>, Ended)>;

impl Node {
    /// Connects in the background, on that runtime.
    pub(super) fn open(opening: Opening, asking: Asking, runtime: &Handle) -> Self {
        let usage = Arc::new(Usage(Mutex::new(Uses {
            now: 0,
            last: Instant::now(),
            began: Instant::now(),
            opened: None,
            liveness: Liveness::with_patience(SILENCE),
            over: false,
        })));
        let (sender, state) = watch::channel(State::Opening);
        let driver = runtime.spawn(drive(opening, asking.lingers(), sender, End(usage.clone())));
        Self { state, usage, _driver: AbortOnDropHandle::new(driver) }
    }

    /// Sends a command and returns the node's reply.
    pub(super) async fn ask(
        &self,
        asking: Asking,
        command: &'static str,
        args: Vec<Bytes>,
        until: Instant,
    ) -> Result<Value, Error> {
        let connection = self.opened(until).await?;
        let answer = match asking {
            Asking::No => connection.send(command, args, until).await,
            Asking::Yes => connection.send_asking(command, args, until).await,
        };
        let answer = answer.map_err(into_ours);
        if !unanswered(&answer) {
            self.usage.uses().liveness.heard();
        }
        answer
    }

    async fn opened(&self, until: Instant) -> Result<Arc<dyn NodeConnection>, Error> {
        let mut state = self.state.clone();
        let known = state.wait_for(|state| !matches!(state, State::Opening));
        match timeout_at(until, known).await.map_err(|_| Error::timeout())?.as_deref() {
            Ok(State::Open(connection)) => Ok(connection.clone()),
            Ok(State::Failed(error)) => Err(Error::Redis(error.clone())),
            // The runtime of the connection has ended.
            _ => Err(closed().into()),
        }
    }

    /// Returns whether the connection could be opened, whatever has become of it.
    pub(super) fn was_open(&self) -> bool {
        self.usage.uses().opened.is_some()
    }

    /// Returns whether the connection can't be used any more, judging by the result of a call that began then.
    pub(super) fn has_failed(&self, began: Instant, answer: &Result<Value, Error>) -> bool {
        let Err(error) = answer else { return false };
        let timed_out = error.is_timeout();
        match timed_out {
            // A slow node still replies to others. One that could not be opened in time is over.
            true => self.usage.is_over() || self.usage.is_silent(began),
            // Also a refusal with which it could not be opened.
            false => unanswered(answer) || self.usage.is_over(),
        }
    }
}

/// Returns whether a call failed without a reply.
fn unanswered(answer: &Result<Value, Error>) -> bool {
    matches!(answer, Err(error @ Error::Redis(_)) if error.code().is_none())
}

fn closed() -> RedisError {
    RedisError::new(RedisErrorKind::Io, "the connection to a node of the cluster was closed")
}

/// Connects, and keeps the connection until it fails or has been idle for long enough.
async fn drive(opening: Opening, lingers: Duration, state: watch::Sender<State>, end: End) {
    let mut ended = match opening.await {
        Ok((connection, ended)) => {
            end.0.uses().opened = Some(Instant::now());
            state.send_replace(State::Open(connection));
            ended
        }
        Err(error) => {
            // First, so that whoever learns of the failure finds it over.
            drop(end);
            state.send_replace(State::Failed(error));
            return;
        }
    };
    loop {
        select! {
            () = &mut ended => break,
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
    began: Instant,
    opened: Option<Instant>,
    liveness: Liveness,
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

    /// `began`: when a call began that has had no reply.
    fn is_silent(&self, began: Instant) -> bool {
        let mut uses = self.uses();
        match uses.opened {
            // It may have waited for that.
            Some(opened) => uses.liveness.is_silent(Sent::with_connection(began.max(opened)), 0),
            // However little time this call had, the next one may find it open.
            None => uses.began.elapsed() >= SILENCE,
        }
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
    use tenure_test_support::{Server as TestServer, eventually, soon};

    use super::super::super::{driver, url};
    use super::*;

    const LONG: Duration = Duration::from_secs(5);

    /// As for a server that is no cluster, which takes ASKING for an error.
    fn open(server: &TestServer, asking: Asking) -> Node {
        let node = url::Address::new("127.0.0.1", server.port());
        Node::open(driver::nodes_of(&server.url()).open(&node), asking, &Handle::current())
    }

    async fn ping(node: &Node, asking: Asking) -> Result<Value, Error> {
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
        let began = Instant::now();
        let answer = ping(&node, Asking::No).await;
        assert!(answer.as_ref().is_err_and(Error::is_transient), "{answer:?}");
        assert!(node.has_failed(began, &answer));
        // There is nobody to connect to.
        let node = open(&server, Asking::No);
        let answer = ping(&node, Asking::No).await;
        assert!(answer.as_ref().is_err_and(Error::is_transient), "{answer:?}");
        assert!(node.has_failed(began, &answer));
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
        assert!(!node.has_failed(Instant::now(), &refused));
        ping(&node, Asking::No).await.unwrap();
    }

    /// A connection that never replies.
    struct Mute;

    impl NodeConnection for Mute {
        fn send(&self, _: &'static str, _: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
            Box::pin(async move {
                tokio::time::sleep_until(until).await;
                Err(late())
            })
        }

        fn send_asking(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
            self.send(command, args, until)
        }
    }

    fn late() -> RedisError {
        RedisError::new(RedisErrorKind::Timeout, "no reply")
    }

    /// Connects to a mute node, which takes so long, or fails.
    fn open_mute(takes: Duration, opens: bool) -> Node {
        let opening = async move {
            sleep(takes).await;
            match opens {
                true => Ok((Arc::new(Mute) as Arc<dyn NodeConnection>, Box::pin(std::future::pending()) as Ended)),
                false => Err(late()),
            }
        };
        Node::open(Box::pin(opening), Asking::No, &Handle::current())
    }

    /// Asks with so much time. Returns whether the connection counts as failed by that.
    async fn fails_by(node: &Node, limit: Duration) -> bool {
        let began = Instant::now();
        let answer = node.ask(Asking::No, "PING", Vec::new(), began + limit).await;
        assert!(answer.as_ref().is_err_and(Error::is_timeout), "{answer:?}");
        node.has_failed(began, &answer)
    }

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_node_is_left_and_one_that_had_little_time_is_not() {
        let node = open_mute(ms(1), true);
        sleep(ms(2)).await;
        // However long nothing was asked.
        sleep(SILENCE).await;
        assert!(!fails_by(&node, ms(20)).await);
        sleep(ms(109)).await;
        assert!(!fails_by(&node, ms(20)).await, "149 ms");
        assert!(fails_by(&node, ms(20)).await, "169 ms");
        // One reply, and it begins anew.
        node.usage.uses().liveness.heard();
        sleep(ms(1)).await;
        assert!(!fails_by(&node, ms(100)).await);
        // A call that has waited for the connection is one of 499 ms, and then one of 500 ms.
        assert!(!fails_by(&open_mute(ms(1), true), SILENCE).await);
        assert!(fails_by(&open_mute(ms(1), true), SILENCE + ms(1)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_far_away_is_reached_also_by_those_who_have_little_time() {
        let node = open_mute(SILENCE, true);
        for _ in 0..24 {
            assert!(!fails_by(&node, ms(20)).await);
        }
        // It can't be reached, or not soon enough.
        assert!(fails_by(&open_mute(SILENCE * 2, true), SILENCE).await);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_could_not_be_opened_in_time_has_failed_however_short_that_was() {
        assert!(fails_by(&open_mute(SILENCE / 2, false), LONG).await);
    }
}
