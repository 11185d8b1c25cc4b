//! The connection to the server: opened with settings that suit locks, watched, and closed with its owner.

use std::fmt;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, EventInterface, FredResult};
use fred::types::Builder;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, ReconnectError, ReconnectPolicy, Server};
use tokio::join;
use tokio::runtime::Handle;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::url;
use crate::Error;

pub(super) struct Connection {
    client: Client,
    /// What fred says of failed connections: the reason why a call had to wait in vain.
    failures: Mutex<Failures>,
    /// Drives the connection, where it is ours.
    driver: Option<Driver>,
    /// Whether calls wait while there is no connection. Where others can stand in, they fail at once.
    waits: bool,
    line: Mutex<Line>,
}

struct Driver {
    task: Mutex<AbortOnDropHandle<FredResult<()>>>,
    runtime: Handle,
}

impl Driver {
    fn new(task: AbortOnDropHandle<FredResult<()>>) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(Self { task: Mutex::new(task), runtime })
    }

    /// After some errors fred ends it, and then answers nothing any more. It is told to begin again.
    fn go_on(&self, client: &Client) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.is_finished() {
            tracing::warn!(name: "tenure.revive", "the client had given up its connection for good");
            let _entered = self.runtime.enter();
            *task = AbortOnDropHandle::new(client.connect());
        }
    }
}

struct Failures {
    told: Receiver<(fred::error::Error, Option<Server>)>,
    last: Option<fred::error::Error>,
}

impl Connection {
    /// # Errors
    ///
    /// Whatever keeps the first connection from being made: nothing is retried here.
    pub(super) async fn open(url: &str, timeout: Duration) -> Result<Self, Error> {
        let client = build(url::parse(url)?, timeout)?;
        let driver = connect(&client).await?;
        let connection = Self::borrowed(client);
        connection.line().patience = timeout * 2;
        Ok(Self { driver: Some(Driver::new(driver)?), ..connection })
    }

    /// Connects in the background, now or whenever the server comes. Until then, and whenever it is away, calls fail at
    /// once: nothing piles up for it.
    ///
    /// # Errors
    ///
    /// None of the server's or the network's.
    pub(super) fn open_lazily(config: Config, timeout: Duration) -> Result<Self, Error> {
        let client = build(Config { fail_fast: false, ..config }, timeout)?;
        // It listens for failures before there can be any.
        let connection = Self::borrowed(client);
        connection.line().patience = timeout * 2;
        let driver = Driver::new(AbortOnDropHandle::new(connection.client.connect()))?;
        Ok(Self { driver: Some(driver), waits: false, ..connection })
    }

    /// Waits for the connection of one that was opened lazily.
    ///
    /// # Errors
    ///
    /// What has kept it from being made within `timeout`; it goes on trying.
    pub(super) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        match tokio::time::timeout(timeout, self.client.wait_for_connect()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(self.why_not_connected().map_or_else(Error::timeout, Error::Redis)),
        }
    }

    pub(super) fn borrowed(client: Client) -> Self {
        let failures = Mutex::new(Failures { told: client.error_rx(), last: None });
        Self { client, failures, driver: None, waits: true, line: Mutex::default() }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Refuses a call that would have to wait for a connection, where none is to.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.waits || self.client.is_connected() {
            return Ok(());
        }
        if let Some(driver) = &self.driver {
            driver.go_on(&self.client);
        }
        let unknown = || fred::error::Error::new(ErrorKind::IO, "there is no connection to the server");
        Err(self.why_not_connected().unwrap_or_else(unknown).into())
    }

    /// Passes on the answer to a call that was sent then, and opens a new connection when the line has gone silent. A
    /// client that is not ours is left alone.
    ///
    /// It takes the answer and not the call, whose future is several kilobytes large and would be kept twice.
    pub(super) fn heard<T>(&self, sent: Instant, answer: Result<T, Error>) -> Result<T, Error> {
        let unanswered = matches!(&answer, Err(Error::Redis(error)) if *error.kind() == ErrorKind::Timeout);
        if !unanswered {
            self.line().heard();
            return answer;
        }
        if let Some(driver) = &self.driver {
            driver.go_on(&self.client);
        }
        if let Some(mut reason) = self.why_not_connected() {
            // Still a timeout: the call may have been sent before the connection broke.
            reason.change_kind(ErrorKind::Timeout);
            return Err(reason.into());
        }
        if self.driver.is_some() && self.line().is_silent(sent) {
            self.reopen();
        }
        answer
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that waited in vain for a connection says "timed out"; this knows better: refused, or still loading.
    fn why_not_connected(&self) -> Option<fred::error::Error> {
        if self.client.is_connected() {
            return None;
        }
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match failures.told.try_recv() {
                Ok((error, _)) => failures.last = Some(error),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return failures.last.clone(),
            }
        }
    }

    /// Asks fred for a new connection. The request is in its queue once this future was polled; its answer, which may
    /// take as long as the server is away, is nobody's business.
    fn reopen(&self) {
        let mut request = Box::pin(self.client.force_reconnection());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if request.as_mut().poll(&mut context).is_ready() {
            tracing::debug!(name: "tenure.reconnect", "the connection could not be asked to reopen");
        }
    }
}

