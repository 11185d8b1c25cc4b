//! The errors of the crate, and what a caller can do about them.

mod redis;

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

pub use self::redis::{RedisError, RedisErrorKind};
use crate::{Key, Loss};

/// Why an operation failed.
///
/// A lock that another holds ([`NotObtained`](Error::NotObtained)) and an unknown outcome ([`Redis`](Error::Redis)) are
/// never confused. After the latter, the operation may or may not have taken effect on the server, and the locker
/// undoes in the background whatever it may have left there.
///
/// # Examples
///
/// ```
/// use tenure::{Error, Locker};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let locker = Locker::in_memory();
/// let first = locker.lock("job").await?;
/// match locker.try_lock("job").await {
///     Err(Error::NotObtained { key, .. }) => println!("{key} is busy"),
///     Err(error) if error.is_transient() => println!("try again later: {error}"),
///     other => drop(other?),
/// }
/// # first.release().await
/// # }
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another holds the lock, as the server last reported, and the request does not wait longer. For a
    /// [fair](crate::LockRequest::fair) request, and for a [reader](crate::Locker::read) or a
    /// [permit](crate::Locker::permit), also: it is another's turn.
    ///
    /// If the server did not report that, the error is [`Redis`](Error::Redis).
    #[error("`{key}` is held by another (attempts: {attempts}, waited: {waited:.1?}); try later or wait longer")]
    NotObtained {
        /// The key that was held; of several, the first one that was found held.
        key: Key,
        /// How often this request tried to take the lock. Zero for a request that waited behind another one of this
        /// process, which tried for both.
        attempts: u32,
        /// The time from the first attempt until the request gave up.
        waited: Duration,
    },

    /// The caller no longer holds the lock.
    #[error("`{key}` is no longer held by this owner: {loss}")]
    NotHeld {
        /// The key in question; of several, the first.
        key: Key,
        /// How the lock ended.
        loss: Loss,
    },

    /// The lock was lost while it was in use; stop the work that it protects.
    #[error("the lock was lost: {0}")]
    Lost(Loss),

    /// No majority of a quorum's nodes has run the operation: too many could not be reached, refused, or have been up
    /// for too short a time to vote. If others hold the lock, the error is [`NotObtained`](Error::NotObtained), as
    /// always.
    #[error("{needed} of {} nodes needed, {granted} granted: {}", 2 * needed - 1, Nodes(nodes))]
    Quorum {
        /// How many nodes make a majority.
        needed: usize,
        /// How many nodes ran the operation.
        granted: usize,
        /// The errors of the other nodes, as far as they contributed to the failure.
        nodes: Vec<NodeError>,
    },

    /// A node of a quorum was started less than the [restart window](crate::LockerBuilder::restart_window) ago.
    ///
    /// It can't tell whether it has forgotten locks or is new. So a quorum of new nodes grants nothing for a window.
    #[error(
        "it was started less than a restart window ago and may have forgotten locks; it votes again in {remaining:?}"
    )]
    NotVoting {
        /// The time until it votes again.
        remaining: Duration,
    },

    /// A node of a quorum has not accepted the number that was proposed as the fencing token.
    #[error("it refused the proposed fencing token: {0}")]
    Outbid(&'static str),

    /// The URL names no server that can be connected to, or has a part that would be ignored. Nothing was sent.
    ///
    /// The text names the part of the URL that is wrong. It never contains a password.
    #[error("invalid URL: {0}")]
    InvalidUrl(Cow<'static, str>),

    /// These nodes can't form a quorum. Nothing was sent.
    #[error("invalid nodes: {0}")]
    InvalidNodes(&'static str),

    /// The server granted the lock so late that too little of its ttl was left. It has been released again.
    #[error("the server replied so late that too little of the ttl was left; use a longer ttl")]
    ValidityExpired,

    /// Fewer replicas than [required](crate::LockerBuilder::min_replicas) acknowledged the lock, or its renewal, in
    /// time. A new lock has been released again; a lock that was held before remains held until its deadline.
    #[error("{acknowledged} of {needed} replicas acknowledged it in time; check the other replicas, or require fewer")]
    NotReplicated {
        /// How many have to acknowledge it.
        needed: usize,
        /// How many are known to have acknowledged it.
        acknowledged: usize,
    },

    /// This kind of server does not support the operation.
    #[error("not supported here: {0}")]
    Unsupported(&'static str),

    /// Keys of one request lie in different slots of the cluster.
    #[error("the keys lie in different slots of the cluster; give them one hash tag, as in `{{invoices}}:1`")]
    CrossSlot,

    /// No lock can have this key. Nothing was sent.
    #[error("invalid key: {0}")]
    InvalidKey(&'static str),

    /// No lock can have this ttl. Nothing was sent.
    #[error("invalid ttl: {0}")]
    InvalidTtl(&'static str),

    /// No lock can be renewed at this interval. Nothing was sent.
    #[error("invalid renewal interval: {0}")]
    InvalidRenewal(&'static str),

    /// No lock can be held for this time: the bound that [`hold_at_least`](crate::LockRequest::hold_at_least) or
    /// [`hold_at_most`](crate::LockRequest::hold_at_most) sets can't work. Nothing was sent.
    #[error("invalid bound: {0}")]
    InvalidHold(&'static str),

    /// No permit can have this limit. Nothing was sent.
    #[error("invalid limit: {0}")]
    InvalidLimit(&'static str),

    /// This text is not a token.
    #[error("invalid token: {0}")]
    InvalidToken(&'static str),

    /// This text is not a lease.
    #[error("invalid lease: {0}")]
    InvalidLease(&'static str),

    /// The [`WatchDog`](crate::WatchDog) already watches a lock with this key.
    #[error("`{key}` is watched already; unwatch or release it first")]
    AlreadyWatched {
        /// The key in question; of several, the first that is watched.
        key: Key,
    },

    /// [`Locker::close`](crate::Locker::close) was called before the operation, or while it ran.
    ///
    /// A [client of your own](crate::Locker::new) that has quit is another matter: that is [`Redis`](Error::Redis).
    #[error("the locker is closed")]
    Closed,

    /// [`WatchDog::shutdown`](crate::WatchDog::shutdown) was called before the operation, or while it ran; or the lock
    /// was unwatched or released meanwhile.
    #[error("the watchdog was shut down, or no longer watches the lock")]
    ShutDown,

    /// The future was polled outside a tokio runtime, and has sent nothing; or the system has no thread left for an
    /// [isolated](crate::LockerBuilder::isolated) locker.
    ///
    /// Every call that may contact the server needs a runtime, whose clock it uses, even if the locker is isolated.
    /// That runtime needs its timer, and for a server I/O as well (`enable_all`, which `#[tokio::main]` does): where
    /// one was not enabled, tokio itself panics, and offers no way to find out before.
    #[error("no tokio runtime: poll the future inside one; an isolated locker also needs a thread of its own")]
    NoRuntime,

    /// The server refused the operation, could not be reached, or did not reply in time.
    #[error("redis: {0}")]
    Redis(RedisError),
}

// No error has a source: its own text contains that of the errors it consists of, and a chain would repeat it.

impl From<Loss> for Error {
    fn from(loss: Loss) -> Self {
        Self::Lost(loss)
    }
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        Self::Redis(error)
    }
}

impl Error {
    /// Returns whether the same call may succeed a little later, without a change to anything but the server's state.
    ///
    /// That is so for timeouts, lost connections, replicas that are behind, and servers that are loading, read-only,
    /// busy, out of memory, electing a primary or at their limit of clients. It is not so for a certificate or a
    /// password that is not accepted.
    ///
    /// [`Locker::lock`](crate::Locker::lock) keeps waiting through all transient errors. The failure of a quorum is
    /// transient if a majority is possible without the nodes whose own errors are not.
    ///
    /// ```
    /// use tenure::{Error, RedisError, RedisErrorKind};
    ///
    /// let loading = RedisError::new(RedisErrorKind::Unknown, "LOADING Redis loads the dataset");
    /// assert!(Error::from(loading).is_transient());
    /// assert!(!Error::Closed.is_transient());
    /// ```
    pub fn is_transient(&self) -> bool {
        let error = match self {
            Self::Redis(error) => error,
            Self::NotVoting { .. } | Self::Outbid(_) | Self::NotReplicated { .. } => return true,
            Self::Quorum { needed, nodes, .. } => {
                // Of 2 * needed - 1 nodes, needed are left.
                return nodes.iter().filter(|node| !node.error.is_transient()).count() < *needed;
            }
            _ => return false,
        };
        match self.code() {
            Some(code) => TRANSIENT_CODES.contains(&code) || error.is_about_too_many_clients(),
            None => match error.kind() {
                RedisErrorKind::Io
                | RedisErrorKind::Timeout
                | RedisErrorKind::Canceled
                | RedisErrorKind::Routing
                | RedisErrorKind::Cluster
                | RedisErrorKind::Sentinel
                | RedisErrorKind::Backpressure
                | RedisErrorKind::Unknown => true,
                RedisErrorKind::Config
                | RedisErrorKind::Auth
                | RedisErrorKind::Protocol
                | RedisErrorKind::Parse
                | RedisErrorKind::Tls => false,
            },
        }
    }

    /// Returns the code of the server's refusal, such as `WRONGTYPE`, `NOPERM`, `READONLY` or `OOM`.
    ///
    /// ```
    /// use tenure::{Error, RedisError, RedisErrorKind};
    ///
    /// let refused = RedisError::new(RedisErrorKind::Unknown, "NOPERM no permissions for that");
    /// assert_eq!(Error::from(refused).code(), Some("NOPERM"));
    /// ```
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Redis(error) => error.code(),
            _ => None,
        }
    }

    /// Returns whether the server has refused the command when it was last sent. Unless the client may have sent it
    /// before, it has surely not run. After any other failure the outcome is unknown, even after a timeout whose text
    /// explains why there is no connection.
    pub(crate) fn is_refusal(&self) -> bool {
        self.refusal().is_some()
    }

    /// Returns the code of a refusal of the command. [`code`](Self::code) may be that of another one, after which the
    /// outcome of this one is unknown.
    pub(crate) fn refusal(&self) -> Option<&str> {
        self.code().filter(|_| !self.is_timeout())
    }

    /// Returns whether the operation has surely not run: it was refused whenever it was sent, or never sent.
    pub(crate) fn has_not_run(&self) -> bool {
        if let Self::Quorum { needed, granted: 0, nodes } = self {
            // On none of them: there are twice as many, less one, as are needed.
            return nodes.len() == 2 * needed - 1 && nodes.iter().all(|node| node.error.has_not_run());
        }
        let may_have_run = matches!(self, Self::Redis(error) if error.may_have_run());
        (self.is_refusal() && !may_have_run) || self.was_not_sent()
    }

    /// Returns whether the operation was surely never sent: there was no connection from its beginning to its end.
    pub(crate) fn was_not_sent(&self) -> bool {
        matches!(self, Self::Redis(error) if error.details().ends_with(NOT_SENT))
    }

    /// Returns whether the cluster refused the command because its keys are on another node, or on two. It has not run.
    pub(crate) fn is_redirection(&self) -> bool {
        matches!(self.refusal(), Some("ASK" | "MOVED" | "TRYAGAIN"))
    }

    pub(crate) fn is_timeout(&self) -> bool {
        matches!(self, Self::Redis(error) if error.kind() == RedisErrorKind::Timeout)
    }

    pub(crate) fn late_release() -> Self {
        let text = "a release of the same token was given up on, and the server may still run it";
        RedisError::new(RedisErrorKind::Timeout, text).into()
    }

    pub(crate) fn timeout() -> Self {
        RedisError::new(RedisErrorKind::Timeout, "the server did not reply in time").into()
    }
}

/// The error of one node of a quorum.
///
/// ```
/// # fn example(failed: tenure::Error) {
/// if let tenure::Error::Quorum { nodes, .. } = failed {
///     for node in nodes {
///         eprintln!("{}: {}", node.address, node.error);
///     }
/// }
/// # }
/// ```
#[derive(Clone, Debug, thiserror::Error)]
#[error("{address}: {error}")]
#[non_exhaustive]
pub struct NodeError {
    /// The address of the node: `host:port`, or the path of its socket.
    pub address: String,
    /// Its refusal, or why it could not be reached.
    pub error: Error,
}

/// The nodes' errors, one after the other.
struct Nodes<'a>(&'a [NodeError]);

impl fmt::Display for Nodes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no node reported an error");
        }
        let mut separator = "";
        self.0.iter().try_for_each(|node| write!(f, "{}{node}", std::mem::replace(&mut separator, "; ")))
    }
}

/// The codes of refusals after which the server is expected to recover.
const TRANSIENT_CODES: [&str; 14] = [
    "ASK",
    "BUSY",
    "CLUSTERDOWN",
    "LATE",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "MOVED",
    "NOGOODSLAVE",
    "NOREPLICAS",
    "NOSCRIPT",
    "OOM",
    "READONLY",
    "TRYAGAIN",
];

/// The end of the text of an error for an operation that was never sent.
pub(crate) const NOT_SENT: &str = " (nothing was sent)";

#[cfg(test)]
mod tests {
    use super::*;

    fn server_said(details: &'static str) -> Error {
        RedisError::new(RedisErrorKind::Unknown, details).into()
    }

    #[test]
    fn a_server_that_will_recover_is_transient() {
        for said in [
            "LOADING Redis is loading",
            "READONLY You can't write",
            "OOM command not allowed",
            "BUSY Redis",
            "ERR max number of clients reached",
        ] {
            assert!(server_said(said).is_transient(), "{said}");
        }
        assert!(Error::timeout().is_transient());
    }

    fn quorum(errors: Vec<Error>) -> Error {
        let nodes = errors.into_iter().zip(1..).map(|(error, n)| NodeError { address: format!("node:{n}"), error });
        Error::Quorum { needed: 2, granted: 1, nodes: nodes.collect() }
    }

    #[test]
    fn a_quorum_says_who_failed_and_how() {
        let failed = quorum(vec![Error::timeout(), server_said("WRONGTYPE Operation")]);
        let said = "2 of 3 nodes needed, 1 granted: node:1: redis: Timeout Error: the server did not reply in time; \
                    node:2: redis: Unknown Error: WRONGTYPE Operation";
        assert_eq!(failed.to_string(), said);
    }

    #[test]
    fn nothing_is_told_twice() {
        let key = Key::from("k");
        let node = NodeError { address: "node:1".into(), error: Error::timeout() };
        let errors: [Box<dyn std::error::Error>; 5] = [
            Box::new(Error::timeout()),
            Box::new(Error::Lost(Loss::Taken)),
            Box::new(Error::NotHeld { key, loss: Loss::Missing }),
            Box::new(quorum(vec![Error::timeout()])),
            Box::new(node),
        ];
        for error in errors {
            let source = error.source().map(ToString::to_string);
            assert!(source.is_none_or(|source| !error.to_string().contains(&source)), "{error}");
        }
    }

    #[test]
    fn what_was_not_sent_is_known_by_its_end() {
        let said = |details: String| Error::from(RedisError::new(RedisErrorKind::Timeout, details));
        assert!(said(format!("connection refused{NOT_SENT}")).was_not_sent());
        assert!(!said("connection refused".to_owned()).was_not_sent());
        assert!(!Error::Closed.was_not_sent());
        // Of a quorum, by those of all nodes.
        let not_sent = || said(format!("connection refused{NOT_SENT}"));
        let of_nodes = |errors: Vec<Error>, granted| match quorum(errors) {
            Error::Quorum { needed, nodes, .. } => Error::Quorum { needed, granted, nodes },
            other => other,
        };
        assert!(of_nodes(vec![not_sent(), not_sent(), not_sent()], 0).has_not_run());
        assert!(!of_nodes(vec![not_sent(), not_sent()], 1).has_not_run());
        assert!(!of_nodes(vec![not_sent(), not_sent()], 0).has_not_run());
        assert!(!of_nodes(vec![not_sent(), not_sent(), Error::timeout()], 0).has_not_run());
    }

    #[test]
    fn a_quorum_may_recover_while_a_majority_may() {
        let for_good = || server_said("WRONGTYPE Operation");
        let resting = || Error::NotVoting { remaining: Duration::from_secs(9) };
        assert!(quorum(vec![Error::timeout(), for_good()]).is_transient());
        assert!(quorum(vec![resting(), resting(), resting()]).is_transient());
        assert!(!quorum(vec![for_good(), for_good()]).is_transient());
        assert!(!quorum(vec![for_good()]).is_refusal());
    }

    #[test]
    fn a_refusal_is_not_transient_and_has_a_name() {
        for (said, code) in [("NOPERM this user", "NOPERM"), ("WRONGTYPE Operation", "WRONGTYPE"), ("ERR no", "ERR")] {
            assert!(!server_said(said).is_transient(), "{said}");
            assert_eq!(server_said(said).code(), Some(code));
        }
        assert_eq!(Error::timeout().code(), None);
    }
}
