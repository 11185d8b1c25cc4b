//! What the handles of a watchdog do with the locks that it watches.

use std::fmt;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::entries::Keeping;
use super::observer::RenewalObserver;
use super::outbox::{Id, Outbox};
use super::registry::{End, Registry};
use super::status::WatchStatus;
use crate::hold::GrantId;
use crate::hold::timing::Renewal;
use crate::locker::shared::Shared;
use crate::store::Ending;
use crate::{Error, Key, Lease, LockGuard, Locker, Loss};

/// How many locks are released at a time. On a quorum of which a node is silent, each may take almost the command
/// timeout.
const RELEASES_AT_ONCE: usize = 1_024;

/// Stops the watchdog when the last handle and the last request that needs it are dropped. Nothing else owns one.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) inner: Arc<Inner>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.inner.stop();
    }
}

pub(super) struct Inner {
    pub(super) locker: Locker,
    /// For leases whose request sets no other.
    pub(super) renewal: Renewal,
    pub(super) registry: Arc<Registry>,
}

impl Inner {
    pub(super) fn new(locker: Locker, renewal: Renewal, outbox: Outbox) -> Self {
        Self { locker, renewal, registry: Arc::new(Registry::new(outbox)) }
    }

    pub(super) fn watch(&self, guard: LockGuard) -> Result<(), Error> {
        self.registry.outbox.call_back_here();
        let hold = guard.hold();
        let refused = self.registry.change(|entries| {
            if let Err(error) = entries.admits(&hold.owned) {
                return Err((error, guard));
            }
            if let Err(loss) = hold.observe(RenewalObserver::new(&self.registry, entries.next())) {
                return Err((Error::NotHeld { key: hold.owned.key(), loss }, guard));
            }
            entries.enter(hold.owned.clone(), false, Keeping::Held(guard));
            Ok(())
        });
        // The guard is dropped outside the mutex (invariant 3), and so released. A lock that is watched under the same
        // token keeps its key.
        refused.map_err(|(error, guard)| {
            drop(guard);
            error
        })
    }

    pub(super) fn unwatch(&self, key: &Key) -> Option<Lease> {
        let id = self.registry.find(key)?;
        let (lease, end) = match self.registry.take_out(id)? {
            Keeping::Held(guard) => keep_as_lease(guard),
            task => {
                drop(task);
                (None, End::Stopped(None))
            }
        };
        self.registry.finish(id, end);
        lease
    }

    pub(super) async fn release(&self, key: &Key) -> Result<(), Error> {
        let not_watched = || Error::NotHeld { key: key.clone(), loss: Loss::Released };
        let id = self.registry.find(key).ok_or_else(not_watched)?;
        self.release_entry(id).await.unwrap_or_else(|| Err(not_watched()))
    }

    pub(super) async fn release_all(self: &Arc<Self>) -> Vec<(Key, Error)> {
        let all = self.registry.watched();
        let mut failed = Vec::new();
        let Ok(runtime) = self.locker.shared().runtime() else {
            return all.into_iter().map(|(_, key)| (key, Error::NoRuntime)).collect();
        };
        let mut releases = JoinSet::new();
        for (id, key) in all {
            if releases.len() == RELEASES_AT_ONCE {
                failed.extend(releases.join_next().await.and_then(Result::ok).flatten());
            }
            let inner = self.clone();
            let release = async move {
                // A lock whose watching has ended meanwhile has reported how.
                let released = inner.release_entry(id).await.unwrap_or(Ok(()));
                released.err().map(|error| (key, error))
            };
            releases.spawn_on(release, &runtime);
        }
        while let Some(released) = releases.join_next().await {
            failed.extend(released.ok().flatten());
        }
        failed
    }

    /// Refuses new locks, stops waiting for locks, and keeps those that are held as leases.
    pub(super) async fn shut_down(&self) -> Vec<Lease> {
        self.registry.change(|entries| entries.closed = true);
        let mut tasks = Vec::new();
        for (id, _) in self.registry.watched() {
            if let Some(Keeping::Obtaining(task)) =
                self.registry.take_out_if(id, |keeping| matches!(keeping, Keeping::Obtaining(_)))
            {
                self.registry.finish(id, End::Stopped(None));
                tasks.extend(task);
            }
        }
        self.end(tasks).await;
        // There is no await below, so no lease is lost if this future is dropped.
        let mut leases = Vec::new();
        for (id, _) in self.registry.watched() {
            if let Some(Keeping::Held(guard)) = self.registry.take_out(id) {
                let (lease, end) = keep_as_lease(guard);
                self.registry.finish(id, end);
                leases.extend(lease);
            }
        }
        leases
    }

