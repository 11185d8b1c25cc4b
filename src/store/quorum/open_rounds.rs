//! Open rounds, which nodes may still grant something to, and the releases that come before they end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::Token;
use crate::hold::{GrantId, Owned};
use crate::store::Ending;

/// The rounds with calls in flight, by their token.
#[derive(Clone, Default)]
pub(super) struct OpenRounds(Arc<Mutex<HashMap<Token, Vec<Arc<Open>>>>>);

/// An open round.
struct Open {
    grant: Option<GrantId>,
    released: AtomicBool,
    /// Which nodes have replied to the release, and whether they have freed the lock.
    answers: Mutex<HashMap<usize, bool>>,
    answered: Notify,
}

/// A release, and the rounds that were open when it was sent.
pub(super) struct Releasing(Vec<Arc<Open>>);

impl Releasing {
    /// Notes a node's reply to the release.
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

/// Keeps a round open until this is dropped.
pub(super) struct OpenRound {
    rounds: OpenRounds,
    token: Token,
    open: Arc<Open>,
}

impl OpenRounds {
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

    /// Notes that a release was sent, so that what these rounds get granted late must be undone. A release that ends
    /// the lock concerns all grants of its token.
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

    /// Returns whether the release has surely freed what this round was granted on the node. Waits for the node's reply,
    /// but no longer than `until`. Of a token that others may use, it is never sure.
    pub(super) async fn is_freed(&self, place: usize, until: Instant) -> bool {
        if self.open.grant.is_some() {
            // By this reply, the node held the token. It may have done so by another grant, before the vote arrived.
            return false;
        }
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

    /// Notes that the round got the lock. A release before that was for another holder.
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
