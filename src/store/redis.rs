//! Locks on one Redis or Valkey server, one that Sentinels watch over, or a cluster, through fred.

mod about;
mod batcher;
mod clock;
mod connection;
#[cfg(test)]
mod differential;
mod line;
mod names;
mod operation;
mod refusal;
mod replicas;
mod router;
mod script;
mod subscriber;
pub(crate) mod url;
mod vote;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fred::bytes::Bytes;
use fred::clients::Client;
use fred::types::Value;
use fred::util::redis_keyslot;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tracing::debug;

pub(crate) use self::about::{About, Contacts};
use self::batcher::{BatchRefused, BatchResults, Batcher, Executor};
use self::clock::ServerClock;
use self::connection::{Connection, Sent};
use self::operation::{Decision, NO_ID, Operation, What, unexpected};
use self::replicas::{Writing, within};
use self::router::Router;
use self::script::{Call, Reply, Said, Script, Scripts, decimal, is_mixed_up};
use self::subscriber::Subscriber;
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Answers, Capabilities, Ending, Extending, HandedOver, Holder, InLine, Latest, LinePlace, Next,
    RECORD_TTL, Store, Undone, Verdict, Wanted,
};
use crate::hold::{GrantId, Owned};
use crate::{Error, Key, Loss, Token};

/// Where all operations travel that may share calls.
const SHARED_LANE: u16 = 0;

/// For how long the server remembers the last fencing token of a key, at least. Should it forget, its clock takes over:
/// the memory only matters where that clock steps back, by less than this.
const FENCE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug)]
pub(crate) struct RedisStore {
    prefix: String,
    /// Tells the waiters of this locker from those of others.
    process: String,
    /// The server doesn't allow us to stand in line.
    without_line: AtomicBool,
    /// Operations on one key share calls. The rest goes by itself.
    batcher: Batcher<Server>,
    subscriber: Subscriber,
}

impl RedisStore {
    /// Connects to the URL with a client of our own, whose settings suit locks.
    pub(crate) async fn connect(
        url: &str,
        prefix: String,
        timeout: Duration,
        min_replicas: usize,
    ) -> Result<Self, Error> {
        let store = Self::on(Connection::open(url, timeout).await?, prefix, min_replicas);
        store.check_replicas()?;
        Ok(store)
    }

    /// Uses the caller's client. Nothing is assumed of its settings: each call brings its own.
    pub(crate) fn with_client(client: Client, prefix: String, min_replicas: usize) -> Self {
        Self::on(Connection::borrowed(client), prefix, min_replicas)
    }

    fn on(connection: Connection, prefix: String, min_replicas: usize) -> Self {
        use fred::interfaces::ClientLike;
        let process = format!("{:016x}", fastrand::u64(..));
        let subscriber = Subscriber::new(connection.client().client_config(), connection.home(), process.clone());
        let router = Router::new(connection.client().clone());
        let (scripts, takes_one_slot) = (Scripts::new(), AtomicBool::new(false));
        let server = Server { connection, router, scripts, clock: ServerClock::new(), min_replicas, takes_one_slot };
        Self { prefix, process, without_line: AtomicBool::new(false), batcher: Batcher::new(server), subscriber }
    }

    fn has_line(&self) -> bool {
        !self.without_line.load(Ordering::Relaxed)
    }

    fn server(&self) -> &Server {
        self.batcher.executor()
    }

    /// The key as the server knows it.
    fn name(&self, key: &Key) -> Bytes {
        if self.prefix.is_empty() {
            return key.to_bytes();
        }
        [self.prefix.as_bytes(), key.as_bytes()].concat().into()
    }

    fn names<'a>(&'a self, owned: &'a Owned) -> impl ExactSizeIterator<Item = Value> + 'a {
        owned.keys.iter().map(|key| Value::Bytes(self.name(key)))
    }

    async fn acquire(&self, wanted: &Wanted, in_line: InLine, timeout: Duration) -> Result<Acquired, Error> {
        self.check_replicas()?;
        let timeout = within(timeout, wanted.ttl, self.server().min_replicas);
        let until = Instant::now() + timeout;
        let answer = self.take(wanted, in_line, timeout).await;
        if matches!(answer, Err(Error::NotReplicated { .. })) {
            // Given back before it is told. Should that fail, it is the caller's to do, as ever when an attempt fails.
            let left = until.saturating_duration_since(Instant::now());
            // Not by the script for one key: this token may be used by the next attempt, so it must not end late.
            drop(Store::release(self, &wanted.owned, Ending::Grant, left).await);
        }
        answer
    }

