//! Requests for an exact ttl that some nodes may still run, although a majority has confirmed them.
//!
//! `hold.rs` counts an exact ttl as set once it is confirmed (invariant 5 there). One server has run it then. Of a
//! quorum, a minority may do so later, after it has confirmed a longer ttl. So until such a node has answered, or can't
//! run the request any more, it confirms no longer ttl of the same grant.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fred::error::ErrorKind;
use tokio::time::Instant;

use crate::hold::{GrantId, Owned};
use crate::{Error, Token};

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
    /// The node refuses to run it from then on.
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestId(u64);

impl Shortened {
    /// An exact ttl is about to be asked for, of so many nodes.
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

    /// A node has run the request, or never will.
    pub(super) fn has_ended(&self, owned: &Owned, ended: RequestId, place: usize) {
        if let Some(requests) = self.all().get_mut(&grant_of(owned)) {
            requests.retain(|request| request.id != ended || request.place != place);
        }
    }

    /// Whether a node may make the ttl shorter than this after it has confirmed it, by another request than `own`.
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

    /// Whether an exact ttl of this grant is, or may be, still to be set anywhere.
    pub(super) fn concerns(&self, owned: &Owned) -> bool {
        let all = self.all();
        let now = Instant::now();
        !all.is_empty() && all.get(&grant_of(owned)).into_iter().flatten().any(|request| now < request.until)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Grant, Vec<Request>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a node's confirmation doesn't count.
pub(super) fn may_be_set_late() -> Error {
    let details = "an earlier request may still set a shorter ttl there";
    fred::error::Error::new(ErrorKind::Timeout, details).into()
}

fn grant_of(owned: &Owned) -> Grant {
    (owned.token.clone(), owned.grant)
}
