//! The arguments of scripts.

use std::time::Duration;

use bytes::Bytes;

use crate::hold::{GrantId, Owned};
use crate::store::{Extending, Wanted};

/// What scripts call a grant that has no id.
pub(super) const NO_ID: &str = "-";

/// What `renew_grant.lua` calls a renewal to at least the ttl.
pub(super) const LEAST: &str = "least";

/// The shortest ttl of a record of grants. The record is deleted with the lock; the ttl is for locks whose holder died.
const RECORD_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Returns what the lock key holds while the lock is held.
pub(super) fn value_of(wanted: &Wanted) -> Bytes {
    let token = &wanted.owned.token;
    match &*wanted.metadata {
        [] => token.to_bytes(),
        metadata => [&token.to_bytes()[..], b"\n", metadata].concat().into(),
    }
}

/// Returns the ttl of the record of grants of a lock with this ttl.
pub(super) fn record_ttl(ttl: Duration) -> i64 {
    millis(RECORD_TTL.max(ttl.saturating_mul(2)))
}

/// Returns what scripts call a grant of a record.
pub(super) fn id_of(grant: Option<GrantId>) -> Bytes {
    grant.map_or_else(|| NO_ID.into(), |grant| grant.to_string().into())
}

/// Returns the id of a grant that has one, and an empty text for one that needs no record.
pub(super) fn id_or_empty(grant: Option<GrantId>) -> Bytes {
    grant.map_or_else(|| "".into(), |grant| grant.to_string().into())
}

pub(super) fn count_of(owned: &Owned) -> Bytes {
    decimal(i64::try_from(owned.keys.len()).unwrap_or(i64::MAX))
}

pub(super) fn flag(is_set: bool) -> Bytes {
    Bytes::from_static(if is_set { b"1" } else { b"0" })
}

/// Returns a number as text.
pub(super) fn decimal(number: i64) -> Bytes {
    number.to_string().into()
}

pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

pub(super) fn seconds(duration: Duration) -> Bytes {
    decimal(i64::try_from(duration.as_secs()).unwrap_or(i64::MAX))
}

impl Extending {
    /// Returns what `renew_grant.lua` calls it; `None` where `renew.lua` does it.
    pub(super) fn name(self) -> Option<&'static str> {
        match self {
            Self::AtLeast | Self::Ensure => None,
            Self::Exactly => Some("exactly"),
            Self::Claim { .. } => Some("claim"),
            Self::KeepRecord => Some("keep"),
            Self::GiveBack { .. } => Some("return"),
        }
    }
}
