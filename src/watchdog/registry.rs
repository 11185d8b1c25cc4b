//! Which locks are watched, and what becomes of each.
//!
//! 1. A lock is entered under all its keys or none, and stays so until its last event has been put out, in the same step:
//!    so the events of one key come in order, whoever watches it next.
//! 2. Whoever ends the watching first takes the guard out of the entry, and alone says how it ended.
//! 3. Nothing is dropped under the mutex that runs code of others: guards, tasks and reservations are handed out first.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::WatchStatus;
use super::events::WatchEvent;
use super::outbox::{Id, Outbox};
use crate::hold::{Observer, Owned};
use crate::schedule::{self, Renewal};
use crate::{Error, Key, Lease, LockGuard, Locker, Loss};

/// How many locks are released at a time.
const RELEASES_AT_ONCE: usize = 128;

pub(super) struct Registry {
    locker: Locker,
    /// Of leases that set none.
    pub(super) renewal: Renewal,
    pub(super) outbox: Arc<Outbox>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ids: HashMap<Key, Id>,
    entries: HashMap<Id, Entry>,
    /// How many of the entries are only reserved.
    reserved: usize,
    next: Id,
    closed: bool,
}

struct Entry {
    owned: Owned,
    /// Came as a lease: not released unless somebody asks for it.
    leased: bool,
    keeping: Keeping,
    renewals: u64,
    last_error: Option<Arc<Error>>,
}

enum Keeping {
    /// A lease that is about to be taken up. Nobody sees it but who would use one of its keys too.
    Reserved,
    /// A task waits for the lock. It is entered a moment later than it starts.
    Obtaining(Option<AbortOnDropHandle<()>>),
    /// The guard's keeper renews it.
    Held(LockGuard),
    /// Somebody has taken out what was here and is about to say how it ended.
    Ending,
}

/// How the watching of a lock ends.
enum End {
    Lost(Loss),
    Released,
    Stopped(Option<Arc<Error>>),
}

impl Registry {
    pub(super) fn new(locker: Locker, renewal: Renewal, outbox: Outbox) -> Self {
        Self { locker, renewal, outbox: Arc::new(outbox), state: Mutex::default() }
    }

    pub(super) fn watch(self: &Arc<Self>, guard: LockGuard) -> Result<(), Error> {
        let hold = guard.hold();
        let refused = self.change(|state| {
            if let Err(error) = state.admits(&hold.owned) {
                let shared = state.shares(&hold.owned);
                return Err((error, guard, shared));
            }
            let watcher = self.watcher(state.next);
            if let Err(loss) = hold.observe(watcher) {
                return Err((Error::NotHeld { key: hold.owned.key(), loss }, guard, false));
            }
            state.enter(hold.owned.clone(), false, Keeping::Held(guard));
            Ok(())
        });
        refused.map_err(|(error, guard, shared)| {
            if shared {
                // By the same token the one that is watched holds the lock, and would lose it.
                drop(guard.into_lease());
            }
            error
        })
    }

    pub(super) async fn watch_lease(
        self: &Arc<Self>,
        lease: Lease,
        renewal: Renewal,
        obtain_when_free: bool,
    ) -> Result<(), Error> {
        let reservation = self.reserve(&lease)?;
        let id = reservation.id;
        let failed = match self.locker.adopt_and_renew(&lease, renewal).await {
            Ok(guard) => return self.take_up(id, guard, obtain_when_free),
            Err(error) => error,
        };
        if !(obtain_when_free && may_pass(&failed)) {
            return Err(failed);
        }
        let runtime = self.locker.upkeep().runtime()?;
        self.change(|state| {
            let Some(entry) = state.entries.get_mut(&id).filter(|_| !state.closed) else { return Err(Error::Closed) };
            entry.keeping = Keeping::Obtaining(None);
            state.reserved -= 1;
            Ok(())
        })?;
        // Not under the mutex: a runtime that is gone drops the task, and the reservation with it, on the spot.
        let task = AbortOnDropHandle::new(runtime.spawn(reservation.obtain(lease, renewal, failed)));
        let late = self.change(|state| match state.entries.get_mut(&id) {
            Some(Entry { keeping: Keeping::Obtaining(entered), .. }) => entered.replace(task),
            // It has obtained the lock already, or nobody wants it any more.
            _ => Some(task),
        });
        drop(late);
        Ok(())
    }

    pub(super) fn unwatch(&self, key: &Key) -> Option<Lease> {
        let id = self.find(key)?;
        let (lease, end) = match self.take_out(id)? {
            Keeping::Held(guard) => let_be(guard),
            task => {
                drop(task);
                (None, End::Stopped(None))
            }
        };
        self.finish(id, end);
        lease
    }

