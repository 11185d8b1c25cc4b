//! Where locks live: the contract between the crate and a server.
//!
//! 1. **Verdicts are values, failures are errors.** `Ok` carries what the server has decided. `Err` means that nobody
//!    knows: the operation may have taken effect, may yet, or never will. The crate never takes an unknown outcome for
//!    a refusal, nor for a loss.
//! 2. **Every operation may be repeated with the same token.** A repeat after a lost reply does no harm and returns
//!    what the first one would have.

pub(crate) mod embedded;
#[cfg(test)]
pub(crate) mod faulty;
#[cfg(test)]
mod in_time;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod notifications;
pub(crate) mod quorum;
pub(crate) mod redis;

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use self::node::Refusal;
use self::notifications::Subscription;
use crate::hold::{GrantId, Owned};
use crate::{Diagnosis, Error, Key, Loss, Token};

/// An operation in progress.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Several operations in progress. Resolves to one result for each, in their order.
pub(crate) type Answers<'a, T> = Pin<Box<dyn Future<Output = Vec<Result<T, Error>>> + Send + 'a>>;

/// By how much [`Store::acquire`] may overrun its timeout, and a heartbeat until it is given up.
pub(crate) const GRACE: Duration = Duration::from_millis(10);

/// The operations of a lock's life. Each ends within its `timeout`, whatever the server does. The callers of
/// [`acquire`](Self::acquire), [`release`](Self::release) and [`linger`](Self::linger) rely on that: a timer of theirs
/// for each would take 4 % of the client's time.
pub(crate) trait Store: fmt::Debug + Send + Sync + 'static {
    /// Returns what the store can do at this moment. A server may turn out to forbid something later, so callers ask
    /// whenever they need to know; it is cheap.
    fn capabilities(&self) -> Capabilities;

    /// Takes all keys for the token, or none.
    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired>;

    /// Extends the ttl of the keys, if all of them hold the token.
    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict>;

    /// Renews several locks of one key each, as [`renew`](Self::renew) does with [`Extending::AtLeast`]. Only where the
    /// store [renews batches](Capabilities::renews_batches).
    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], _timeout: Duration) -> Answers<'a, Verdict> {
        let unsupported = || Err(Error::Unsupported("this store renews one lock at a time"));
        Box::pin(async move { locks.iter().map(|_| unsupported()).collect() })
    }

    /// Releases those of the keys that hold the token.
    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict>;

    /// Ends a hold as [`release`](Self::release) does, but leaves the keys to nobody for `rest`, in whole milliseconds:
    /// they stay taken for that long, by no token. Where other grants rely on the lock, it stays with them, and is left
    /// to nobody when they end before that time. A repeat prolongs nothing.
    fn linger<'a>(&'a self, owned: &'a Owned, ending: Ending, rest: Duration, timeout: Duration)
    -> Answer<'a, Verdict>;

    /// Ends a grant whose request the server may run until `latest`, and removes what it has left so far, if anything.
    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, timeout: Duration) -> Answer<'a, Undone>;

    /// Releases a lock of one key and acquires it for another owner of this process in one step, or gives it to another
    /// process whose turn it is. Only where the store [hands over](Capabilities::hands_over).
    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        timeout: Duration,
    ) -> Answer<'a, HandedOver>;

    /// Turns the lock of one key into a reader's share, by the same token and grant, for as long as the key would have
    /// lived. In one step: at no moment is the key free.
    fn downgrade<'a>(&'a self, _owned: &'a Owned, _timeout: Duration) -> Answer<'a, Downgraded> {
        Box::pin(async { Err(Error::Unsupported("this store has no readers")) })
    }

    /// Takes the last place in the line for the key.
    fn enter<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Tells the server that this process is alive and still waits for the key. Returns whether its place is in the
    /// line and not the next to get the lock.
    fn heartbeat<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, bool> {
        Box::pin(async { Ok(true) })
    }

    /// Leaves the line for the key.
    fn leave<'a>(&'a self, _key: &'a Key, _place: LinePlace, _timeout: Duration) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Subscribes to the notifications that the key may have become free.
    fn subscribe(&self, key: &Key) -> Subscription;

    /// Returns the time that is left until the first of the keys expires, if all of them hold the token. For a shared
    /// grant, that is its own time; for [`GrantId::UNKNOWN`], the longest of the token's grants.
    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>>;

    /// Ends the lock of this key, whoever of these holds it, and the time for which it was left to nobody. Returns
    /// `Missing` if there was neither, and `Taken` if others hold the key: then nothing has changed. A repeat may end
    /// the lock of the next holder.
    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, timeout: Duration) -> Answer<'a, Verdict>;

    /// Returns the keys that begin with the prefix and may be lock keys. Each step takes no longer than `timeout`, and
    /// there are as many as the server has keys.
    fn find_keys<'a>(&'a self, prefix: &'a [u8], timeout: Duration) -> Answer<'a, BTreeSet<Key>>;

    /// Looks for what endangers locks on this server. A node of a quorum also gets the restart window. The embedded
    /// store has no server.
    fn diagnose(&self, _window: Option<Duration>, _timeout: Duration) -> Answer<'_, Diagnosis> {
        Box::pin(async { Ok(Diagnosis::default()) })
    }

    /// Returns all who hold the key, in any mode: those that stay longest first.
    fn holders<'a>(&'a self, _key: &'a Key, _timeout: Duration) -> Answer<'a, Vec<Holder>> {
        Box::pin(async { Err(Error::Unsupported("this store lists no holders")) })
    }

    /// Returns the holder of the key. Of several, the one that stays longest.
    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>>;
}

