//! Takes up the lock of a lease: adopts it if it is held, or else waits until it is free.

use std::sync::Arc;

use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::entries::{Entry, Keeping};
use super::events::WatchEvent;
use super::inner::Inner;
use super::observer::RenewalObserver;
use super::outbox::Id;
use super::registry::End;
use crate::hold::timing::{self, Renewal};
use crate::mode::Mode;
use crate::{Error, Lease, LockGuard};

impl Inner {
    pub(super) async fn watch_lease(
        self: &Arc<Self>,
        lease: Lease,
        renewal: Renewal,
        obtain_when_free: bool,
    ) -> Result<(), Error> {
        if obtain_when_free && lease.owned().mode == Mode::Permit {
            return Err(Error::Unsupported("a lease doesn't know how many permits there are, so it can't obtain one"));
        }
        self.registry.outbox.call_back_here();
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
        self.registry.change(|entries| match entries.closed {
            true => Err(Error::ShutDown),
            false => Ok(entries.replace(id, Keeping::Obtaining(None))),
        })?;
        // Outside the mutex (invariant 3): a runtime that has shut down drops the task, and with it the reservation,
        // within spawn().
        let task = AbortOnDropHandle::new(runtime.spawn(reservation.obtain(lease, renewal, failed)));
        let late = self.registry.change(|entries| match entries.get_mut(id) {
            Some(Entry { keeping: Keeping::Obtaining(entered), .. }) => entered.replace(task),
            // The task has obtained the lock already, or somebody has ended the watching.
            _ => Some(task),
        });
        drop(late);
        Ok(())
    }
}

/// The entry of a lease whose lock is not held yet. Dropping it before the lock is held removes the entry.
struct Reservation {
    inner: Arc<Inner>,
    id: Id,
}

impl Reservation {
    fn new(inner: &Arc<Inner>, lease: &Lease) -> Result<Self, Error> {
        let id = inner.registry.change(|entries| {
            entries.admits(lease.owned())?;
            Ok::<_, Error>(entries.enter(lease.owned().clone(), true, Keeping::Reserved))
        })?;
        Ok(Self { inner: inner.clone(), id })
    }

    /// Waits for the lock until it is held or an error occurs that waiting cannot resolve.
    async fn obtain(self, lease: Lease, renewal: Renewal, mut failed: Error) {
        let locker = &self.inner.locker;
        let mut attempts = 0;
        let given_up = loop {
            let attempt = match &failed {
                Error::NotHeld { .. } => {
                    let request = locker.lock_all(lease.keys().to_vec()).token(lease.token().clone());
                    let request = request.sharing(lease.owned().mode, 0);
                    request.ttl(lease.ttl()).renewal(renewal).await.map(|guard| (guard, None))
                }
                passing if may_pass(passing) => {
                    // The lock may still be held by the lease. A renewal keeps its metadata, and an attempt would not.
                    attempts += 1;
                    sleep(timing::poll_after(attempts, None, fastrand::f64())).await;
                    locker.adopt_and_renew(&lease, renewal).await.map(|guard| (guard, Some(&lease)))
                }
                _ => break failed,
            };
            // A lock that was lost before it could be taken up is waited for again.
            match attempt.and_then(|(guard, lease)| self.take_up(guard, true, lease)) {
                Ok(()) => return,
                Err(error) => failed = error,
            }
        };
        self.give_up(given_up);
    }

    /// Watches the lock, which is held now. `lease` is the one that it was adopted from, if it was adopted.
    fn take_up(&self, guard: LockGuard, tell: bool, lease: Option<&Lease>) -> Result<(), Error> {
        let (registry, id, hold) = (&self.inner.registry, self.id, guard.hold());
        let (key, fencing_token) = (hold.owned.key(), hold.fencing_token);
        let taken = registry.change(|entries| {
            let wanted = matches!(
                entries.get(id),
                Some(Entry { keeping: Keeping::Reserved | Keeping::Obtaining(_), .. }) if !entries.closed
            );
            if !wanted {
                return Err((Error::ShutDown, guard));
            }
            if let Err(loss) = hold.observe(RenewalObserver::new(registry, id)) {
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
                    Some(lease) => drop(self.inner.return_to(guard, lease.owned().grant)),
                    // It was obtained, and nobody wants it any more: it is released.
                    None => drop(guard),
                }
                Err(error)
            }
        }
    }

    fn give_up(&self, reason: Error) {
        // Whoever ended the watching has taken the task out (invariant 2).
        let task = self.inner.registry.take_out_if(self.id, |keeping| matches!(keeping, Keeping::Obtaining(_)));
        if task.is_some() {
            detach(task);
            self.inner.registry.finish(self.id, End::Stopped(Some(Arc::new(reason))));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let unused = self.inner.registry.change(|entries| {
            let unused = matches!(entries.get(self.id)?.keeping, Keeping::Reserved);
            unused.then(|| entries.remove(self.id))
        });
        drop(unused);
        // Has an effect only if the task was dropped with its runtime.
        self.give_up(Error::NoRuntime);
    }
}

/// Lets the task go on: it is the one that calls this, and is about to end.
fn detach(keeping: Option<Keeping>) {
    if let Some(Keeping::Obtaining(Some(task))) = keeping {
        drop(task.detach());
    }
}

/// Returns whether the error may pass while the lock is waited for.
fn may_pass(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::NotHeld { .. } | Error::ValidityExpired)
}
