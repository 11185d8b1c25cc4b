//! A store for tests, whose calls fail as planned.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::memory::{MemoryStore, PlaceOf};
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Answers, Capabilities, Downgraded, Ending, Extending, HandedOver, Holder, InLine, Latest,
    LinePlace, Next, Store, Undone, Verdict, Wanted, Whose,
};
use crate::error::NOT_SENT;
use crate::hold::Owned;
use crate::{Error, Key, RedisError, RedisErrorKind};

/// What happens to one call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Nothing: it runs and returns.
    None,
    /// It fails at once, and never runs.
    Refused,
    /// The same, and the caller knows that nothing was sent.
    NotSent,
    /// It never runs, and never returns; an acquire or a release fails when its time is over, as their callers have no
    /// timer of their own.
    Hung,
    /// It never runs, and fails when its time is over.
    Lost,
    /// It runs at once, and its reply is lost with the connection.
    AnswerLost,
    /// It runs at once, and its reply takes this long. A caller that gives up earlier never gets it.
    AnsweredAfter(Duration),
    /// It arrives this much later, whether or not its caller still waits, and returns then. After its timeout the
    /// server refuses to run it.
    RunAfter(Duration),
    /// It arrives twice: at once, and this much later.
    Doubled(Duration),
    /// It arrives twice, and returns the second time.
    Twice(Duration),
    /// The server forgets everything before it runs.
    Forgotten,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Acquire,
    Renew,
    /// Also one that hands the lock over.
    Release,
    Downgrade,
    /// Entering the line other than by asking, leaving it, or a heartbeat.
    Line,
    /// A read: of the ttl that is left, or of the holders.
    Read,
}

/// What the server has done for a call.
pub(crate) enum Ran<'a> {
    Acquire(&'a Wanted, &'a Acquired),
    Renew(&'a Owned, Duration, Extending, &'a Verdict),
    Release(&'a Owned, Ending, &'a Verdict),
    Linger(&'a Owned, Ending, Duration, &'a Verdict),
    Undo(&'a Owned, &'a Undone),
    HandOver(&'a Owned, Ending, &'a Wanted, &'a HandedOver),
    Downgrade(&'a Owned, &'a Downgraded),
}

/// Learns when calls are sent, and what the server does for them and when.
pub(crate) trait Witness: Send + Sync {
    /// A call is being sent. Returns the call's number.
    fn sent(&self, operation: Operation, fault: Fault) -> u64;

