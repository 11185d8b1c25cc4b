//! Open rounds, which nodes may still grant something to, and the releases that come before they end.
//!
//! A release marks the rounds before its calls are sent. So a reply that finds its round unmarked came before the
//! release reached the node, which needs no other. What a round undoes after it was marked waits until the calls are
//! sent, and must not be what frees the lock. But a node may run requests in another order: then the release finds
//! nothing, of what the round has found to be ours. So a node that is told to undo can't tell of a loss any more.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::hold::{GrantId, Owned};
use crate::mode::Mode;
use crate::store::Ending;
use crate::{Key, Token};

/// The rounds with calls in flight, by their token.
#[derive(Clone, Default)]
pub(super) struct OpenRounds(Arc<Mutex<HashMap<Token, Vec<Arc<Open>>>>>);

/// An open round.
struct Open {
    /// A token may hold several locks, of different keys.
    keys: Box<[Key]>,
    grant: Option<GrantId>,
    mode: Mode,
    release: watch::Sender<Release>,
    /// Which nodes have replied to the release, and whether they have surely freed what the round was granted.
    answers: Mutex<HashMap<usize, bool>>,
    answered: Notify,
    /// Which nodes were told to undo what they had granted.
    undone: Mutex<HashSet<usize>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Release {
    No,
    /// Its calls are being sent.
    BeingSent,
    Sent {
        stays_until: Instant,
    },
}

/// A release, and the rounds that were open when it was sent.
pub(super) struct Releasing {
    rounds: Vec<Arc<Open>>,
    /// Until when it leaves the keys to nobody.
    stays_until: Instant,
}

impl Releasing {
    /// Notes that the calls to all nodes have been sent.
    pub(super) fn is_sent(&self) {
        self.is_now(Release::Sent { stays_until: self.stays_until });
    }

    fn is_now(&self, release: Release) {
        for open in &self.rounds {
            open.release.send_replace(release);
        }
    }

    /// Returns whether the node was told to undo what the rounds were granted: it may have done so before it ran the
    /// release.
    pub(super) fn may_be_undone(&self, place: usize) -> bool {
        self.rounds.iter().any(|open| open.undone().contains(&place))
    }

    /// Notes a node's reply to the release.
    pub(super) fn answered(&self, place: usize, is_freed: bool) {
        for open in &self.rounds {
            *open.answers().entry(place).or_insert(true) &= is_freed;
            open.answered.notify_waiters();
        }
    }
}

impl Open {
    fn has_any_of(&self, owned: &Owned) -> bool {
        self.keys.iter().any(|key| owned.keys.contains(key))
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<usize, bool>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn undone(&self) -> MutexGuard<'_, HashSet<usize>> {
        self.undone.lock().unwrap_or_else(PoisonError::into_inner)
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
            keys: owned.keys.clone(),
            grant: owned.grant,
            mode: owned.mode,
            release: watch::Sender::new(Release::No),
            answers: Mutex::default(),
            answered: Notify::new(),
            undone: Mutex::default(),
        });
        self.all().entry(owned.token.clone()).or_default().push(open.clone());
        OpenRound { rounds: self.clone(), token: owned.token.clone(), open }
    }

    /// Notes that a release is about to be sent, so that what these rounds get granted late must be undone. A release
    /// that ends the lock concerns all grants of its token, and none of what the token holds by other keys. The lock may
    /// have become a reader's share by the same grant: that outlives what is released late of the lock.
    pub(super) fn release(&self, owned: &Owned, ending: Ending, stays_until: Instant) -> Releasing {
        let all = self.all();
        let ended = all.get(&owned.token).into_iter().flatten();
        let ended = ended.filter(|open| open.has_any_of(owned));
        let ended = ended.filter(|open| open.mode != Mode::Read || owned.mode == Mode::Read);
        let ended = ended.filter(|open| ending == Ending::Lock || open.grant == owned.grant).cloned();
        let releasing = Releasing { rounds: ended.collect(), stays_until };
        releasing.is_now(Release::BeingSent);
        releasing
    }

    /// Notes that a node is asked once more for what the rounds of this lock have asked it for. When it has freed
    /// that, the earlier vote may still be on its way.
    pub(super) fn ask_again(&self, owned: &Owned, place: usize) {
        for open in self.all().get(&owned.token).into_iter().flatten() {
            if open.has_any_of(owned) {
                open.answers().insert(place, false);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Token, Vec<Arc<Open>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenRound {
    /// Returns whether a release has been sent, or is about to be.
    pub(super) fn is_released(&self) -> bool {
        *self.open.release.borrow() != Release::No
    }

    /// Waits until the calls of the release have been sent. Returns until when it leaves the keys to nobody.
    pub(super) async fn release_is_sent(&self) -> Option<Instant> {
        let mut release = self.open.release.subscribe();
        // The sender lives as long as this round.
        match release.wait_for(|release| *release != Release::BeingSent).await.as_deref() {
            Ok(Release::Sent { stays_until }) => Some(*stays_until),
            _ => None,
        }
    }

    /// Notes that the node is told to undo what it has granted to this round. Must be called before it is told.
    pub(super) fn undoes(&self, place: usize) {
        self.open.undone().insert(place);
    }

    /// Returns whether the release has surely freed what this round was granted on the node. Waits for the node's
    /// reply, but no longer than `until`. Of a token that others may use, it is never sure.
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
        self.open.undone().clear();
        self.open.release.send_replace(Release::No);
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
