//! The driver for fred: a client with settings that suit locks, or the caller's.
//!
//! What fred does that a lock must not rely on, as measured on 10.1:
//!
//! 1. A command whose reply was lost is run again, unless the call forbids it. Every call has one attempt and its own
//!    timeout. fred drops a command that still waits for a connection when that timeout is over; one whose future was
//!    dropped is sent all the same. So no call's future is dropped to end it.
//! 2. In a cluster fred can't follow an `ASK`, and gives replies to the wrong callers (`router.rs`). So its cluster
//!    client sends nothing: it provides the configuration and the map of the slots.
//! 3. It reconnects to all nodes of a cluster together, so a dead node would hold up the commands to all others.
//! 4. A subscription counts as made before the server has confirmed it.
//!
//! And one thing that nothing here can make up for: a reply of a million nested arrays overflows the stack of fred's
//! parser, which ends the process. No server sends one, so this matters only where the server is not trusted, and where
//! a connection without TLS could be tampered with. redis-rs refuses such a reply.

mod convert;
mod events;
mod node;
mod pub_sub;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use fred::clients::Client;
use fred::interfaces::{ClientLike, FredResult};
use fred::types::config::{Config, ConnectionConfig, Options, PerformanceConfig, ReconnectError, ReconnectPolicy};
use fred::types::{Builder, ClusterHash, CustomCommand};
use tokio::join;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use self::events::Events;
use self::node::FredNodes;
use self::pub_sub::FredPubSub;
use super::demotion::Demotion;
use super::failure::Peer;
use super::liveness::Liveness;
use super::task::{DriverTask, Home};
use super::{Calling, Connection, Nodes, PubSub, Sent, Value, WithoutConnection, not_sent};
use crate::store::redis::url::Target;
use crate::{RedisError, RedisErrorKind};

struct FredConnection {
    client: Client,
    /// The server at the other end, for error messages.
    peer: Peer,
    /// The connections that were made and that failed.
    events: Mutex<Events>,
    /// A copy of `Events::is_broken` that needs no mutex.
    is_broken: AtomicBool,
    /// `None` where the client is the caller's.
    driver: Option<Arc<DriverTask<FredResult<()>>>>,
    /// Whether calls wait while there is no connection. For a node of a quorum they fail at once.
    waits: bool,
    liveness: Mutex<Liveness>,
    demotion: Mutex<Demotion>,
}

impl FredConnection {
    /// # Errors
    ///
    /// Whatever keeps the first connection from being made: nothing is retried here.
    async fn open(target: &Target, timeout: Duration) -> Result<Self, crate::Error> {
        // It subscribes to fred's events before there can be any.
        let mut connection = Self::ours(build(convert::config_of(target)?, timeout)?, timeout);
        let driver = connect(&connection.client).await;
        let driver = driver.map_err(|error| connection.peer.unreachable(error.into(), None))?;
        connection.driver = Some(connection.driven_by(driver)?);
        connection.ping(timeout).await?;
        Ok(connection)
    }

    /// Connects in the background, now or when the server comes up.
    ///
    /// # Errors
    ///
    /// Never fails because of the server or the network.
    fn open_lazily(target: &Target, timeout: Duration, without: WithoutConnection) -> Result<Self, crate::Error> {
        let config = Config { fail_fast: false, ..convert::config_of(target)? };
        let connection = Self::ours(build(config, timeout)?, timeout);
        let driver = connection.driven_by(AbortOnDropHandle::new(connection.client.connect()))?;
        Ok(Self { driver: Some(driver), waits: without == WithoutConnection::CallsWait, ..connection })
    }

    /// Wraps a client of our own that doesn't connect yet.
    fn ours(client: Client, timeout: Duration) -> Self {
        let connection = Self::of(client, true);
        connection.liveness().patience = timeout * 2;
        connection
    }

    fn driven_by(
        &self,
        task: AbortOnDropHandle<FredResult<()>>,
    ) -> Result<Arc<DriverTask<FredResult<()>>>, crate::Error> {
        let client = self.client.clone();
        Ok(Arc::new(DriverTask::new(task, move || client.connect())?))
    }

