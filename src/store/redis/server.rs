//! The server at the other end of a connection: runs scripts within their time, and the batcher's operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::batcher::{BatchResults, Executor, NotRun};
use super::clock::ServerClock;
use super::driver::{Connection, heard};
use super::operation::{self, Operation, What};
use super::replicas::{Waits, Writing};
use super::replies::{self, Decision, Kind};
use super::router::Router;
use super::script::{Call, Reply, Script, Scripts, is_mixed_up};
use crate::report::{debug, warn};
use crate::store::ByOthers;
use crate::{Error, metrics};

/// A server, and the scripts that it is asked to run.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) connection: Arc<dyn Connection>,
    pub(super) router: Router,
    pub(super) scripts: Scripts,
    pub(super) clock: ServerClock,
    /// How many replicas must have acknowledged what is granted and renewed.
    pub(super) min_replicas: usize,
    waits: Waits,
    /// The server has refused a call with keys of several slots, although the client takes it for no cluster: it may be
    /// one behind a proxy.
    takes_one_slot: AtomicBool,
}

/// How many operations in flight are [few](Executor::few). `benches/versus` measures it. With the server on a core of
/// its own, 16 tasks do 1.5 times as many pairs a second as if 8 were few, on redis-rs, and 1.3 times on fred. If 32
/// were few, 32 tasks would do 0.7 and 0.5 times as many.
const FEW: usize = 16;

/// How often a request is sent again because the server's clock differs from what was known of it.
const CLOCKS: u32 = 3;

impl Server {
    pub(super) fn new(connection: Arc<dyn Connection>, min_replicas: usize) -> Self {
        let router = Router::new(connection.clone());
        let (scripts, clock, takes_one_slot) = (Scripts::new(), ServerClock::new(), AtomicBool::new(false));
        Self { connection, router, scripts, clock, min_replicas, waits: Waits::new(), takes_one_slot }
    }

    /// Returns whether all keys of a call must be in one slot.
    pub(super) fn takes_one_slot(&self) -> bool {
        self.connection.is_cluster() || self.takes_one_slot.load(Ordering::Relaxed)
    }

    /// Runs a script once, within `timeout` by our clock and by the server's. Before anything is sent, `sending` gets
    /// the latest time at which the server may run it, in ms by the server's clock.
    pub(super) async fn run(
        &self,
        script: &Script,
        call: impl Fn() -> Call + Sync,
        sending: impl Fn(u64),
        timeout: Duration,
    ) -> Result<Reply, Error> {
        let now = Instant::now();
        self.run_by_clocks(CLOCKS, script, call, sending, now, now + timeout).await
    }

    /// Like [`run`](Self::run), but from `now` until `until`, and sends the script again at most `clocks` times because
    /// the server's clock differs from what was known of it.
    async fn run_by_clocks(
        &self,
        clocks: u32,
        script: &Script,
        call: impl Fn() -> Call + Sync,
        sending: impl Fn(u64),
        mut now: Instant,
        until: Instant,
    ) -> Result<Reply, Error> {
        let mut reading = self.clock.reading(now);
        let mut refused = 0;
        loop {
            let sent = self.connection.begin(now)?;
            self.router.live_on(|| self.connection.runtime());
            let latest = self.clock.at(until, reading);
            sending(latest);
            let stamp = self.scripts.stamp(latest);
            // Boxed: most operations wait for a call of others, and the futures of all would be as large as this path.
            // Then the allocator has none of their size at hand: 3 to 4 % more instructions for a pair at 16 to 256
            // tasks.
            let reply = Box::pin(script.run(&self.router, &call, stamp, until)).await;
            if reply.as_ref().is_err_and(is_mixed_up) {
                warn!(name: "tenure.mixed_up", "the client handed out the reply to another request; reconnecting");
                self.connection.replace();
                self.router.replace();
            }
            let failure = reply.as_ref().map_or_else(Some, |reply| reply.outcome.as_ref().err());
            if failure.is_some_and(is_by_replica) {
                self.connection.refused_by_replica();
            }
            let mut reply = self.of_last_run(heard(&*self.connection, sent, reply))?;
            reply.outcome = self.of_last_run(reply.outcome);
            let learned = reply.now.map(|now| self.clock.learn(now));
            match &reply.outcome {
                // Another server's clock, or one that was not known yet. If this is too late by our clock, there is no
                // time left for another try.
                Err(error) if error.refusal() == Some("LATE") && refused < clocks => {
                    refused += 1;
                    (reading, now) = (learned, Instant::now());
                }
                _ => return Ok(reply),
            }
        }
    }

