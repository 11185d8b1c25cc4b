//! Where locks live: the contract between the crate and a server.
//!
//! **Verdicts are values, failures are errors.** `Ok` carries what the server has decided. `Err` means that nobody
//! knows: the operation may have taken effect, may yet, or never will. Unknown is never taken for refused, nor for
//! lost.
//!
//! Every operation may be repeated with the same token: a repeat after a lost answer does no harm and answers what the
//! first one would have.

#[cfg(test)]
pub(crate) mod faulty;
pub(crate) mod listen;
pub(crate) mod memory;
pub(crate) mod quorum;
pub(crate) mod redis;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use self::listen::Listening;
use crate::hold::{GrantId, Owned};
use crate::{Error, Key, Loss, Token};

/// An operation on its way.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Several of them on their way: an answer for each, in their order.
pub(crate) type Each<'a, T> = Pin<Box<dyn Future<Output = Vec<Result<T, Error>>> + Send + 'a>>;

/// The operations of a lock's life. Each ends within its `timeout`, whatever the server does.
pub(crate) trait Store: fmt::Debug + Send + Sync + 'static {
    /// Takes all keys for the token, or none.
    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired>;

    /// Makes the keys live on, if all hold the token.
    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Renewed>;

    /// How locks are renewed together, where that costs less than each by itself.
    fn together(&self) -> Option<&dyn Together> {
        None
    }

    /// Releases those of the keys that hold the token.
    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Released>;

    /// Ends a grant whose request may not have been run yet, until `latest`: what it has left at the server, if
    /// anything.
    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone>;

    /// Whether a lock can be handed over.
    fn hands_over(&self) -> bool;

    /// Releases a lock of one key, and acquires it for another owner of this process, in one step, or gives it to another
    /// process whose turn it is.
    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        timeout: Duration,
    ) -> Answer<'a, HandedOver>;

    /// Whether those who wait in different processes stand in one line for a key.
    fn has_line(&self) -> bool {
        false
    }

    /// Takes the last place in the line for the key.
    fn enter<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Gives a sign of life of this process, which waits for the key. Returns whether its place is in the line, and not
    /// next.
    fn heartbeat<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, bool> {
        Box::pin(async { Ok(true) })
    }

    /// Leaves the line for the key.
    fn leave<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// News of the key, from now on: that it may have become free.
    fn listen(&self, key: &Key) -> Listening;

    /// How long the keys will live on, the shortest of them, if all hold the token.
    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>>;

    /// Who holds the key.
    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>>;

    /// Whether an acquire that is not granted leaves nothing that others have to undo, whatever became of it. Each
    /// attempt must have a token of its own then: what is taken back may be so after the answer.
    fn settles(&self) -> bool {
        false
    }
}

/// What is done for several locks at a time. Each of them has one key.
pub(crate) trait Together: Send + Sync {
    /// Renews each as [`Store::renew`] does, to at least its ttl. Ends within `timeout`.
    fn renew_all<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], timeout: Duration) -> Each<'a, Renewed>;
}

/// What a request wants of the server.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) owned: Owned,
    pub(crate) metadata: Box<[u8]>,
    pub(crate) ttl: Duration,
    pub(crate) fenced: bool,
    /// How to stand in line with those of other processes.
    pub(crate) queueing: Queueing,
    /// Until when what was sent of it may be run. Shared by all copies.
    pub(crate) latest: Arc<Latest>,
}

/// The latest time, in ms by the server's clock, at which the server may run what was sent of one request.
///
/// A server refuses what arrives later. So once its clock has passed this, and what the request left until then is
/// undone, nothing of the request can come to pass any more.
#[derive(Debug, Default)]
pub(crate) struct Latest(AtomicU64);

impl Latest {
    /// Another request is about to be sent.
    pub(crate) fn extend(&self, until: u64) {
        self.0.fetch_max(until, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// How long a server whose clock shows `now` may still run what was sent.
    pub(crate) fn remaining(&self, now: u64) -> Option<Duration> {
        let latest = self.0.load(Ordering::Relaxed);
        // The millisecond itself is part of it.
        (now <= latest).then(|| Duration::from_millis(latest - now + 1))
    }
}

/// What a release ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The lock, whichever grants rely on it: a user asked for that.
    Lock,
    /// The owner's own grant. What others have obtained by the same token stays.
    Grant,
}

/// How a renewal sets the ttl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extending {
    /// To at least this.
    AtLeast,
    /// To exactly this; to at least this while other grants rely on the lock.
    Exactly,
    /// To at least this, and the owner's grant takes the place of this one.
    Claim { earlier: Option<GrantId> },
    /// To at least this, and the record of grants lives on as well.
    KeepRecord,
    /// To at least this, of a lock that a lease speaks of; and the record, where the lease's grant has an id. Unlike a
    /// guard's, its renewal is no word that the lock was held until now.
    Ensure,
    /// Not at all: the owner's grant ends, and this one, which it took the place of, takes its place where no other has
    /// the lock. The ttl is that of this one.
    GiveBack { earlier: Option<GrantId> },
}