/// What a store can do besides the operations that every store has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Capabilities {
    /// It gives a lock from one owner to the next in one step ([`Store::hand_over`]).
    pub(crate) hands_over: bool,
    /// Waiters of different processes stand in one line for a key, and a release gives the lock to its head.
    pub(crate) has_line: bool,
    /// It has such a line for those who ask to be fair, and refuses them where the user may not use it.
    pub(crate) has_line_for_fair: bool,
    /// It renews several locks in one call ([`Store::renew_batch`]).
    pub(crate) renews_batches: bool,
    /// It undoes every acquire that is not granted by itself, whatever became of the calls. It may still do so after it
    /// has returned, so each attempt needs a token, or a grant, of its own.
    pub(crate) undoes_attempts: bool,
    /// Readers share keys ([`Mode::Read`](crate::mode::Mode)).
    pub(crate) has_readers: bool,
    /// It counts permits ([`Mode::Permit`](crate::mode::Mode)).
    pub(crate) has_permits: bool,
    /// It has a line for requests for several keys, which are in no queue.
    pub(crate) has_line_for_several: bool,
    /// It has a line in which several lockers of one process take turns at a key. Unlike that of
    /// [`has_line`](Self::has_line), a waiter enters it by asking alone, and a release gives the lock to nobody.
    pub(crate) has_line_of_lockers: bool,
}

impl Capabilities {
    /// Returns whether those who wait for so many keys tell the store their places: for one of its lines, or because a
    /// writer that waits for readers announces itself to the nodes of a quorum.
    pub(crate) fn has_places(self, keys: usize) -> bool {
        let is_told = self.has_line || self.undoes_attempts || self.has_line_of_lockers;
        is_told || self.has_line_for_several && keys > 1
    }
}

/// What a request wants of the server.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) owned: Owned,
    pub(crate) metadata: Box<[u8]>,
    pub(crate) ttl: Duration,
    pub(crate) fenced: bool,
    /// How it relates to the line of waiters of other processes.
    pub(crate) queueing: Queueing,
    /// Whether it may take over the lock of an earlier holder of this process.
    pub(crate) takes_over: bool,
    /// Until when the server may run what was sent for this request. All copies share it.
    pub(crate) latest: Arc<Latest>,
    /// At most how many tokens may hold the key together. Only for [`Mode::Permit`](crate::mode::Mode), and then not 0.
    pub(crate) limit: usize,
    /// When the request began. Where no line says who came first, this does.
    pub(crate) since: Instant,
}

#[cfg(test)]
impl Wanted {
    /// Returns a request for a fencing token that doesn't wait. Of permits, there are two.
    pub(crate) fn at_once(owned: Owned, ttl: Duration) -> Self {
        Self {
            owned,
            metadata: Box::default(),
            ttl,
            fenced: true,
            queueing: Queueing::None,
            takes_over: false,
            latest: Arc::default(),
            limit: 2,
            since: Instant::now(),
        }
    }
}