    async fn take(&self, wanted: &Wanted, in_line: InLine, timeout: Duration) -> Result<Acquired, Error> {
        let Owned { keys, token, grant, .. } = &wanted.owned;
        let place = match in_line {
            InLine::At { place, .. } => Some(place),
            InLine::No | InLine::Behind => None,
        };
        let is_shared = place.is_some_and(|place| place.is_shared);
        if let (InLine::Behind | InLine::At { .. }, [key]) = (in_line, &**keys) {
            if !is_shared {
                return Box::pin(self.acquire_in_line(wanted, key, place, timeout)).await;
            }
            if self.has_line() {
                match Box::pin(self.acquire_in_line(wanted, key, place, timeout)).await {
                    // Who may not use the line waits without one, unless it was asked for.
                    Err(error) if error.code() == Some("NOPERM") => {
                        debug!(name: "tenure.without_line", %error, "may not stand in line");
                        self.without_line.store(true, Ordering::Relaxed);
                    }
                    answer => return answer,
                }
            }
        }
        let (ttl, fence_ttl) = (millis(wanted.ttl), fence_ttl(wanted.ttl));
        if let ([key], None) = (&**keys, grant) {
            let name = self.name(key);
            let fence = wanted.fenced.then(|| (names::fence_of(&name), fence_ttl));
            let what = What::Acquire { value: value_of(wanted), ttl, fence, latest: wanted.latest.clone() };
            return acquired(self.run(Operation::new(name, token, what), timeout).await?);
        }
        Box::pin(self.acquire_whole(wanted, place, timeout)).await
    }

    /// By the script that knows all there is to know.
    async fn acquire_whole(
        &self,
        wanted: &Wanted,
        place: Option<LinePlace>,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let Owned { keys, token, grant, .. } = &wanted.owned;
        let mut names: Vec<Bytes> = keys.iter().map(|key| self.name(key)).collect();
        self.check_slots(&names)?;
        let count = i64::try_from(names.len()).unwrap_or(i64::MAX);
        let locks = names.clone();
        if grant.is_some() {
            names.extend(locks.iter().map(names::grants_of));
        }
        if wanted.fenced {
            names.extend(locks.iter().map(names::fence_of));
        }
        let args = [
            token.to_text().into(),
            value_of(wanted),
            millis(wanted.ttl).into(),
            count.into(),
            fence_ttl(wanted.ttl).into(),
            grant.map_or_else(|| "".into(), |grant| grant.to_string().into()),
            record_ttl(wanted.ttl).into(),
            place.map_or_else(|| "".into(), |place| self.place(place)),
        ];
        let call = Call::new(names.into_iter().map(Value::Bytes), args);
        let (until, writing) = self.server().writing(timeout);
        let sending = |until| wanted.latest.extend(until);
        let answer =
            self.server().run(&self.server().scripts.acquire, || call.clone(), sending, timeout).await?.value()?;
        match integers(&answer)?[..] {
            [1, fence] => {
                self.server().replicated(writing, until).await?;
                Ok(granted(fence))
            }
            [0, ttl, place] => {
                let place = usize::try_from(place - 1).unwrap_or_default();
                Ok(Acquired::Held { place, remaining: from_millis(ttl) })
            }
            _ => Err(unexpected()),
        }
    }

    async fn renew(&self, owned: &Owned, ttl: Duration, how: Extending, timeout: Duration) -> Result<Verdict, Error> {
        let (how, timeout) = (how.of(owned), within(timeout, ttl, self.server().min_replicas));
        if let ([key], Extending::AtLeast) = (&*owned.keys, how) {
            return self.run_owned(key, &owned.token, What::Renew { ttl: millis(ttl) }, timeout).await.map(renewed);
        }
        let (script, call) = match how.name() {
            None => {
                let args = [Value::from(owned.token.to_text()), millis(ttl).into()];
                (&self.server().scripts.renew, Call::new(self.names(owned), args))
            }
            Some(_) => (&self.server().scripts.renew_grant, self.renewal_of_grant(owned, ttl, how, Duration::ZERO)),
        };
        let (until, writing) = self.server().writing(timeout);
        let answer = match self.server().run(script, || call.clone(), |_| {}, timeout).await {
            Err(error) if error.is_redirection() && owned.keys.len() > 1 => {
                return self.one_by_one(owned, Apart::Renew(ttl, how), until).await.map(renewed);
            }
            answer => answer?.value(),
        };
        let verdict = verdict(answer);
        if matches!(verdict, Ok(Ok(()))) {
            self.server().replicated(writing, until).await?;
        }
        verdict.map(renewed)
    }

