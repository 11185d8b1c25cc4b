//! Locks on a majority of independent servers: Redlock, fenced by ballots.
//!
//! The algorithm is that of <https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/>: every node is
//! asked at once, a lock is held when a majority has granted it, and what a failed attempt got is given back. Two
//! majorities share a node, so there is one holder at a time, for as long as the nodes remember and their clocks run at
//! about the same speed. The critique at <https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html>
//! is that it mints no fencing tokens, without which no lock protects a store from a holder who woke too late. Here it
//! does.
//!
//! # Fencing by ballots
//!
//! The client proposes one number P to all nodes, a little ahead of the clocks that it knows ([`clocks`]). A node
//! grants when the keys are free or ours, P is greater than the last number that it has granted for them, and P is not
//! further ahead of its own clock than the restart window. It then remembers P, for longer than the window. A node that
//! remembers no last number takes its own clock for it; so does one whose last number may be from before it was last
//! started, which is any that is no further ahead of that moment than a window. The fencing token is a P that a
//! majority has granted.
//!
//! Why tokens grow: the majority that grants a later P' shares a node with the one that granted P. Either that node
//! remembers P; then P' > P. Or it has forgotten P, in one of two ways. It was restarted, without its data or with
//! older data: then it votes again only after a window. Or the number's own ttl has passed, which is longer than the
//! window. When it granted P, P was at most one window ahead of its clock, so by now the clock has passed P, and P' is
//! greater than the clock: also where it has found an older number on its disk.
//!
//! Assumed: the clock of a node that has forgotten has not been set back by more than the time that it was away, nor
//! put forward since, as it tells its age by it; a node's memory goes only in a restart or with the ttls, not by a
//! flush or an eviction; and all who share locks have set the same window. The clocks of clients, and differences
//! between the nodes' below the window, cost another round, never the order. Another round was needed by none of a
//! hundred locks in a row whose client's clock was right or wrong by 20 ms, and by the first alone where it was wrong
//! by an hour: the client learns the nodes' clocks from their answers. After a restart of a majority, a client whose
//! clock is behind needs one for each key that was locked before.
//!
//! A node that has been up for less than the window does not vote at all, since it may have forgotten locks as well.
//! That is enough as long as no ttl is longer than the window: then what it has forgotten has expired. For the same
//! reason its word does not count either where a lease is taken up: what it holds for the lease may be from an old
//! dump. A guard that renews is another matter: it has held the lock without a gap, so that nobody else can have been
//! granted it by a majority.
//!
//! # Renewals
//!
//! A renewal counts the nodes that confirm it now, and moves the guard's deadline when they are a majority. A node that
//! says that the key is gone counts as "not ours". Once a majority has confirmed, such nodes are healed: they are asked
//! for the key again, and confirm later renewals like any other ([`heal`], where it is said why that is safe). So a
//! guard outlives any number of nodes that are away one after another, and a lock that was obtained on a bare majority
//! is on all nodes soon after its first renewal.
//!
//! Where several guards share a token, a node counts for each of them only by what it has put down for that one: so each
//! renewal of such a guard has it put down again.
//!
//! # What is left behind
//!
//! 1. Every call to a node ends within its own timeout, listened to or not, and is never dropped: fred would run it
//!    later.
//! 2. An attempt that is not granted, or whose asker has gone, is taken back on every node that granted it or may have,
//!    as soon as all its calls to that node have ended ([`round`]).
//! 3. No token is used for two attempts, so whatever comes late of one can't touch the next. Where the user has chosen
//!    the token, grants have ids instead, and a node takes back only what the grant of this id alone holds.

