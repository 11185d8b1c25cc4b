//! The error of a Redis client, in words of our own: whichever client drives the connection, its errors become these.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// Why a Redis or Valkey server refused an operation, or could not be asked.
///
/// Its text names the server, as far as that is known, and never contains a password or a token. The error of the
/// client under tenure, if there was one, is its [`source`](Error::source).
///
/// # Examples
///
/// ```
/// use tenure::{Error, RedisError, RedisErrorKind};
///
/// # fn example(error: Error) {
/// if let Error::Redis(error) = &error {
///     match (error.code(), error.kind()) {
///         (Some("NOPERM"), _) => eprintln!("the user may not do that: {error}"),
///         (None, RedisErrorKind::Timeout) => eprintln!("slow, or away: {error}"),
///         _ => eprintln!("{error}"),
///     }
/// }
/// # }
/// ```
#[derive(Clone)]
pub struct RedisError {
    kind: RedisErrorKind,
    text: Cow<'static, str>,
    source: Option<Arc<dyn Error + Send + Sync>>,
    /// The client may have sent the command before, and the server may have run it then.
    may_have_run: bool,
}

/// What kind of failure a [`RedisError`] is. See there for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisErrorKind {
    /// The settings of the client can't work. Waiting doesn't help.
    Config,
    /// The server did not accept the user or the password.
    Auth,
    /// There was no server to send the command to.
    Routing,
    /// The connection could not be made, or broke.
    Io,
    /// What replied is no Redis server, or the reply has another form than it must have.
    Protocol,
    /// A reply could not be parsed.
    Parse,
    /// There is no TLS connection, for a reason that an operator has to change.
    Tls,
    /// The client has dropped the command.
    Canceled,
    /// There was no reply in time.
    Timeout,
    /// The cluster has changed, or is not available.
    Cluster,
    /// The Sentinels know no primary, or can't be asked.
    Sentinel,
    /// Too many commands are waiting already.
    Backpressure,
    /// Any other failure, in particular a refusal of the server that has a [code](RedisError::code).
    Unknown,
}

impl RedisErrorKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Config => "Config Error",
            Self::Auth => "Authentication Error",
            Self::Routing => "Routing Error",
            Self::Io => "IO Error",
            Self::Protocol => "Protocol Error",
            Self::Parse => "Parse Error",
            Self::Tls => "TLS Error",
            Self::Canceled => "Canceled",
            Self::Timeout => "Timeout Error",
            Self::Cluster => "Cluster Error",
            Self::Sentinel => "Sentinel Error",
            Self::Backpressure => "Backpressure",
            Self::Unknown => "Unknown Error",
        }
    }
}

impl fmt::Display for RedisErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl RedisError {
    /// Creates an error, as for a test of code that handles one. The text of a refusal begins with its code.
    ///
    /// ```
    /// use tenure::{Error, RedisError, RedisErrorKind};
    ///
    /// let loading = RedisError::new(RedisErrorKind::Unknown, "LOADING Redis loads the dataset");
    /// assert!(Error::from(loading).is_transient());
    /// ```
    pub fn new(kind: RedisErrorKind, text: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, text: text.into(), source: None, may_have_run: false }
    }

    /// Adds the error of the client.
    pub(crate) fn with_source(self, source: impl Error + Send + Sync + 'static) -> Self {
        Self { source: Some(Arc::new(source)), ..self }
    }

    /// Returns the kind of the failure. See [`RedisError`] for an example.
    pub fn kind(&self) -> RedisErrorKind {
        self.kind
    }

    /// Returns the code of the server's refusal, such as `WRONGTYPE`, `NOPERM`, `READONLY` or `OOM`. See [`RedisError`]
    /// for an example.
    pub fn code(&self) -> Option<&str> {
        let word = self.text.split_ascii_whitespace().next()?;
        let is_code = word.len() > 1 && word.bytes().all(|b| b.is_ascii_uppercase());
        is_code.then_some(word)
    }

    /// Returns whether the server has refused the connection because it has as many clients as it may. That has no code
    /// of its own.
    pub(crate) fn is_about_too_many_clients(&self) -> bool {
        self.text.starts_with("ERR max number of clients")
    }

    /// Returns the text, without the kind.
    pub(crate) fn details(&self) -> &str {
        &self.text
    }

    pub(crate) fn change_kind(&mut self, kind: RedisErrorKind) {
        self.kind = kind;
    }

    /// Returns whether the server may have run the command, although it refused it when it was last sent.
    pub(crate) fn may_have_run(&self) -> bool {
        self.may_have_run
    }

    /// For the refusal of a command that the client may have sent before.
    pub(crate) fn of_last_run(self) -> Self {
        Self { may_have_run: true, ..self }
    }

    /// Replaces the text by a more helpful one that says the same.
    pub(crate) fn with_text(self, text: impl Into<Cow<'static, str>>) -> Self {
        Self { text: text.into(), ..self }
    }

    /// Leaves out the client's error, whose text may repeat what ours must not show.
    pub(crate) fn without_source(self) -> Self {
        Self { source: None, ..self }
    }
}

impl fmt::Display for RedisError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.text)
    }
}

impl fmt::Debug for RedisError {
    /// Leaves out the source, which says the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisError").field("kind", &self.kind).field("text", &self.text).finish()
    }
}

impl Error for RedisError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn Error + 'static))
    }
}