    /// For `renew_grant.lua`. The window is that of a quorum's node, or zero.
    fn renewal_of_grant(&self, owned: &Owned, ttl: Duration, how: Extending, window: Duration) -> Call {
        let earlier = match how {
            Extending::Claim { earlier } | Extending::GiveBack { earlier } => id_of(earlier),
            _ => "".into(),
        };
        let args = [
            owned.token.to_text().into(),
            millis(ttl).into(),
            count_of(owned),
            how.name().unwrap_or("least").into(),
            id_of(owned.grant),
            record_ttl(ttl).into(),
            earlier,
            Value::Integer(i64::try_from(window.as_secs()).unwrap_or(i64::MAX)),
        ];
        Call::new(self.names_with_records(owned), args)
    }

    async fn release(&self, owned: &Owned, ending: Ending, timeout: Duration) -> Result<Verdict, Error> {
        let what = match (&*owned.keys, owned.grant, ending) {
            ([_], None, Ending::Lock) if owned.own_token => What::Release { publish: self.publish() },
            ([key], None, Ending::Grant) => {
                What::EndGrant { publish: self.publish(), record: names::grants_of(&self.name(key)) }
            }
            _ => {
                let until = Instant::now() + timeout;
                return match Box::pin(self.release_whole(owned, ending, timeout)).await {
                    Err(error) if error.is_redirection() && owned.keys.len() > 1 => {
                        Box::pin(self.one_by_one(owned, Apart::Release(ending), until)).await.map(released)
                    }
                    answer => answer.map(|(released, _)| released),
                };
            }
        };
        self.run_owned(&owned.key(), &owned.token, what, timeout).await.map(released)
    }

    /// With all keys and records. Returns the server's time in ms as well.
    async fn release_whole(&self, owned: &Owned, ending: Ending, timeout: Duration) -> Result<(Verdict, u64), Error> {
        let (token, count) = (Value::from(owned.token.to_text()), count_of(owned));
        let publish = self.publish().into();
        let locks: Vec<Bytes> = owned.keys.iter().map(|key| self.name(key)).collect();
        let scripts = &self.server().scripts;
        let lines = locks.iter().map(names::line_of);
        let records = locks.iter().filter(|_| ending == Ending::Grant || !owned.own_token).map(names::grants_of);
        let keys: Vec<Bytes> = locks.iter().cloned().chain(lines).chain(records).collect();
        let keys = keys.into_iter().map(Value::Bytes);
        let (script, mut call) = match ending {
            Ending::Lock => (&scripts.release, Call::new(keys, [token, count, publish])),
            Ending::Grant => (&scripts.end_grant, Call::new(keys, [token, count, publish, id_of(owned.grant)])),
        };
        call.args(operation::channels(&locks));
        let reply = self.server().run(script, || call.clone(), |_| {}, timeout).await?;
        let now = reply.now.unwrap_or_default();
        Ok((released(verdict(reply.value())?), now))
    }

    async fn undo(&self, owned: &Owned, latest: &Latest, timeout: Duration) -> Result<Undone, Error> {
        let (_, now) = self.release_whole(owned, Ending::Grant, timeout).await?;
        Ok(latest.remaining(now).map_or(Undone::Complete, Undone::MayRun))
    }

    /// The lock keys, then their records of grants.
    fn names_with_records(&self, owned: &Owned) -> impl ExactSizeIterator<Item = Value> {
        let locks: Vec<Bytes> = owned.keys.iter().map(|key| self.name(key)).collect();
        let records: Vec<Bytes> = locks.iter().map(names::grants_of).collect();
        [locks, records].concat().into_iter().map(Value::Bytes)
    }