mod calls;
mod catch_up;
mod clocks;
mod heal;
mod identity;
mod nodes;
mod reads;
#[cfg(test)]
mod restarted;
mod round;
mod rounds;
mod shortened;
#[cfg(test)]
mod simulated;
mod tally;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use self::calls::Calls;
use self::clocks::Clocks;
use self::heal::Healing;
use self::identity::Identity;
pub(crate) use self::nodes::{Connected, connect};
use self::rounds::Rounds;
use self::shortened::{RequestId, Shortened};
use self::tally::{Outcome, Tally};
use super::node::Node;
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Capabilities, Ending, Extending, HandedOver, Holder, InLine, Latest, Next, Store, Undone,
    Verdict, Wanted,
};
use crate::hold::Owned;
use crate::{Error, Key, Loss, NodeError};

/// How far ahead numbers may be where there is no restart window: less than nodes remember them for.
const AHEAD: Duration = Duration::from_secs(60);

/// So many calls may be on their way to one node.
const CALLS: usize = 4_096;

/// And so many more may wait for that. One that hangs fails all further ones at once.
const WAITING: usize = 4 * CALLS;

/// A lock store over an odd number of independent nodes.
pub(crate) struct QuorumStore {
    quorum: Arc<Quorum>,
}

/// What the background tasks share with the store.
struct Quorum {
    members: Vec<Member>,
    needed: usize,
    window: Duration,
    clocks: Clocks,
    /// The calls on their way; each ends by its own timeout.
    calls: TaskTracker,
    /// What closing waits for: everything that may still have to be taken back.
    releases: TaskTracker,
    rounds: Rounds,
    shortened: Shortened,
}

struct Member {
    address: String,
    node: Arc<dyn Node>,
    identity: Option<Arc<Identity>>,
    calls: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// It was restarted lately, and doesn't vote until then.
    silent_until: Mutex<Option<Instant>>,
    /// How many locks it may be behind with at a time. Its own affair: a node that is gone takes nothing from the
    /// others.
    arrears: Arc<Semaphore>,
}

impl QuorumStore {
    /// The window is rounded up to whole seconds, which is how servers tell their age.
    pub(crate) fn new(nodes: Vec<Connected>, window: Duration, releases: TaskTracker) -> Self {
        Self::with_clock(nodes, window, releases, clocks::since_1970)
    }

    fn with_clock(
        nodes: Vec<impl Into<Connected>>,
        window: Duration,
        releases: TaskTracker,
        clock: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        let needed = nodes.len() / 2 + 1;
        let clocks = Clocks::new(clock, nodes.len(), needed);
        let members = nodes
            .into_iter()
            .map(Into::into)
            .map(|Connected { address, node, identity }| Member {
                address,
                node,
                identity,
                calls: Arc::new(Semaphore::new(CALLS)),
                waiting: Arc::new(Semaphore::new(WAITING)),
                silent_until: Mutex::default(),
                arrears: Arc::new(Semaphore::new(catch_up::LOCKS)),
            })
            .collect();
        let window = whole_seconds(window);
        Self {
            quorum: Arc::new(Quorum {
                members,
                needed,
                window,
                clocks,
                calls: TaskTracker::new(),
                releases,
                rounds: Rounds::default(),
                shortened: Shortened::default(),
            }),
        }
    }

    async fn acquire(&self, wanted: &Wanted, timeout: Duration) -> Result<Acquired, Error> {
        self.quorum.check_ttl(wanted.ttl)?;
        round::attempt(&self.quorum, wanted, timeout).await
    }