    /// Makes sure that the server replies, if only with a refusal: fred takes a connection for a good one that the
    /// server has closed at once, as it does without TLS where it wants TLS.
    async fn ping(&self, timeout: Duration) -> Result<(), RedisError> {
        let options = Options { max_attempts: Some(1), timeout: Some(timeout.max(SHORTEST)), ..Options::default() };
        let answer: FredResult<fred::types::Value> =
            self.client.with_options(&options).custom(custom("PING"), Vec::<Bytes>::new()).await;
        match answer.map_err(|error| self.peer.unreachable(error.into(), None)) {
            Err(error) if error.code().is_none() => Err(error),
            _ => Ok(()),
        }
    }

    fn of(client: Client, is_broken: bool) -> Self {
        let events = Mutex::new(Events::of(&client, is_broken));
        let peer = Peer::of(&convert::target_of(&client.client_config()));
        let is_broken = AtomicBool::new(is_broken);
        let (liveness, demotion) = (Mutex::default(), Mutex::default());
        Self { client, peer, events, is_broken, driver: None, waits: true, liveness, demotion }
    }

    fn sent(&self, at: Instant) -> Sent {
        let sent = self.events().sent(at);
        Sent { without: sent.without && !self.is_cluster(), ..sent }
    }

    fn why_unanswered(&self) -> Option<RedisError> {
        let mut reason = self.why_not_connected()?;
        // It is still a timeout, as the call may have been sent before the connection broke; unless waiting is of no
        // use.
        if reason.kind() != RedisErrorKind::Tls {
            reason.change_kind(RedisErrorKind::Timeout);
        }
        Some(reason)
    }

    fn go_on_if_stalled(&self) {
        if let Some(driver) = &self.driver {
            let patience = self.liveness().patience / 4;
            driver.go_on_here_if_stalled(patience);
        }
    }

    fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the events up to now.
    fn events(&self) -> MutexGuard<'_, Events> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.take_in() {
            self.is_broken.store(events.is_broken, Ordering::Relaxed);
        }
        events
    }

    /// Returns why there is no connection, which is more than the "timed out" of a call that waited for one: the server
    /// refused it, say, or is still loading.
    fn why_not_connected(&self) -> Option<RedisError> {
        let events = self.events();
        let is_broken = events.is_broken && !self.is_cluster();
        if self.client.is_connected() && !is_broken {
            return None;
        }
        let (error, server) = events.last.as_ref()?;
        let server = server.as_ref().map(convert::address_of);
        let error = error.clone().into();
        Some(match events.made() {
            0 => self.peer.unreachable(error, server.as_ref()),
            _ => self.peer.lost(error, server.as_ref()),
        })
    }
}