    /// Notes in an error that the client may have sent the command before, if it does such things.
    fn of_last_run<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Redis(error)) if self.connection.resends() => Err(error.of_last_run().into()),
            result => result,
        }
    }

    /// Prepares for a write that replicas have to acknowledge. Must be called before it is sent.
    pub(super) fn writing(&self, timeout: Duration) -> (Instant, Option<Writing>) {
        (Instant::now() + timeout, self.writing_now())
    }

    fn writing_now(&self) -> Option<Writing> {
        Writing::on(&*self.connection, self.min_replicas)
    }

    /// Waits until enough replicas have acknowledged the write.
    pub(super) async fn replicated(&self, writing: Option<Writing>, until: Instant) -> Result<(), Error> {
        let Some(writing) = writing else { return Ok(()) };
        match Box::pin(writing.acknowledged(&self.waits, &*self.connection, until)).await {
            // The write itself has succeeded. Whatever keeps the server from telling which replicas have it, it is
            // there and must be undone.
            Err(error @ Error::Redis(_)) => {
                debug!(name: "tenure.wait_failed", %error, "could not ask the server which replicas have a write");
                Err(Error::NotReplicated { needed: self.min_replicas, acknowledged: 0 })
            }
            acknowledged => acknowledged,
        }
    }

    /// Waits until enough replicas have acknowledged what one call has granted and renewed.
    async fn all_replicated(
        &self,
        operations: &[Box<Operation>],
        mut results: BatchResults<Decision>,
        writing: Option<Writing>,
        until: Instant,
    ) -> BatchResults<Decision> {
        let mut both = operations.iter().zip(&results);
        if self.min_replicas == 0 || !both.any(|(operation, result)| is_for_replicas(operation, result)) {
            return results;
        }
        if let Err(error) = self.replicated(writing, until).await {
            for (operation, result) in operations.iter().zip(&mut results) {
                if is_for_replicas(operation, result) {
                    *result = Some(Err(error.clone()));
                }
            }
        }
        results
    }

    async fn decide(&self, operation: &Operation, now: Instant, until: Instant) -> Result<Decision, Error> {
        let script = match operation.what {
            What::Release { .. } | What::EndGrant { .. } => &self.scripts.release_one,
            What::Renew { .. } => &self.scripts.renew_one,
            What::Acquire { .. } => &self.scripts.acquire_one,
        };
        let sending = |until| operation.is_sent(until);
        let reply = self.run_by_clocks(CLOCKS, script, || operation.call(), sending, now, until).await?;
        let decision = match reply.outcome {
            Ok(returned) => replies::single(operation.kind(), &returned),
            Err(error) => Some(replies::refused(operation.kind(), error)),
        };
        match decision {
            Some(decision) => decision,
            None => {
                let left = until.saturating_duration_since(Instant::now());
                Box::pin(self.decide_by_full_script(operation, left)).await
            }
        }
    }

    /// Decides what the scripts for one key leave to others: an acquire that finds its own token, and the renewal or
    /// the end of a grant when there may be other grants.
    async fn decide_by_full_script(&self, operation: &Operation, timeout: Duration) -> Result<Decision, Error> {
        let script = match operation.what {
            What::Acquire { .. } => &self.scripts.acquire,
            What::Renew { .. } => &self.scripts.renew_grant,
            What::Release { .. } | What::EndGrant { .. } => &self.scripts.end_grant,
        };
        let sending = |until| operation.is_sent(until);
        let reply = self.run(script, || operation.full_call(), sending, timeout).await?.value();
        match operation.kind() {
            Kind::Acquire { .. } => replies::acquired(&reply?).map(Decision::Acquire),
            Kind::Owned => replies::verdict(reply).map(Decision::Owned),
        }
    }
}

