//! The name of a lock.

use std::collections::HashSet;
use std::fmt;

use bytes::Bytes;

use crate::Error;

/// The name of a lock: any bytes, but at least one.
///
/// It is the key at the server, after the locker's [prefix](crate::LockerBuilder::prefix). Cheap to clone.
///
/// # Reserved names
///
/// The server keeps further keys beside a lock key, in the same hash slot of a cluster. None of them may be used as a
/// lock key, or for anything else. For the key `job` they are
///
/// - `{job}:fence`, the last fencing token;
/// - `{job}:grants`, the grants of a [chosen](crate::LockRequest::token) token, which may have several;
/// - `{job}:queue` and `{job}:alive`, the line of waiters, and which of them are alive;
/// - `{job}:holders` and `{job}:shares`, the [readers](crate::Locker::read) or holders of
///   [permits](crate::Locker::permit), and what belongs to them; `{job}:intent`, the writers that wait for readers in a
///   [quorum](crate::Locker::quorum).
///
/// What the lock key itself holds is the token of the holder, alone or followed by a newline and metadata. If it begins
/// with a newline, nobody has it alone: several share it, it is reserved for the next waiter, or it stays taken for a
/// while ([`hold_at_least`](crate::LockRequest::hold_at_least)).
///
/// A key with a hash tag of its own keeps it: `{user:1}:job` has `{user:1}:job:fence`. A key that is nothing but a tag
/// gets empty braces: `{job}` has `{job}{}:fence`. A key with a `}` but without a tag gets a stand-in of four letters
/// that hash to its slot, and a tilde: `a}b` has `{jnhl}a}b:fence~`. No two keys share such a name.
///
/// # Examples
///
/// ```
/// use tenure::Key;
///
/// let key = Key::from("invoices:42");
/// assert_eq!(key.as_bytes(), b"invoices:42");
/// assert_eq!(key.to_string(), "invoices:42");
/// assert_eq!(Key::from(&b"\xff\n"[..]).to_string(), "\\xff\\n");
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Bytes);

impl Key {
    /// The greatest length of a key in bytes: the server's limit, less room for the names beside it. See [`Key`] for an
    /// example.
    pub const MAX_LEN: usize = 512 * 1024 * 1024 - 1024;

    /// Returns the key's bytes. See [`Key`] for an example.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// Refuses keys that no lock, or set of locks, can have.
    pub(crate) fn validate_all(keys: &[Self]) -> Result<(), Error> {
        if keys.is_empty() {
            return Err(Error::InvalidKey("no key was given"));
        }
        keys.iter().try_for_each(Self::validate)?;
        if keys.len() > 1 && keys.iter().collect::<HashSet<_>>().len() < keys.len() {
            return Err(Error::InvalidKey("the same key was given twice"));
        }
        Ok(())
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.0.is_empty() {
            return Err(Error::InvalidKey("it is empty"));
        }
        if self.0.len() > Self::MAX_LEN {
            return Err(Error::InvalidKey("it is longer than the server's 512 MiB"));
        }
        Ok(())
    }
}

impl From<&str> for Key {
    fn from(key: &str) -> Self {
        Self(Bytes::copy_from_slice(key.as_bytes()))
    }
}

impl From<String> for Key {
    fn from(key: String) -> Self {
        Self(key.into_bytes().into())
    }
}

impl From<&String> for Key {
    fn from(key: &String) -> Self {
        key.as_str().into()
    }
}

impl From<&[u8]> for Key {
    fn from(key: &[u8]) -> Self {
        Self(Bytes::copy_from_slice(key))
    }
}

impl<const N: usize> From<&[u8; N]> for Key {
    fn from(key: &[u8; N]) -> Self {
        key.as_slice().into()
    }
}

impl From<Vec<u8>> for Key {
    fn from(key: Vec<u8>) -> Self {
        Self(key.into())
    }
}

impl From<&Self> for Key {
    fn from(key: &Self) -> Self {
        key.clone()
    }
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Key {
    /// Writes text as it is, except control characters and bytes that are not UTF-8, which it escapes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() {
                    write!(f, "{}", c.escape_default())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}
