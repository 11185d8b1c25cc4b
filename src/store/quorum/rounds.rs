//! Rounds that may still be granted something, and the releases that come before they are over.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Token;
use crate::hold::{GrantId, Owned};
use crate::store::Ending;

/// The rounds whose calls have not all ended, by their token.
#[derive(Clone, Default)]
pub(super) struct Rounds(Arc<Mutex<HashMap<Token, Vec<Arc<Open>>>>>);

/// One of them.
struct Open {
    grant: Option<GrantId>,
    released: AtomicBool,
}

/// A round that is open until this is dropped.
pub(super) struct OpenRound {
    rounds: Rounds,
    token: Token,
    open: Arc<Open>,
}

impl Rounds {
    pub(super) fn open(&self, owned: &Owned) -> OpenRound {
        let open = Arc::new(Open { grant: owned.grant, released: AtomicBool::new(false) });
        self.all().entry(owned.token.clone()).or_default().push(open.clone());
        OpenRound { rounds: self.clone(), token: owned.token.clone(), open }
    }

    /// A release was sent: what these rounds are granted late must be taken back. One that ends the lock is for all
    /// grants of its token.
    pub(super) fn mark_released(&self, owned: &Owned, ending: Ending) {
        for open in self.all().get(&owned.token).into_iter().flatten() {
            if ending == Ending::Lock || open.grant == owned.grant {
                open.released.store(true, Ordering::Release);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Token, Vec<Arc<Open>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenRound {
    pub(super) fn was_released(&self) -> bool {
        self.open.released.load(Ordering::Acquire)
    }

    /// It has been granted the lock. What was released before that was another's.
    pub(super) fn begin(&self) {
        self.open.released.store(false, Ordering::Release);
    }
}

impl Drop for OpenRound {
    fn drop(&mut self) {
        let mut all = self.rounds.all();
        let Some(rounds) = all.get_mut(&self.token) else { return };
        rounds.retain(|open| !Arc::ptr_eq(open, &self.open));
        if rounds.is_empty() {
            all.remove(&self.token);
        }
    }
}