impl Executor for Server {
    /// Boxed, because it is moved several times until it is sent.
    type Operation = Box<Operation>;
    type Output = Decision;

    fn home(&self) -> Option<Handle> {
        self.connection.runtime()
    }

    fn few(&self) -> usize {
        FEW
    }

    fn begin_waiting(&self, now: Instant) -> impl FnOnce() -> Error + Send {
        let sent = self.connection.will_wait(now);
        move || self.connection.unheard(sent).into()
    }

    async fn run_one(&self, operation: &Box<Operation>, now: Instant, until: Instant) -> Result<Decision, Error> {
        metrics::called(1);
        let writing = self.writing_now();
        let decision = self.decide(operation, now, until).await?;
        if operation.is_for_replicas(&decision) {
            self.replicated(writing, until).await?;
        }
        Ok(decision)
    }

    fn begin_by_others(&self, operation: &Box<Operation>) -> Option<ByOthers> {
        operation.begin_by_others()
    }

    async fn run_batch(
        &self,
        operations: &[Box<Operation>],
        timeout: Duration,
    ) -> Result<BatchResults<Decision>, NotRun> {
        metrics::called(operations.len());
        let (now, writing) = (Instant::now(), self.writing_now());
        let until = now + timeout;
        let sending = |until| operations.iter().for_each(|operation| operation.is_sent(until));
        let call = || operation::batch_call(operations);
        let reply = self.run_by_clocks(0, &self.scripts.many, call, sending, now, until).await.and_then(Reply::value);
        let kinds = operations.iter().map(|operation| operation.kind());
        // What refuses the batch as a whole has run nothing. A client that sends calls again may have had an earlier
        // run of it before, as it may with each operation that is sent alone (`resent.rs`).
        match reply.and_then(|reply| replies::batch(kinds, &reply)) {
            Ok(results) => {
                if results.iter().flatten().any(|result| result.as_ref().is_err_and(is_by_replica)) {
                    self.connection.refused_by_replica();
                }
                let results = results.into_iter().map(|result| Some(self.of_last_run(result?))).collect();
                Ok(self.all_replicated(operations, results, writing, until).await)
            }
            // The server's clock was not known yet, or this is another server.
            Err(error) if error.refusal() == Some("LATE") => Err(NotRun::TooLate),
            // From a proxy in front of a cluster. From now on operations are batched by slot.
            Err(Error::CrossSlot) => {
                self.takes_one_slot.store(true, Ordering::Relaxed);
                Err(NotRun::Refused)
            }
            // The slot is half moved, so no node has all of the keys.
            Err(error) if error.is_redirection() => Err(NotRun::Split),
            // Because of one of its keys (NOPERM).
            Err(error) if error.is_refusal() && !error.is_transient() => Err(NotRun::Refused),
            Err(error) => Ok(operations.iter().map(|_| Some(Err(error.clone()))).collect()),
        }
    }

    fn rank(operation: &Box<Operation>) -> usize {
        operation.rank()
    }
}

/// Returns whether the server is a replica, and so can't do what was asked.
fn is_by_replica(error: &Error) -> bool {
    matches!(error.code(), Some("READONLY" | "MASTERDOWN"))
}

