//! Which server is behind a node's address: the node is asked when it is first connected, and after each reconnection.
//!
//! Two addresses may lead to one server, which would have two votes then. And while a node is away, its address may
//! come to lead to another server. A connected node gets no vote and no renewal until it has identified itself. If its
//! connection is replaced while a call is on its way, the call may be run by another server: what that has replied
//! counts only once that has identified itself, too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::error::NOT_SENT;
use crate::report::warn;
use crate::store::Answer;
use crate::store::redis::{RedisStore, ServerInfo};
use crate::{Error, RedisError, RedisErrorKind};

/// How long others wait for the call that asks a node, whose future may no longer be polled. Then another one asks.
const TRUSTED: Duration = Duration::from_millis(100);

const NOT_IDENTIFIED: &str = "the node has not identified itself since it reconnected; try again";

/// The servers at the addresses of one quorum, by the index of the node.
#[derive(Default)]
pub(super) struct Identities(Mutex<HashMap<usize, Server>>);

#[derive(Clone, PartialEq, Eq)]
struct Server {
    run_id: String,
    /// Two databases of one server count as two nodes; a warning advises against it.
    database: u8,
    address: String,
    /// Another address led to the same server before.
    is_refused: bool,
}

/// The server at one address.
pub(crate) struct Identity {
    all: Arc<Identities>,
    place: usize,
    address: String,
    database: u8,
    node: Arc<RedisStore>,
    nodes_never_forget: bool,
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    step: Step,
    /// How often the node was asked.
    asked: u64,
    /// How many connections to the node had been made when that was last looked at.
    connections: u64,
    known: ServerInfo,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The node has to be asked, once it is connected.
    Due,
    /// A call asks the node. Others wait for it until this time.
    Asking(Instant),
    Known,
}

