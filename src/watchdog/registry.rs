//! Which locks are watched, and what becomes of each.
//!
//! 1. A lock is entered under all its keys or none, and stays so until its last event has been put out, in the same
//!    step: so the events of one key come in order, whoever watches it next.
//! 2. Whoever ends the watching first takes the guard out of the entry, and alone says how it ended.
//! 3. Nothing is dropped under the mutex that runs code of others: guards, tasks and reservations are handed out first.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::WatchStatus;
use super::entries::{Entries, Keeping};
use super::events::WatchEvent;
use super::outbox::{Id, Outbox};
use super::watcher::Watcher;
use crate::hold::GrantId;
use crate::hold::Hold;
use crate::hold::timing::Renewal;
use crate::locker::shared::Shared;
use crate::store::Ending;
use crate::{Error, Key, Lease, LockGuard, Locker, Loss};

/// How many locks are released at a time.
const RELEASES_AT_ONCE: usize = 128;

pub(super) struct Registry {
    pub(super) locker: Locker,
    /// Of leases that set none.
    pub(super) renewal: Renewal,
    pub(super) outbox: Arc<Outbox>,
    entries: Mutex<Entries>,
}

/// How the watching of a lock ends.
pub(super) enum End {
    Lost(Loss, Option<Arc<Error>>),
    Released,
    Stopped(Option<Arc<Error>>),
}

impl End {
    fn lost(loss: Loss, hold: &Hold) -> Self {
        Self::Lost(loss, hold.cause_of(loss))
    }
}

impl Registry {
    pub(super) fn new(locker: Locker, renewal: Renewal, outbox: Outbox) -> Self {
        Self { locker, renewal, outbox: Arc::new(outbox), entries: Mutex::default() }
    }

