//! The connection to the server: opened with settings that suit locks, watched, and closed with its owner.

mod failure;

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, EventInterface, FredResult};
use fred::types::config::{
    Config, ConnectionConfig, Options, PerformanceConfig, ReconnectError, ReconnectPolicy, Server,
};
use fred::types::{Builder, ClusterHash, CustomCommand, Value};
use tokio::join;
use tokio::runtime::Handle;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use self::failure::{Peer, is_tls};
use super::url;
use crate::Error;
use crate::error::NOT_SENT;

pub(super) struct Connection {
    client: Client,
    /// Who is at the other end.
    peer: Peer,
    /// What fred has told of connections that were made and that failed.
    events: Mutex<Events>,
    /// What they have said last, for those who can't take the mutex.
    is_broken: AtomicBool,
    /// Drives the connection, where it is ours.
    driver: Option<Arc<Driver>>,
    /// Whether calls wait while there is no connection. Where others can stand in, they fail at once.
    waits: bool,
    line: Mutex<Line>,
}

/// What is known of a call when it is about to be sent.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    at: Instant,
    /// There is no connection then, and so many had been made before.
    without: Option<u64>,
}

impl Sent {
    /// For a call that is a part of something that was sent before.
    pub(super) fn in_part() -> Self {
        Self { at: Instant::now(), without: None }
    }
}

impl Connection {
    /// # Errors
    ///
    /// Whatever keeps the first connection from being made: nothing is retried here.
    pub(super) async fn open(url: &str, timeout: Duration) -> Result<Self, Error> {
        // It listens to what fred tells before there can be anything.
        let mut connection = Self::ours(build(url::parse(url)?, timeout)?, timeout);
        let driver = connect(&connection.client).await.map_err(|error| connection.peer.unreachable(&error, None))?;
        connection.driver = Some(Arc::new(Driver::new(driver)?));
        connection.ping(timeout).await?;
        Ok(connection)
    }

    /// Connects in the background, now or whenever the server comes. Until then, and whenever it is away, calls fail at
    /// once: nothing piles up for it.
    ///
    /// # Errors
    ///
    /// None of the server's or the network's.
    pub(super) fn open_lazily(config: Config, timeout: Duration) -> Result<Self, Error> {
        let connection = Self::ours(build(Config { fail_fast: false, ..config }, timeout)?, timeout);
        let driver = Driver::new(AbortOnDropHandle::new(connection.client.connect()))?;
        Ok(Self { driver: Some(Arc::new(driver)), waits: false, ..connection })
    }

    /// Of a client that doesn't connect yet.
    fn ours(client: Client, timeout: Duration) -> Self {
        let connection = Self::of(client, true);
        connection.line().patience = timeout * 2;
        connection
    }

