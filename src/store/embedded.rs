//! The embedded store as a server that several lockers share, and that tests take away from them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::memory::{MemoryStore, PlaceOf, in_turn};
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Answers, Capabilities, Downgraded, Ending, Extending, HandedOver, Holder, InLine, Latest,
    LinePlace, Next, Store, Undone, Verdict, Wanted, Whose,
};
use crate::hold::Owned;
use crate::{Error, Key};

/// The server.
#[derive(Debug)]
pub(crate) struct Embedded {
    pub(crate) store: MemoryStore,
    is_away: watch::Sender<bool>,
}

/// A locker's connection to it.
#[derive(Debug)]
pub(crate) struct EmbeddedStore {
    server: Arc<Embedded>,
    /// What the server tells its lockers apart by.
    locker: u64,
}

impl Default for Embedded {
    fn default() -> Self {
        Self { store: MemoryStore::new(), is_away: watch::Sender::new(false) }
    }
}

impl Embedded {
    pub(crate) fn set_away(&self, is_away: bool) {
        self.is_away.send_replace(is_away);
    }

    /// Waits for the server. An operation that has waited in vain never runs.
    async fn present(&self, limit: Duration) -> Result<(), Error> {
        if !*self.is_away.borrow() {
            return Ok(());
        }
        let mut is_away = self.is_away.subscribe();
        match timeout(limit, is_away.wait_for(|is_away| !is_away)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::timeout()),
        }
    }
}

impl EmbeddedStore {
    pub(crate) fn new(server: Arc<Embedded>) -> Self {
        let locker = server.store.new_locker();
        Self { server, locker }
    }

    /// Returns what one of this locker's places is at the server.
    fn place(&self, place: LinePlace) -> PlaceOf {
        PlaceOf { locker: self.locker, place }
    }

    fn call<'a, T>(
        &'a self,
        limit: Duration,
        call: impl FnOnce(&'a MemoryStore) -> Answer<'a, T> + Send + 'a,
    ) -> Answer<'a, T> {
        Box::pin(async move {
            self.server.present(limit).await?;
            call(&self.server.store).await
        })
    }
}