    /// How those who wait are told of a release. On a cluster other messages go to every node.
    fn publish(&self) -> &'static str {
        use fred::interfaces::ClientLike;
        match self.server().client().is_clustered() {
            true => "SPUBLISH",
            false => "PUBLISH",
        }
    }

    async fn hand_over(
        &self,
        from: &Owned,
        ending: Ending,
        to: &Wanted,
        next: &Next,
        timeout: Duration,
    ) -> Result<HandedOver, Error> {
        let [key] = &*from.keys else { return Ok(HandedOver::NotOurs(Loss::Missing)) };
        let name = self.name(key);
        let fence = to.fenced.then(|| names::fence_of(&name));
        let keys = line::lock_and_line(&name).into_iter().chain([names::grants_of(&name)]).chain(fence);
        let keys: Vec<Value> = keys.map(Value::Bytes).collect();
        // Who may not use the line doesn't try to at every turn.
        let has_line = self.has_line();
        let grant = match ending {
            Ending::Grant => id_of(from.grant),
            Ending::Lock if from.own_token => "".into(),
            Ending::Lock => "*".into(),
        };
        let args = [
            from.token.to_text().into(),
            value_of(to),
            decimal(millis(to.ttl)),
            decimal(fence_ttl(to.ttl)),
            self.place(next.place),
            line::alive(),
            flag(next.may_keep || !has_line),
            flag(to.fenced),
            grant,
            flag(next.in_line && has_line),
        ];
        let call = Call::new(keys.into_iter(), args.into_iter().chain(self.notify(&name)));
        let sending = |until| to.latest.extend(until);
        let reply = self.server().run(&self.server().scripts.hand_over, || call.clone(), sending, timeout).await?;
        let done = |fence| HandedOver::Done { fencing_token: fencing_token(fence), alone: false };
        let answer = match reply.outcome? {
            Said::Code(1) => return Ok(done(0)),
            Said::FencingToken(fence) => return Ok(done(fence)),
            Said::Value(answer) => answer,
            Said::Code(_) => return Err(unexpected()),
        };
        Ok(match integers(&answer)?[..] {
            [-1] => HandedOver::NotOurs(Loss::Missing),
            [-2] => HandedOver::NotOurs(Loss::Taken),
            [-3] => HandedOver::NotNow,
            [-4] => HandedOver::PassedBy,
            [fence, alone] => HandedOver::Done { fencing_token: fencing_token(fence), alone: alone == 1 },
            _ => return Err(unexpected()),
        })
    }

    async fn run_owned(
        &self,
        key: &Key,
        token: &Token,
        what: What,
        timeout: Duration,
    ) -> Result<Result<(), Loss>, Error> {
        about_owned(self.run(Operation::new(self.name(key), token, what), timeout).await?)
    }

    /// Does to each of the keys by itself what could not be done to all at once, because they are on two nodes while
    /// their slot moves. Returns the loss of any key that is not ours any more.
    async fn one_by_one(&self, owned: &Owned, what: Apart, until: Instant) -> Result<Result<(), Loss>, Error> {
        let (mut all, mut done, mut failure) = (Ok(()), 0, None);
        for key in &*owned.keys {
            let one = Owned { keys: [key.clone()].into(), ..owned.clone() };
            let left = until.saturating_duration_since(Instant::now());
            let answer = match what {
                Apart::Renew(ttl, how) => Store::renew(self, &one, ttl, how, left).await.map(|renewed| match renewed {
                    Verdict::Done => Ok(()),
                    Verdict::NotOurs(loss) => Err(loss),
                }),
                Apart::Release(ending) => {
                    Store::release(self, &one, ending, left).await.map(|released| match released {
                        Verdict::Done => Ok(()),
                        Verdict::NotOurs(loss) => Err(loss),
                    })
                }
            };
            match answer {
                Ok(verdict) => (all, done) = (all.and(verdict), done + 1),
                // A refusal says nothing of another key's outcome that is unknown.
                Err(error) if failure.as_ref().is_none_or(Error::has_not_run) => failure = Some(error),
                Err(_) => {}
            }
        }
        match failure {
            None => Ok(all),
            // A refusal would mean that nothing has run.
            Some(error) if done > 0 && error.has_not_run() => Err(Error::timeout()),
            Some(error) => Err(error),
        }
    }

    async fn renew_batch(&self, locks: &[(&Owned, Duration)], timeout: Duration) -> Vec<Result<Verdict, Error>> {
        let renewal = |&(owned, ttl): &(&Owned, Duration)| {
            Operation::new(self.name(&owned.key()), &owned.token, What::Renew { ttl: millis(ttl) })
        };
        let answers = self.batcher.run_all(SHARED_LANE, locks.iter().map(renewal).collect(), timeout).await;
        answers.into_iter().map(|answer| answer.and_then(about_owned).map(renewed)).collect()
    }

    async fn run(&self, operation: Box<Operation>, timeout: Duration) -> Result<Decision, Error> {
        // What one call may touch: on a cluster, the keys of one slot.
        let lane = match self.server().takes_one_slot() {
            true => redis_keyslot(&operation.name),
            false => SHARED_LANE,
        };
        if self.server().router.is_moving(lane) {
            return Box::pin(self.server().run_one(&operation, timeout)).await;
        }
        self.batcher.run(lane, operation, timeout).await
    }

    async fn remaining(&self, owned: &Owned, timeout: Duration) -> Result<Option<Duration>, Error> {
        let call = Call::new(self.names(owned), [owned.token.to_text().into()]);
        let reply = self.server().run(&self.server().scripts.remaining, || call.clone(), |_| {}, timeout).await?;
        let answer = reply.value()?;
        Ok(match integer(&answer)? {
            -2 => None,
            // Somebody has taken the ttl away; the next renewal gives it back.
            -1 => Some(Duration::MAX),
            ttl => from_millis(ttl),
        })
    }

    async fn inspect(&self, key: &Key, timeout: Duration) -> Result<Option<Holder>, Error> {
        let name = self.name(key);
        let fence = names::fence_of(&name);
        let call = Call::new([name, fence].map(Value::Bytes).into_iter(), []);
        let reply = self.server().run(&self.server().scripts.inspect, || call.clone(), |_| {}, timeout).await?;
        let answer = reply.value()?;
        if answer.is_null() {
            return Ok(None);
        }
        let Value::Array(parts) = answer else { return Err(unexpected()) };
        let Ok([held, ttl, fence]) = <[Value; 3]>::try_from(parts) else { return Err(unexpected()) };
        let held = held.into_owned_bytes().ok_or_else(unexpected)?;
        let mut parts = held.splitn(2, |&b| b == b'\n');
        let (token, metadata) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Ok(Some(Holder {
            // What other libraries put there may be no text at all.
            token: Token::from_server(token),
            metadata: metadata.to_vec(),
            remaining: from_millis(integer(&ttl)?),
            fencing_token: fence.as_str().and_then(|fence| fence.parse().ok()),
        }))
    }

    /// On a cluster one script can only touch one slot: said before anything is sent.
    fn check_slots(&self, names: &[Bytes]) -> Result<(), Error> {
        use fred::interfaces::ClientLike;
        let in_one_slot =
            || names.windows(2).all(|pair| matches!(pair, [a, b] if redis_keyslot(a) == redis_keyslot(b)));
        match names.len() > 1 && self.server().client().is_clustered() && !in_one_slot() {
            true => Err(Error::CrossSlot),
            false => Ok(()),
        }
    }

    /// In a cluster `WAIT` would have to follow its write to the same node, through every migration of its slot.
    fn check_replicas(&self) -> Result<(), Error> {
        use fred::interfaces::ClientLike;
        match self.server().min_replicas > 0 && self.server().client().is_clustered() {
            true => Err(Error::Unsupported("a cluster can't be asked how many replicas have acknowledged one write")),
            false => Ok(()),
        }
    }
}