    /// Ends everything when no handle is left. Locks that came as guards are released in the background, as guards are.
    fn stop(&self) {
        self.registry.change(|entries| entries.closed = true);
        for (id, _) in self.registry.watched() {
            let leased = self.registry.entries().get(id).filter(|entry| entry.leased).map(|entry| entry.owned.grant);
            let end = match (self.registry.take_out(id), leased) {
                (Some(Keeping::Held(guard)), Some(grant)) => self.return_to(guard, grant),
                (Some(Keeping::Held(guard)), None) => match guard.hold().end(Loss::Released) {
                    Loss::Released => End::Released,
                    loss => End::lost(loss, &guard.hold()),
                },
                (Some(Keeping::Obtaining(_)), _) => End::Stopped(None),
                _ => continue,
            };
            self.registry.finish(id, end);
        }
    }

    /// Stops the renewal, and leaves the lock to the lease that the guard was adopted from.
    pub(super) fn return_to(&self, guard: LockGuard, lease: Option<GrantId>) -> End {
        let (owned, ttl) = (guard.hold().owned.clone(), guard.ttl());
        let (hold, shared) = (guard.hold(), self.locker.shared());
        let (kept, end) = keep_as_lease(guard);
        if kept.is_some() {
            let now = Instant::now();
            let may_run_until = match shared.store.capabilities().undoes_attempts {
                // A majority has confirmed the claim. Other nodes may run it yet.
                true => now + shared.may_run_for(),
                // It has been confirmed. What may come late is a renewal. After the end, none is sent any more.
                false => hold.may_record_until().unwrap_or(now),
            };
            shared.give_back(owned, lease, ttl, may_run_until);
        }
        end
    }

    pub(super) fn len(&self) -> usize {
        self.registry.entries().len()
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.registry.find(key).is_some()
    }

    pub(super) fn status(&self, key: &Key) -> Option<WatchStatus> {
        let (mut status, hold) = {
            let entries = self.registry.entries();
            let (_, entry) = entries.find(key)?;
            let hold = match &entry.keeping {
                Keeping::Held(guard) => Some(guard.hold()),
                _ => None,
            };
            let (renewals, last_error) = (entry.renewals, entry.last_error.clone());
            (WatchStatus { held: false, deadline: None, renewals, last_error }, hold)
        };
        // Outside the mutex: if this check is the first to find the lock expired, it reports the loss, which locks it.
        if let Some(hold) = hold {
            status.held = hold.check().is_ok();
            status.deadline = Some(hold.deadline());
        }
        Some(status)
    }

    async fn release_entry(&self, id: Id) -> Option<Result<(), Error>> {
        let keeping = self.registry.take_out(id)?;
        let end = match keeping {
            // It was never reported as obtained, so it is not reported as released, either.
            Keeping::Obtaining(_) => End::Stopped(None),
            _ => End::Released,
        };
        // Finishes the entry even if this future is dropped, which leaves the release to the background.
        let mut ending = Finishing { registry: &self.registry, id, end: Some(end) };
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

    /// Cancels tasks that wait for a lock, and waits until they have ended. The wait is bounded, as a runtime that
    /// nobody drives never ends its tasks. It does not run them, either.
    async fn end(&self, tasks: impl IntoIterator<Item = AbortOnDropHandle<()>>) {
        let mut tasks: Vec<_> = tasks.into_iter().collect();
        tasks.iter().for_each(AbortOnDropHandle::abort);
        let gone = async {
            for task in &mut tasks {
                // It was cancelled, or had already ended.
                drop(task.await);
            }
        };
        // Outside a runtime nothing can wait; the tasks are cancelled all the same.
        if Shared::check_runtime().is_ok() {
            drop(timeout(self.locker.shared().command_timeout, gone).await);
        }
    }

    /// Releases what an attempt may have obtained at the server before its reply was read.
    async fn release_what_was_tried(&self, id: Id) -> Result<(), Error> {
        let owned = self.registry.entries().get(id).map(|entry| entry.owned.clone());
        let Some(owned) = owned else { return Ok(()) };
        let shared = self.locker.shared();
        shared.release(&owned, Ending::Lock, None, Instant::now() + shared.command_timeout).await.map(drop)
    }
}

/// Stops the renewal and keeps the lock, if it is still held.
fn keep_as_lease(guard: LockGuard) -> (Option<Lease>, End) {
    let hold = guard.hold();
    match guard.into_held_lease() {
        Ok(lease) => (Some(lease), End::Stopped(None)),
        Err(loss) => (None, End::lost(loss, &hold)),
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = self.registry.entries().closed;
        f.debug_struct("Inner").field("len", &self.len()).field("closed", &closed).finish_non_exhaustive()
    }
}

/// Finishes an entry whose guard or task was taken out, even if the future that ends it is dropped.
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
