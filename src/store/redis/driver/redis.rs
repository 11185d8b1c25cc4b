//! The driver for redis-rs: connections of our own over its `MultiplexedConnection`, or those of the caller.
//!
//! Where redis-rs 1.8 behaves otherwise than fred, as measured on Redis 7.0, and what follows:
//!
//! 1. Its connection never reconnects, and never sends a command again. Reconnecting is ours: a task keeps one
//!    connection open (`keep`), and opens the next one as soon as it ends, then after 25 to 500 ms.
//! 2. A call may be dropped at any time, so our own timeouts end them. Its late reply goes to nobody: of 64,000 calls
//!    with random timeouts, 1,500 of them cut, none got another's reply. A dropped call that redis-rs has not yet taken
//!    is never sent (50 of 50 behind a full channel); any other may run, however late.
//! 3. Its errors don't say whether a command was sent: all calls on a broken connection fail alike, also those begun
//!    after its end. So the stream is ours and counts what the system accepts (`stream.rs`, `Link::call`): of 50 kills
//!    under traffic, 20 of 411 failed calls were surely not sent. Such a call goes to the next connection by itself.
//! 4. Each call whose time is over leaves an entry of 80 bytes until the connection ends. A connection that is silent
//!    while calls wait is replaced.
//! 5. Refusals come as values. Their code is the first word, and their text is put together again here. redis-rs logs
//!    in by itself with errors that have neither, so the login is ours, too.
//! 6. Nothing follows a failover or a redirection. After `READONLY` the connection is replaced, and the Sentinels are
//!    asked anew whenever one is opened. In a cluster, the router sends to single nodes, and `ASKING` goes with its
//!    command in one message; redis-rs' cluster client ran commands twice and hung for ever while a slot moved.
//! 7. A subscription counts as made when the server has confirmed it. It has connections of its own, with RESP3: a
//!    server that ends a subscription by itself shifts the replies of such a connection, which is closed then.
//!
//! An unfenced pair of obtain and release takes 45,300 instructions of the client at 1 task, 39,100 at 16, 25,500 at 64
//! and 25,300 at 256; raw redis-rs 27,400, 20,700, 21,100 and 22,800 (callgrind, one thread). `benches/versus` measures
//! time.

mod cluster;
mod convert;
mod given;
mod link;
mod origin;
mod pub_sub;
mod stream;
#[cfg(test)]
mod tests;
mod tls;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use self::cluster::ClusterConnection;
pub use self::given::RedisConnection;
pub(in super::super) use self::given::borrowed;
use self::link::{Link, WasSent};
use self::origin::Origin;
use self::pub_sub::RedisPubSub;
use super::demotion::Demotion;
use super::liveness::Liveness;
use super::task::{DriverTask, Home};
use super::{Calling, Connection, Ended, Nodes, PubSub, Sent, Value, WithoutConnection, not_sent};
use crate::error::NOT_SENT;
use crate::store::redis::url::{Servers, Target};
use crate::{Error, RedisError, RedisErrorKind};

/// The pause after a connection could not be opened: the first, and the longest.
const REOPEN: [Duration; 2] = [Duration::from_millis(25), Duration::from_millis(500)];

/// Connects to a server, or learns what the nodes of a cluster are.
pub(super) async fn open(target: &Target, timeout: Duration) -> Result<Arc<dyn Connection>, Error> {
    let origin = Origin::of(target, timeout)?;
    if let Servers::Cluster(_) = target.servers {
        return Ok(Arc::new(ClusterConnection::open(origin).await?));
    }
    let first = origin.open().await.map_err(|error| origin.peer.unreachable(error, None))?;
    Ok(Arc::new(OwnConnection::new(origin, true, Some(first))?))
}

/// Connects in the background, now or when the server comes up.
pub(super) fn open_lazily(
    target: &Target,
    timeout: Duration,
    without: WithoutConnection,
) -> Result<Arc<dyn Connection>, Error> {
    let origin = Origin::of(target, timeout)?;
    match target.servers {
        Servers::Cluster(_) => Ok(Arc::new(ClusterConnection::open_lazily(origin)?)),
        _ => Ok(Arc::new(OwnConnection::new(origin, without == WithoutConnection::CallsWait, None)?)),
    }
}

#[cfg(test)]
pub(super) fn nodes_of(target: &Target) -> Arc<dyn Nodes> {
    cluster::nodes_of(Origin::of(target, Duration::from_secs(2)).unwrap())
}

#[cfg(test)]
pub(super) fn pub_sub_of(target: &Target) -> Arc<dyn PubSub> {
    let origin = Arc::new(Origin::of(target, Duration::from_secs(2)).unwrap());
    Arc::new(RedisPubSub::new(origin, Home::of(None), None))
}

/// One connection at a time, to a server or to the primary that Sentinels name.
struct OwnConnection {
    shared: Arc<Shared>,
    task: Arc<DriverTask<()>>,
}