/// What is done to several keys one by one.
#[derive(Clone, Copy)]
enum Apart {
    Renew(Duration, Extending),
    Release(Ending),
}

/// What a lock key holds.
fn value_of(wanted: &Wanted) -> Value {
    let token = &wanted.owned.token;
    match &*wanted.metadata {
        [] => Value::from(token.to_text()),
        metadata => Value::Bytes([token.as_str().as_bytes(), b"\n", metadata].concat().into()),
    }
}

/// The server at the other end of a connection, and what it is asked to run.
#[derive(Debug)]
struct Server {
    connection: Connection,
    router: Router,
    scripts: Scripts,
    clock: ServerClock,
    /// So many must have acknowledged what is granted and renewed, or it is not.
    min_replicas: usize,
    /// It has said so, although it is no cluster to the client: behind a proxy, it may be one.
    takes_one_slot: AtomicBool,
}

impl Server {
    fn client(&self) -> &Client {
        self.connection.client()
    }

    /// Whether the keys of a call must be of one slot.
    fn takes_one_slot(&self) -> bool {
        use fred::interfaces::ClientLike;
        self.client().is_clustered() || self.takes_one_slot.load(Ordering::Relaxed)
    }

    /// Runs a script once, within `timeout` by our clock and by the server's. `sending` is told the latest time at
    /// which the server may run it, in ms by the server's clock, before anything is sent.
    async fn run(
        &self,
        script: &Script,
        call: impl Fn() -> Call + Sync,
        sending: impl Fn(u64),
        timeout: Duration,
    ) -> Result<Reply, Error> {
        self.run_by_clocks(CLOCKS, script, call, sending, timeout).await
    }

