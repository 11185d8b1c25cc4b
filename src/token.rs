//! The secret that identifies the owner of a lock.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;

use crate::Error;

/// The owner's secret of one held lock.
///
/// The server stores it at the lock's key, and renews or releases the lock only for a request with the same token.
/// Every request gets a new random token; choose your own with [`LockRequest::token`](crate::LockRequest::token) if the
/// same owner must be able to obtain its lock again, for example after a restart.
///
/// Not to be confused with the *fencing* token, a number that grows with every new holder
/// ([`LockGuard::fencing_token`](crate::LockGuard::fencing_token)).
///
/// Its `Debug` form shows nothing: whoever knows a token can release the lock.
///
/// # Examples
///
/// ```
/// use tenure::Token;
///
/// let fresh = Token::random();
/// assert_eq!(fresh.as_str().len(), 32);
///
/// let mine: Token = "worker-7".parse()?;
/// assert_eq!(mine.as_str(), "worker-7");
/// # Ok::<(), tenure::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Token {
    bytes: Bytes,
    /// What is shown of it if another library has stored bytes that are no text.
    shown: Option<Arc<str>>,
}

impl Token {
    /// The greatest length of a token in bytes. See [`Token`] for an example.
    pub const MAX_LEN: usize = 1024;

    /// Creates a token of 128 random bits from the operating system, as 32 hexadecimal digits. See [`Token`] for an
    /// example.
    pub fn random() -> Self {
        let mut bits = [0; 16];
        if getrandom::fill(&mut bits).is_err() {
            // No system that runs tokio is known to fail here. If one does, the keys of the standard library's hasher
            // are the next best source: they differ in every process and at every call.
            let half = || RandomState::new().build_hasher().finish().to_le_bytes();
            bits = [half(), half()].concat().try_into().unwrap_or(bits);
        }
        // Formatted by hand, which takes a third less time than `format!`.
        let digit = |half| if half < 10 { b'0' + half } else { b'a' + half - 10 };
        let digits = bits.map(|byte| [byte >> 4, byte & 15].map(digit));
        // One allocation. Copied, the digits would be in one and their count of references in another.
        Self::of(Bytes::from_owner(Digits(digits)))
    }

    fn of(bytes: Bytes) -> Self {
        Self { bytes, shown: None }
    }

    /// Reads the content of a key as a token. Other libraries may have stored any bytes there.
    pub(crate) fn from_server(bytes: &[u8]) -> Self {
        let shown = std::str::from_utf8(bytes).is_err().then(|| String::from_utf8_lossy(bytes).into());
        Self { bytes: Bytes::copy_from_slice(bytes), shown }
    }

    /// Returns what a key holds that stays taken although nobody holds the lock: no token, as it has newlines.
    pub(crate) fn nobody() -> Self {
        Self::of(Bytes::from_static(b"\n\nh"))
    }

    /// Returns whether it looks like one that [`random`](Self::random) has created.
    pub(crate) fn is_random(&self) -> bool {
        self.bytes.len() == 32 && self.bytes.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// Returns the token as it is sent, without a copy.
    pub(crate) fn to_bytes(&self) -> Bytes {
        self.bytes.clone()
    }

    /// Returns the token as the server stores it. See [`Token`] for an example.
    ///
    /// Other libraries may store bytes that are no text. Of those this returns a text to show, with `�` in place of
    /// what is not UTF-8; the token itself keeps the bytes.
    pub fn as_str(&self) -> &str {
        match &self.shown {
            Some(shown) => shown,
            // It is text.
            None => std::str::from_utf8(&self.bytes).unwrap_or_default(),
        }
    }
}

impl FromStr for Token {
    type Err = Error;

    /// Takes any text of 1 to [`MAX_LEN`](Token::MAX_LEN) bytes without a newline.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidToken`] for any other text. At the server a newline separates the token from the metadata.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.is_empty() {
            return Err(Error::InvalidToken("it is empty"));
        }
        if text.len() > Self::MAX_LEN {
            return Err(Error::InvalidToken("it is longer than 1024 bytes"));
        }
        if text.contains('\n') {
            return Err(Error::InvalidToken("it contains a newline"));
        }
        Ok(Self::of(Bytes::copy_from_slice(text.as_bytes())))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The text of a random token.
struct Digits([[u8; 2]; 16]);

impl AsRef<[u8]> for Digits {
    fn as_ref(&self) -> &[u8] {
        self.0.as_flattened()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_tokens_differ_and_are_32_hex_digits() {
        let (one, other) = (Token::random(), Token::random());
        assert_ne!(one, other);
        assert_eq!(one.as_str().len(), 32);
        assert!(one.as_str().bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn what_would_blur_into_metadata_is_refused() {
        for bad in ["", "job\n1", "\n", &"x".repeat(1025)] {
            assert!(matches!(bad.parse::<Token>(), Err(Error::InvalidToken(_))), "{bad:?}");
        }
    }

    #[test]
    fn bytes_of_another_library_are_kept_and_shown_as_text() {
        let [one, other] = [&b"a\xff"[..], b"a\xfe"].map(Token::from_server);
        assert_ne!(one, other);
        assert_eq!((one.as_str(), &*one.to_bytes()), ("a\u{fffd}", &b"a\xff"[..]));
        assert_eq!(Token::from_server(b"worker-7"), "worker-7".parse().unwrap());
    }

    #[test]
    fn debug_shows_no_token() {
        let token: Token = "secret".parse().unwrap();
        assert!(!format!("{token:?}").contains("secret"));
    }
}
