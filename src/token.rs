//! Who holds a lock: a secret that only its owner knows.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use fred::bytes_utils::Str;

use crate::Error;

/// The owner's secret of one held lock.
///
/// The server stores it at the lock's key, and renews or releases only for who presents the same one. A fresh token is
/// made for every request; bring your own with [`LockRequest::token`](crate::LockRequest::token) when the same owner
/// must be able to obtain its lock again, after a restart say.
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
pub struct Token(Str);

impl Token {
    /// The most bytes that a token may have.
    pub const MAX_LEN: usize = 1024;

    /// Makes a token of 128 random bits from the operating system, as 32 hexadecimal digits.
    pub fn random() -> Self {
        let mut bits = [0; 16];
        if getrandom::fill(&mut bits).is_err() {
            // No system that runs tokio is known to refuse. Should one do so, the standard library's hasher keys are
            // the next best thing that is different in every process and at every call.
            let half = || RandomState::new().build_hasher().finish().to_le_bytes();
            bits = [half(), half()].concat().try_into().unwrap_or(bits);
        }
        // By hand, which takes a third less than to format them.
        let digit = |half| if half < 10 { b'0' + half } else { b'a' + half - 10 };
        Self::from_server(bits.map(|byte| [byte >> 4, byte & 15].map(digit)).as_flattened())
    }

    /// What a key holds, read as a token. Other libraries may have put any bytes there: those that are no text are
    /// replaced, as this is only shown.
    pub(crate) fn from_server(bytes: &[u8]) -> Self {
        Self(String::from_utf8_lossy(bytes).into_owned().into())
    }

    /// As a client sends it, without a copy.
    pub(crate) fn to_text(&self) -> Str {
        self.0.clone()
    }

    /// The token as the server stores it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Token {
    type Err = Error;

    /// Takes any text of 1 to [`MAX_LEN`](Token::MAX_LEN) bytes without a newline.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidToken`] for any other. The newline is what ends the token where metadata follows it.
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
        Ok(Self(text.into()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
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
    fn debug_shows_no_token() {
        let token: Token = "secret".parse().unwrap();
        assert!(!format!("{token:?}").contains("secret"));
    }
}