    /// As [`run`](Self::run); sent again only so often where it meets another clock than the last server's.
    async fn run_by_clocks(
        &self,
        clocks: u32,
        script: &Script,
        call: impl Fn() -> Call + Sync,
        sending: impl Fn(u64),
        timeout: Duration,
    ) -> Result<Reply, Error> {
        let now = Instant::now();
        let until = now + timeout;
        let mut reading = self.clock.reading(now);
        let mut refused = 0;
        loop {
            let sent = self.connection.begin()?;
            self.router.live_on(|| self.connection.runtime());
            let latest = self.clock.at(until, reading);
            sending(latest);
            let stamp = self.scripts.stamp(latest);
            // fred's futures are several kilobytes large, and those around them would be as large, on every path.
            let answer = Box::pin(script.run(&self.router, &call, stamp, until)).await;
            if answer.as_ref().is_err_and(is_mixed_up) {
                self.connection.replace();
                self.router.replace();
            }
            let reply = self.connection.heard(sent, answer)?;
            let learned = reply.now.map(|now| self.clock.learn(now));
            match &reply.outcome {
                // Another server's clock, or one that was not known yet. If it is too late by ours, there is no time
                // left.
                Err(error) if error.code() == Some("LATE") && refused < clocks => {
                    refused += 1;
                    reading = learned;
                }
                _ => return Ok(reply),
            }
        }
    }

    /// To be asked for before something is sent that replicas shall have by then.
    fn writing(&self, timeout: Duration) -> (Instant, Option<Writing>) {
        (Instant::now() + timeout, Writing::on(self.client(), self.min_replicas))
    }

    async fn replicated(&self, writing: Option<Writing>, until: Instant) -> Result<(), Error> {
        let Some(writing) = writing else { return Ok(()) };
        let sent = Sent::in_part();
        let answer = Box::pin(writing.acknowledged(self.client(), until)).await;
        match self.connection.heard(sent, answer) {
            // The write was answered: whatever keeps us from asking who has it, it is there and must be given back.
            Err(error @ Error::Redis(_)) => {
                debug!(name: "tenure.wait_failed", %error, "could not ask the server which replicas have a write");
                Err(Error::NotReplicated { needed: self.min_replicas, acknowledged: 0 })
            }
            answer => answer,
        }
    }

    /// One acknowledgement serves all that were granted or renewed by one call.
    async fn all_replicated(
        &self,
        operations: &[Box<Operation>],
        mut answers: BatchResults<Decision>,
        writing: Option<Writing>,
        until: Instant,
    ) -> BatchResults<Decision> {
        let mut both = operations.iter().zip(&answers);
        if self.min_replicas == 0 || !both.any(|(operation, answer)| is_for_replicas(operation, answer)) {
            return answers;
        }
        if let Err(error) = self.replicated(writing, until).await {
            for (operation, answer) in operations.iter().zip(&mut answers) {
                if is_for_replicas(operation, answer) {
                    *answer = Some(Err(error.clone()));
                }
            }
        }
        answers
    }

    async fn decide(&self, operation: &Operation, timeout: Duration) -> Result<Decision, Error> {
        let script = match operation.what {
            What::Release { .. } | What::EndGrant { .. } => &self.scripts.release_one,
            What::Renew { .. } => &self.scripts.renew_one,
            What::Acquire { .. } => &self.scripts.acquire_one,
        };
        let until = Instant::now() + timeout;
        let sending = |until| operation.is_sent(until);
        let answer = self.run(script, || operation.alone(), sending, timeout).await?;
        let answer = match answer.outcome {
            Ok(said) => operation.read_alone(&said),
            Err(error) => Some(operation.read_error(error)),
        };
        match answer {
            Some(answer) => answer,
            None => {
                let left = until.saturating_duration_since(Instant::now());
                Box::pin(self.decide_again(operation, left)).await
            }
        }
    }