impl Connection for FredConnection {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(
            async move { once(&self.client, command, args, until).await.map_err(|error| closing(&self.client, error)) },
        )
    }

    fn address(&self) -> String {
        self.peer.address().to_owned()
    }

    fn nodes(&self) -> Option<Arc<dyn Nodes>> {
        self.is_cluster().then(|| Arc::new(FredNodes::of(self.client.clone())) as Arc<dyn Nodes>)
    }

    fn is_cluster(&self) -> bool {
        self.client.is_clustered()
    }

    fn is_connected(&self) -> bool {
        self.client.is_connected()
    }

    fn connections_made(&self) -> u64 {
        self.events().made()
    }

    fn ready(&self, timeout: Duration) -> Calling<'_, ()> {
        Box::pin(async move {
            let until = Instant::now() + timeout;
            match timeout_at(until, self.client.wait_for_connect()).await {
                Ok(Ok(())) => self.ping(until.saturating_duration_since(Instant::now())).await,
                Ok(Err(error)) => Err(self.peer.unreachable(error.into(), None)),
                Err(_) => Err(self.why_not_connected().unwrap_or_else(|| self.peer.silent())),
            }
        })
    }

    fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
        // The runtime that has driven it until now may have ended.
        drop(self.runtime());
        if self.waits || self.client.is_connected() {
            return Ok(self.sent(now));
        }
        // Nothing else may call, and so notice, as long as there is no connection.
        self.go_on_if_stalled();
        let unknown = || RedisError::new(RedisErrorKind::Io, "there is no connection to the server");
        Err(not_sent(self.why_not_connected().unwrap_or_else(|| self.peer.unreachable(unknown(), None))))
    }

    fn answered(&self) {
        self.liveness().heard();
    }

    /// Opens a new connection if this one has gone silent, but leaves a client alone that is not ours.
    fn failed(&self, sent: Sent, error: RedisError) -> RedisError {
        let unanswered = error.kind() == RedisErrorKind::Timeout;
        let unrouted = error.details() == UNROUTED && !self.is_cluster();
        let unreceived = UNRECEIVED.contains(&error.details());
        let never_sent = unrouted || (unreceived && self.driver.is_some()) || self.events().never_sent(sent);
        if !unanswered {
            self.liveness().heard();
        } else {
            self.go_on_if_stalled();
        }
        let reason = if unanswered || unrouted { self.why_unanswered() } else { None };
        let error = match reason {
            Some(reason) => reason,
            None if unreceived => self.peer.gone(self.driver.is_some()),
            None => {
                let made = self.connections_made();
                if unanswered && self.driver.is_some() && self.liveness().is_silent(sent, made) {
                    self.replace();
                }
                self.peer.unanswered(error)
            }
        };
        if never_sent { not_sent(error) } else { error }
    }

    /// Takes no mutex while there is a connection.
    fn will_wait(&self, now: Instant) -> Sent {
        // The calls that the operation waits for have checked the connection in full.
        let is_connected = self.client.is_connected() && !self.is_broken.load(Ordering::Relaxed);
        if is_connected { Sent::with_connection(now) } else { self.sent(now) }
    }

    fn unheard(&self, sent: Sent) -> RedisError {
        self.go_on_if_stalled();
        let error = self.why_unanswered().unwrap_or_else(|| self.peer.silent());
        match self.events().never_sent(sent) {
            true => not_sent(error),
            false => error,
        }
    }

    fn blocks(&self, until: Instant) {
        let made = self.connections_made();
        self.liveness().blocks(until, made);
    }

    fn no_longer_blocks(&self, until: Instant) {
        self.liveness().no_longer_blocks(until);
    }

    /// Asks fred for a new connection. One poll puts the request in fred's queue. Nothing waits for its result, which
    /// may take as long as the server is away.
    fn replace(&self) {
        let mut request = Box::pin(self.client.force_reconnection());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if request.as_mut().poll(&mut context).is_ready() {
            crate::report::debug!(name: "tenure.reconnect", "the connection could not be asked to reopen");
        }
    }

    /// What a client of the caller's does then is for its settings to say. Without a policy it would end.
    fn refused_by_replica(&self) {
        let is_ours = self.driver.is_some();
        let reconnects = self.client.connection_config().reconnect_errors.contains(&ReconnectError::ReadOnly);
        if !(is_ours || reconnects) || !self.client.has_reconnect_policy() || self.is_cluster() {
            return;
        }
        let made = self.connections_made();
        let mut demotion = self.demotion.lock().unwrap_or_else(PoisonError::into_inner);
        if demotion.is_due(made) {
            drop(demotion);
            self.replace();
        }
    }

    fn runtime(&self) -> Option<Handle> {
        self.driver.as_ref().map(|driver| driver.go_on())
    }

    fn pub_sub(&self) -> Arc<dyn PubSub> {
        Arc::new(FredPubSub::new(self.client.client_config(), Home::of(self.driver.as_ref())))
    }
}

/// Connects to a server, or learns what the nodes of a cluster are.
pub(super) async fn open(target: &Target, timeout: Duration) -> Result<Arc<dyn Connection>, crate::Error> {
    Ok(Arc::new(FredConnection::open(target, timeout).await?))
}

/// Connects in the background, now or when the server comes up.
pub(super) fn open_lazily(
    target: &Target,
    timeout: Duration,
    without: WithoutConnection,
) -> Result<Arc<dyn Connection>, crate::Error> {
    Ok(Arc::new(FredConnection::open_lazily(target, timeout, without)?))
}