impl Store for EmbeddedStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities { has_line_of_lockers: true, ..self.server.store.capabilities() }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, limit: Duration) -> Answer<'a, Acquired> {
        let whose = PlaceOf::of(wanted, in_line, self.locker);
        self.call(limit, move |store| in_turn(move || store.acquire_now(wanted, whose)))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, limit: Duration) -> Answer<'a, Verdict> {
        self.call(limit, move |store| store.renew(owned, ttl, how, limit))
    }

    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], limit: Duration) -> Answers<'a, Verdict> {
        Box::pin(async move {
            match self.server.present(limit).await {
                Ok(()) => self.server.store.renew_batch(locks, limit).await,
                Err(error) => locks.iter().map(|_| Err(error.clone())).collect(),
            }
        })
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, limit: Duration) -> Answer<'a, Verdict> {
        self.call(limit, move |store| store.release(owned, ending, limit))
    }

    fn linger<'a>(&'a self, owned: &'a Owned, ending: Ending, rest: Duration, limit: Duration) -> Answer<'a, Verdict> {
        self.call(limit, move |store| store.linger(owned, ending, rest, limit))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, limit: Duration) -> Answer<'a, Undone> {
        self.call(limit, move |store| store.undo(owned, latest, limit))
    }

    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        limit: Duration,
    ) -> Answer<'a, HandedOver> {
        let locker = self.locker;
        self.call(limit, move |store| in_turn(move || store.hand_over_now(from, ending, to, next, locker)))
    }

    fn downgrade<'a>(&'a self, owned: &'a Owned, limit: Duration) -> Answer<'a, Downgraded> {
        self.call(limit, move |store| store.downgrade(owned, limit))
    }

    fn enter<'a>(&'a self, key: &'a Key, place: LinePlace, limit: Duration) -> Answer<'a, ()> {
        let whose = self.place(place);
        self.call(limit, move |store| in_turn(move || store.enter_now(key, whose)))
    }

    fn heartbeat<'a>(&'a self, key: &'a Key, place: LinePlace, limit: Duration) -> Answer<'a, bool> {
        let whose = self.place(place);
        self.call(limit, move |store| in_turn(move || store.heartbeat_now(key, whose)))
    }

    fn leave<'a>(&'a self, key: &'a Key, place: LinePlace, limit: Duration) -> Answer<'a, ()> {
        let whose = self.place(place);
        self.call(limit, move |store| in_turn(move || store.leave_now(key, whose)))
    }

    fn subscribe(&self, key: &Key) -> Subscription {
        self.server.store.subscribe(key)
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, limit: Duration) -> Answer<'a, Option<Duration>> {
        self.call(limit, move |store| store.remaining(owned, limit))
    }

    fn find_keys<'a>(&'a self, prefix: &'a [u8], limit: Duration) -> Answer<'a, BTreeSet<Key>> {
        self.call(limit, move |store| store.find_keys(prefix, limit))
    }

    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, limit: Duration) -> Answer<'a, Verdict> {
        self.call(limit, move |store| store.force_release(key, whose, limit))
    }

    fn holders<'a>(&'a self, key: &'a Key, limit: Duration) -> Answer<'a, Vec<Holder>> {
        self.call(limit, move |store| store.holders(key, limit))
    }

    fn inspect<'a>(&'a self, key: &'a Key, limit: Duration) -> Answer<'a, Option<Holder>> {
        self.call(limit, move |store| store.inspect(key, limit))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use crate::testing::EmbeddedServer;
    use crate::{Error, Locker, Loss, Token};

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn lockers(server: &EmbeddedServer) -> (Locker, Locker) {
        let builder = || Locker::builder().command_timeout(ms(500)).ttl(ms(3_000));
        (builder().in_memory_with(server), builder().in_memory_with(server))
    }

    #[tokio::test(start_paused = true)]
    async fn lockers_on_one_server_exclude_each_other_and_waiters_are_notified() {
        let server = EmbeddedServer::new();
        let (here, there) = lockers(&server);
        let guard = here.lock("k").await.unwrap();
        assert!(matches!(there.try_lock("k").await, Err(Error::NotObtained { .. })));
        let waiter = tokio::spawn(there.lock("k").into_future());
        sleep(ms(10)).await;
        let released = Instant::now();
        guard.release().await.unwrap();
        drop(waiter.await.unwrap().unwrap());
        assert!(released.elapsed() < ms(10), "{:?}", released.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_while_it_is_away_runs_when_it_is_back_in_time_and_never_after() {
        let server = EmbeddedServer::new();
        let (here, _) = lockers(&server);
        server.go_away();
        let began = Instant::now();
        let refused = here.try_lock("late").await.unwrap_err();
        assert!(refused.is_transient() && began.elapsed() == ms(500), "{refused} after {:?}", began.elapsed());
        let in_time = tokio::spawn(here.try_lock("in time").into_future());
        sleep(ms(400)).await;
        server.come_back();
        let guard = in_time.await.unwrap().unwrap();
        sleep(ms(10_000)).await;
        assert_eq!(server.holder("late"), None);
        assert!(guard.is_held() && server.holder("in time").is_some_and(|holder| holder.token == *guard.token()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_guard_survives_a_short_absence_and_ends_by_its_deadline_in_a_long_one() {
        let server = EmbeddedServer::new();
        let (here, there) = lockers(&server);
        let guard = here.lock("k").await.unwrap();
        server.go_away();
        sleep(ms(1_500)).await;
        server.come_back();
        sleep(ms(6_000)).await;
        assert!(guard.is_held());
        server.go_away();
        let (lost, waiter) = (guard.lost(), tokio::spawn(there.lock("k").into_future()));
        let deadline = guard.deadline();
        assert_eq!(lost.await, Loss::Expired);
        assert!(Instant::now() >= deadline && Instant::now() < deadline + ms(5));
        server.come_back();
        waiter.await.unwrap().unwrap().release().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_lost_or_given_to_another_is_noticed_at_the_next_renewal() {
        let server = EmbeddedServer::new();
        let (here, there) = lockers(&server);
        let (lost, given) = (here.lock("lost").await.unwrap(), here.lock("given").await.unwrap());
        assert!(server.lose("lost") && !server.lose("lost"));
        server.give("given", Token::random(), ms(60_000));
        let began = Instant::now();
        assert_eq!((lost.lost().await, given.lost().await), (Loss::Missing, Loss::Taken));
        assert!(began.elapsed() <= ms(1_100), "{:?}", began.elapsed());
        // What it was given for has to pass.
        let next = there.lock("given").await.unwrap();
        assert!(began.elapsed() >= ms(60_000) && next.fencing_token() > given.fencing_token());
        server.lose_all();
        assert_eq!(server.holder("given"), None);
    }
}
