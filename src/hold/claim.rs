//! Takes over the lock of a lease, and gives it back.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::select;
use tokio::time::{Instant, sleep, sleep_until};

use super::{GrantId, Owned, timing};
use crate::Error;
use crate::locker::cleanups::{Cleanup, PendingCleanup};
use crate::locker::shared::Shared;
use crate::store::{Extending, Verdict};

/// The lock of a lease, which a new grant has taken over.
pub(crate) struct Claim {
    shared: Arc<Shared>,
    runtime: Handle,
    owned: Owned,
    /// The grant of the lease.
    earlier: Option<GrantId>,
    ttl: Duration,
    /// Until when the server may run a request that makes the key rely on the new grant.
    may_run_until: Instant,
    /// `Some` while no guard has the lock. [`Locker::close`](crate::Locker::close) waits until the lock is given back.
    pending: Option<PendingCleanup>,
}

impl Claim {
    /// Leaves the lock to a guard. Returns false if it was given back already, as the locker is closed.
    pub(crate) fn keep(mut self) -> bool {
        self.pending.take().is_none_or(PendingCleanup::complete)
    }
}

impl Drop for Claim {
    /// Gives the lock back: no guard will have this grant, and nobody would release it.
    fn drop(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        let (shared, owned) = (self.shared.clone(), self.owned.clone());
        let (earlier, ttl, may_run_until) = (self.earlier, self.ttl, self.may_run_until);
        self.runtime.spawn(async move {
            shared.return_claim(&owned, earlier, ttl, may_run_until).await;
            drop(pending);
        });
    }
}

impl Shared {
    /// Takes over the lock of a lease for a new grant, `owned`. If the claim is dropped before a guard
    /// [keeps](Claim::keep) it, the lock is given back in the background.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        owned: Owned,
        earlier: Option<GrantId>,
        ttl: Duration,
        runtime: &Handle,
    ) -> Result<Claim, Error> {
        let may_run_until = Instant::now() + self.may_run_for();
        let mut claim = self.pending_claim(owned, earlier, ttl, may_run_until, runtime.clone());
        let how = Extending::Claim { earlier };
        match self.store.renew(&claim.owned, ttl, how, self.command_timeout).await {
            Ok(Verdict::Done) => Ok(claim),
            Ok(Verdict::NotOurs(loss)) => {
                claim.pending = None;
                Err(Error::NotHeld { key: claim.owned.key(), loss })
            }
            Err(error) => {
                if error.has_not_run() {
                    claim.pending = None;
                }
                Err(error)
            }
        }
    }

    /// Waits while the server may run a release that would end the lock of a lease.
    pub(crate) async fn await_late_releases(&self, owned: &Owned) -> Result<(), Error> {
        while let Some(until) = self.late_releases.until(owned) {
            select! {
                biased;
                () = self.closed.cancelled() => return Err(Error::Closed),
                () = sleep_until(until) => {}
            }
        }
        Ok(())
    }

    /// Gives the lock back in the background to the lease that a guard had adopted; nobody will use `owned`. Until
    /// `may_run_until`, the server may run a renewal of it.
    pub(crate) fn give_back(
        self: &Arc<Self>,
        owned: Owned,
        earlier: Option<GrantId>,
        ttl: Duration,
        may_run_until: Instant,
    ) {
        let Ok(runtime) = self.runtime() else { return };
        drop(self.pending_claim(owned, earlier, ttl, may_run_until, runtime));
    }

    fn pending_claim(
        self: &Arc<Self>,
        owned: Owned,
        earlier: Option<GrantId>,
        ttl: Duration,
        may_run_until: Instant,
        runtime: Handle,
    ) -> Claim {
        let work = Cleanup::GiveBack { owned: owned.clone(), earlier, ttl, may_run_until };
        let pending = Some(self.cleanups.register(work));
        Claim { shared: self.clone(), runtime, owned, earlier, ttl, may_run_until, pending }
    }

    /// Gives the lock back to the lease from which the grant `owned` took it over.
    ///
    /// Until `may_run_until`, the server may still run the claim itself, or a renewal. So the lock is given back once
    /// more after that, also if it was not ours: its token may obtain it meanwhile, and what is run late would join
    /// that grant.
    pub(crate) async fn return_claim(
        &self,
        owned: &Owned,
        earlier: Option<GrantId>,
        ttl: Duration,
        may_run_until: Instant,
    ) {
        let until = Instant::now() + ttl;
        let mut failures = 0;
        loop {
            let sent = Instant::now();
            let timeout = timing::call_timeout(self.command_timeout, sent, until);
            let given_back = self.store.renew(owned, ttl, Extending::GiveBack { earlier }, timeout).await;
            let remaining = until.saturating_duration_since(Instant::now());
            let pause = match given_back {
                Ok(Verdict::Done | Verdict::NotOurs(_)) if sent >= may_run_until => return,
                Ok(Verdict::Done | Verdict::NotOurs(_)) => may_run_until.saturating_duration_since(Instant::now()),
                Err(error) if !error.is_transient() => return,
                Err(_) => {
                    failures += 1;
                    timing::pause_after(failures, self.command_timeout, remaining, fastrand::f64())
                }
            };
            if pause >= remaining {
                return;
            }
            sleep(pause).await;
        }
    }

    /// Renews a lock that no guard of this locker holds, to at least this ttl.
    pub(crate) async fn extend(&self, owned: &Owned, ttl: Duration) -> Result<(), Error> {
        Self::check_runtime()?;
        self.await_late_releases(owned).await?;
        match self.store.renew(owned, ttl, Extending::Ensure, self.command_timeout).await? {
            Verdict::Done => Ok(()),
            Verdict::NotOurs(loss) => Err(Error::NotHeld { key: owned.key(), loss }),
        }
    }
}