    pub(super) async fn release(self: &Arc<Self>, key: &Key) -> Result<(), Error> {
        let not_watched = || Error::NotHeld { key: key.clone(), loss: Loss::Released };
        let id = self.find(key).ok_or_else(not_watched)?;
        self.release_entry(id).await.unwrap_or_else(|| Err(not_watched()))
    }

    pub(super) async fn release_all(self: &Arc<Self>) -> Vec<(Key, Error)> {
        let all = self.ids();
        let mut failed = Vec::new();
        let Ok(runtime) = self.locker.upkeep().runtime() else {
            return all.into_iter().map(|(_, key)| (key, Error::NoRuntime)).collect();
        };
        let mut releases = JoinSet::new();
        for (id, key) in all {
            if releases.len() == RELEASES_AT_ONCE {
                failed.extend(releases.join_next().await.and_then(Result::ok).flatten());
            }
            let registry = self.clone();
            let release = async move {
                // One that has ended meanwhile has said how.
                let released = registry.release_entry(id).await.unwrap_or(Ok(()));
                released.err().map(|error| (key, error))
            };
            releases.spawn_on(release, &runtime);
        }
        while let Some(released) = releases.join_next().await {
            failed.extend(released.ok().flatten());
        }
        failed
    }

    /// Refuses all that is new, ends the waiting, and lets all locks be.
    pub(super) async fn shut_down(&self) -> Vec<Lease> {
        self.change(|state| state.closed = true);
        let mut tasks = Vec::new();
        for (id, _) in self.ids() {
            if let Some(Keeping::Obtaining(task)) =
                self.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_)))
            {
                self.finish(id, End::Stopped(None));
                tasks.extend(task);
            }
        }
        for task in tasks {
            task.abort();
            // Cancelled, if it hasn't ended by itself.
            drop(task.await);
        }
        // Only now, so that no lease is lost with this future.
        let mut leases = Vec::new();
        for (id, _) in self.ids() {
            if let Some(Keeping::Held(guard)) = self.take_out(id) {
                let (lease, end) = let_be(guard);
                self.finish(id, end);
                leases.extend(lease);
            }
        }
        leases
    }

    /// Nobody is left to ask for anything: what came as a guard is released in the background, as guards are.
    pub(super) fn stop(&self) {
        self.change(|state| state.closed = true);
        for (id, _) in self.ids() {
            let leased = self.state().entries.get(&id).is_some_and(|entry| entry.leased);
            let end = match self.take_out(id) {
                Some(Keeping::Held(guard)) if leased => let_be(guard).1,
                Some(Keeping::Held(guard)) => match guard.hold().end(Loss::Released) {
                    Loss::Released => End::Released,
                    loss => End::Lost(loss),
                },
                Some(Keeping::Obtaining(_)) => End::Stopped(None),
                _ => continue,
            };
            self.finish(id, end);
        }
    }

    pub(super) fn len(&self) -> usize {
        let state = self.state();
        state.entries.len() - state.reserved
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.find(key).is_some()
    }

    pub(super) fn status(&self, key: &Key) -> Option<WatchStatus> {
        let (mut status, hold) = {
            let state = self.state();
            let entry = state.visible(key)?;
            let hold = match &entry.keeping {
                Keeping::Held(guard) => Some(guard.hold()),
                _ => None,
            };
            let (renewals, last_error) = (entry.renewals, entry.last_error.clone());
            (WatchStatus { held: false, deadline: None, renewals, last_error }, hold)
        };
        // Not under the mutex: the first to find a lock expired tells all others.
        if let Some(hold) = hold {
            status.held = hold.check().is_ok();
            status.deadline = Some(hold.deadline());
        }
        Some(status)
    }

    /// What is written, under the mutex, and then told, outside.
    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let outcome = act(&mut self.state());
        self.outbox.deliver();
        outcome
    }

    fn reserve(self: &Arc<Self>, lease: &Lease) -> Result<Reservation, Error> {
        let id = self.change(|state| {
            state.admits(lease.owned())?;
            state.reserved += 1;
            Ok::<_, Error>(state.enter(lease.owned().clone(), true, Keeping::Reserved))
        })?;
        Ok(Reservation { registry: self.clone(), id })
    }

    /// The lock of a lease is held: from here on it is watched.
    fn take_up(self: &Arc<Self>, id: Id, guard: LockGuard, tell: bool) -> Result<(), Error> {
        let hold = guard.hold();
        let (key, fencing_token) = (hold.owned.key(), hold.fencing_token);
        let taken = self.change(|state| {
            let closed = state.closed;
            let wanted = state.entries.get_mut(&id).filter(|_| !closed);
            let Some(entry @ Entry { keeping: Keeping::Reserved | Keeping::Obtaining(_), .. }) = wanted else {
                return Err((Error::Closed, guard));
            };
            if let Err(loss) = hold.observe(self.watcher(id)) {
                return Err((Error::NotHeld { key, loss }, guard));
            }
            let before = std::mem::replace(&mut entry.keeping, Keeping::Held(guard));
            if let Keeping::Reserved = before {
                state.reserved -= 1;
            }
            if tell {
                self.outbox.put(id, WatchEvent::Obtained { key, fencing_token });
            }
            Ok(before)
        });
        match taken {
            Ok(before) => {
                detach(before);
                Ok(())
            }
            Err((error, guard)) => {
                // It is a lease's.
                drop(let_be(guard));
                Err(error)
            }
        }
    }

    async fn release_entry(self: &Arc<Self>, id: Id) -> Option<Result<(), Error>> {
        let keeping = self.take_out(id)?;
        // Released it is, whatever becomes of this future: dropped, it leaves that to the background.
        let mut ending = Ending { registry: self, id, end: Some(End::Released) };
        let released = match keeping {
            Keeping::Held(guard) => guard.release().await,
            Keeping::Obtaining(task) => {
                if let Some(task) = task {
                    task.abort();
                    drop(task.await);
                }
                self.release_what_was_tried(id).await
            }
            Keeping::Reserved | Keeping::Ending => Ok(()),
        };
        if let Err(Error::NotHeld { loss, .. }) = released {
            ending.end = Some(End::Lost(loss));
        }
        Some(released)
    }

    /// An attempt may have left the lock at the server, and nobody has learned of it.
    async fn release_what_was_tried(&self, id: Id) -> Result<(), Error> {
        let owned = self.state().entries.get(&id).map(|entry| entry.owned.clone());
        let Some(owned) = owned else { return Ok(()) };
        let upkeep = self.locker.upkeep();
        upkeep.release(&owned, Instant::now() + upkeep.command_timeout).await.map(drop)
    }

    /// Whoever gets something out of it has to [`finish`](Registry::finish) the entry (invariant 2).
    fn take_out(&self, id: Id) -> Option<Keeping> {
        self.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_) | Keeping::Held(_)))
    }

    fn take_out_if(&self, id: Id, wanted: impl FnOnce(&Keeping) -> bool) -> Option<Keeping> {
        let mut state = self.state();
        let keeping = &mut state.entries.get_mut(&id)?.keeping;
        wanted(keeping).then(|| std::mem::replace(keeping, Keeping::Ending))
    }

    /// The last event and the removal are one step (invariant 1).
    fn finish(&self, id: Id, end: End) {
        let entry = self.change(|state| {
            let entry = state.remove(id)?;
            let key = entry.owned.key();
            let event = match end {
                End::Lost(loss) => WatchEvent::Lost { key, loss },
                End::Released => WatchEvent::Released { key },
                End::Stopped(reason) => WatchEvent::Stopped { key, reason },
            };
            self.outbox.put(id, event);
            Some(entry)
        });
        drop(entry);
    }

    /// What the keeper says, unless somebody else ends the watching at this moment.
    fn lost(&self, id: Id, loss: Loss) {
        let guard = self.take_out_if(id, |keeping| matches!(keeping, Keeping::Held(_)));
        if guard.is_some() {
            self.finish(id, End::Lost(loss));
        }
    }

    fn watcher(self: &Arc<Self>, id: Id) -> Arc<Watcher> {
        Arc::new(Watcher { registry: Arc::downgrade(self), id })
    }

    fn find(&self, key: &Key) -> Option<Id> {
        let state = self.state();
        state.visible(key)?;
        state.ids.get(key).copied()
    }

    /// All that are watched, by the first of their keys.
    fn ids(&self) -> Vec<(Id, Key)> {
        let state = self.state();
        let visible = state.entries.iter().filter(|(_, entry)| !matches!(entry.keeping, Keeping::Reserved));
        visible.map(|(&id, entry)| (id, entry.owned.key())).collect()
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn admits(&self, owned: &Owned) -> Result<(), Error> {
        if self.closed {
            return Err(Error::Closed);
        }
        match owned.keys.iter().find(|&key| self.ids.contains_key(key)) {
            Some(key) => Err(Error::AlreadyWatched { key: key.clone() }),
            None => Ok(()),
        }
    }

    /// Whether a lock that is watched holds one of the keys by the very same token.
    fn shares(&self, owned: &Owned) -> bool {
        let entries = owned.keys.iter().filter_map(|key| self.entries.get(self.ids.get(key)?));
        entries.into_iter().any(|entry| entry.owned.token == owned.token)
    }

    fn enter(&mut self, owned: Owned, leased: bool, keeping: Keeping) -> Id {
        let id = self.next;
        self.next += 1;
        self.ids.extend(owned.keys.iter().map(|key| (key.clone(), id)));
        self.entries.insert(id, Entry { owned, leased, keeping, renewals: 0, last_error: None });
        id
    }

    fn remove(&mut self, id: Id) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        for key in &entry.owned.keys {
            self.ids.remove(key);
        }
        Some(entry)
    }

    fn visible(&self, key: &Key) -> Option<&Entry> {
        let entry = self.entries.get(self.ids.get(key)?)?;
        (!matches!(entry.keeping, Keeping::Reserved)).then_some(entry)
    }
}