/// Whether the server still speaks to us. A line that was silently cut (by a firewall that forgot it, a peer that vanished)
/// looks like any other until the system gives up on it, which takes minutes.
#[derive(Default)]
struct Line {
    /// How long nothing may be heard while something was asked.
    patience: Duration,
    /// When the server last spoke, or a new connection was asked for.
    heard: Option<Instant>,
    /// When the first of the calls was sent that have all gone unanswered since.
    unanswered: Option<Instant>,
}

impl Line {
    fn heard(&mut self) {
        self.heard = Some(Instant::now());
        self.unanswered = None;
    }

    /// A call that was sent then has had no answer: is the line dead? Says so once for each connection: to open one after
    /// the other while all are slow would make nothing faster.
    fn is_silent(&mut self, sent: Instant) -> bool {
        // Others were answered meanwhile: slow, not dead.
        if self.heard.is_some_and(|heard| heard >= sent) {
            return false;
        }
        let since = *self.unanswered.get_or_insert(sent);
        let silent = since.elapsed() >= self.patience;
        if silent {
            self.heard();
        }
        silent
    }
}

fn build(config: Config, timeout: Duration) -> Result<Client, Error> {
    let client = Builder::from_config(config)
        .with_connection_config(|config| configure(config, timeout))
        // A second belt: every command brings its own timeout.
        .with_performance_config(|config: &mut PerformanceConfig| config.default_command_timeout = timeout)
        // Without a policy fred never connects again.
        .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
        .build()?;
    Ok(client)
}

/// Connects, and owns the task that drives the connection from the first moment: who stops waiting for `init` leaves it
/// running for ever.
#[expect(clippy::async_yields_async, reason = "the handle is what is wanted; the task ends with the connection")]
async fn connect(client: &Client) -> Result<AbortOnDropHandle<FredResult<()>>, Error> {
    let (connected, driver) = join!(
        // It listens from its first poll on, so it comes before what it listens to.
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
    // Nor one that follows to another node of a cluster: unless it says so, once it was sent there.
    config.max_redirections = 0;
    // A primary that became a replica: look for the new one. Other refusals pass without a new connection.
    config.reconnect_errors = vec![ReconnectError::ClusterDown, ReconnectError::ReadOnly];
}

impl fmt::Debug for Connection {
    /// Says nothing of the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.client.id()).field("state", &self.client.state()).finish()
    }
}

#[cfg(test)]
mod tests {
    use fred::types::{ClusterHash, CustomCommand, Value};
    use tenure_test_support::{Server, eventually, soon};
    use tokio::time::advance;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_is_dead_when_nothing_was_heard_for_long_while_something_was_asked() {
        let mut line = Line { patience: ms(400), ..Line::default() };
        line.heard();
        // However long nothing was asked.
        advance(ms(60_000)).await;
        let first = Instant::now();
        advance(ms(200)).await;
        assert!(!line.is_silent(first));
        let second = Instant::now();
        advance(ms(200)).await;
        assert!(line.is_silent(second));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_server_is_not_a_dead_line() {
        let mut line = Line { patience: ms(400), ..Line::default() };
        for _ in 0..10 {
            let sent = Instant::now();
            advance(ms(100)).await;
            line.heard();
            advance(ms(400)).await;
            assert!(!line.is_silent(sent));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_calls_on_a_dead_line_one_opens_a_new_one() {
        let mut line = Line { patience: ms(400), ..Line::default() };
        let sent = Instant::now();
        advance(ms(400)).await;
        let opened = (0..1_000).filter(|_| line.is_silent(sent)).count();
        assert_eq!(opened, 1);
    }

    #[tokio::test]
    async fn a_client_that_has_given_up_begins_again() {
        let server = Server::start();
        let connection = Connection::open(&server.url(), ms(500)).await.unwrap();
        soon(connection.client().quit()).await.unwrap();
        eventually("it answers", async || {
            let sent = Instant::now();
            let options = fred::types::config::Options { timeout: Some(ms(100)), ..Default::default() };
            let command = CustomCommand::new_static("PING", ClusterHash::FirstKey, false);
            let answer: FredResult<Value> =
                connection.client().with_options(&options).custom(command, Vec::<Value>::new()).await;
            connection.heard(sent, answer.map_err(Error::from)).ok()
        })
        .await;
    }
}