struct Shared {
    origin: Arc<Origin>,
    /// Whether calls wait while there is no connection. For a node of a quorum they fail at once.
    waits: bool,
    /// The connection, while there is one. It may have ended already.
    link: watch::Sender<Option<Arc<Link>>>,
    /// How many connections were made, counted before anything is sent on the last one.
    made: AtomicU64,
    /// How often the task was started: only the last one changes anything.
    starts: AtomicU64,
    /// Why the last connection ended, or could not be opened.
    last: Mutex<Option<RedisError>>,
    liveness: Mutex<Liveness>,
    demotion: Mutex<Demotion>,
}

impl OwnConnection {
    fn new(origin: Origin, waits: bool, first: Option<(Arc<Link>, Ended)>) -> Result<Self, Error> {
        let liveness = Liveness::with_patience(origin.timeout * 2);
        let shared = Arc::new(Shared {
            origin: Arc::new(origin),
            waits,
            link: watch::Sender::new(None),
            made: AtomicU64::new(0),
            starts: AtomicU64::new(0),
            last: Mutex::default(),
            liveness: Mutex::new(liveness),
            demotion: Mutex::default(),
        });
        let here = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let begun = shared.clone().begin(first);
        let task = AbortOnDropHandle::new(here.spawn(begun));
        let again = shared.clone();
        let task = DriverTask::new(task, move || tokio::spawn(again.clone().begin(None)))?;
        Ok(Self { shared, task: Arc::new(task) })
    }

    fn sent(&self, at: Instant) -> Sent {
        // Counted first: one that is made in between must count as later, or a call on it would seem never sent.
        let made = self.connections_made();
        Sent { at, made, without: self.shared.link().is_none() }
    }

    fn why_unanswered(&self) -> Option<RedisError> {
        let mut reason = self.shared.why_not_connected()?;
        // It is still a timeout, as the call may have been sent before the connection broke; unless waiting is of no
        // use.
        if reason.kind() != RedisErrorKind::Tls {
            reason.change_kind(RedisErrorKind::Timeout);
        }
        Some(reason)
    }

    fn go_on_if_stalled(&self) {
        self.task.go_on_here_if_stalled(self.shared.origin.timeout / 2);
    }

    async fn call(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Result<Value, RedisError> {
        let mut connected = None;
        loop {
            if until <= Instant::now() {
                return Err(not_sent(self.why_unanswered().unwrap_or_else(convert::late)));
            }
            let Some(link) = self.shared.link_by(until, &mut connected).await else {
                return Err(not_sent(self.why_unanswered().unwrap_or_else(|| self.shared.origin.peer.silent())));
            };
            let reply = link.call(command, &args, until).await;
            return match reply {
                // Surely not sent: the next connection takes it.
                Err((_, WasSent::No)) if self.shared.waits => continue,
                Err((error, was_sent)) => match (error.kind(), was_sent) {
                    (RedisErrorKind::Timeout | RedisErrorKind::Unknown, _) => Err(error),
                    (_, WasSent::Maybe) => Err(self.shared.origin.peer.unanswered(error)),
                    (_, WasSent::No) => Err(not_sent(self.shared.origin.peer.unanswered(error))),
                },
                Ok(reply) => Ok(reply),
            };
        }
    }
}

impl Connection for OwnConnection {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(self.call(command, args, until))
    }

    fn address(&self) -> String {
        self.shared.origin.peer.address().to_owned()
    }

    fn nodes(&self) -> Option<Arc<dyn Nodes>> {
        None
    }

    fn is_cluster(&self) -> bool {
        false
    }

    fn is_connected(&self) -> bool {
        self.shared.link().is_some()
    }

    fn connections_made(&self) -> u64 {
        self.shared.made.load(Ordering::Acquire)
    }

