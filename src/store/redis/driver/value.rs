//! What the server replies, whichever client has received it.

use bytes::Bytes;

/// The reply to a command, unless it is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Value {
    Nil,
    Integer(i64),
    /// A string of either kind. Lua's status replies are strings, too.
    Bytes(Bytes),
    /// A map is an array of its keys, each followed by its value.
    Array(Vec<Self>),
}

impl Value {
    /// Returns a number, or one that is written as text.
    pub(in super::super) fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Integer(number) => Some(*number),
            Self::Bytes(text) => std::str::from_utf8(text).ok()?.parse().ok(),
            Self::Nil | Self::Array(_) => None,
        }
    }

    /// Returns a string as text. Bytes that are not UTF-8 are replaced.
    pub(in super::super) fn to_text(&self) -> Option<std::borrow::Cow<'_, str>> {
        match self {
            Self::Bytes(text) => Some(String::from_utf8_lossy(text)),
            _ => None,
        }
    }
}
