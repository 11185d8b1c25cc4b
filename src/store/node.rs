//! A node of a quorum: what it is asked to vote on, and what it replies. The stores that can be nodes and the quorum
//! both depend on this.

use std::time::Duration;

use crate::Key;
use crate::hold::Owned;
use crate::store::{Answer, Extending, LinePlace, Store, Verdict, Wanted};

/// Some nodes of a quorum, by their places. Those from the 65th on are in no such set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nodes(u64);

impl Nodes {
    pub(crate) fn contains(self, place: usize) -> bool {
        place < 64 && self.0 & 1 << place != 0
    }
}

impl FromIterator<usize> for Nodes {
    fn from_iter<T: IntoIterator<Item = usize>>(places: T) -> Self {
        Self(places.into_iter().filter(|&place| place < 64).fold(0, |nodes, place| nodes | 1 << place))
    }
}

/// The nodes that refused a request. Their notifications tell when it makes sense to ask again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) by: Nodes,
    /// Nodes that have granted it what it gives back, or that were asked and have yet to reply: too few for a majority,
    /// whatever becomes free there.
    pub(crate) ignored: Nodes,
}

/// A store that can be a node of a quorum.
pub(crate) trait Node: Store {
    /// Votes on a ballot: takes all keys for the token, or none.
    fn vote<'a>(&'a self, wanted: &'a Wanted, ballot: &'a Ballot, timeout: Duration) -> Answer<'a, VoteReply>;

    /// Renews as [`Store::renew`] does, unless the node was restarted within the window: then it changes nothing, and
    /// fails with [`Error::NotVoting`](crate::Error::NotVoting).
    fn renew_if_it_votes<'a>(
        &'a self,
        owned: &'a Owned,
        ttl: Duration,
        how: Extending,
        window: Duration,
        timeout: Duration,
    ) -> Answer<'a, Verdict>;

    /// Returns what the grant has stored beside its token; `None` if the grant holds the key no longer.
    fn metadata<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Box<[u8]>>>;

    /// Notes that a writer waits for the readers of the key to leave. For [`ANNOUNCED`], the node lets no other reader
    /// in.
    fn announce<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()>;

    /// Takes back what [`announce`](Self::announce) has noted for this place, and notifies those who waited for that.
    fn withdraw<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()>;
}

/// For how long a writer that waits for readers holds new ones back after it was last heard of.
pub(crate) const ANNOUNCED: Duration = Duration::from_millis(1_500);

/// What a quorum asks all of its nodes to agree on.
#[derive(Clone, Debug)]
pub(crate) struct Ballot {
    /// The proposed fencing token, if one is wanted.
    pub(crate) number: Option<u64>,
    /// Whether the number must replace an earlier one by which the token holds the keys.
    pub(crate) exactly: bool,
    /// How long a node doesn't vote after a restart, in whole seconds.
    pub(crate) window: Duration,
    /// How far ahead of a node's clock the number may be.
    pub(crate) ahead: Duration,
    /// The place of the request among those that wait. It doesn't wait for what was announced for this place.
    pub(crate) place: Option<LinePlace>,
    /// It brings a lock back that is held. Nobody who waits comes before it.
    pub(crate) heals: bool,
}

/// What a node has decided, and what its reply shows of its memory.
#[derive(Clone, Debug)]
pub(crate) struct VoteReply {
    pub(crate) vote: Vote,
    pub(crate) seen: Seen,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Vote {
    /// With the ballot's number, or an earlier one where the token held the keys already.
    Granted { number: Option<u64> },
    /// Another holds one of the keys, which is given by its index; or, for a reader, a writer waits for that.
    Held { place: usize, remaining: Option<Duration>, by: HeldBy },
    /// The number must be greater.
    Behind,
    /// The number must be smaller.
    Ahead,
    /// It was restarted lately, and votes again after this time.
    Silent { remaining: Duration },
}

impl Vote {
    /// Returns whether it granted the ballot, or would grant it with another number.
    pub(crate) fn is_willing(self) -> bool {
        matches!(self, Self::Granted { .. } | Self::Behind | Self::Ahead)
    }
}

/// The node's clock and memory, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// The node's clock.
    pub(crate) now: u64,
    /// The highest number that it knows, or assumes, for the keys; 0 if the ballot has no number.
    pub(crate) last: u64,
}

/// Whom a request has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeldBy {
    Readers,
    /// One who holds the key alone, or a writer that waits.
    Another,
}