    fn ready(&self, timeout: Duration) -> Calling<'_, ()> {
        Box::pin(async move {
            // Each connection has had a reply to its login.
            match self.shared.link_by(Instant::now() + timeout, &mut None).await {
                Some(_) => Ok(()),
                None => Err(self.shared.why_not_connected().unwrap_or_else(|| self.shared.origin.peer.silent())),
            }
        })
    }

    fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
        // The runtime that has driven it until now may have ended.
        self.task.go_on();
        let sent = self.sent(now);
        if self.shared.waits || !sent.without {
            return Ok(sent);
        }
        self.go_on_if_stalled();
        let peer = &self.shared.origin.peer;
        let unknown = || RedisError::new(RedisErrorKind::Io, "there is no connection to the server");
        let why = self.shared.why_not_connected().unwrap_or_else(|| peer.unreachable(unknown(), None));
        Err(not_sent(why))
    }

    fn answered(&self) {
        self.shared.liveness().heard();
    }

    fn failed(&self, sent: Sent, error: RedisError) -> RedisError {
        if error.kind() != RedisErrorKind::Timeout {
            self.shared.liveness().heard();
            return error;
        }
        self.go_on_if_stalled();
        if error.details().ends_with(NOT_SENT) {
            return error;
        }
        if let Some(reason) = self.why_unanswered() {
            return reason;
        }
        if self.shared.liveness().is_silent(sent, self.connections_made()) {
            self.replace();
        }
        self.shared.origin.peer.silent()
    }

    fn will_wait(&self, now: Instant) -> Sent {
        self.sent(now)
    }

    fn unheard(&self, sent: Sent) -> RedisError {
        self.go_on_if_stalled();
        let error = self.why_unanswered().unwrap_or_else(|| self.shared.origin.peer.silent());
        match sent.without && sent.made == self.connections_made() {
            true => not_sent(error),
            false => error,
        }
    }

    fn blocks(&self, until: Instant) {
        let made = self.connections_made();
        self.shared.liveness().blocks(until, made);
    }

    fn no_longer_blocks(&self, until: Instant) {
        self.shared.liveness().no_longer_blocks(until);
    }

    fn replace(&self) {
        if let Some(link) = self.shared.link() {
            link.give_up();
        }
    }

    fn refused_by_replica(&self) {
        let mut demotion = self.shared.demotion.lock().unwrap_or_else(PoisonError::into_inner);
        if demotion.is_due(self.connections_made()) {
            drop(demotion);
            self.replace();
        }
    }

    fn runtime(&self) -> Option<Handle> {
        Some(self.task.go_on())
    }

    fn pub_sub(&self) -> Arc<dyn PubSub> {
        Arc::new(RedisPubSub::new(self.shared.origin.clone(), Home::of(Some(&self.task)), None))
    }
}

impl Shared {
    /// Returns the task that keeps a connection open. The connections of an earlier one no longer count from here on.
    fn begin(self: Arc<Self>, first: Option<(Arc<Link>, Ended)>) -> impl Future<Output = ()> + Send + 'static {
        let start = self.starts.fetch_add(1, Ordering::AcqRel) + 1;
        self.link.send_replace(None);
        if let Some((link, _)) = &first {
            self.has_opened(start, link);
        }
        self.keep(start, first)
    }

    async fn keep(self: Arc<Self>, start: u64, mut first: Option<(Arc<Link>, Ended)>) {
        let mut failures = 0_u32;
        loop {
            let opened = match first.take() {
                Some(first) => Ok(first),
                None => {
                    let opened = self.origin.open().await;
                    opened.inspect(|(link, _)| self.has_opened(start, link))
                }
            };
            match opened {
                Ok((link, driver)) => {
                    failures = 0;
                    select! {
                        () = driver => {}
                        // Dropping the driver closes the connection. What is in flight on it fails.
                        () = link.given_up() => {}
                    }
                    self.has_ended(start, link.broken());
                }
                Err(error) => {
                    self.has_ended(start, error);
                    let [shortest, longest] = REOPEN;
                    let pause = longest.min(shortest * (1 << failures.min(8)));
                    failures += 1;
                    // Clients that lost their connections together don't come back together.
                    sleep(pause.mul_f64(0.75 + 0.25 * fastrand::f64())).await;
                }
            }
        }
    }

    fn has_opened(&self, start: u64, link: &Arc<Link>) {
        self.link.send_if_modified(|current| {
            let is_last = self.starts.load(Ordering::Acquire) == start;
            if is_last {
                self.made.fetch_add(1, Ordering::AcqRel);
                *current = Some(link.clone());
            }
            is_last
        });
    }

    fn has_ended(&self, start: u64, why: RedisError) {
        self.link.send_if_modified(|current| {
            let is_last = self.starts.load(Ordering::Acquire) == start;
            if is_last {
                *current = None;
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            }
            is_last
        });
    }

    /// Returns the connection, if it can be used.
    fn link(&self) -> Option<Arc<Link>> {
        self.link.borrow().as_ref().filter(|link| !link.is_over()).cloned()
    }

    /// Waits for a connection that can be used.
    async fn link_by(
        &self,
        until: Instant,
        connected: &mut Option<watch::Receiver<Option<Arc<Link>>>>,
    ) -> Option<Arc<Link>> {
        if let Some(link) = self.link() {
            return Some(link);
        }
        let connected = connected.get_or_insert_with(|| self.link.subscribe());
        let usable = connected.wait_for(|link| link.as_ref().is_some_and(|link| !link.is_over()));
        // In a box, as it is rare: the future of each call has room for it.
        Box::pin(timeout_at(until, usable)).await.ok()?.ok()?.clone()
    }

    /// Returns why there is no connection, which is more than the "timed out" of a call that waited for one: the server
    /// refused it, say, or is still loading.
    fn why_not_connected(&self) -> Option<RedisError> {
        if self.link().is_some() {
            return None;
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        last.map(|error| match self.made.load(Ordering::Acquire) {
            0 => self.origin.peer.unreachable(error, None),
            _ => self.origin.peer.lost(error, None),
        })
    }

    fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for OwnConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.is_connected();
        f.debug_struct("OwnConnection").field("connected", &connected).finish_non_exhaustive()
    }
}
