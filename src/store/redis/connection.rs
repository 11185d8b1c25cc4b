//! The connection to the server: opened with settings that suit locks, watched, and closed when its owner is dropped.

mod driver;
mod events;
mod failure;
mod liveness;

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, FredResult};
use fred::types::config::{Config, ConnectionConfig, Options, PerformanceConfig, ReconnectError, ReconnectPolicy};
use fred::types::{Builder, ClusterHash, CustomCommand, Value};
use tokio::join;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use self::driver::Driver;
pub(super) use self::driver::Home;
use self::events::Events;
use self::failure::{Peer, is_tls};
use self::liveness::Liveness;
use super::url;
use crate::Error;
use crate::error::NOT_SENT;

pub(super) struct Connection {
    client: Client,
    /// The server at the other end, for error messages.
    peer: Peer,
    /// The connections that were made and that failed.
    events: Mutex<Events>,
    /// A copy of `Events::is_broken` that needs no mutex.
    is_broken: AtomicBool,
    /// `None` where the client is the caller's.
    driver: Option<Arc<Driver>>,
    /// Whether calls wait while there is no connection. For a node of a quorum they fail at once.
    waits: bool,
    liveness: Mutex<Liveness>,
}

/// The state of the connection when a call was about to be sent.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    at: Instant,
    /// How many connections had been made before, if there was none.
    without: Option<u64>,
}

impl Sent {
    /// For a call that belongs to another, which has been sent before.
    pub(super) fn in_part() -> Self {
        Self { at: Instant::now(), without: None }
    }
}

impl Connection {
    /// # Errors
    ///
    /// Whatever keeps the first connection from being made: nothing is retried here.
    pub(super) async fn open(url: &str, timeout: Duration) -> Result<Self, Error> {
        // It subscribes to fred's events before there can be any.
        let mut connection = Self::ours(build(url::parse(url)?, timeout)?, timeout);
        let driver = connect(&connection.client).await.map_err(|error| connection.peer.unreachable(&error, None))?;
        connection.driver = Some(Arc::new(Driver::new(driver)?));
        connection.ping(timeout).await?;
        Ok(connection)
    }

    /// Connects in the background, now or when the server comes up. Until then, and whenever the server is away, calls
    /// fail at once, so none pile up.
    ///
    /// # Errors
    ///
    /// Never fails because of the server or the network.
    pub(super) fn open_lazily(config: Config, timeout: Duration) -> Result<Self, Error> {
        let connection = Self::ours(build(Config { fail_fast: false, ..config }, timeout)?, timeout);
        let driver = Driver::new(AbortOnDropHandle::new(connection.client.connect()))?;
        Ok(Self { driver: Some(Arc::new(driver)), waits: false, ..connection })
    }

    /// Wraps a client of our own that doesn't connect yet.
    fn ours(client: Client, timeout: Duration) -> Self {
        let connection = Self::of(client, true);
        connection.liveness().patience = timeout * 2;
        connection
    }