    async fn renew(&self, owned: &Owned, ttl: Duration, how: Extending, timeout: Duration) -> Result<Verdict, Error> {
        let quorum = &self.quorum;
        quorum.check_ttl(ttl)?;
        let how = match how {
            // A node may hold the key only by what another grant of the token was granted there. It has to know of this
            // one before it counts: or it frees the key when the other is dropped.
            Extending::AtLeast if owned.grant.is_some() => Extending::KeepRecord,
            how => how,
        };
        let exact = (how == Extending::Exactly).then(|| {
            // As much again for what we don't know of the node's clock.
            let until = Instant::now() + timeout.saturating_mul(2);
            quorum.shortened.begin(owned, ttl, quorum.members.len(), until)
        });
        let mut healing = Healing::begin(quorum, owned, ttl, how);
        let timeout = node_timeout(ttl, first(timeout));
        // What a node remembers that was restarted lately may have been released since.
        let window = quorum.window;
        let mut answers = quorum.ask(timeout, |node| {
            let owned = owned.clone();
            Box::pin(async move {
                match how.begins() && !window.is_zero() {
                    true => node.renew_if_it_votes(&owned, ttl, how, window, timeout).await,
                    false => node.renew(&owned, ttl, how, timeout).await,
                }
            })
        })?;
        let mut tally = Tally::new(quorum);
        let mut not_ours = Loss::Missing;
        while let Some((place, answer)) = answers.next().await {
            quorum.note_exact(owned, exact, place, &answer);
            if let (Some(healing), Ok(renewed)) = (&mut healing, &answer) {
                healing.note(place, *renewed);
            }
            match answer {
                Ok(Verdict::Done) if quorum.shortened.may_shorten(owned, exact, place, ttl) => {
                    tally.failed(place, shortened::may_be_set_late());
                }
                Ok(Verdict::Done) => tally.yes(),
                Ok(Verdict::NotOurs(loss)) => {
                    not_ours = worse(not_ours, loss);
                    tally.no();
                }
                Err(error) => tally.failed(place, error),
            }
            match tally.outcome() {
                Some(Outcome::Yes) => {
                    match healing {
                        Some(healing) => healing.confirmed(answers),
                        None => quorum.note_the_rest(owned, exact, answers),
                    }
                    return Ok(Verdict::Done);
                }
                Some(Outcome::No) => return Ok(Verdict::NotOurs(not_ours)),
                Some(Outcome::Unknown) => break,
                None => {}
            }
        }
        Err(tally.into_error())
    }

    async fn release(&self, owned: &Owned, ending: Ending, timeout: Duration) -> Result<Verdict, Error> {
        let (quorum, timeout) = (&self.quorum, first(timeout));
        let mut answers = quorum.ask(timeout, |node| {
            let owned = owned.clone();
            Box::pin(async move { node.release(&owned, ending, timeout).await })
        })?;
        // Only now: an open round that hears of it releases too, which must not be what frees the lock.
        let releasing = quorum.rounds.mark_released(owned, ending);
        let mut tally = Tally::new(quorum);
        let mut not_ours = Loss::Missing;
        let mut behind = Vec::new();
        while let Some((place, answer)) = answers.next().await {
            releasing.answered(place, matches!(answer, Ok(Verdict::Done)));
            match answer {
                Ok(Verdict::Done) => tally.yes(),
                Ok(Verdict::NotOurs(loss)) => {
                    not_ours = worse(not_ours, loss);
                    tally.no();
                }
                Err(error) => {
                    behind.push(place);
                    tally.failed(place, error);
                }
            }
            let released = match tally.outcome() {
                Some(Outcome::Yes) => Verdict::Done,
                Some(Outcome::No) => Verdict::NotOurs(not_ours),
                // Whoever asked tries again, and on all nodes.
                Some(Outcome::Unknown) => break,
                None => continue,
            };
            quorum.release_the_rest(owned, timeout, releasing, behind, answers);
            return Ok(released);
        }
        Err(tally.into_error_of_release())
    }
}

/// Where any node knows another holder, the lock was taken: a successor's majority and the one that answers share a
/// node.
fn worse(one: Loss, other: Loss) -> Loss {
    if one == Loss::Taken { one } else { other }
}

/// Less than we are given, so that it is we who say which nodes have not answered.
fn first(timeout: Duration) -> Duration {
    timeout.mul_f64(0.9)
}

/// How long to wait for a node: a small part of the ttl, as what is waited for eats it up.
fn node_timeout(ttl: Duration, timeout: Duration) -> Duration {
    const ENOUGH: Duration = Duration::from_millis(200);
    timeout.min((ttl / 50).max(ENOUGH.min(ttl / 4))).max(Duration::from_millis(1))
}