/// Stops the renewal and keeps the lock, if it is still held.
fn let_be(guard: LockGuard) -> (Option<Lease>, End) {
    match guard.into_held_lease() {
        Ok(lease) => (Some(lease), End::Stopped(None)),
        Err(loss) => (None, End::Lost(loss)),
    }
}

/// Whether waiting may help against it.
fn may_pass(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::NotHeld { .. } | Error::ValidityExpired)
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = self.state().closed;
        f.debug_struct("Registry").field("len", &self.len()).field("closed", &closed).finish_non_exhaustive()
    }
}

/// What a keeper tells of the lock with this id.
struct Watcher {
    /// Not owned: the registry owns the guard, that owns the hold, that owns this.
    registry: Weak<Registry>,
    id: Id,
}

impl Watcher {
    /// Only as long as the lock is held here: what comes after somebody has ended the watching is no news.
    fn tell(&self, event: impl FnOnce(&mut Entry) -> WatchEvent) {
        let Some(registry) = self.registry.upgrade() else { return };
        registry.change(|state| {
            let Some(entry) = state.entries.get_mut(&self.id) else { return };
            if let Keeping::Held(_) = entry.keeping {
                registry.outbox.put(self.id, event(entry));
            }
        });
    }
}

impl Observer for Watcher {
    fn renewed(&self, deadline: Instant) {
        self.tell(|entry| {
            entry.renewals += 1;
            entry.last_error = None;
            WatchEvent::Renewed { key: entry.owned.key(), count: 1, deadline }
        });
    }