    /// What the script for one key leaves to others: an acquire that meets its own token, and the end of a grant beside
    /// others.
    async fn decide_again(&self, operation: &Operation, timeout: Duration) -> Result<Decision, Error> {
        let sending = |until| operation.is_sent(until);
        let is_acquire = matches!(operation.what, What::Acquire { .. });
        let script = if is_acquire { &self.scripts.acquire } else { &self.scripts.end_grant };
        let answer = self.run(script, || operation.again(), sending, timeout).await?.value();
        if !is_acquire {
            return verdict(answer).map(Decision::Owned);
        }
        match integers(&answer?)?[..] {
            [1, fence] => Ok(Decision::Granted(fence)),
            [0, ttl, _] => Ok(Decision::Held(ttl)),
            _ => Err(unexpected()),
        }
    }
}

impl Executor for Server {
    /// In a box: it is moved several times until it is sent.
    type Operation = Box<Operation>;
    type Output = Decision;

    fn home(&self) -> Option<Handle> {
        self.connection.runtime()
    }

    fn begin_waiting(&self, now: Instant) -> impl FnOnce() -> Error + Send {
        let sent = self.connection.will_wait(now);
        move || self.connection.unheard(sent)
    }

    async fn run_one(&self, operation: &Box<Operation>, timeout: Duration) -> Result<Decision, Error> {
        let (until, writing) = self.writing(timeout);
        let decision = self.decide(operation, timeout).await?;
        if operation.is_for_replicas(&decision) {
            self.replicated(writing, until).await?;
        }
        Ok(decision)
    }

    async fn run_batch(
        &self,
        operations: &[Box<Operation>],
        timeout: Duration,
    ) -> Result<BatchResults<Decision>, BatchRefused> {
        let (until, writing) = self.writing(timeout);
        let sending = |until| operations.iter().for_each(|operation| operation.is_sent(until));
        let answer =
            self.run_by_clocks(0, &self.scripts.many, || operation::together(operations), sending, timeout).await;
        match answer.and_then(Reply::value).and_then(|answer| operation::read_together(operations, &answer)) {
            Ok(answers) => Ok(self.all_replicated(operations, answers, writing, until).await),
            // The server's clock was not known yet, or it is another server. Nothing was run. Not sent again as it is:
            // some of those who asked may have gone by now, and have been undone.
            Err(error) if error.code() == Some("LATE") => Ok(operations.iter().map(|_| None).collect()),
            // From a proxy before a cluster. Nothing was run. What comes from now on travels by slots.
            Err(Error::CrossSlot) => {
                self.takes_one_slot.store(true, Ordering::Relaxed);
                Err(BatchRefused)
            }
            // Their slot is half moved, so no node has all of the keys. Nothing was run.
            Err(error) if error.is_redirection() => {
                let left = until.saturating_duration_since(Instant::now());
                let each = router::all(operations.iter().map(|operation| self.decide(operation, left))).await;
                Ok(each.into_iter().map(Some).collect())
            }
            // The call as such, because of one of its keys (NOPERM). Nothing was run.
            Err(error) if error.is_refusal() && !error.is_transient() => Err(BatchRefused),
            Err(error) => Ok(operations.iter().map(|_| Some(Err(error.clone()))).collect()),
        }
    }

    fn rank(operation: &Box<Operation>) -> usize {
        operation.rank()
    }
}

fn is_for_replicas(operation: &Operation, answer: &Option<Result<Decision, Error>>) -> bool {
    matches!(answer, Some(Ok(decision)) if operation.is_for_replicas(decision))
}

/// So often a request may meet a server whose clock shows something else than the last one's.
const CLOCKS: u32 = 3;

/// The answer to a renewal or a release: whether the keys held our token.
fn verdict(answer: Result<Value, Error>) -> Result<Result<(), Loss>, Error> {
    match answer {
        // Not a string: surely not our lock.
        Err(error) if error.code() == Some("WRONGTYPE") => Ok(Err(Loss::Taken)),
        Err(error) => Err(error),
        Ok(answer) => Ok(operation::owned(integer(&answer)?)),
    }
}

