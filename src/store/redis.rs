//! Locks on one Redis or Valkey server, one that Sentinels watch over, or a cluster.

mod acquire;
#[cfg(test)]
mod alike;
mod args;
mod batcher;
mod clock;
#[cfg(test)]
mod differential;
mod dispatch;
mod driver;
mod examination;
mod line;
mod listing;
mod names;
mod operation;
mod owned;
mod refusal;
mod replicas;
mod replies;
mod resent;
mod router;
mod script;
mod server;
mod server_info;
mod shared;
mod slot;
mod subscriber;
#[cfg(any(test, fuzzing))]
pub(crate) mod untrusted;
pub(crate) mod url;
mod vote;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use self::batcher::Batcher;
pub use self::driver::Driver;
#[cfg(feature = "redis")]
pub use self::driver::RedisConnection;
use self::driver::{Connection, WithoutConnection};
use self::examination::Circumstances;
use self::replies::Inspected;
use self::script::Call;
use self::server::Server;
pub(crate) use self::server_info::ServerInfo;
use self::slot::slot_of;
use self::subscriber::Subscriber;
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Answers, Capabilities, Downgraded, Ending, Extending, HandedOver, Holder, InLine, Latest,
    LinePlace, Next, Store, Undone, Verdict, Wanted, Whose,
};
use crate::hold::Owned;
use crate::{Diagnosis, Error, Key};

#[derive(Debug)]
pub(crate) struct RedisStore {
    prefix: String,
    /// Distinguishes the waiters of this locker from those of others.
    process: String,
    /// The server doesn't permit the keys of lines.
    without_line: AtomicBool,
    /// Operations on one key share calls. All others are sent by themselves.
    batcher: Batcher<Server>,
    subscriber: Subscriber,
    /// How long the last fencing token of a key is remembered, at least.
    fence_ttl: Duration,
    /// It is a node of a quorum.
    is_node: bool,
}

/// How long the last fencing token of a key is remembered unless that is set.
///
/// Should the server forget it after that, its clock takes over. It has passed the token by then, unless it was set
/// back by more than this since the token was granted; or another server takes over whose clock is that much behind.
pub(crate) const FENCE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// The shortest time for which it may be set to be remembered: more than servers' clocks are corrected by, and more
/// than those of a primary and its replicas differ by.
pub(crate) const SHORTEST_FENCE_TTL: Duration = Duration::from_secs(60);

impl RedisStore {
    /// Connects to the URL with a client of our own, whose settings suit locks.
    pub(crate) async fn connect(
        driver: Driver,
        url: &str,
        prefix: String,
        timeout: Duration,
        min_replicas: usize,
    ) -> Result<Self, Error> {
        let store = Self::on(driver::open(driver, &url::parse(url)?, timeout).await?, prefix, min_replicas);
        store.check_replicas()?;
        Ok(store)
    }

    /// Connects to the URL in the background, now or when the server comes up. Until then, calls wait for it.
    ///
    /// # Errors
    ///
    /// Never fails because of the server or the network.
    pub(crate) fn connect_lazily(
        driver: Driver,
        url: &str,
        prefix: String,
        timeout: Duration,
        min_replicas: usize,
    ) -> Result<Self, Error> {
        let connection = driver::open_lazily(driver, &url::parse(url)?, timeout, WithoutConnection::CallsWait)?;
        let store = Self::on(connection, prefix, min_replicas);
        store.check_replicas()?;
        Ok(store)
    }

    /// Uses the caller's client. Assumes nothing of its settings: each call brings its own.
    #[cfg(feature = "fred")]
    pub(crate) fn with_client(client: fred::clients::Client, prefix: String, min_replicas: usize) -> Self {
        Self::on(driver::fred::borrowed(client), prefix, min_replicas)
    }

    /// Uses the caller's connection.
    #[cfg(feature = "redis")]
    pub(crate) fn with_redis(connection: RedisConnection, prefix: String, min_replicas: usize) -> Self {
        Self::on(driver::redis::borrowed(connection), prefix, min_replicas)
    }

