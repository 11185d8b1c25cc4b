//! What the parts of one request work with: its attempts, its position, its waiter.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio_util::sync::WaitForCancellationFuture;

use crate::Key;
use crate::locker::shared::Shared;
use crate::store::{Queueing, Wanted};

/// What a request wants, and where it is carried out.
pub(crate) struct Context {
    /// Shared with the queue and the cleanups. Replaced when the token is.
    pub(crate) wanted: Arc<Wanted>,
    pub(crate) shared: Arc<Shared>,
    /// The runtime that background work is spawned on.
    pub(crate) runtime: Handle,
}

impl Context {
    /// Returns the key that messages name.
    pub(crate) fn key(&self) -> Key {
        self.wanted.owned.key()
    }

    /// Returns the key of a request for one key.
    pub(crate) fn only_key(&self) -> Option<Key> {
        match &*self.wanted.owned.keys {
            [key] => Some(key.clone()),
            _ => None,
        }
    }

    /// Waits until the locker is closed.
    pub(crate) fn closed(&self) -> WaitForCancellationFuture<'_> {
        self.shared.closed.cancelled()
    }

    /// Returns whether the server has a line in which the waiters of all processes stand, for this one too.
    pub(crate) fn has_line(&self) -> bool {
        self.shared.store.capabilities().has_line || self.has_line_as_fair()
    }

    fn has_line_as_fair(&self) -> bool {
        let is_fair = match self.wanted.queueing {
            Queueing::Own => true,
            Queueing::Behind => !self.is_shared(),
            Queueing::Shared | Queueing::None => false,
        };
        // Of several keys, none is refused: the request has no place in any line before it is refused a key.
        is_fair && self.only_key().is_some() && self.shared.store.capabilities().has_line_for_fair
    }

    /// Returns whether the store hears of the places of waiters.
    pub(crate) fn has_places(&self) -> bool {
        self.shared.store.capabilities().has_places(self.wanted.owned.keys.len()) || self.has_line_as_fair()
    }

    /// Returns whether a waiter before this one can hand the lock over to it, so that it need not be in the line.
    pub(crate) fn can_be_handed_over(&self) -> bool {
        if self.is_shared() {
            return false;
        }
        !self.has_line() || self.shared.store.capabilities().hands_over && self.wanted.owned.own_token
    }

    /// Returns whether others may hold the key together with this request.
    pub(crate) fn is_shared(&self) -> bool {
        self.wanted.owned.mode.is_shared()
    }

    /// Returns whether others of this process wait for the key, so that a request for a shared grant, which could be
    /// granted before them, has to wait behind them.
    pub(crate) fn is_held_back(&self) -> bool {
        self.is_shared() && self.shared.queues.has_waiters(&self.key())
    }

    /// Returns whether they wait for a holder that the server has told of, so that a request need not ask as well. Of a
    /// server that doesn't reply, nobody knows whether the key is held.
    pub(crate) fn is_held_back_by_answer(&self) -> bool {
        self.is_shared() && self.shared.queues.has_waiters_for_holder(&self.key())
    }

    /// Returns whether several servers decide, each by itself.
    pub(crate) fn is_voted_on(&self) -> bool {
        self.shared.store.capabilities().undoes_attempts
    }
}