    /// Waits for the connection of one that was opened lazily.
    ///
    /// # Errors
    ///
    /// What has kept it from being made within `timeout`; it goes on trying.
    pub(super) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        let until = Instant::now() + timeout;
        match tokio::time::timeout_at(until, self.client.wait_for_connect()).await {
            Ok(Ok(())) => self.ping(until.saturating_duration_since(Instant::now())).await,
            Ok(Err(error)) => Err(self.peer.unreachable(&error, None).into()),
            Err(_) => Err(self.why_not_connected().unwrap_or_else(|| self.peer.silent()).into()),
        }
    }

    /// Makes sure that there is somebody who answers, be it with a refusal: fred takes a connection that was closed at
    /// once, as one is that should have used TLS, for a good one.
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
        let events = Mutex::new(Events {
            connections: client.reconnect_rx(),
            failures: client.error_rx(),
            last: None,
            made: 0,
            is_broken,
        });
        let peer = Peer::of(&client.client_config());
        let is_broken = AtomicBool::new(is_broken);
        Self { client, peer, events, is_broken, driver: None, waits: true, line: Mutex::default() }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The runtime that the connection is driven on, where it is ours.
    pub(super) fn runtime(&self) -> Option<Handle> {
        self.driver.as_ref().map(|driver| driver.go_on(&self.client))
    }

    /// Where the connection lives, for what is to live beside it.
    pub(super) fn home(&self) -> Home {
        Home(self.driver.as_ref().map(|driver| (Arc::downgrade(driver), self.client.clone())))
    }

    /// Begins a call. Refuses one that would have to wait for a connection, where none is to.
    pub(super) fn begin(&self) -> Result<Sent, Error> {
        // The runtime that has driven it until now may be gone.
        drop(self.runtime());
        if self.waits || self.client.is_connected() {
            return Ok(Sent { at: Instant::now(), without: self.without_connection() });
        }
        let unknown = || fred::error::Error::new(ErrorKind::IO, "there is no connection to the server");
        let why = self.why_not_connected().unwrap_or_else(|| self.peer.unreachable(&unknown(), None));
        Err(not_sent(&why).into())
    }

    /// Passes on the answer to a call, and opens a new connection when the line has gone silent. A client that is not
    /// ours is left alone.
    ///
    /// It takes the answer and not the call, whose future is several kilobytes large and would be kept twice.
    pub(super) fn heard<T>(&self, sent: Sent, answer: Result<T, Error>) -> Result<T, Error> {
        match answer {
            Err(Error::Redis(error)) => Err(self.failed(sent, error).into()),
            answer => {
                self.line().heard();
                answer
            }
        }
    }

    /// Says what is known of a call that has failed.
    fn failed(&self, sent: Sent, error: fred::error::Error) -> fred::error::Error {
        let unanswered = *error.kind() == ErrorKind::Timeout;
        let unrouted = error.details() == UNROUTED && !self.client.is_clustered();
        let unreceived = UNRECEIVED.contains(&error.details());
        let never_sent = unrouted || (unreceived && self.driver.is_some()) || self.events().never_sent(sent);
        if !unanswered {
            self.line().heard();
        } else if let Some(driver) = &self.driver {
            driver.go_on_here_if_stalled(&self.client, self.line().patience / 4);
        }
        let reason = if unanswered || unrouted { self.why_unanswered() } else { None };
        let error = match reason {
            Some(reason) => reason,
            None if unreceived => self.peer.gone(self.driver.is_some()),
            None => {
                if unanswered && self.driver.is_some() && self.line().is_silent(sent.at) {
                    self.reopen();
                }
                self.peer.unanswered(error)
            }
        };
        if never_sent { not_sent(&error) } else { error }
    }

    /// What is known of an operation before it waits to be a part of a call. Many wait, so this takes no mutex while
    /// there is a connection.
    pub(super) fn will_wait(&self, now: Instant) -> Sent {
        // Operations wait for calls, and those have looked before.
        let is_connected = self.client.is_connected() && !self.is_broken.load(Ordering::Relaxed);
        Sent { at: now, without: if is_connected { None } else { self.without_connection() } }
    }

    /// Says what is known of one that has waited in vain, in whatever call it was or would have been.
    pub(super) fn unheard(&self, sent: Sent) -> Error {
        let error = self.why_unanswered().unwrap_or_else(|| self.peer.silent());
        match self.events().never_sent(sent) {
            true => not_sent(&error).into(),
            false => error.into(),
        }
    }

    /// How many connections were made before, where there is none now.
    fn without_connection(&self) -> Option<u64> {
        self.events().without_connection().filter(|_| !self.client.is_clustered())
    }

    fn why_unanswered(&self) -> Option<fred::error::Error> {
        let mut reason = self.why_not_connected()?;
        // Still a timeout: the call may have been sent before the connection broke. Unless nothing will come of
        // waiting.
        if !is_tls(reason.kind()) {
            reason.change_kind(ErrorKind::Timeout);
        }
        Some(reason)
    }

    /// The connection hands out replies to other requests: whatever is on its way there is given up.
    pub(super) fn replace(&self) {
        tracing::warn!(name: "tenure.mixed_up", "the client handed out the reply to another request; reconnecting");
        self.reopen();
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As of now.
    fn events(&self) -> MutexGuard<'_, Events> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.take_in() {
            self.is_broken.store(events.is_broken, Ordering::Relaxed);
        }
        events
    }

    /// A call that waited in vain for a connection says "timed out"; this knows better: refused, or still loading.
    fn why_not_connected(&self) -> Option<fred::error::Error> {
        let events = self.events();
        let is_broken = events.is_broken && !self.client.is_clustered();
        if self.client.is_connected() && !is_broken {
            return None;
        }
        events.last.as_ref().map(|(error, server)| self.peer.unreachable(error, server.as_ref()))
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

/// fred takes zero for "no timeout at all".
const SHORTEST: Duration = Duration::from_millis(1);

/// What fred says of a command for which there was no connection, and which it has not kept for another.
const UNROUTED: &str = "Failed to route command.";

/// What fred says of a command that nobody has taken: nothing drives the connection, yet or any more.
const UNRECEIVED: [&str; 2] = ["Failed to send command to router.", "Client is not initialized."];

fn not_sent(error: &fred::error::Error) -> fred::error::Error {
    fred::error::Error::new(error.kind().clone(), format!("{}{NOT_SENT}", error.details()))
}

/// Where a connection lives. Doesn't keep it open.
pub(super) struct Home(Option<(Weak<Driver>, Client)>);

impl Home {
    /// The runtime that the connection is driven on, where it is ours and still there.
    pub(super) fn runtime(&self) -> Option<Handle> {
        let (driver, client) = self.0.as_ref()?;
        Some(driver.upgrade()?.go_on(client))
    }
}

/// What drives the connection: a task, on the runtime of whoever has needed it first.
struct Driver(Mutex<Driving>);

struct Driving {
    task: AbortOnDropHandle<FredResult<()>>,
    runtime: Handle,
    /// Shows whether that runtime runs its tasks.
    probe: Option<(Instant, AbortOnDropHandle<()>)>,
}

impl Driver {
    fn new(task: AbortOnDropHandle<FredResult<()>>) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        Ok(Self(Mutex::new(Driving { task, runtime, probe: None })))
    }

    /// Begins again where fred has ended it, as it does after some errors, or its runtime has: then on the runtime of
    /// the caller. Without it every call would fail. Returns the runtime that it runs on.
    fn go_on(&self, client: &Client) -> Handle {
        let mut driving = self.driving();
        if driving.task.is_finished() {
            driving.start_again(client);
        }
        driving.runtime.clone()
    }

    /// A call has had no answer. The runtime of the driver may be one that nobody drives any more, though it is still
    /// there (a current-thread runtime outside of `block_on`, or one that is blocked): then it goes on here.
    fn go_on_here_if_stalled(&self, client: &Client, patience: Duration) {
        let mut driving = self.driving();
        let here = match Handle::try_current() {
            Ok(here) if here.id() != driving.runtime.id() => here,
            _ => return,
        };
        match &driving.probe {
            Some((since, probe)) if !probe.is_finished() => {
                if since.elapsed() >= patience {
                    tracing::debug!(name: "tenure.revive", "the connection's runtime stands still");
                    driving.start(client, here);
                }
            }
            _ => {
                let probe = AbortOnDropHandle::new(driving.runtime.spawn(async {}));
                driving.probe = Some((Instant::now(), probe));
            }
        }
    }

    fn driving(&self) -> MutexGuard<'_, Driving> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driving {
    fn start_again(&mut self, client: &Client) {
        tracing::debug!(name: "tenure.revive", "nothing drives the connection any more; it begins again");
        self.start(client, self.runtime.clone());
        // A runtime that has ended ends at once what is spawned on it.
        if let (true, Ok(here)) = (self.task.is_finished(), Handle::try_current()) {
            self.start(client, here);
        }
    }

    fn start(&mut self, client: &Client, runtime: Handle) {
        let entered = runtime.enter();
        self.task = AbortOnDropHandle::new(client.connect());
        drop(entered);
        (self.runtime, self.probe) = (runtime, None);
    }
}