fn is_for_replicas(operation: &Operation, result: &Option<Result<Decision, Error>>) -> bool {
    matches!(result, Some(Ok(decision)) if operation.is_for_replicas(decision))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::driver::{Calling, Nodes, PubSub, Sent, Value};
    use super::*;
    use crate::{RedisError, RedisErrorKind, Token};

    /// A connection whose last reply is known, whatever came before.
    #[derive(Debug)]
    struct Played {
        resends: bool,
        /// What a script is refused with. A refusal of the command, if it has none of its own.
        in_script: bool,
    }

    const REFUSAL: &str = "OOM command not allowed when used memory > 'maxmemory'.";

    impl Connection for Played {
        fn send(&self, _: &'static str, args: Vec<Bytes>, _: Instant) -> Calling<'_, Value> {
            Box::pin(async move {
                if !self.in_script {
                    return Err(RedisError::new(RedisErrorKind::Unknown, REFUSAL));
                }
                let stamp: u64 = std::str::from_utf8(args.last().unwrap()).unwrap().parse().unwrap();
                let mark = Value::Integer(i64::try_from(stamp % (1 << 32)).unwrap());
                let refused = || Value::Bytes(REFUSAL.into());
                Ok(match args[1] == "1" {
                    true => Value::Array(vec![mark, Value::Integer(1), Value::Nil, refused()]),
                    // Of two operations, the first was refused.
                    false => {
                        let batch = [Value::Integer(1), Value::Integer(1), Value::Integer(1), refused()];
                        Value::Array(vec![mark, Value::Integer(1), Value::Array(batch.into())])
                    }
                })
            })
        }

        fn address(&self) -> String {
            "played".to_owned()
        }

        fn nodes(&self) -> Option<Arc<dyn Nodes>> {
            None
        }

        fn is_cluster(&self) -> bool {
            false
        }

        fn is_connected(&self) -> bool {
            true
        }

        fn resends(&self) -> bool {
            self.resends
        }

        fn connections_made(&self) -> u64 {
            0
        }

        fn ready(&self, _: Duration) -> Calling<'_, ()> {
            Box::pin(async { Ok(()) })
        }

        fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
            Ok(Sent::with_connection(now))
        }

        fn answered(&self) {}

        fn failed(&self, _: Sent, error: RedisError) -> RedisError {
            error
        }

        fn will_wait(&self, now: Instant) -> Sent {
            Sent::with_connection(now)
        }

        fn unheard(&self, _: Sent) -> RedisError {
            RedisError::new(RedisErrorKind::Timeout, "unheard")
        }

        fn replace(&self) {}

        fn runtime(&self) -> Option<Handle> {
            None
        }

        fn pub_sub(&self) -> Arc<dyn PubSub> {
            unreachable!("nobody waits")
        }
    }

    /// The first run may have taken the lock, and its reply may have been lost.
    #[tokio::test]
    async fn the_refusal_of_a_call_that_was_sent_again_does_not_mean_that_it_has_not_run() {
        for (resends, in_script) in [(false, false), (false, true), (true, false), (true, true)] {
            let server = Server::new(Arc::new(Played { resends, in_script }), 0);
            let acquire = || {
                let value = Bytes::from_static(b"token");
                let what = What::Acquire { value, ttl: 1_000, fence: None, latest: Arc::default() };
                Operation::new("k".into(), &Token::random(), what)
            };
            let now = Instant::now();
            let alone = server.run_one(&acquire(), now, now + Duration::from_secs(5)).await;
            let mut errors = vec![alone.err().unwrap()];
            if in_script {
                let batch = server.run_batch(&[acquire(), acquire()], Duration::from_secs(5)).await.unwrap();
                errors.extend(batch.into_iter().flatten().filter_map(Result::err));
                assert_eq!(errors.len(), 2);
            }
            for error in errors {
                assert_eq!((error.code(), error.is_refusal()), (Some("OOM"), true), "{error}");
                assert_eq!(error.has_not_run(), !resends, "{error}");
            }
        }
    }
}