impl Extending {
    /// What is done at the server.
    pub(crate) fn of(self, owned: &Owned) -> Self {
        match (self, owned.grant) {
            (Self::Ensure, None | Some(GrantId::UNKNOWN)) => Self::AtLeast,
            // A grant that has an id relies on the lock for as long as its record says.
            (Self::Ensure, Some(_)) => Self::KeepRecord,
            (how, _) => how,
        }
    }

    /// Whether it begins a hold, or confirms one that nobody here has seen held. Guards prolong theirs.
    pub(crate) fn begins(self) -> bool {
        matches!(self, Self::Claim { .. } | Self::Ensure)
    }
}

/// What has become of a grant that is being undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// Nothing is left of it, and nothing will be.
    Settled,
    /// Nothing is left of it, but it may still be run within this time.
    MayRun(Duration),
}

/// For how long a record of grants lives, at least. It is deleted with the lock; this is for locks whose holder died.
pub(crate) const RECORD_TTL: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    Granted {
        fencing_token: Option<u64>,
    },
    /// One of the keys, told by its place, by another: for this long unless renewed; for ever where there is no ttl.
    Held {
        place: usize,
        remaining: Option<Duration>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewed {
    Extended,
    NotOurs(Loss),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Released {
    Freed,
    NotOurs(Loss),
}

/// How a request stands in line with those of other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queueing {
    /// Not at all: it tries, and gets the lock if that is free.
    None,
    /// Not at all, but it doesn't overtake those who do.
    Behind,
    /// All that wait for the key in its process have one place.
    Shared,
    /// It has a place of its own.
    Own,
}

impl Queueing {
    /// Whether it waits: where nobody can tell whether another has the lock, it asks again, and wants no error.
    pub(crate) fn waits(self) -> bool {
        matches!(self, Self::Shared | Self::Own)
    }
}

/// A place in the line of all processes for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinePlace {
    /// Tells it from others of its process.
    pub(crate) number: u64,
    /// Whether all that wait in the process have it, or one request.
    pub(crate) is_shared: bool,
}

/// How an acquire stands in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InLine {
    /// It doesn't.
    No,
    /// It takes nothing that others are in line for.
    Behind,
    /// It has this place in the line for one of its keys, or takes it if it is not granted.
    At { key: usize, place: LinePlace },
}

/// Who is to get a lock that is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) place: LinePlace,
    /// The place may be in the line.
    pub(crate) in_line: bool,
    /// Other processes have to wait, whether they are in the line or not.
    pub(crate) may_keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandedOver {
    Done {
        fencing_token: Option<u64>,
        /// Nobody else is in the line.
        alone: bool,
    },
    NotOurs(Loss),
    /// Others rely on the lock, and nothing has been changed.
    NotNow,
    /// It was released, and went to another process. The place is in the line.
    PassedBy,
}

/// Who holds a lock; answered by [`Locker::inspect`](crate::Locker::inspect).
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// let locker = tenure::Locker::in_memory();
/// let guard = locker.lock("k").await?;
/// if let Some(holder) = locker.inspect("k").await? {
///     println!("held for {:?} more, unless renewed", holder.remaining);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The holder's token.
    pub token: Token,
    /// What the holder put beside its token; empty where nothing.
    pub metadata: Vec<u8>,
    /// For how long the server will keep the key unless it is renewed; `None` for a key without a ttl, which no lock
    /// of this crate is.
    pub remaining: Option<Duration>,
    /// The latest fencing token that was handed out for this key: the holder's, unless it asked for none.
    pub fencing_token: Option<u64>,
}

impl fmt::Debug for Holder {
    /// Shows the metadata as text, and no token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder")
            .field("token", &self.token)
            .field("metadata", &format_args!("b\"{}\"", self.metadata.escape_ascii()))
            .field("remaining", &self.remaining)
            .field("fencing_token", &self.fencing_token)
            .finish()
    }
}