/// Uses the caller's client. Assumes nothing of its settings: each call brings its own.
pub(in super::super) fn borrowed(client: Client) -> Arc<dyn Connection> {
    Arc::new(FredConnection::of(client, false))
}

/// Sends a command once, by `until`.
///
/// fred gets the timeout and writes the command only once: it would still send a command whose future was dropped while
/// it waited for a connection.
async fn once(client: &Client, command: &'static str, args: Vec<Bytes>, until: Instant) -> Result<Value, RedisError> {
    let client = client.with_options(&options(until)?);
    let sent = client.custom::<fred::types::Value, Bytes>(custom(command), args);
    let reply = timeout_at(until, sent).await.map_err(|_| late())?;
    Ok(reply?.into())
}

fn late() -> RedisError {
    RedisError::new(RedisErrorKind::Timeout, "the server did not reply in time")
}

/// fred closes the connection after some refusals: `CLUSTERDOWN`, and those that the settings of a caller's client
/// name. It gives this error to all that is in flight, whoever sent it. So what it says is known of the connection, and
/// not of this command, which may have run.
fn closing(client: &Client, mut error: RedisError) -> RedisError {
    let config = client.connection_config();
    let is_named = |text: &str| config.reconnect_errors.iter().any(|refusal| text.starts_with(beginning_of(refusal)));
    let text = error.details();
    let closes = text.starts_with("CLUSTERDOWN")
        || is_named(text)
        || (config.reconnect_on_auth_error && error.kind() == RedisErrorKind::Auth);
    if closes {
        error.change_kind(RedisErrorKind::Timeout);
    }
    error
}

fn beginning_of(refusal: &ReconnectError) -> &'static str {
    match refusal {
        ReconnectError::ClusterDown => "CLUSTERDOWN",
        ReconnectError::Loading => "LOADING",
        ReconnectError::MasterDown => "MASTERDOWN",
        ReconnectError::ReadOnly => "READONLY",
        ReconnectError::Misconf => "MISCONF",
        ReconnectError::Busy => "BUSY",
        ReconnectError::NoReplicas => "NOREPLICAS",
        ReconnectError::Custom(text) => text,
    }
}

fn custom(command: &'static str) -> CustomCommand {
    CustomCommand::new_static(command, ClusterHash::FirstKey, false)
}

fn options(until: Instant) -> Result<Options, RedisError> {
    let left = until.saturating_duration_since(Instant::now());
    // fred's timeout must end before ours, and zero means none to it.
    if left < SHORTEST * 2 {
        return Err(RedisError::new(RedisErrorKind::Timeout, "no time left to ask the server"));
    }
    // A `WAIT` lasts for four fifths of what is left.
    let timeout = left.saturating_sub(EARLIER).max(left.mul_f64(0.9));
    Ok(Options { max_attempts: Some(1), timeout: Some(timeout), ..Options::default() })
}

/// How much earlier fred's timeout ends than ours, which is there for what fred may do instead: a command that has
/// timed out by fred's is not written any more.
const EARLIER: Duration = Duration::from_millis(5);

/// How exact timers are. fred takes zero for "no timeout at all".
const SHORTEST: Duration = Duration::from_millis(1);

/// fred's error for a command that it has dropped because there was no connection.
const UNROUTED: &str = "Failed to route command.";

/// fred's errors for a command that nothing has received, because nothing drives the connection.
const UNRECEIVED: [&str; 2] = ["Failed to send command to router.", convert::NOT_INITIALIZED];

fn build(config: Config, timeout: Duration) -> Result<Client, RedisError> {
    let client = Builder::from_config(config)
        .with_connection_config(|config| configure(config, timeout))
        // A second safeguard: every command has its own timeout.
        .with_performance_config(|config: &mut PerformanceConfig| config.default_command_timeout = timeout)
        // Without a policy fred never connects again.
        .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
        .build()?;
    Ok(client)
}