    /// The server has just run the call.
    fn ran(&self, call: u64, ran: Ran<'_>);

    /// A waiter subscribes to notifications.
    fn subscribes(&self, subscription: Subscription) -> Subscription;
}

/// The embedded store, behind a connection that does to each call what `plan` returns.
pub(crate) struct FaultyStore {
    store: Arc<MemoryStore>,
    plan: Box<dyn Fn(Operation) -> Fault + Send + Sync>,
    witness: Option<Arc<dyn Witness>>,
    /// For how many of its timeouts a request may run.
    lives: u32,
    /// What the server tells its lockers apart by.
    locker: u64,
}

impl FaultyStore {
    pub(crate) fn new(store: Arc<MemoryStore>, plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Self {
        let locker = store.new_locker();
        Self { store, plan: Box::new(plan), witness: None, lives: 1, locker }
    }

    /// Returns the store with a witness of all calls.
    pub(crate) fn witnessed(self, witness: Arc<dyn Witness>) -> Self {
        Self { witness: Some(witness), ..self }
    }

    /// Returns the store with requests that may run for this many of their timeouts after they were sent. The error in
    /// what a client knows of the server's clock counts, too.
    pub(crate) fn living(self, lives: u32) -> Self {
        Self { lives, ..self }
    }

    /// Returns the latest time at which a request may run.
    fn latest(&self, timeout: Duration) -> u64 {
        self.store.millis(Instant::now() + timeout * self.lives)
    }

    fn place(&self, place: LinePlace) -> PlaceOf {
        PlaceOf { locker: self.locker, place }
    }

    /// Runs a call that reports to the witness what it has done.
    async fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        timeout: Duration,
        run: impl Fn(&MemoryStore, &dyn Fn(Ran<'_>)) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let fault = match ((self.plan)(operation), operation) {
            (Fault::Hung, Operation::Acquire | Operation::Release) => Fault::Lost,
            (fault, _) => fault,
        };
        let witness = self.witness.clone().map(|witness| (witness.sent(operation, fault), witness));
        let run = move |store: &MemoryStore| {
            run(store, &|ran| {
                if let Some((call, witness)) = &witness {
                    witness.ran(*call, ran);
                }
            })
        };
        call_within(fault, &self.store, timeout, timeout * self.lives, run, MemoryStore::forget).await
    }
}

/// Runs a call to a store of any kind with a fault. The server refuses to run it after `life`.
pub(super) async fn call_within<S: Send + Sync + 'static, T: Send + 'static>(
    fault: Fault,
    store: &Arc<S>,
    timeout: Duration,
    life: Duration,
    run: impl Fn(&S) -> T + Send + 'static,
    forget: impl Fn(&S),
) -> Result<T, Error> {
    let store = store.clone();
    let until = Instant::now() + life;
    match fault {
        Fault::None => Ok(run(&store)),
        Fault::Refused => Err(Error::timeout()),
        Fault::NotSent => {
            Err(RedisError::new(RedisErrorKind::Timeout, format!("there is no connection{NOT_SENT}")).into())
        }
        Fault::AnswerLost => {
            run(&store);
            Err(Error::timeout())
        }
        Fault::Hung => std::future::pending().await,
        Fault::Lost => {
            sleep(timeout).await;
            Err(Error::timeout())
        }
        Fault::AnsweredAfter(delay) => {
            let answer = run(&store);
            tokio::time::timeout(timeout, sleep(delay)).await.map_err(|_| Error::timeout())?;
            Ok(answer)
        }
        Fault::RunAfter(delay) => {
            let later = tokio::spawn(async move {
                sleep(delay).await;
                (Instant::now() <= until).then(|| run(&store))
            });
            let answer = tokio::time::timeout(timeout, later).await.map_err(|_| Error::timeout())?;
            answer.expect("it doesn't panic").ok_or_else(Error::timeout)
        }
        Fault::Doubled(delay) => {
            let answer = run(&store);
            tokio::spawn(async move {
                sleep(delay).await;
                if Instant::now() <= until {
                    run(&store);
                }
            });
            Ok(answer)
        }
        Fault::Twice(delay) => {
            run(&store);
            let later = tokio::spawn(async move {
                sleep(delay).await;
                (Instant::now() <= until).then(|| run(&store))
            });
            let answer = tokio::time::timeout(timeout, later).await.map_err(|_| Error::timeout())?;
            answer.expect("it doesn't panic").ok_or_else(Error::timeout)
        }
        Fault::Forgotten => {
            forget(&store);
            Ok(run(&store))
        }
    }
}

impl Store for FaultyStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities { has_line_of_lockers: true, ..self.store.capabilities() }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired> {
        let whose = PlaceOf::of(wanted, in_line, self.locker);
        let wanted = wanted.clone();
        wanted.latest.extend(self.latest(timeout));
        Box::pin(self.call(Operation::Acquire, timeout, move |store, ran| {
            let acquired = store.acquire_now(&wanted, whose);
            ran(Ran::Acquire(&wanted, &acquired));
            acquired
        }))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Renew, timeout, move |store, ran| {
            let renewed = store.renew_now(&owned, ttl, how);
            ran(Ran::Renew(&owned, ttl, how, &renewed));
            renewed
        }))
    }

    /// They share a call, and what becomes of it.
    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], timeout: Duration) -> Answers<'a, Verdict> {
        let owned: Vec<_> = locks.iter().map(|&(owned, ttl)| (owned.clone(), ttl)).collect();
        let call = self.call(Operation::Renew, timeout, move |store, ran| -> Vec<_> {
            let renew = |(owned, ttl): &(Owned, Duration)| {
                let renewed = store.renew_now(owned, *ttl, Extending::AtLeast);
                ran(Ran::Renew(owned, *ttl, Extending::AtLeast, &renewed));
                renewed
            };
            owned.iter().map(renew).collect()
        });
        Box::pin(async {
            match call.await {
                Ok(answers) => answers.into_iter().map(Ok).collect(),
                Err(error) => locks.iter().map(|_| Err(error.clone())).collect(),
            }
        })
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Release, timeout, move |store, ran| {
            let released = store.release_now(&owned, ending);
            ran(Ran::Release(&owned, ending, &released));
            released
        }))
    }

    fn linger<'a>(
        &'a self,
        owned: &'a Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Answer<'a, Verdict> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Release, timeout, move |store, ran| {
            let released = store.linger_now(&owned, ending, rest);
            ran(Ran::Linger(&owned, ending, rest, &released));
            released
        }))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
        let (owned, copy) = (owned.clone(), Latest::default());
        copy.extend(latest.get());
        Box::pin(self.call(Operation::Release, timeout, move |store, ran| {
            let undone = store.undo_now(&owned, &copy);
            ran(Ran::Undo(&owned, &undone));
            undone
        }))
    }

    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        timeout: Duration,
    ) -> Answer<'a, HandedOver> {
        let (from, to, next, locker) = (from.clone(), to.clone(), *next, self.locker);
        to.latest.extend(self.latest(timeout));
        Box::pin(self.call(Operation::Release, timeout, move |store, ran| {
            let handed_over = store.hand_over_now(&from, ending, &to, &next, locker);
            ran(Ran::HandOver(&from, ending, &to, &handed_over));
            handed_over
        }))
    }

    fn downgrade<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Downgraded> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Downgrade, timeout, move |store, ran| {
            let downgraded = store.downgrade_now(&owned);
            ran(Ran::Downgrade(&owned, &downgraded));
            downgraded
        }))
    }

    fn enter<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        let (key, whose) = (key.clone(), self.place(place));
        Box::pin(self.call(Operation::Line, timeout, move |store, _| store.enter_now(&key, whose)))
    }

    fn heartbeat<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, bool> {
        let (key, whose) = (key.clone(), self.place(place));
        Box::pin(self.call(Operation::Line, timeout, move |store, _| store.heartbeat_now(&key, whose)))
    }

    fn leave<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        let (key, whose) = (key.clone(), self.place(place));
        Box::pin(self.call(Operation::Line, timeout, move |store, _| store.leave_now(&key, whose)))
    }

    fn subscribe(&self, key: &Key) -> Subscription {
        let subscription = self.store.subscribe_now(key);
        match &self.witness {
            Some(witness) => witness.subscribes(subscription),
            None => subscription,
        }
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Read, timeout, move |store, _| store.remaining_now(&owned)))
    }

    fn find_keys<'a>(&'a self, prefix: &'a [u8], timeout: Duration) -> Answer<'a, BTreeSet<Key>> {
        self.store.find_keys(prefix, timeout)
    }

    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, timeout: Duration) -> Answer<'a, Verdict> {
        let (key, whose) = (key.clone(), whose.clone());
        Box::pin(self.call(Operation::Release, timeout, move |store, _| store.force_release_now(&key, &whose)))
    }

    fn holders<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Vec<Holder>> {
        let key = key.clone();
        Box::pin(self.call(Operation::Read, timeout, move |store, _| store.holders_now(&key)))
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        let key = key.clone();
        Box::pin(self.call(Operation::Read, timeout, move |store, _| store.inspect_now(&key)))
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").finish_non_exhaustive()
    }
}
