//! Rounds that may still be granted something, and the releases that come before they are over.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

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
    /// What the nodes have answered to the release.
    answers: Mutex<HashMap<usize, bool>>,
    answered: Notify,
}

/// A release on its way, and the rounds that were open when it was sent.
pub(super) struct Releasing(Vec<Arc<Open>>);

impl Releasing {
    /// Whether the node has freed the lock.
    pub(super) fn answered(&self, place: usize, is_freed: bool) {
        for open in &self.0 {
            open.answers().insert(place, is_freed);
            open.answered.notify_waiters();
        }
    }
}

impl Open {
    fn answers(&self) -> MutexGuard<'_, HashMap<usize, bool>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A round that is open until this is dropped.
pub(super) struct OpenRound {
    rounds: Rounds,
    token: Token,
    open: Arc<Open>,
}

impl Rounds {
    pub(super) fn open(&self, owned: &Owned) -> OpenRound {
        let open = Arc::new(Open {
            grant: owned.grant,
            released: AtomicBool::new(false),
            answers: Mutex::default(),
            answered: Notify::new(),
        });
        self.all().entry(owned.token.clone()).or_default().push(open.clone());
        OpenRound { rounds: self.clone(), token: owned.token.clone(), open }
    }

    /// A release was sent: what these rounds are granted late must be taken back. One that ends the lock is for all
    /// grants of its token.
    pub(super) fn mark_released(&self, owned: &Owned, ending: Ending) -> Releasing {
        let all = self.all();
        let ended = all.get(&owned.token).into_iter().flatten();
        let ended = ended.filter(|open| ending == Ending::Lock || open.grant == owned.grant).cloned();
        Releasing(ended.inspect(|open| open.released.store(true, Ordering::Release)).collect())
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Token, Vec<Arc<Open>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenRound {
    pub(super) fn was_released(&self) -> bool {
        self.open.released.load(Ordering::Acquire)
    }

    /// Whether the release has freed the lock on this node, which has granted it before: waits for its answer, but no
    /// longer than `until`.
    pub(super) async fn is_freed(&self, place: usize, until: Instant) -> bool {
        loop {
            let answered = self.open.answered.notified();
            if let Some(is_freed) = self.open.answers().get(&place).copied() {
                return is_freed;
            }
            if timeout_at(until, answered).await.is_err() {
                return false;
            }
        }
    }

    /// It has been granted the lock. What was released before that was another's.
    pub(super) fn begin(&self) {
        self.open.answers().clear();
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
