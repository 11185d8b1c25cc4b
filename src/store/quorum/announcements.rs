//! Writers that wait for readers to leave.
//!
//! A quorum has no line of waiters. So a writer that finds readers announces itself on all nodes, which then let no
//! other reader in: not a majority of them, or else those readers would share a node with the refusal. An announcement
//! ends by itself after [`ANNOUNCED`](crate::store::node::ANNOUNCED), unless the writer repeats it while it waits. The
//! writer takes it back when it has the lock, or leaves. Two writers' announcements have different places, and end one
//! by one.
//!
//! No safety depends on it: a writer needs a majority of the nodes all the same. A node that has lost an announcement
//! lets readers in, a moment too early.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Quorum;
use super::calls::Calls;
use crate::Key;
use crate::store::node::Node;
use crate::store::{Answer, LinePlace};

/// How long a node may take to note an announcement, and by how much it may outlast its writer for that.
const TIMEOUT: Duration = Duration::from_millis(500);

/// How often an announcement is repeated at most, whatever repeats it: a refusal, or a heartbeat.
const EVERY: Duration = Duration::from_millis(250);

/// When each place was last announced that was not taken back, by its key and number.
#[derive(Default)]
pub(super) struct Announcements(Mutex<HashMap<(Key, u64), Instant>>);

impl Announcements {
    /// Returns whether the place has to be announced now, and notes that it is.
    fn is_due(&self, key: &Key, place: LinePlace) -> bool {
        let now = Instant::now();
        let mut all = self.all();
        let last = all.get(&(key.clone(), place.number));
        let is_due = last.is_none_or(|last| now.saturating_duration_since(*last) >= EVERY);
        if is_due {
            all.insert((key.clone(), place.number), now);
        }
        is_due
    }

    /// Returns whether the place was announced and has to be announced again, and notes that it is. In one step: what
    /// another thread takes back meanwhile would stay here.
    fn is_due_again(&self, key: &Key, place: LinePlace) -> bool {
        let now = Instant::now();
        let mut all = self.all();
        if all.is_empty() {
            return false;
        }
        match all.get_mut(&(key.clone(), place.number)) {
            Some(last) if now.saturating_duration_since(*last) >= EVERY => {
                *last = now;
                true
            }
            _ => false,
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<(Key, u64), Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Quorum {
    /// Announces that a writer waits for the readers of this key. Waits for no reply.
    pub(super) fn announce(&self, key: &Key, place: LinePlace) {
        if self.announcements.is_due(key, place) {
            self.announce_to_all(key, place);
        }
    }

    /// Repeats the announcement, if there is one.
    pub(super) fn still_waits(&self, key: &Key, place: LinePlace) {
        if self.announcements.is_due_again(key, place) {
            self.announce_to_all(key, place);
        }
    }

    /// Takes the announcement back, if there is one. Waits for no reply.
    pub(super) fn withdraw(&self, key: &Key, place: LinePlace) {
        if self.announcements.all().remove(&(key.clone(), place.number)).is_some() {
            self.tell_all(key, move |node, key| Box::pin(async move { node.withdraw(&key, place, TIMEOUT).await }));
        }
    }

    fn announce_to_all(&self, key: &Key, place: LinePlace) {
        self.tell_all(key, move |node, key| Box::pin(async move { node.announce(&key, place, TIMEOUT).await }));
    }

    fn tell_all(&self, key: &Key, call: impl Fn(Arc<dyn Node>, Key) -> Answer<'static, ()>) {
        // Outside a runtime nothing waits.
        let Ok(mut calls) = Calls::new(self) else { return };
        // When this is dropped, a task runs the calls to their end.
        calls.send_to_all(self, TIMEOUT, |node| call(node, key.clone()));
    }
}