/// What fred tells, in two channels without an order between them.
struct Events {
    /// A connection was made, and nothing has been written on it yet.
    connections: Receiver<Server>,
    /// A connection broke, and nothing is written on it any more, or could not be made.
    failures: Receiver<(fred::error::Error, Option<Server>)>,
    last: Option<(fred::error::Error, Option<Server>)>,
    /// How many connections were made.
    made: u64,
    /// The last one broke, and none has been made since. Means nothing where there are several at a time.
    is_broken: bool,
}

impl Events {
    /// The channel of connections is read first. So a failure that is read now may be older than a connection that is
    /// read now, which then counts; but no failure that is read later is older than a connection that is read now.
    ///
    /// Returns whether a connection was lost by that, or found.
    fn take_in(&mut self) -> bool {
        if self.connections.is_empty() && self.failures.is_empty() {
            return false;
        }
        let (before, was_broken) = (self.made, self.is_broken);
        loop {
            match self.connections.try_recv() {
                Ok(_) => self.made += 1,
                Err(TryRecvError::Lagged(missed)) => self.made += missed,
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        let mut has_failed = false;
        loop {
            match self.failures.try_recv() {
                Ok(failure) => self.last = Some(failure),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
            has_failed = true;
        }
        // When in doubt there is a connection: then a call may have been sent.
        self.is_broken = self.made == before && (was_broken || has_failed);
        self.is_broken != was_broken
    }

    fn without_connection(&self) -> Option<u64> {
        self.is_broken.then_some(self.made)
    }

    /// Whether there was no connection when the call began, and none has been made since.
    fn never_sent(&self, sent: Sent) -> bool {
        sent.without == Some(self.made)
    }
}

/// No silence is shorter: a server far away may take so long.
const SHORTEST_SILENCE: Duration = Duration::from_millis(150);

/// Whether the server still speaks to us. A line that was silently cut (by a firewall that forgot it, a peer that
/// vanished) looks like any other until the system gives up on it, which takes minutes.
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

    /// A call that was sent then has had no answer: is the line dead? Says so once for each connection: to open one
    /// after the other while all are slow would make nothing faster.
    fn is_silent(&mut self, sent: Instant) -> bool {
        // Others were answered meanwhile: slow, not dead.
        if self.heard.is_some_and(|heard| heard >= sent) {
            return false;
        }
        let since = *self.unanswered.get_or_insert(sent);
        // A call that had less time than others needs its answer sooner: a lock of a short ttl is lost otherwise.
        let waited = sent.elapsed();
        let patience = if waited * 2 < self.patience { waited.max(SHORTEST_SILENCE) } else { self.patience };
        let silent = since.elapsed() >= patience;
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
pub(super) async fn connect(client: &Client) -> FredResult<AbortOnDropHandle<FredResult<()>>> {
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
    // Nor may one follow to another node of a cluster, see `router`.
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
    use tenure_test_support::{Server as RedisServer, eventually, soon};
    use tokio::sync::broadcast;
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
    async fn a_call_that_has_little_time_finds_a_line_dead_sooner() {
        let mut line = Line { patience: ms(4_000), ..Line::default() };
        line.heard();
        advance(ms(1_000)).await;
        let first = Instant::now();
        advance(ms(30)).await;
        assert!(!line.is_silent(first), "it may be far away");
        let second = Instant::now();
        advance(ms(300)).await;
        assert!(line.is_silent(second));
        assert!(!line.is_silent(second), "once for each connection");
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

    /// What fred tells, told by the test.
    struct Told {
        connections: broadcast::Sender<Server>,
        failures: broadcast::Sender<(fred::error::Error, Option<Server>)>,
        events: Events,
    }

    impl Told {
        fn new(is_broken: bool) -> Self {
            let (connections, failures) = (broadcast::channel(4).0, broadcast::channel(4).0);
            let receivers = (connections.subscribe(), failures.subscribe());
            let events = Events { connections: receivers.0, failures: receivers.1, last: None, made: 0, is_broken };
            Self { connections, failures, events }
        }

        fn connects(&self) {
            self.connections.send(Server::new("a", 1)).unwrap();
        }

        fn breaks(&self) {
            let broken = fred::error::Error::new(ErrorKind::IO, "Connection closed.");
            self.failures.send((broken, Some(Server::new("a", 1)))).unwrap();
        }

        fn begin(&mut self) -> Sent {
            self.events.take_in();
            Sent { at: Instant::now(), without: self.events.without_connection() }
        }

        fn never_sent(&mut self, sent: Sent) -> bool {
            self.events.take_in();
            self.events.never_sent(sent)
        }
    }

    #[test]
    fn what_began_without_a_connection_and_ended_without_one_was_never_sent() {
        let mut told = Told::new(false);
        told.breaks();
        let sent = told.begin();
        assert!(told.never_sent(sent));
        // However often it is tried in vain.
        told.breaks();
        assert!(told.never_sent(sent));
        let later = told.begin();
        told.connects();
        assert!(!told.never_sent(sent) && !told.never_sent(later));
    }

    #[test]
    fn before_the_first_connection_nothing_was_sent() {
        let mut told = Told::new(true);
        let sent = told.begin();
        assert!(told.never_sent(sent));
        told.connects();
        assert!(!told.never_sent(sent));
        let sent = told.begin();
        assert!(!told.never_sent(sent));
    }

    #[test]
    fn in_doubt_a_call_was_sent() {
        // A connection may have been made before the failure or after it.
        for connects_first in [true, false] {
            let mut told = Told::new(false);
            match connects_first {
                true => (told.connects(), told.breaks()),
                false => (told.breaks(), told.connects()),
            };
            let sent = told.begin();
            assert!(!told.never_sent(sent), "{connects_first}");
        }
        // It breaks while the call is under way.
        let mut told = Told::new(false);
        let sent = told.begin();
        told.breaks();
        assert!(!told.never_sent(sent));
        // It comes, and is gone again before its end.
        let mut told = Told::new(false);
        told.breaks();
        let sent = told.begin();
        told.connects();
        told.breaks();
        assert!(!told.never_sent(sent));
        // So much has happened that not all is known.
        for _ in 0..9 {
            told.breaks();
        }
        let sent = told.begin();
        for _ in 0..9 {
            told.connects();
            told.breaks();
        }
        assert!(!told.never_sent(sent));
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
