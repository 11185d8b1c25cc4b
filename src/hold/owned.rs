//! What identifies a held lock at the server.

use std::fmt;
use std::str::FromStr;

use crate::mode::Mode;
use crate::{Key, Token};

/// The keys of a held lock, and the token that they hold at the server.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Owned {
    pub(crate) keys: Box<[Key]>,
    pub(crate) token: Token,
    /// Whether the token was made for one request, so that nobody else uses it.
    pub(crate) own_token: bool,
    /// Distinguishes this grant from others of the same token. `None` is the grant of the request that made the token.
    pub(crate) grant: Option<GrantId>,
    /// Who else may hold the keys meanwhile.
    pub(crate) mode: Mode,
}

impl Owned {
    /// Returns whether the server may have a record of its grant beside each key. A shared grant is in the set of
    /// holders.
    pub(crate) fn has_record(&self) -> bool {
        self.grant.is_some() && !self.mode.is_shared()
    }

    /// Returns the key that messages and events name.
    pub(crate) fn key(&self) -> Key {
        self.keys.first().cloned().unwrap_or_else(|| Key::from(""))
    }
}

/// Distinguishes the grants of one token.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct GrantId(u64);

impl GrantId {
    /// The grant of a lease that was made by hand, from a token alone.
    pub(crate) const UNKNOWN: Self = Self(0);

    pub(crate) fn random() -> Self {
        Self(fastrand::u64(1..))
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl FromStr for GrantId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}