    pub(super) fn watch(self: &Arc<Self>, guard: LockGuard) -> Result<(), Error> {
        self.outbox.call_back_here();
        let hold = guard.hold();
        let refused = self.change(|entries| {
            if let Err(error) = entries.admits(&hold.owned) {
                return Err((error, guard));
            }
            if let Err(loss) = hold.observe(self.watcher(entries.next())) {
                return Err((Error::NotHeld { key: hold.owned.key(), loss }, guard));
            }
            entries.enter(hold.owned.clone(), false, Keeping::Held(guard));
            Ok(())
        });
        // Not under the mutex. A lock that is watched by the same token stays.
        refused.map_err(|(error, guard)| {
            drop(guard);
            error
        })
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
        let all = self.watched();
        let mut failed = Vec::new();
        let Ok(runtime) = self.locker.shared().runtime() else {
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
        self.change(|entries| entries.closed = true);
        let mut tasks = Vec::new();
        for (id, _) in self.watched() {
            if let Some(Keeping::Obtaining(task)) =
                self.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_)))
            {
                self.finish(id, End::Stopped(None));
                tasks.extend(task);
            }
        }
        self.end(tasks).await;
        // Only now, so that no lease is lost with this future.
        let mut leases = Vec::new();
        for (id, _) in self.watched() {
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
        self.change(|entries| entries.closed = true);
        for (id, _) in self.watched() {
            let leased = self.entries().get(id).filter(|entry| entry.leased).map(|entry| entry.owned.grant);
            let end = match (self.take_out(id), leased) {
                (Some(Keeping::Held(guard)), Some(grant)) => self.return_to(guard, grant),
                (Some(Keeping::Held(guard)), None) => match guard.hold().end(Loss::Released) {
                    Loss::Released => End::Released,
                    loss => End::lost(loss, &guard.hold()),
                },
                (Some(Keeping::Obtaining(_)), _) => End::Stopped(None),
                _ => continue,
            };
            self.finish(id, end);
        }
    }

    /// Stops the renewal, and leaves the lock to the lease that the guard had it from.
    pub(super) fn return_to(&self, guard: LockGuard, lease: Option<GrantId>) -> End {
        let (owned, ttl) = (guard.hold().owned.clone(), guard.ttl());
        let (kept, end) = let_be(guard);
        if kept.is_some() {
            self.locker.shared().give_back(owned, lease, ttl);
        }
        end
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.find(key).is_some()
    }

    pub(super) fn status(&self, key: &Key) -> Option<WatchStatus> {
        let (mut status, hold) = {
            let entries = self.entries();
            let (_, entry) = entries.find(key)?;
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
    pub(super) fn change<T>(&self, act: impl FnOnce(&mut Entries) -> T) -> T {
        let outcome = act(&mut self.entries());
        self.outbox.deliver();
        outcome
    }

    async fn release_entry(self: &Arc<Self>, id: Id) -> Option<Result<(), Error>> {
        let keeping = self.take_out(id)?;
        let end = match keeping {
            // It was never reported as obtained, so it is not reported as released, either.
            Keeping::Obtaining(_) => End::Stopped(None),
            _ => End::Released,
        };
        // It ends so, whatever becomes of this future: dropped, it leaves the release to the background.
        let mut ending = Finishing { registry: self, id, end: Some(end) };
        let hold = match &keeping {
            Keeping::Held(guard) => Some(guard.hold()),
            _ => None,
        };
        let released = match keeping {
            Keeping::Held(guard) => guard.release().await,
            Keeping::Obtaining(task) => {
                self.end(task).await;
                self.release_what_was_tried(id).await
            }
            Keeping::Reserved | Keeping::Ending => Ok(()),
        };
        if let (Err(Error::NotHeld { loss, .. }), Some(hold)) = (&released, hold) {
            ending.end = Some(End::lost(*loss, &hold));
        }
        Some(released)
    }

    /// Cancels tasks that wait for a lock, and waits until they have ended. The wait is bounded: a runtime that nobody
    /// drives never ends its tasks, but it does not run them either.
    async fn end(&self, tasks: impl IntoIterator<Item = AbortOnDropHandle<()>>) {
        let mut tasks: Vec<_> = tasks.into_iter().collect();
        tasks.iter().for_each(AbortOnDropHandle::abort);
        let gone = async {
            for task in &mut tasks {
                // Cancelled, if it hasn't ended by itself.
                drop(task.await);
            }
        };
        // Outside a runtime nobody can wait; the tasks are cancelled all the same.
        if Shared::check_runtime().is_ok() {
            drop(timeout(self.locker.shared().command_timeout, gone).await);
        }
    }

    /// An attempt may have left the lock at the server, and nobody has learned of it.
    async fn release_what_was_tried(&self, id: Id) -> Result<(), Error> {
        let owned = self.entries().get(id).map(|entry| entry.owned.clone());
        let Some(owned) = owned else { return Ok(()) };
        let shared = self.locker.shared();
        shared.release(&owned, Ending::Lock, Instant::now() + shared.command_timeout).await.map(drop)
    }

    /// Whoever gets something out of it has to [`finish`](Registry::finish) the entry (invariant 2).
    fn take_out(&self, id: Id) -> Option<Keeping> {
        self.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_) | Keeping::Held(_)))
    }

    pub(super) fn take_out_if(&self, id: Id, wanted: impl FnOnce(&Keeping) -> bool) -> Option<Keeping> {
        let mut entries = self.entries();
        if !wanted(&entries.get(id)?.keeping) {
            return None;
        }
        entries.replace(id, Keeping::Ending)
    }

    /// The last event and the removal are one step (invariant 1).
    pub(super) fn finish(&self, id: Id, end: End) {
        let entry = self.change(|entries| {
            let entry = entries.remove(id)?;
            let key = entry.owned.key();
            let event = match end {
                End::Lost(loss, cause) => WatchEvent::Lost { key, loss, cause },
                End::Released => WatchEvent::Released { key },
                End::Stopped(reason) => WatchEvent::Stopped { key, reason },
            };
            self.outbox.put(id, event);
            Some(entry)
        });
        drop(entry);
    }

    /// What the renewer says, unless somebody else ends the watching at this moment.
    pub(super) fn lost(&self, id: Id, loss: Loss) {
        if let Some(Keeping::Held(guard)) = self.take_out_if(id, |keeping| matches!(keeping, Keeping::Held(_))) {
            self.finish(id, End::lost(loss, &guard.hold()));
        }
    }

    pub(super) fn watcher(self: &Arc<Self>, id: Id) -> Arc<Watcher> {
        Arc::new(Watcher::new(self, id))
    }

    fn find(&self, key: &Key) -> Option<Id> {
        self.entries().find(key).map(|(id, _)| id)
    }

    /// A list of its own, so that nothing is locked while it is gone through.
    fn watched(&self) -> Vec<(Id, Key)> {
        self.entries().watched()
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops the renewal and keeps the lock, if it is still held.
pub(super) fn let_be(guard: LockGuard) -> (Option<Lease>, End) {
    let hold = guard.hold();
    match guard.into_held_lease() {
        Ok(lease) => (Some(lease), End::Stopped(None)),
        Err(loss) => (None, End::lost(loss, &hold)),
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = self.entries().closed;
        f.debug_struct("Registry").field("len", &self.len()).field("closed", &closed).finish_non_exhaustive()
    }
}

/// Finishes an entry whose guard was taken out, whatever becomes of the future that does it.
struct Finishing<'a> {
    registry: &'a Registry,
    id: Id,
    end: Option<End>,
}

impl Drop for Finishing<'_> {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.registry.finish(self.id, end);
        }
    }
}