    fn on(connection: Arc<dyn Connection>, prefix: String, min_replicas: usize) -> Self {
        let process = format!("{:016x}", fastrand::u64(..));
        let subscriber = Subscriber::of(&connection, process.clone());
        let batcher = Batcher::new(Server::new(connection, min_replicas));
        Self {
            prefix,
            process,
            without_line: AtomicBool::new(false),
            batcher,
            subscriber,
            fence_ttl: FENCE_TTL,
            is_node: false,
        }
    }

    /// Sets for how long the last fencing token of a key is remembered, at least.
    pub(crate) fn with_fence_ttl(self, fence_ttl: Duration) -> Self {
        Self { fence_ttl: fence_ttl.max(SHORTEST_FENCE_TTL), ..self }
    }

    /// Returns the ttl of the fence key of a lock with this ttl.
    fn fence_ttl(&self, ttl: Duration) -> i64 {
        args::millis(self.fence_ttl.max(ttl.saturating_mul(2)))
    }

    fn has_line(&self) -> bool {
        !self.without_line.load(Ordering::Relaxed)
    }

    fn server(&self) -> &Server {
        self.batcher.executor()
    }

    /// Returns the key's name at the server.
    fn name(&self, key: &Key) -> Bytes {
        if self.prefix.is_empty() {
            return key.to_bytes();
        }
        [self.prefix.as_bytes(), key.as_bytes()].concat().into()
    }

    fn names<'a>(&'a self, owned: &'a Owned) -> impl ExactSizeIterator<Item = Bytes> + 'a {
        owned.keys.iter().map(|key| self.name(key))
    }

    /// Returns the command that notifies waiters of a release. On a cluster, messages that are not sharded go to every
    /// node.
    fn publish(&self) -> &'static str {
        match self.server().connection.is_cluster() {
            true => "SPUBLISH",
            false => "PUBLISH",
        }
    }

    async fn remaining(&self, owned: &Owned, timeout: Duration) -> Result<Option<Duration>, Error> {
        let call = Call::new(self.names(owned), [owned.token.to_bytes()]);
        let reply = self.server().run(&self.server().scripts.remaining, || call.clone(), |_| {}, timeout).await?;
        replies::remaining(&reply.value()?)
    }

    async fn inspect(&self, key: &Key, timeout: Duration) -> Result<Option<Holder>, Error> {
        let (until, name) = (Instant::now() + timeout, self.name(key));
        let fence = names::fence_of(&name);
        let call = Call::new([name, fence].into_iter(), []);
        let reply = self.server().run(&self.server().scripts.inspect, || call.clone(), |_| {}, timeout).await?;
        match replies::inspected(reply.value()?)? {
            Inspected::Holder(holder) => Ok(holder),
            Inspected::Shared => {
                Box::pin(self.longest_holder(key, until.saturating_duration_since(Instant::now()))).await
            }
        }
    }

    /// Refuses keys in several slots of a cluster, before anything is sent: a script can only touch one slot.
    fn check_slots(&self, names: &[Bytes]) -> Result<(), Error> {
        let in_one_slot = || names.windows(2).all(|pair| matches!(pair, [a, b] if slot_of(a) == slot_of(b)));
        match names.len() > 1 && self.server().connection.is_cluster() && !in_one_slot() {
            true => Err(Error::CrossSlot),
            false => Ok(()),
        }
    }

    /// Refuses to wait for replicas where `WAIT` might not follow its write on the same connection.
    fn check_replicas(&self) -> Result<(), Error> {
        match self.server().connection.why_not_replicated() {
            Some(why) if self.server().min_replicas > 0 => Err(Error::Unsupported(why)),
            _ => Ok(()),
        }
    }
}