    /// Waits until a connection that was opened lazily is there.
    ///
    /// # Errors
    ///
    /// Returns why it was not made within `timeout`. It goes on trying.
    pub(super) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        let until = Instant::now() + timeout;
        match tokio::time::timeout_at(until, self.client.wait_for_connect()).await {
            Ok(Ok(())) => self.ping(until.saturating_duration_since(Instant::now())).await,
            Ok(Err(error)) => Err(self.peer.unreachable(&error, None).into()),
            Err(_) => Err(self.why_not_connected().unwrap_or_else(|| self.peer.silent()).into()),
        }
    }

    /// Makes sure that the server replies, if only with a refusal: fred takes a connection for a good one that the
    /// server has closed at once, as it does without TLS where it wants TLS.
    async fn ping(&self, timeout: Duration) -> Result<(), Error> {
        let options = Options { max_attempts: Some(1), timeout: Some(timeout.max(SHORTEST)), ..Options::default() };
        let ping = CustomCommand::new_static("PING", ClusterHash::FirstKey, false);
        let answer: FredResult<Value> = self.client.with_options(&options).custom(ping, Vec::<Value>::new()).await;
        match answer.map_err(|error| self.peer.unreachable(&error, None)).map_err(Error::from) {
            Err(error) if error.code().is_none() => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn borrowed(client: Client) -> Self {
        Self::of(client, false)
    }

    fn of(client: Client, is_broken: bool) -> Self {
        let events = Mutex::new(Events::of(&client, is_broken));
        let peer = Peer::of(&client.client_config());
        let is_broken = AtomicBool::new(is_broken);
        Self { client, peer, events, is_broken, driver: None, waits: true, liveness: Mutex::default() }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the runtime that the connection is driven on, if the connection is ours.
    pub(super) fn runtime(&self) -> Option<Handle> {
        self.driver.as_ref().map(|driver| driver.go_on(&self.client))
    }

    /// Returns where the connection lives, for what lives beside it.
    pub(super) fn home(&self) -> Home {
        Home::of(self.driver.as_ref(), &self.client)
    }

    /// Begins a call. Fails if there is no connection and calls don't wait for one.
    pub(super) fn begin(&self) -> Result<Sent, Error> {
        // The runtime that has driven it until now may have ended.
        drop(self.runtime());
        if self.waits || self.client.is_connected() {
            return Ok(Sent { at: Instant::now(), without: self.without_connection() });
        }
        let unknown = || fred::error::Error::new(ErrorKind::IO, "there is no connection to the server");
        let why = self.why_not_connected().unwrap_or_else(|| self.peer.unreachable(&unknown(), None));
        Err(not_sent(&why).into())
    }

    /// Returns the result of a call, with what is known of a failure. Opens a new connection if this one has gone
    /// silent, but leaves a client alone that is not ours.
    ///
    /// It takes the result and not the call, whose future is several kilobytes large and would be stored twice.
    pub(super) fn heard<T>(&self, sent: Sent, answer: Result<T, Error>) -> Result<T, Error> {
        match answer {
            Err(Error::Redis(error)) => Err(self.failed(sent, error).into()),
            answer => {
                self.liveness().heard();
                answer
            }
        }
    }

    /// Returns what is known of a call that has failed.
    fn failed(&self, sent: Sent, error: fred::error::Error) -> fred::error::Error {
        let unanswered = *error.kind() == ErrorKind::Timeout;
        let unrouted = error.details() == UNROUTED && !self.client.is_clustered();
        let unreceived = UNRECEIVED.contains(&error.details());
        let never_sent = unrouted || (unreceived && self.driver.is_some()) || self.events().never_sent(sent);
        if !unanswered {
            self.liveness().heard();
        } else if let Some(driver) = &self.driver {
            driver.go_on_here_if_stalled(&self.client, self.liveness().patience / 4);
        }
        let reason = if unanswered || unrouted { self.why_unanswered() } else { None };
        let error = match reason {
            Some(reason) => reason,
            None if unreceived => self.peer.gone(self.driver.is_some()),
            None => {
                if unanswered && self.driver.is_some() && self.liveness().is_silent(sent.at) {
                    self.reopen();
                }
                self.peer.unanswered(error)
            }
        };
        if never_sent { not_sent(&error) } else { error }
    }

    /// Returns the state of the connection for an operation that is about to wait for a call. Takes no mutex while
    /// there is a connection, as many operations wait.
    pub(super) fn will_wait(&self, now: Instant) -> Sent {
        // The calls that the operation waits for have checked the connection in full.
        let is_connected = self.client.is_connected() && !self.is_broken.load(Ordering::Relaxed);
        Sent { at: now, without: if is_connected { None } else { self.without_connection() } }
    }

    /// Returns the error of an operation that has waited in vain, whether it became part of a call or not.
    pub(super) fn unheard(&self, sent: Sent) -> Error {
        let error = self.why_unanswered().unwrap_or_else(|| self.peer.silent());
        match self.events().never_sent(sent) {
            true => not_sent(&error).into(),
            false => error.into(),
        }
    }

    /// Returns how many connections were made before, if there is none now.
    fn without_connection(&self) -> Option<u64> {
        self.events().without_connection().filter(|_| !self.client.is_clustered())
    }

    fn why_unanswered(&self) -> Option<fred::error::Error> {
        let mut reason = self.why_not_connected()?;
        // It is still a timeout, as the call may have been sent before the connection broke; unless waiting is of no
        // use.
        if !is_tls(reason.kind()) {
            reason.change_kind(ErrorKind::Timeout);
        }
        Some(reason)
    }

    /// Replaces a connection that hands out replies to other requests. All calls in flight on it fail.
    pub(super) fn replace(&self) {
        tracing::warn!(name: "tenure.mixed_up", "the client handed out the reply to another request; reconnecting");
        self.reopen();
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
    fn why_not_connected(&self) -> Option<fred::error::Error> {
        let events = self.events();
        let is_broken = events.is_broken && !self.client.is_clustered();
        if self.client.is_connected() && !is_broken {
            return None;
        }
        events.last.as_ref().map(|(error, server)| self.peer.unreachable(error, server.as_ref()))
    }

    /// Asks fred for a new connection. One poll puts the request in fred's queue. Nothing waits for its result, which
    /// may take as long as the server is away.
    fn reopen(&self) {
        let mut request = Box::pin(self.client.force_reconnection());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if request.as_mut().poll(&mut context).is_ready() {
            tracing::debug!(name: "tenure.reconnect", "the connection could not be asked to reopen");
        }
    }
}

/// fred takes zero for "no timeout at all".
const SHORTEST: Duration = Duration::from_millis(1);

/// fred's error for a command that it has dropped because there was no connection.
const UNROUTED: &str = "Failed to route command.";

/// fred's errors for a command that nothing has received, because nothing drives the connection.
const UNRECEIVED: [&str; 2] = ["Failed to send command to router.", "Client is not initialized."];

fn not_sent(error: &fred::error::Error) -> fred::error::Error {
    fred::error::Error::new(error.kind().clone(), format!("{}{NOT_SENT}", error.details()))
}

fn build(config: Config, timeout: Duration) -> Result<Client, Error> {
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
pub(super) async fn connect(client: &Client) -> FredResult<AbortOnDropHandle<FredResult<()>>> {
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
    // Nor may it follow a redirection to another node of a cluster (see `router`).
    config.max_redirections = 0;
    // Reconnect when a primary has become a replica, to find the new primary. Other refusals need no new connection.
    config.reconnect_errors = vec![ReconnectError::ClusterDown, ReconnectError::ReadOnly];
}

impl fmt::Debug for Connection {
    /// Leaves out the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.client.id()).field("state", &self.client.state()).finish()
    }
}

#[cfg(test)]
mod tests {
    use tenure_test_support::{Server as RedisServer, eventually, soon};

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_client_that_has_given_up_begins_again() {
        let server = RedisServer::start();
        let connection = Connection::open(&server.url(), ms(500)).await.unwrap();
        soon(connection.client().quit()).await.unwrap();
        eventually("it answers", async || {
            let sent = connection.begin().unwrap();
            let options = Options { timeout: Some(ms(100)), ..Default::default() };
            let command = CustomCommand::new_static("PING", ClusterHash::FirstKey, false);
            let answer: FredResult<Value> =
                connection.client().with_options(&options).custom(command, Vec::<Value>::new()).await;
            connection.heard(sent, answer.map_err(Error::from)).ok()
        })
        .await;
    }
}