    fn renewal_failed(&self, error: Error, remaining: Duration) {
        let error = Arc::new(error);
        self.tell(|entry| {
            entry.last_error = Some(error.clone());
            WatchEvent::RenewFailed { key: entry.owned.key(), count: 1, error, remaining }
        });
    }

    fn lost(&self, loss: Loss) {
        if let Some(registry) = self.registry.upgrade() {
            registry.lost(self.id, loss);
        }
    }
}

/// Finishes an entry whose guard was taken out, whatever becomes of the future that does it.
struct Ending<'a> {
    registry: &'a Registry,
    id: Id,
    end: Option<End>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.registry.finish(self.id, end);
        }
    }
}

/// The entry of a lease whose lock is not held yet. Dropped before it is, nothing stays entered.
struct Reservation {
    registry: Arc<Registry>,
    id: Id,
}

impl Reservation {
    /// Waits for the lock, for as long as waiting may help.
    async fn obtain(self, lease: Lease, renewal: Renewal, mut failed: Error) {
        let locker = &self.registry.locker;
        let mut attempts = 0;
        let given_up = loop {
            let attempt = match &failed {
                Error::NotHeld { .. } => {
                    let request = locker.lock_all(lease.keys().to_vec()).token(lease.token().clone());
                    request.ttl(lease.ttl()).renewal(renewal).await
                }
                passing if may_pass(passing) => {
                    // It may well be held: a renewal, other than an attempt, leaves its metadata as it is.
                    attempts += 1;
                    sleep(schedule::poll_after(attempts, None, fastrand::f64())).await;
                    locker.adopt_and_renew(&lease, renewal).await
                }
                _ => break failed,
            };
            // Lost again before it could be taken up, it is waited for again.
            match attempt.and_then(|guard| self.registry.take_up(self.id, guard, true)) {
                Ok(()) => return,
                Err(error) => failed = error,
            }
        };
        self.give_up(given_up);
    }

    fn give_up(&self, reason: Error) {
        // Whoever no longer wants the lock has taken the task out.
        let task = self.registry.take_out_if(self.id, |keeping| matches!(keeping, Keeping::Obtaining(_)));
        if let Some(task) = task {
            detach(task);
            self.registry.finish(self.id, End::Stopped(Some(Arc::new(reason))));
        }
    }
}

/// The task is the one that says so, and ends by itself.
fn detach(keeping: Keeping) {
    if let Keeping::Obtaining(Some(task)) = keeping {
        drop(task.detach());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let unused = self.registry.change(|state| {
            let entry = state.entries.get(&self.id)?;
            let unused = matches!(entry.keeping, Keeping::Reserved);
            unused.then(|| {
                state.reserved -= 1;
                state.remove(self.id)
            })
        });
        drop(unused);
        // The task was dropped with its runtime.
        self.give_up(Error::NoRuntime);
    }
}