/// For how long the rest of the nodes is waited for, where a majority has answered within `elapsed` and more would be
/// known by all answers.
fn grace(elapsed: Duration) -> Duration {
    (elapsed * 4).max(Duration::from_millis(2))
}

/// Refuses a ttl that is longer than the restart window: the nodes would forget the lock in a restart, and vote again
/// before it has expired.
pub(crate) fn check_ttl(ttl: Duration, window: Duration) -> Result<(), Error> {
    if window.is_zero() || ttl <= whole_seconds(window) {
        return Ok(());
    }
    Err(Error::InvalidTtl("it is longer than the quorum's restart window; use a shorter one, or a longer window"))
}

/// Rounded up.
fn whole_seconds(window: Duration) -> Duration {
    Duration::from_secs(window.as_secs().saturating_add(u64::from(window.subsec_nanos() > 0)))
}

impl Quorum {
    fn check_ttl(&self, ttl: Duration) -> Result<(), Error> {
        check_ttl(ttl, self.window)
    }

    /// How far ahead of a node's clock a number may be.
    fn ahead(&self) -> Duration {
        if self.window.is_zero() { AHEAD } else { self.window }
    }

    /// What a node's answer says of a request for an exact ttl.
    fn note_exact(&self, owned: &Owned, exact: Option<RequestId>, place: usize, answer: &Result<Verdict, Error>) {
        if let Some(id) = exact.filter(|_| answer.as_ref().map_or_else(Error::has_not_run, |_| true)) {
            self.shortened.has_ended(owned, id, place);
        }
    }

    /// Learns from those that answer after the majority.
    fn note_the_rest(self: &Arc<Self>, owned: &Owned, exact: Option<RequestId>, mut answers: Calls<usize, Verdict>) {
        if exact.is_none() || answers.have_ended() {
            return;
        }
        let (quorum, owned, runtime) = (self.clone(), owned.clone(), answers.runtime().clone());
        let rest = async move {
            while let Some((place, answer)) = answers.next().await {
                quorum.note_exact(&owned, exact, place, &answer);
            }
        };
        self.calls.spawn_on(rest, &runtime);
    }

    fn node_error(&self, place: usize, error: Error) -> NodeError {
        let address = self.members.get(place).map(|member| member.address.clone()).unwrap_or_default();
        NodeError { address, error }
    }
}

impl Store for QuorumStore {
    /// It doesn't hand over: the votes for the next owner would have to arrive while those for the last are taken back.
    fn capabilities(&self) -> Capabilities {
        Capabilities { undoes_attempts: true, ..Capabilities::default() }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, _: InLine, timeout: Duration) -> Answer<'a, Acquired> {
        Box::pin(self.acquire(wanted, timeout))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(self.renew(owned, ttl, how, timeout))
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(self.release(owned, ending, timeout))
    }

    /// A round takes its own attempt back, on each node by that node's clock.
    fn undo<'a>(&'a self, owned: &'a Owned, _: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
        Box::pin(async move { self.release(owned, Ending::Grant, timeout).await.map(|_| Undone::Complete) })
    }

    fn hand_over<'a>(
        &'a self,
        _: &'a Owned,
        _: Ending,
        _: &'a Wanted,
        _: &'a Next,
        _: Duration,
    ) -> Answer<'a, HandedOver> {
        Box::pin(async { Ok(HandedOver::NotOurs(Loss::Missing)) })
    }

    /// A release on any node is news.
    fn subscribe(&self, key: &Key) -> Subscription {
        Subscription::join(self.quorum.members.iter().map(|member| member.node.subscribe(key)))
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        Box::pin(self.remaining(owned, timeout))
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        Box::pin(self.inspect(key, timeout))
    }
}

impl fmt::Debug for QuorumStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<_> = self.quorum.members.iter().map(|member| &member.address).collect();
        f.debug_struct("QuorumStore")
            .field("nodes", &addresses)
            .field("restart_window", &self.quorum.window)
            .finish_non_exhaustive()
    }
}