/// The latest time, in ms by the server's clock, at which the server may run what was sent for one request.
///
/// A server refuses what arrives later. So once its clock has passed this time, and what the request left until then is
/// undone, nothing of the request can take effect any longer.
#[derive(Debug, Default)]
pub(crate) struct Latest {
    until: AtomicU64,
    /// How many calls are under way that others make for the request. Until they end, they may be sent, or sent again.
    by_others: AtomicUsize,
}

/// A call that others make for a request, until it ends.
#[derive(Debug)]
pub(crate) struct ByOthers(Arc<Latest>);

impl Latest {
    /// Notes that the next call, which the server may run until this time, is about to be sent.
    pub(crate) fn extend(&self, until: u64) {
        self.until.fetch_max(until, Ordering::Relaxed);
    }

    /// Notes that another than the request itself begins a call for it.
    pub(crate) fn begin_by_others(self: Arc<Self>) -> ByOthers {
        self.by_others.fetch_add(1, Ordering::Relaxed);
        ByOthers(self)
    }

    #[cfg(test)]
    pub(crate) fn get(&self) -> u64 {
        self.until.load(Ordering::Relaxed)
    }

    /// Returns for how long a server whose clock shows `now` may still run what was sent. Not shorter than
    /// [`LOOK_AGAIN`] while anything may still be sent.
    pub(crate) fn remaining(&self, now: u64) -> Option<Duration> {
        // In this order: what a call that has ended noted is there.
        let may_be_sent = self.by_others.load(Ordering::Acquire) > 0;
        let latest = self.until.load(Ordering::Relaxed);
        // The server still runs it in that very millisecond.
        let remaining = (now <= latest).then(|| Duration::from_millis(latest - now + 1));
        if may_be_sent { remaining.max(Some(LOOK_AGAIN)) } else { remaining }
    }
}

impl Drop for ByOthers {
    fn drop(&mut self) {
        self.0.by_others.fetch_sub(1, Ordering::Release);
    }
}

/// The time after which to look again whether a call that others make has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a release ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The lock, even if other grants rely on it: a user asked for that.
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
    /// To at least this, and the owner's grant replaces the earlier one.
    Claim { earlier: Option<GrantId> },
    /// To at least this, and adds the grant to the record: what the two for at least a ttl become where the grant has
    /// an id ([`of`](Self::of)).
    KeepRecord,
    /// To at least this, for the lock of a lease. Unlike the renewal of a guard, it doesn't imply that the lock was
    /// held until now.
    Ensure,
    /// Leaves the ttl alone. The owner's grant ends, and the earlier one, which it had replaced, gets its place back
    /// where no other grant relies on the lock. The ttl is that of the earlier one.
    GiveBack { earlier: Option<GrantId> },
}

impl Extending {
    /// Returns what the server has to do.
    pub(crate) fn of(self, owned: &Owned) -> Self {
        match (self, owned.grant) {
            (Self::AtLeast | Self::Ensure, None | Some(GrantId::UNKNOWN)) => self,
            // The key may be there because of another grant of the token, and the record of this one lost. Unless it is
            // recorded again, it counts for nothing: the key ends with the other grant.
            (Self::AtLeast | Self::Ensure, Some(_)) => Self::KeepRecord,
            (how, _) => how,
        }
    }

    /// Returns whether it begins a hold, or confirms one that this process has not seen held. Guards prolong theirs.
    pub(crate) fn begins(self) -> bool {
        matches!(self, Self::Claim { .. } | Self::Ensure)
    }
}

/// What has become of a grant that is being undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// Nothing is left of it, and nothing will be.
    Complete,
    /// Nothing is left of it, but the server may still run its request within this time.
    MayRun(Duration),
}

/// The verdict on an acquire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    Granted {
        fencing_token: Option<u64>,
    },
    /// Another holds one of the keys.
    Held {
        /// The index of the key in the request.
        place: usize,
        /// How long the lock lasts unless it is renewed; `None` where it has no ttl.
        remaining: Option<Duration>,
        /// The nodes of a quorum that refused.
        refusal: Refusal,
    },
}

impl Acquired {
    pub(crate) fn held(place: usize, remaining: Option<Duration>) -> Self {
        Self::Held { place, remaining, refusal: Refusal::default() }
    }
}

/// Whose lock may be ended by force.
#[derive(Clone, Debug)]
pub(crate) enum Whose {
    All,
    Only(Arc<[Token]>),
}