/// Connects. Owns the task that drives the connection from the first moment, unlike `init`, which leaves the task
/// running for ever when its caller stops waiting.
#[expect(clippy::async_yields_async, reason = "the handle is what is wanted; the task ends with the connection")]
async fn connect(client: &Client) -> FredResult<AbortOnDropHandle<FredResult<()>>> {
    let (connected, driver) = join!(
        // It subscribes to fred's events at its first poll, so it must be polled before the task that causes them.
        biased;
        client.wait_for_connect(),
        async { AbortOnDropHandle::new(client.connect()) },
    );
    connected?;
    Ok(driver)
}

fn configure(config: &mut ConnectionConfig, timeout: Duration) {
    config.connection_timeout = timeout;
    config.internal_command_timeout = timeout;
    // A command whose reply was lost must not run again behind our back.
    config.max_command_attempts = 1;
    // Nor may it follow a redirection to another node of a cluster (see `router.rs`).
    config.max_redirections = 0;
    // A refusal concerns its own command, not all that are in flight (`closing`). If it is that of a replica, the
    // connection is replaced (`refused_by_replica`).
    config.reconnect_errors = Vec::new();
}

impl fmt::Debug for FredConnection {
    /// Leaves out the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FredConnection").field("id", &self.client.id()).field("state", &self.client.state()).finish()
    }
}

#[cfg(test)]
pub(super) fn nodes_of(target: &Target) -> Arc<dyn Nodes> {
    Arc::new(FredNodes::of(Builder::from_config(convert::config_of(target).unwrap()).build().unwrap()))
}

#[cfg(test)]
pub(super) fn pub_sub_of(target: &Target) -> Arc<dyn PubSub> {
    borrowed(Builder::from_config(convert::config_of(target).unwrap()).build().unwrap()).pub_sub()
}

#[cfg(test)]
mod tests {
    use tenure_test_support::{Server as RedisServer, eventually, soon};
    use tokio::time::sleep;

    use super::super::heard;
    use super::*;
    use crate::store::redis::url;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_client_that_has_given_up_begins_again() {
        let server = RedisServer::start();
        let connection = FredConnection::open(&url::parse(&server.url()).unwrap(), ms(500)).await.unwrap();
        soon(connection.client.quit()).await.unwrap();
        eventually("it answers", async || {
            let sent = connection.begin(Instant::now()).unwrap();
            let answer = connection.send("PING", Vec::new(), Instant::now() + ms(100)).await;
            heard(&connection, sent, answer.map_err(crate::Error::from)).ok()
        })
        .await;
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_call_judges_only_the_connection_that_it_was_sent_on() {
        let server = RedisServer::start();
        let target = url::parse(&server.url()).unwrap();
        let connection = FredConnection::open_lazily(&target, ms(500), WithoutConnection::CallsWait).unwrap();
        let early = connection.begin(Instant::now()).unwrap();
        soon(connection.ready(ms(10_000))).await.unwrap();
        let timed_out = || RedisError::new(RedisErrorKind::Timeout, "no reply");
        sleep(ms(1_000)).await;
        // The early one has waited for the connection, which is as good as new.
        connection.failed(early, timed_out());
        sleep(ms(500)).await;
        assert_eq!(connection.connections_made(), 1);
        let silent = connection.begin(Instant::now()).unwrap();
        sleep(ms(1_000)).await;
        connection.failed(silent, timed_out());
        eventually("it is replaced", async || (connection.connections_made() > 1).then_some(())).await;
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn one_silence_opens_one_connection() {
        let server = RedisServer::start();
        let connection = FredConnection::open(&url::parse(&server.url()).unwrap(), ms(2_000)).await.unwrap();
        let ping = async |within| {
            let sent = connection.begin(Instant::now()).unwrap();
            let answer = connection.send("PING", Vec::new(), Instant::now() + within).await;
            heard(&connection, sent, answer.map_err(crate::Error::from))
        };
        server.freeze();
        for _ in 0..8 {
            ping(ms(200)).await.unwrap_err();
        }
        server.thaw();
        // fred does what it has been asked for before one after the other.
        eventually("it answers", async || ping(ms(2_000)).await.ok()).await;
        assert_eq!(connection.connections_made(), 2);
    }
}