impl Store for RedisStore {
    fn capabilities(&self) -> Capabilities {
        let server = self.server();
        let waits_for_replicas = server.min_replicas > 0;
        Capabilities {
            // A release must not wait until replicas have acknowledged what the next owner gets.
            hands_over: !waits_for_replicas,
            has_line: self.has_line(),
            has_line_for_fair: true,
            // Not where a call takes keys of one slot only, or must not last longer than what it renews.
            renews_batches: !waits_for_replicas && !server.takes_one_slot(),
            undoes_attempts: false,
            has_readers: true,
            has_permits: true,
            has_line_for_several: false,
            has_line_of_lockers: false,
        }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired> {
        if !self.server().router.is_clustered() {
            return Box::pin(self.acquire(wanted, in_line, timeout));
        }
        Box::pin(router::patiently(timeout, move |left| self.acquire(wanted, in_line, left)))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict> {
        if owned.mode.is_shared() {
            return Box::pin(self.renew_shared(owned, ttl, how, timeout));
        }
        Box::pin(self.renew(owned, ttl, how, timeout))
    }

    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], timeout: Duration) -> Answers<'a, Verdict> {
        Box::pin(self.renew_batch(locks, timeout))
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict> {
        if self.server().connection.resends() {
            return Box::pin(self.end_resent(owned, ending, None, timeout));
        }
        if owned.mode.is_shared() {
            return Box::pin(self.release_shared(owned, ending, Duration::ZERO, timeout));
        }
        Box::pin(self.release(owned, ending, timeout))
    }

    fn linger<'a>(
        &'a self,
        owned: &'a Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Answer<'a, Verdict> {
        if self.server().connection.resends() {
            return Box::pin(self.end_resent(owned, ending, Some(rest), timeout));
        }
        if owned.mode.is_shared() {
            return Box::pin(self.release_shared(owned, ending, rest, timeout));
        }
        Box::pin(self.linger(owned, ending, rest, timeout))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
        if owned.mode.is_shared() {
            return Box::pin(self.undo_shared(owned, latest, timeout));
        }
        Box::pin(self.undo(owned, latest, timeout))
    }

    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        timeout: Duration,
    ) -> Answer<'a, HandedOver> {
        if self.server().connection.resends() {
            return Box::pin(self.hand_over_resent(from, ending, to, next, timeout));
        }
        Box::pin(self.hand_over(from, ending, to, next, timeout))
    }

    fn downgrade<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Downgraded> {
        Box::pin(self.downgrade(owned, timeout))
    }

    fn enter<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        Box::pin(self.enter(key, place, timeout))
    }

    fn heartbeat<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, bool> {
        Box::pin(self.heartbeat(key, place, timeout))
    }

    fn leave<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        Box::pin(self.leave(key, place, timeout))
    }

    fn subscribe(&self, key: &Key) -> Subscription {
        self.subscriber.subscribe(self.name(key))
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        if owned.mode.is_shared() {
            return Box::pin(router::patiently(timeout, move |left| self.remaining_shared(owned, left)));
        }
        Box::pin(router::patiently(timeout, move |left| self.remaining(owned, left)))
    }

    fn find_keys<'a>(&'a self, prefix: &'a [u8], timeout: Duration) -> Answer<'a, BTreeSet<Key>> {
        Box::pin(self.find_keys(prefix, timeout))
    }

    fn diagnose(&self, window: Option<Duration>, timeout: Duration) -> Answer<'_, Diagnosis> {
        Box::pin(self.diagnose(Circumstances { window, ..Circumstances::default() }, timeout))
    }

    /// What got `TRYAGAIN` has not run.
    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, timeout: Duration) -> Answer<'a, Verdict> {
        if self.server().connection.resends() {
            return Box::pin(async { Err(Error::Unsupported(resent::MAY_END_THE_NEXT)) });
        }
        Box::pin(router::patiently(timeout, move |left| self.force_release(key, whose, left)))
    }

    fn holders<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Vec<Holder>> {
        Box::pin(self.holders(key, timeout))
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        Box::pin(router::patiently(timeout, move |left| self.inspect(key, left)))
    }
}