impl Whose {
    pub(crate) fn includes(&self, token: &Token) -> bool {
        match self {
            Self::All => true,
            Self::Only(tokens) => tokens.contains(token),
        }
    }
}

/// The verdict on a renewal or a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All keys held the token, and are renewed or released.
    Done,
    /// Not all of the keys held the token.
    NotOurs(Loss),
}

/// The verdict on turning a lock into a reader's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Downgraded {
    /// The token holds the key as a reader.
    Done,
    NotOurs(Loss),
    /// Other grants rely on the lock, or it has to stay taken for one that has ended. Nothing has changed.
    NotNow,
}

/// How a request relates to the line in which waiters of other processes stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queueing {
    /// It ignores the line: it tries, and gets the lock if that is free.
    None,
    /// It doesn't enter the line, and doesn't overtake those who stand in it.
    Behind,
    /// It waits at the place that all waiters for the key in its process share.
    Shared,
    /// It waits at a place of its own.
    Own,
}

impl Queueing {
    /// Returns whether the request waits. Where nobody can tell whether another has the lock, a waiter tries again and
    /// needs no error.
    pub(crate) fn waits(self) -> bool {
        matches!(self, Self::Shared | Self::Own)
    }
}

/// A place in the line in which the waiters of all processes stand for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinePlace {
    /// Distinguishes it from other places of its process.
    pub(crate) number: u64,
    /// Whether its turn is only for who has this place: the waiters of a process that share one, or a request for
    /// several keys. The turns of the other places are for the first of the fair requests of the process.
    pub(crate) is_shared: bool,
}

/// How an acquire uses the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InLine {
    /// It ignores the line. A request for a [shared](crate::mode::Mode::is_shared) grant doesn't: for that, this is
    /// [`Behind`](Self::Behind).
    No,
    /// It takes nothing that others wait for in the line.
    Behind,
    /// It has this place in the line for one of its keys, or enters there if it is not granted. If it is granted, it
    /// leaves the line; on a server, a shared grant doesn't if the place `stays`, as the next waiter with it may share
    /// the key, too.
    At { key: usize, place: LinePlace, stays: bool },
}

/// The waiter that gets a lock that is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) place: LinePlace,
    /// The place may be in the line.
    pub(crate) in_line: bool,
    /// This process may keep the lock from other processes, whether they stand in the line or not.
    pub(crate) may_keep: bool,
    /// How many fencing tokens to reserve, if any is wanted. Those after the first are for the waiters behind this one.
    pub(crate) tokens: u64,
}

/// The verdict on a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandedOver {
    Done {
        fencing_token: Option<u64>,
        /// Nobody else's turn comes before the next of this process.
        alone: bool,
    },
    NotOurs(Loss),
    /// Other grants rely on the lock, or it has to stay taken for one that has ended. Nothing has changed.
    NotNow,
    /// The lock was released and went to another process. The place is in the line.
    PassedBy,
}

/// The holder of a lock, as [`Locker::inspect`](crate::Locker::inspect) returns it.
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
    /// The holder's token. If the lock was [handed over](crate::LockerBuilder::local_hand_over) within a process, it is
    /// that of an earlier holder there.
    pub token: Token,
    /// What the holder stored beside its token; empty if it stored nothing.
    pub metadata: Vec<u8>,
    /// How long the server keeps the key unless it is renewed. `None` for a key without a ttl; locks of this crate
    /// always have one.
    pub remaining: Option<Duration>,
    /// The last fencing token that was granted for this key: the holder's, unless it asked for none.
    ///
    /// It may be greater than the holder's, by up to 16: a process whose tasks wait for the lock gets a block of them,
    /// which its next holders use if the lock is [handed over](crate::LockerBuilder::local_hand_over) there.
    pub fencing_token: Option<u64>,
}

impl Holder {
    /// Returns whether what the key holds is surely a lock: of this crate, and fenced or by a random token.
    pub(crate) fn is_of_a_lock(&self) -> bool {
        self.remaining.is_some() && (self.fencing_token.is_some() || self.token.is_random())
    }
}

impl fmt::Debug for Holder {
    /// Shows the metadata as text, and hides the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder")
            .field("token", &self.token)
            .field("metadata", &format_args!("b\"{}\"", self.metadata.escape_ascii()))
            .field("remaining", &self.remaining)
            .field("fencing_token", &self.fencing_token)
            .finish()
    }
}
