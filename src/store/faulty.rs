//! For tests: a store whose calls go wrong as they are told to.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::listen::Listening;
use super::memory::MemoryStore;
use super::{
    Acquired, Answer, Each, Ending, Extending, HandedOver, Holder, Latest, Released, Renewed, Store, Together, Undone,
    Wanted,
};
use crate::hold::Owned;
use crate::{Error, Key};

/// What happens to one call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Nothing: it is run and answered.
    None,
    /// It fails at once, and is never run.
    Refused,
    /// It is never answered, nor given up on, nor run.
    Hung,
    /// It is run at once, and its answer is lost with the connection.
    AnswerLost,
    /// It is run at once, and its answer takes so long. Whoever gives up earlier never learns it.
    AnsweredAfter(Duration),
    /// It arrives so much later, whether anybody still waits for it or not, and is answered then. After its timeout the server
    /// refuses to run it.
    RunAfter(Duration),
    /// It arrives twice: at once, and so much later.
    Doubled(Duration),
    /// Before it is run, the server forgets everything.
    Forgotten,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Acquire,
    Renew,
    Release,
}

/// The embedded store, behind a line that does what `plan` says to each call.
pub(crate) struct FaultyStore {
    store: Arc<MemoryStore>,
    plan: Box<dyn Fn(Operation) -> Fault + Send + Sync>,
}

impl FaultyStore {
    pub(crate) fn new(store: Arc<MemoryStore>, plan: impl Fn(Operation) -> Fault + Send + Sync + 'static) -> Self {
        Self { store, plan: Box::new(plan) }
    }

    async fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        timeout: Duration,
        run: impl Fn(&MemoryStore) -> T + Send + 'static,
    ) -> Result<T, Error> {
        call((self.plan)(operation), &self.store, timeout, run, MemoryStore::forget).await
    }
}

/// One call to a store, of whatever kind, that goes wrong as told.
pub(super) async fn call<S: Send + Sync + 'static, T: Send + 'static>(
    fault: Fault,
    store: &Arc<S>,
    timeout: Duration,
    run: impl Fn(&S) -> T + Send + 'static,
    forget: impl Fn(&S),
) -> Result<T, Error> {
    let store = store.clone();
    let until = Instant::now() + timeout;
    match fault {
        Fault::None => Ok(run(&store)),
        Fault::Refused => Err(Error::timeout()),
        Fault::AnswerLost => {
            run(&store);
            Err(Error::timeout())
        }
        Fault::Hung => std::future::pending().await,
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
        Fault::Forgotten => {
            forget(&store);
            Ok(run(&store))
        }
    }
}

impl Store for FaultyStore {
    fn acquire<'a>(&'a self, wanted: &'a Wanted, timeout: Duration) -> Answer<'a, Acquired> {
        let wanted = wanted.clone();
        wanted.latest.extend(self.store.millis(Instant::now() + timeout));
        Box::pin(self.call(Operation::Acquire, timeout, move |store| store.acquire_now(&wanted)))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Renewed> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Renew, timeout, move |store| store.renew_now(&owned, ttl, how)))
    }

    fn together(&self) -> Option<&dyn Together> {
        Some(self)
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Released> {
        let owned = owned.clone();
        Box::pin(self.call(Operation::Release, timeout, move |store| store.release_now(&owned, ending)))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
        let (owned, copy) = (owned.clone(), Latest::default());
        copy.extend(latest.get());
        Box::pin(self.call(Operation::Release, timeout, move |store| store.undo_now(&owned, &copy)))
    }

    fn hands_over(&self) -> bool {
        true
    }

    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        timeout: Duration,
    ) -> Answer<'a, HandedOver> {
        let (from, to) = (from.clone(), to.clone());
        to.latest.extend(self.store.millis(Instant::now() + timeout));
        Box::pin(self.call(Operation::Release, timeout, move |store| store.hand_over_now(&from, ending, &to)))
    }

    fn listen(&self, key: &Key) -> Listening {
        self.store.listen_now(key)
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        self.store.remaining(owned, timeout)
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        self.store.inspect(key, timeout)
    }
}

impl Together for FaultyStore {
    /// They share a call, and what becomes of it.
    fn renew_all<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], timeout: Duration) -> Each<'a, Renewed> {
        let owned: Vec<_> = locks.iter().map(|&(owned, ttl)| (owned.clone(), ttl)).collect();
        let call = self.call(Operation::Renew, timeout, move |store| -> Vec<_> {
            owned.iter().map(|(owned, ttl)| store.renew_now(owned, *ttl, Extending::AtLeast)).collect()
        });
        Box::pin(async {
            match call.await {
                Ok(answers) => answers.into_iter().map(Ok).collect(),
                Err(error) => locks.iter().map(|_| Err(error.clone())).collect(),
            }
        })
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").finish_non_exhaustive()
    }
}