impl Identity {
    pub(super) fn new(
        all: &Arc<Identities>,
        place: usize,
        address: String,
        database: u8,
        node: Arc<RedisStore>,
        nodes_never_forget: bool,
    ) -> Arc<Self> {
        let state =
            State { step: Step::Due, asked: 0, connections: node.connections_made(), known: ServerInfo::default() };
        Arc::new(Self {
            all: all.clone(),
            place,
            address,
            database,
            node,
            nodes_never_forget,
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    /// Returns the call, preceded by the question if the server is not known.
    pub(super) fn before<T: Send + 'static>(
        self: &Arc<Self>,
        within: Duration,
        call: Answer<'static, T>,
    ) -> Answer<'static, T> {
        let made = self.node.connections_made();
        if self.state().step(made) == Step::Known && self.twin().is_none() {
            let identity = self.clone();
            return Box::pin(async move { identity.reply_to(call, Some(made), Instant::now() + within).await });
        }
        self.at_last(within, call)
    }

    /// Does the same for a call that waits to be sent: checks when it is sent.
    pub(super) fn at_last<T: Send + 'static>(
        self: &Arc<Self>,
        within: Duration,
        call: Answer<'static, T>,
    ) -> Answer<'static, T> {
        let identity = self.clone();
        Box::pin(async move {
            let until = Instant::now() + within;
            let made = identity.identify(within).await?;
            identity.reply_to(call, made, until).await
        })
    }

    /// Makes the call. `made` is the connection on which the server is known, as the last of so many.
    async fn reply_to<T: Send>(&self, call: Answer<'static, T>, made: Option<u64>, until: Instant) -> Result<T, Error> {
        let reply = call.await?;
        if made == Some(self.node.connections_made()) {
            return Ok(reply);
        }
        let left = until.saturating_duration_since(Instant::now());
        match self.identify(left).await {
            Ok(Some(_)) => Ok(reply),
            // The call has been run all the same.
            Ok(None) | Err(_) => Err(RedisError::new(RedisErrorKind::Io, NOT_IDENTIFIED).into()),
        }
    }

    /// Waits until the server is known. Returns by which connection it is, as the last of so many that were made; or
    /// `None` if there is none.
    ///
    /// # Errors
    ///
    /// Fails if another address has its vote, which it names, or if the server has not identified itself.
    pub(super) async fn identify(&self, within: Duration) -> Result<Option<u64>, Error> {
        let made = loop {
            let changed = self.changed.notified();
            match self.begin() {
                // The call itself reports best why there is no connection.
                None => return Ok(None),
                Some(Begun { step: Step::Known, made, .. }) => break made,
                Some(Begun { step: Step::Asking(until), .. }) => drop(timeout_at(until, changed).await),
                Some(Begun { step: Step::Due, number, .. }) => {
                    let asking = Asking { identity: self, number };
                    match self.node.info(within).await {
                        Ok(info) => self.learn(asking.number, info),
                        // A server that refuses to tell is assumed to be well.
                        Err(error) if error.code().is_some() && !error.is_transient() => {
                            self.learn(asking.number, ServerInfo::default());
                        }
                        Err(_) => return Err(unsent(RedisErrorKind::Io, NOT_IDENTIFIED)),
                    }
                    drop(asking);
                }
            }
        };
        match self.twin() {
            None => Ok(Some(made)),
            Some(other) => {
                let details = format!("it is the same server as {other}, which has its vote");
                Err(unsent(RedisErrorKind::Config, &details))
            }
        }
    }

    /// Returns the current step. Returns [`Step::Due`] to one caller only, which has to ask. `None` if there is no
    /// connection.
    fn begin(&self) -> Option<Begun> {
        let mut state = self.state();
        let made = self.node.connections_made();
        let step = state.step(made);
        if step == Step::Due {
            if !self.node.is_connected() {
                return None;
            }
            state.step = Step::Asking(Instant::now() + TRUSTED);
            state.asked += 1;
        }
        Some(Begun { step, number: state.asked, made })
    }

    /// Notes a reply, unless another call has asked since.
    fn learn(&self, asked: u64, info: ServerInfo) {
        let news = {
            let mut state = self.state();
            if state.asked != asked {
                return;
            }
            state.step = Step::Known;
            let news = info.since(&state.known);
            state.known = info.clone();
            news
        };
        self.warn_of(&news);
        let Some(run_id) = info.run_id else {
            self.all.servers().remove(&self.place);
            return;
        };
        let mut servers = self.all.servers();
        let mut server = Server { run_id, database: self.database, address: self.address.clone(), is_refused: false };
        let twin = servers.iter().find(|(place, other)| **place != self.place && other.is_same(&server));
        if let Some(other) = twin.map(|(_, other)| other.address.clone()) {
            server.is_refused = true;
            warn!(
                name: "tenure.same_server", node = %self.address, %other,
                "both addresses lead to one server, which has one vote: the first one's"
            );
        }
        servers.insert(self.place, server);
    }

    /// Returns the address that has this server's vote, if it is another.
    pub(super) fn twin(&self) -> Option<String> {
        let mut servers = self.all.servers();
        let own = servers.get(&self.place).filter(|own| own.is_refused)?.clone();
        let twin = servers.iter().find(|(place, other)| **place != self.place && other.is_same(&own));
        let twin = twin.map(|(_, other)| other.address.clone());
        if let Some(own) = servers.get_mut(&self.place).filter(|_| twin.is_none()) {
            // The other address leads to another server by now.
            own.is_refused = false;
        }
        twin
    }

    /// Warns of settings of a node that may break the quorum.
    fn warn_of(&self, info: &ServerInfo) {
        let node = &*self.address;
        if info.is_replica {
            warn!(name: "tenure.node_is_replica", node, "it follows another server, and can't vote");
        }
        if info.was_promoted {
            warn!(
                name: "tenure.node_was_promoted", node,
                "it was a replica and was promoted: it may lack what was granted before; nothing may fail over to a \
                 node"
            );
        }
        if self.nodes_never_forget && info.may_forget {
            warn!(
                name: "tenure.node_may_forget", node,
                "the restart window is off, but the node answers before what it grants is on disk: a restart can give \
                 a lock to a second holder; set `appendfsync always`, or a restart window"
            );
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Begun {
    step: Step,
    /// That of the last question.
    number: u64,
    /// How many connections had been made.
    made: u64,
}

/// A call that asks the node. Others wait until this is dropped.
struct Asking<'a> {
    identity: &'a Identity,
    number: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut state = self.identity.state();
        if state.asked == self.number && matches!(state.step, Step::Asking(_)) {
            state.step = Step::Due;
        }
        drop(state);
        self.identity.changed.notify_waiters();
    }
}

impl State {
    /// Returns the step at this moment.
    fn step(&mut self, connections: u64) -> Step {
        let is_stale = match self.step {
            Step::Due => false,
            Step::Asking(until) => Instant::now() >= until,
            Step::Known => std::mem::replace(&mut self.connections, connections) != connections,
        };
        if is_stale {
            self.step = Step::Due;
        }
        self.step
    }
}

