//! Turns the hold of a lock into that of a reader.
//!
//! From before the server is asked, the lock no longer counts as held: readers may share it from the moment at which
//! the server runs the request, and nobody learns when that is. If the outcome stays unknown, both are released: the
//! lock first, so that no late request can turn it into a reader's share after that was released.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::{Instant, sleep, timeout_at};

use super::state::State;
use super::{Hold, Owned, timing};
use crate::locker::shared::Shared;
use crate::metrics::{Held, Label};
use crate::mode::Mode;
use crate::store::Downgraded;
use crate::sync::Mutex;
use crate::{Error, Loss};

impl Shared {
    /// Asks the server to turn the lock into a reader's share. Tries again after failures, for as long as a release
    /// does, and as long as the lock would have been held.
    pub(crate) async fn downgrade(&self, hold: &Hold) -> Result<Downgraded, Error> {
        let until = hold.deadline().min(Instant::now() + self.command_timeout);
        let mut failures = 0;
        loop {
            let timeout = timing::call_timeout(self.command_timeout, Instant::now(), until);
            let call = self.store.downgrade(&hold.owned, timeout);
            let error = match timeout_at(until, call).await.unwrap_or_else(|_| Err(Error::timeout())) {
                Ok(downgraded) => return Ok(downgraded),
                Err(error) => error,
            };
            failures += 1;
            let remaining = until.saturating_duration_since(Instant::now());
            let pause = timing::pause_after(failures, self.command_timeout, remaining, fastrand::f64());
            if !error.is_transient() || pause >= remaining {
                return Err(error);
            }
            sleep(pause).await;
        }
    }
}

impl Hold {
    /// Ends the hold, as the server is about to be asked to make it a reader's.
    pub(crate) fn begin_downgrade(&self) -> Result<(), Loss> {
        match self.end(Loss::Released) {
            Loss::Released => {
                self.may_be_reader.store(true, Ordering::Relaxed);
                Ok(())
            }
            loss => Err(loss),
        }
    }

    /// Returns what the server keeps if it has run a downgrade of this hold, and may have run one.
    pub(crate) fn as_reader(&self) -> Option<Owned> {
        let may_be = self.may_be_reader.load(Ordering::Relaxed);
        may_be.then(|| Owned { mode: Mode::Read, ..self.owned.clone() })
    }

    /// Returns the reader's hold, which is the same in everything else: it is held for as long as the lock would have
    /// been.
    ///
    /// # Errors
    ///
    /// [`Loss::Expired`] or [`Loss::LimitReached`], if that time is over.
    pub(crate) fn downgraded(&self) -> Result<Self, Loss> {
        let state = self.current();
        let state = State {
            ttl: state.ttl,
            renewal: state.renewal,
            limit: state.limit,
            suspended: state.suspended,
            sent: state.sent,
            worth: state.worth,
            deadline: state.deadline,
            ends_at_limit: state.ends_at_limit,
            kept_until: state.kept_until,
            epoch: state.epoch,
            // What the server has not run before the downgrade, it finds no lock for.
            unresolved: Vec::new(),
            recording: Vec::new(),
            last_error: state.last_error.clone(),
            loss: None,
            final_step: None,
            observer: None,
            held: Held::default(),
            label: Label::default(),
            over: None,
            shortened: None,
        };
        state.verdict(Instant::now())?;
        Ok(Self {
            owned: Owned { mode: Mode::Read, ..self.owned.clone() },
            metadata: self.metadata.clone(),
            fencing_token: self.fencing_token,
            spare_tokens: 0,
            is_token_known: AtomicBool::new(self.is_token_known.load(Ordering::Relaxed)),
            may_be_reader: AtomicBool::new(false),
            may_be_released: AtomicBool::new(false),
            // What an earlier attempt may still leave is the lock's, and undone by its hold.
            doubt: None,
            has_parts: self.has_parts,
            bounds: self.bounds,
            is_voted_on: self.is_voted_on,
            stays_until: self.stays_until,
            drift: self.drift,
            origin: self.origin,
            caller: self.caller.clone(),
            state: Mutex::new(state),
        })
    }
}
