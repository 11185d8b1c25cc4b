//! Requests for an exact ttl that some nodes may still run, although a majority has confirmed them.
//!
//! `hold.rs` counts an exact ttl as set once it is confirmed (invariant 5 there). A single server has run the request
//! then. In a quorum, a minority may run it later, after it has confirmed a longer ttl. So until such a node has
//! replied, or can no longer run the request, its confirmation of a longer ttl of the same grant doesn't count.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::hold::{GrantId, Owned};
use crate::{Error, RedisError, RedisErrorKind, Token};

#[derive(Default)]
pub(super) struct Shortened {
    requests: Mutex<HashMap<Grant, Vec<Request>>>,
    next: AtomicU64,
}

type Grant = (Token, Option<GrantId>);

struct Request {
    id: RequestId,
    place: usize,
    ttl: Duration,
    /// The node refuses to run the request from this time on.
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestId(u64);

impl Shortened {
    /// Notes that an exact ttl is about to be requested of this many nodes.
    pub(super) fn begin(&self, owned: &Owned, ttl: Duration, nodes: usize, until: Instant) -> RequestId {
        let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
        let now = Instant::now();
        let mut all = self.all();
        all.retain(|_, requests| {
            requests.retain(|request| now < request.until);
            !requests.is_empty()
        });
        let requests = all.entry(grant_of(owned)).or_default();
        requests.extend((0..nodes).map(|place| Request { id, place, ttl, until }));
        id
    }

    /// Notes that a node has run the request, or never will.
    pub(super) fn has_ended(&self, owned: &Owned, ended: RequestId, place: usize) {
        if let Some(requests) = self.all().get_mut(&grant_of(owned)) {
            requests.retain(|request| request.id != ended || request.place != place);
        }
    }

    /// Returns whether a node may run another request than `own` later, which sets a ttl shorter than this.
    pub(super) fn may_shorten(&self, owned: &Owned, own: Option<RequestId>, place: usize, ttl: Duration) -> bool {
        let all = self.all();
        if all.is_empty() {
            return false;
        }
        let now = Instant::now();
        all.get(&grant_of(owned)).into_iter().flatten().any(|request| {
            Some(request.id) != own && request.place == place && request.ttl < ttl && now < request.until
        })
    }

    /// Returns whether any node may still set an exact ttl for this grant.
    pub(super) fn concerns(&self, owned: &Owned) -> bool {
        let all = self.all();
        let now = Instant::now();
        !all.is_empty() && all.get(&grant_of(owned)).into_iter().flatten().any(|request| now < request.until)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Grant, Vec<Request>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a node whose confirmation doesn't count.
pub(super) fn may_be_set_late() -> Error {
    let details = "an earlier request may still set a shorter ttl there";
    RedisError::new(RedisErrorKind::Timeout, details).into()
}

fn grant_of(owned: &Owned) -> Grant {
    (owned.token.clone(), owned.grant)
}
