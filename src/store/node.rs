//! What a node of a quorum is asked, and what it answers.

use std::time::Duration;

use crate::hold::Owned;
use crate::store::{Answer, Extending, Store, Verdict, Wanted};

/// What a store must be able to do to be one of a quorum.
pub(crate) trait Node: Store {
    /// Takes all keys for the token by this ballot, or none.
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
}

/// What all nodes are asked to agree on.
#[derive(Clone, Debug)]
pub(crate) struct Ballot {
    /// The proposed fencing token, where one is wanted.
    pub(crate) number: Option<u64>,
    /// Whether the number shall replace an earlier one by which the keys are ours.
    pub(crate) exactly: bool,
    /// For how long a node that was restarted doesn't vote; whole seconds.
    pub(crate) window: Duration,
    /// How far ahead of a node's clock the number may be.
    pub(crate) ahead: Duration,
}

/// What a node has decided, and what could be seen of its memory.
#[derive(Clone, Debug)]
pub(crate) struct VoteReply {
    pub(crate) vote: Vote,
    pub(crate) seen: Seen,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Vote {
    /// With the ballot's number, or an earlier one where the keys were ours.
    Granted { number: Option<u64> },
    /// One of the keys, told by its place, by another.
    Held { place: usize, remaining: Option<Duration> },
    /// The number must be greater.
    Behind,
    /// The number must be smaller.
    Ahead,
    /// Restarted lately; votes again in so long.
    Silent { remaining: Duration },
}

/// In microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// The node's clock.
    pub(crate) now: u64,
    /// The highest number that it knows for the keys, or what it takes for it; 0 where none was looked for.
    pub(crate) last: u64,
}