impl Server {
    /// Returns whether this one has the vote of the other.
    fn is_same(&self, other: &Self) -> bool {
        !self.is_refused && (&self.run_id, self.database) == (&other.run_id, other.database)
    }
}

impl Identities {
    fn servers(&self) -> MutexGuard<'_, HashMap<usize, Server>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unsent(kind: RedisErrorKind, details: &str) -> Error {
    RedisError::new(kind, format!("{details}{NOT_SENT}")).into()
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use tenure_test_support::{Proxy, Server, eventually};
    use tokio::time::timeout;

    use super::*;
    use crate::store::redis::{Driver, url};

    const LONG: Duration = Duration::from_secs(10);

    /// Of one server.
    async fn identity(server: &Server) -> Arc<Identity> {
        identity_of(&Arc::default(), 0, &server.url()).await
    }

    async fn identity_of(all: &Arc<Identities>, place: usize, url: &str) -> Arc<Identity> {
        let node = RedisStore::open_lazily(Driver::default(), &url::parse(url).unwrap(), String::new(), LONG).unwrap();
        node.ready(LONG).await.unwrap();
        Identity::new(all, place, "node".into(), 0, Arc::new(node), false)
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_future_that_asks_and_is_not_polled_any_more_holds_up_no_other() {
        let server = Server::start();
        let identity = identity(&server).await;
        let mut parked = Box::pin(identity.identify(LONG));
        assert!(parked.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        timeout(LONG, identity.identify(LONG)).await.unwrap().unwrap();
        assert!(identity.state().known.run_id.is_some());
        parked.await.unwrap();
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_node_that_has_not_said_yet_who_it_is_may_do_so_later_and_was_sent_nothing() {
        let server = Server::start();
        let identity = identity(&server).await;
        server.freeze();
        let error = identity.identify(Duration::from_millis(150)).await.unwrap_err();
        assert!(error.is_transient() && error.has_not_run(), "{error}");
        server.thaw();
        identity.identify(LONG).await.unwrap();
    }

    /// As when a script is sent again as a whole, since the server doesn't know it, and the connection broke in
    /// between.
    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_call_whose_connection_was_replaced_counts_once_the_server_is_known() {
        let servers = [Server::start(), Server::start()];
        let proxy = Arc::new(Proxy::start(servers[0].port()).await);
        let all = Arc::default();
        let mut nodes = Vec::new();
        for (place, url) in [servers[1].url(), proxy.url()].iter().enumerate() {
            let identity = identity_of(&all, place, url).await;
            identity.identify(LONG).await.unwrap();
            nodes.push(identity);
        }
        let call_that_lasts_until_it_leads_to = |server: &Server| {
            let (identity, proxy) = (nodes[1].clone(), proxy.clone());
            let made = identity.node.connections_made();
            proxy.lead_to(server.port());
            let call: Answer<'static, ()> = Box::pin(async move {
                proxy.cut();
                let is_new = || identity.node.is_connected() && identity.node.connections_made() > made;
                eventually("it leads there", async || is_new().then_some(())).await;
                Ok(())
            });
            nodes[1].before(LONG, call)
        };
        call_that_lasts_until_it_leads_to(&servers[0]).await.unwrap();
        let error = call_that_lasts_until_it_leads_to(&servers[1]).await.unwrap_err();
        assert!(error.is_transient() && !error.has_not_run(), "{error}");
        let error = nodes[1].identify(LONG).await.unwrap_err();
        assert!(error.to_string().contains("has its vote"), "{error}");
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_node_that_is_promoted_is_noticed_when_it_is_reached_anew() {
        let primary = Server::start();
        let replica = primary.start_replica();
        let identity = identity(&replica).await;
        identity.identify(LONG).await.unwrap();
        let known = identity.state().known.clone();
        assert!(known.is_replica && !known.was_promoted, "{known:?}");
        replica.cli(&["REPLICAOF", "NO", "ONE"]);
        replica.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        let promoted = eventually("it is reached anew", async || {
            drop(identity.identify(LONG).await);
            Some(identity.state().known.clone()).filter(|now| now.was_promoted)
        });
        let promoted = promoted.await;
        assert!(promoted.since(&known).was_promoted && !promoted.since(&promoted).was_promoted);
    }
}
