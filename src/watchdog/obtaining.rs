//! From a lease to a lock that is watched: held already, or waited for.

use std::sync::Arc;

use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::entries::{Entry, Keeping};
use super::events::WatchEvent;
use super::outbox::Id;
use super::registry::{End, Registry};
use crate::hold::timing::{self, Renewal};
use crate::{Error, Lease, LockGuard};

impl Registry {
    pub(super) async fn watch_lease(
        self: &Arc<Self>,
        lease: Lease,
        renewal: Renewal,
        obtain_when_free: bool,
    ) -> Result<(), Error> {
        self.outbox.call_back_here();
        let reservation = Reservation::new(self, &lease)?;
        let id = reservation.id;
        let failed = match self.locker.adopt_and_renew(&lease, renewal).await {
            Ok(guard) => return reservation.take_up(guard, obtain_when_free, Some(&lease)),
            Err(error) => error,
        };
        if !(obtain_when_free && may_pass(&failed)) {
            return Err(failed);
        }
        let runtime = self.locker.shared().runtime()?;
        self.change(|entries| match entries.closed {
            true => Err(Error::Closed),
            false => Ok(entries.replace(id, Keeping::Obtaining(None))),
        })?;
        // Not under the mutex: a runtime that is gone drops the task, and the reservation with it, on the spot.
        let task = AbortOnDropHandle::new(runtime.spawn(reservation.obtain(lease, renewal, failed)));
        let late = self.change(|entries| match entries.get_mut(id) {
            Some(Entry { keeping: Keeping::Obtaining(entered), .. }) => entered.replace(task),
            // It has obtained the lock already, or nobody wants it any more.
            _ => Some(task),
        });
        drop(late);
        Ok(())
    }
}

/// The entry of a lease whose lock is not held yet. Dropped before it is, nothing stays entered.
struct Reservation {
    registry: Arc<Registry>,
    id: Id,
}

impl Reservation {
    fn new(registry: &Arc<Registry>, lease: &Lease) -> Result<Self, Error> {
        let id = registry.change(|entries| {
            entries.admits(lease.owned())?;
            Ok::<_, Error>(entries.enter(lease.owned().clone(), true, Keeping::Reserved))
        })?;
        Ok(Self { registry: registry.clone(), id })
    }

    /// Waits for the lock, for as long as waiting may help.
    async fn obtain(self, lease: Lease, renewal: Renewal, mut failed: Error) {
        let locker = &self.registry.locker;
        let mut attempts = 0;
        let given_up = loop {
            let attempt = match &failed {
                Error::NotHeld { .. } => {
                    let request = locker.lock_all(lease.keys().to_vec()).token(lease.token().clone());
                    request.ttl(lease.ttl()).renewal(renewal).await.map(|guard| (guard, None))
                }
                passing if may_pass(passing) => {
                    // It may well be held: a renewal, other than an attempt, leaves its metadata as it is.
                    attempts += 1;
                    sleep(timing::poll_after(attempts, None, fastrand::f64())).await;
                    locker.adopt_and_renew(&lease, renewal).await.map(|guard| (guard, Some(&lease)))
                }
                _ => break failed,
            };
            // Lost again before it could be taken up, it is waited for again.
            match attempt.and_then(|(guard, lease)| self.take_up(guard, true, lease)) {
                Ok(()) => return,
                Err(error) => failed = error,
            }
        };
        self.give_up(given_up);
    }

    /// The lock is held: from here on it is watched. `lease` is what it was adopted from, if it was.
    fn take_up(&self, guard: LockGuard, tell: bool, lease: Option<&Lease>) -> Result<(), Error> {
        let (registry, id, hold) = (&self.registry, self.id, guard.hold());
        let (key, fencing_token) = (hold.owned.key(), hold.fencing_token);
        let taken = registry.change(|entries| {
            let wanted = matches!(
                entries.get(id),
                Some(Entry { keeping: Keeping::Reserved | Keeping::Obtaining(_), .. }) if !entries.closed
            );
            if !wanted {
                return Err((Error::Closed, guard));
            }
            if let Err(loss) = hold.observe(registry.watcher(id)) {
                return Err((Error::NotHeld { key, loss }, guard));
            }
            if tell {
                registry.outbox.put(id, WatchEvent::Obtained { key, fencing_token });
            }
            Ok(entries.replace(id, Keeping::Held(guard)))
        });
        match taken {
            Ok(before) => {
                detach(before);
                Ok(())
            }
            Err((error, guard)) => {
                match lease {
                    Some(lease) => drop(registry.return_to(guard, lease.owned().grant)),
                    // Obtained for nobody: it is released.
                    None => drop(guard),
                }
                Err(error)
            }
        }
    }

    fn give_up(&self, reason: Error) {
        // Whoever no longer wants the lock has taken the task out.
        let task = self.registry.take_out_if(self.id, |keeping| matches!(keeping, Keeping::Obtaining(_)));
        if task.is_some() {
            detach(task);
            self.registry.finish(self.id, End::Stopped(Some(Arc::new(reason))));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let unused = self.registry.change(|entries| {
            let unused = matches!(entries.get(self.id)?.keeping, Keeping::Reserved);
            unused.then(|| entries.remove(self.id))
        });
        drop(unused);
        // The task was dropped with its runtime.
        self.give_up(Error::NoRuntime);
    }
}

/// The task is the one that calls this, and ends by itself.
fn detach(keeping: Option<Keeping>) {
    if let Some(Keeping::Obtaining(Some(task))) = keeping {
        drop(task.detach());
    }
}

/// Whether waiting may help against it.
fn may_pass(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::NotHeld { .. } | Error::ValidityExpired)
}