/// What was decided on an operation of ours on one key.
fn about_owned(decision: Decision) -> Result<Result<(), Loss>, Error> {
    match decision {
        Decision::Owned(verdict) => Ok(verdict),
        Decision::Granted(_) | Decision::Held(_) => Err(unexpected()),
    }
}

fn released(verdict: Result<(), Loss>) -> Verdict {
    match verdict {
        Ok(()) => Verdict::Done,
        Err(loss) => Verdict::NotOurs(loss),
    }
}

fn renewed(verdict: Result<(), Loss>) -> Verdict {
    match verdict {
        Ok(()) => Verdict::Done,
        Err(loss) => Verdict::NotOurs(loss),
    }
}

/// Of one key.
fn acquired(decision: Decision) -> Result<Acquired, Error> {
    match decision {
        Decision::Granted(fence) => Ok(granted(fence)),
        Decision::Held(ttl) => Ok(Acquired::Held { place: 0, remaining: from_millis(ttl) }),
        Decision::Owned(_) => Err(unexpected()),
    }
}

fn granted(fence: i64) -> Acquired {
    Acquired::Granted { fencing_token: fencing_token(fence) }
}

/// As scripts tell it: 0 for none.
fn fencing_token(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

/// For how long the server shall remember the fencing token of a lock with this ttl.
fn fence_ttl(ttl: Duration) -> i64 {
    millis(FENCE_TTL.max(ttl.saturating_mul(2)))
}

/// For how long the server shall remember the grants of a lock with this ttl.
fn record_ttl(ttl: Duration) -> i64 {
    millis(RECORD_TTL.max(ttl.saturating_mul(2)))
}

/// What scripts call a grant.
fn id_of(grant: Option<GrantId>) -> Value {
    grant.map_or_else(|| NO_ID.into(), |grant| grant.to_string().into())
}

fn count_of(owned: &Owned) -> Value {
    Value::Integer(i64::try_from(owned.keys.len()).unwrap_or(i64::MAX))
}

impl Extending {
    /// What `renew_grant.lua` calls it; `None` where `renew.lua` does.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::AtLeast | Self::Ensure => None,
            Self::Exactly => Some("exactly"),
            Self::Claim { .. } => Some("claim"),
            Self::KeepRecord => Some("keep"),
            Self::GiveBack { .. } => Some("return"),
        }
    }
}

fn flag(is_set: bool) -> Value {
    Value::from_static_str(if is_set { "1" } else { "0" })
}

fn integer(answer: &Value) -> Result<i64, Error> {
    answer.as_i64().ok_or_else(unexpected)
}

fn integers(answer: &Value) -> Result<Vec<i64>, Error> {
    match answer {
        Value::Array(parts) => parts.iter().map(integer).collect(),
        _ => Err(unexpected()),
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A ttl as the server tells it; below zero it has none.
fn from_millis(ttl: i64) -> Option<Duration> {
    u64::try_from(ttl).ok().map(Duration::from_millis)
}

impl Store for RedisStore {
    fn capabilities(&self) -> Capabilities {
        let server = self.server();
        let waits_for_replicas = server.min_replicas > 0;
        Capabilities {
            // A release must not wait until replicas have acknowledged what the next owner gets.
            hands_over: !waits_for_replicas,
            has_line: self.has_line(),
            // Not where a call takes keys of one slot only, or must not last longer than what it renews.
            renews_batches: !waits_for_replicas && !server.takes_one_slot(),
            undoes_attempts: false,
        }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired> {
        if !self.server().router.is_clustered() {
            return Box::pin(self.acquire(wanted, in_line, timeout));
        }
        Box::pin(router::patiently(timeout, move |left| self.acquire(wanted, in_line, left)))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(self.renew(owned, ttl, how, timeout))
    }

    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], timeout: Duration) -> Answers<'a, Verdict> {
        Box::pin(self.renew_batch(locks, timeout))
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(self.release(owned, ending, timeout))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
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
        Box::pin(self.hand_over(from, ending, to, next, timeout))
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
        Box::pin(router::patiently(timeout, move |left| self.remaining(owned, left)))
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        Box::pin(router::patiently(timeout, move |left| self.inspect(key, left)))
    }
}
