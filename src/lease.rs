//! A held lock as plain data: what identifies it, without a guard.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use crate::hold::{GrantId, Owned};
use crate::mode::Mode;
use crate::{Error, Key, Token};

/// A held lock as plain data, without a guard: its keys and token, its ttl and fencing token.
///
/// A lease renews nothing. [`LockGuard::into_lease`](crate::LockGuard::into_lease) returns one, and [`new`](Lease::new)
/// creates one for a token that came from elsewhere. [`Locker::adopt`](crate::Locker::adopt) turns it back into a
/// guard, in this process or another. Its keys don't include the locker's [prefix](crate::LockerBuilder::prefix).
///
/// # Text
///
/// [`Display`](fmt::Display) and [`FromStr`] convert it to one word of letters, digits and `:-._~%`, fit for an
/// environment variable or the payload of a job, and back. The word begins with its version. It contains the token:
/// anybody who reads it can release the lock. `Debug` does not show the token.
///
/// A lease also keeps what kind of guard it came from: that of a lock, of a [reader](crate::Locker::read), or of a
/// [permit](crate::Locker::permit). The text of the latter two has a version of its own, which versions of this crate
/// that know only locks refuse.
///
/// With the feature `serde`, a lease is serialised as that text.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::Lease;
///
/// let lease = Lease::new("invoices:42", "worker-7".parse()?, Duration::from_secs(30));
/// assert_eq!(lease.to_string(), "tenure:1:30000::worker-7:invoices%3A42");
/// assert_eq!(lease.to_string().parse::<Lease>()?, lease);
/// # Ok::<(), tenure::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    owned: Owned,
    ttl: Duration,
    fencing_token: Option<u64>,
}

impl Lease {
    /// Creates a lease from its parts, for a token that came from elsewhere.
    ///
    /// Nothing is checked here: the functions that use the lease refuse one that can't work.
    ///
    /// The lease has only the token. It doesn't know which guard holds the lock by it, and that guard may be alive. So
    /// a guard that [adopted](crate::Locker::adopt) the lease ends the lock only by an explicit
    /// [`release`](crate::LockGuard::release); when it is dropped, the lock stays until its ttl ends. A lease that came
    /// from a guard has no such limit.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tenure::{Lease, Token};
    ///
    /// let lease = Lease::new("k", Token::random(), Duration::from_secs(30));
    /// assert_eq!(lease.key().as_bytes(), b"k");
    /// assert_eq!(lease.keys().len(), 1);
    /// assert_eq!(lease.ttl(), Duration::from_secs(30));
    /// assert_eq!(lease.token().as_str().len(), 32);
    /// assert_eq!(lease.fencing_token(), None);
    /// ```
    pub fn new(key: impl Into<Key>, token: Token, ttl: Duration) -> Self {
        Self::from_parts(
            Owned {
                keys: Box::new([key.into()]),
                token,
                own_token: false,
                grant: Some(GrantId::UNKNOWN),
                mode: Mode::Exclusive,
            },
            ttl,
            None,
        )
    }

    pub(crate) fn from_parts(mut owned: Owned, ttl: Duration, fencing_token: Option<u64>) -> Self {
        // The token can be read from the lease, so that others may use it.
        owned.own_token = false;
        // Rounded to the unit of the server and of the text, so that neither changes it.
        let millis = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        Self { owned, ttl: Duration::from_millis(millis), fencing_token }
    }

    /// Returns the locked key; the first one if there are several. See [`new`](Lease::new) for an example.
    pub fn key(&self) -> Key {
        self.owned.key()
    }

    /// Returns all locked keys. See [`new`](Lease::new) for an example.
    pub fn keys(&self) -> &[Key] {
        &self.owned.keys
    }

    /// Returns the token: the secret of the holder. See [`new`](Lease::new) for an example.
    pub fn token(&self) -> &Token {
        &self.owned.token
    }

    /// Returns how long the server keeps the lock after each renewal, in whole milliseconds. See [`new`](Lease::new)
    /// for an example.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Returns the [fencing token](crate::LockGuard::fencing_token), if it is known. See [`new`](Lease::new) for an
    /// example.
    pub fn fencing_token(&self) -> Option<u64> {
        self.fencing_token
    }

    pub(crate) fn owned(&self) -> &Owned {
        &self.owned
    }
}

/// The beginning of the text of a lock's lease.
const OF_LOCK: &str = "tenure:1:";

/// The beginning of the text of a shared lease. An earlier version of the crate refuses it, as it would take the lease
/// for that of a lock.
const OF_SHARE: &str = "tenure:2:";

const READ: &str = "read";
const PERMIT: &str = "permit";

/// All characters except those that need no escaping anywhere (RFC 3986's unreserved ones). So colons are only
/// separators.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

impl fmt::Display for Lease {
    /// Writes `tenure:1:` ttl in ms `:` fencing token or nothing `:` token `:` key, and more keys, each after a colon.
    /// The fencing token is followed by `~` and the id of the grant, unless that is unknown. The lease of a reader
    /// begins with `tenure:2:read:` instead, that of a permit with `tenure:2:permit:`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.owned.mode {
            Mode::Exclusive => f.write_str(OF_LOCK)?,
            Mode::Read => write!(f, "{OF_SHARE}{READ}:")?,
            Mode::Permit => write!(f, "{OF_SHARE}{PERMIT}:")?,
        }
        write!(f, "{}:", self.ttl.as_millis())?;
        if let Some(fence) = self.fencing_token {
            write!(f, "{fence}")?;
        }
        match self.owned.grant {
            Some(GrantId::UNKNOWN) => {}
            Some(grant) => write!(f, "~{grant}")?,
            None => f.write_str("~-")?,
        }
        write!(f, ":{}", percent_encode(&self.token().to_bytes(), ESCAPED))?;
        self.keys().iter().try_for_each(|key| write!(f, ":{}", percent_encode(key.as_bytes(), ESCAPED)))
    }
}

impl FromStr for Lease {
    type Err = Error;

    /// # Errors
    ///
    /// [`Error::InvalidLease`] if the text is not a lease, or one of a later version.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (mode, rest) = match (text.strip_prefix(OF_LOCK), text.strip_prefix(OF_SHARE)) {
            (Some(rest), _) => (Mode::Exclusive, rest),
            (None, Some(rest)) => match rest.split_once(':') {
                Some((READ, rest)) => (Mode::Read, rest),
                Some((PERMIT, rest)) => (Mode::Permit, rest),
                _ => return Err(Error::InvalidLease("it is neither a reader's nor a permit's")),
            },
            (None, None) => {
                return Err(Error::InvalidLease(match text.starts_with("tenure:") {
                    true => "this version of tenure doesn't know its version",
                    false => "it does not begin with `tenure:`",
                }));
            }
        };
        let mut parts = rest.split(':');
        let mut part = || parts.next().ok_or(Error::InvalidLease("it ends too early"));
        let ttl =
            part()?.parse().map(Duration::from_millis).map_err(|_| Error::InvalidLease("its ttl is not a number"))?;
        let fence = part()?;
        let (fence, grant) = fence.split_once('~').map_or((fence, None), |(fence, grant)| (fence, Some(grant)));
        let fencing_token = match fence {
            "" => None,
            fence => Some(fence.parse().map_err(|_| Error::InvalidLease("its fencing token is not a number"))?),
        };
        let grant = match grant {
            None => Some(GrantId::UNKNOWN),
            Some("-") => None,
            Some(grant) => Some(grant.parse().map_err(|_| Error::InvalidLease("its grant is not a number"))?),
        };
        let token =
            percent_decode_str(part()?).decode_utf8().map_err(|_| Error::InvalidLease("its token is not text"))?;
        let token = token.parse().map_err(|_| Error::InvalidLease("its token is invalid"))?;
        let keys: Box<[Key]> = parts.map(|key| percent_decode_str(key).collect::<Vec<u8>>().into()).collect();
        Key::validate_all(&keys).map_err(|_| Error::InvalidLease("it has no key, an empty key, or a key twice"))?;
        if mode.is_shared() && (keys.len() > 1 || grant == Some(GrantId::UNKNOWN)) {
            return Err(Error::InvalidLease("it shares several keys, or its grant is missing"));
        }
        Ok(Self::from_parts(Owned { keys, token, own_token: false, grant, mode }, ttl, fencing_token))
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("keys", &self.keys())
            .field("mode", &self.owned.mode)
            .field("ttl", &self.ttl)
            .field("fencing_token", &self.fencing_token)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Lease {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Lease {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_lease_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "does not begin"),
            ("redis:1:1::t:k", "does not begin"),
            ("tenure:3:1::t:k", "version"),
            ("tenure:2:1::t:k", "neither"),
            ("tenure:2:lock:5:1~-:t:k", "neither"),
            ("tenure:2:read", "neither"),
            ("tenure:2:read:", "not a number"),
            ("tenure:2:read:5:1:t:k", "grant is missing"),
            ("tenure:2:permit:5:1~-:t:k:l", "several keys"),
            ("tenure:1:", "not a number"),
            ("tenure:1:-5::t:k", "not a number"),
            ("tenure:1:99999999999999999999::t:k", "not a number"),
            ("tenure:1:5", "too early"),
            ("tenure:1:5:x:t:k", "not a number"),
            ("tenure:1:5:1", "too early"),
            ("tenure:1:5:1:%FF:k", "not text"),
            ("tenure:1:5:1::k", "is invalid"),
            ("tenure:1:5:1:a%0Ab:k", "is invalid"),
            ("tenure:1:5:1:t", "no key"),
            ("tenure:1:5:1:t:", "empty"),
            ("tenure:1:5:1:t:k:k", "twice"),
        ] {
            let refused = text.parse::<Lease>().unwrap_err();
            assert!(
                matches!(&refused, Error::InvalidLease(_)) && refused.to_string().contains(reason),
                "{text}: {refused}"
            );
        }
    }

    #[test]
    fn the_text_of_a_shared_lease_is_read_back() {
        for (mode, text) in
            [(Mode::Read, "tenure:2:read:5:7~-:t:k%3A1"), (Mode::Permit, "tenure:2:permit:5:~1f:t:k%3A1")]
        {
            let lease: Lease = text.parse().unwrap();
            assert_eq!((lease.owned.mode, lease.to_string().as_str()), (mode, text));
        }
    }

    #[test]
    fn debug_shows_no_token() {
        let lease = Lease::new("k", "secret".parse().unwrap(), Duration::from_secs(1));
        assert!(!format!("{lease:?}").contains("secret"));
    }
}
