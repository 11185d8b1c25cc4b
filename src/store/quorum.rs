//! Locks on a majority of independent servers: Redlock, fenced by ballots.
//!
//! The algorithm is that of <https://redis.io/docs/latest/develop/clients/patterns/distributed-locks/>. A request asks
//! all nodes at once; a lock is held when a majority has granted it; a failed attempt releases what it got. Two
//! majorities share a node, so there is one holder at a time, as long as the nodes remember and their clocks run at
//! about the same speed. The critique at <https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html>
//! is that the algorithm mints no fencing tokens, without which no lock protects a store from a holder that woke too
//! late. This implementation mints them.
//!
//! # Fencing by ballots
//!
//! The client proposes one number P to all nodes, a little ahead of the clocks that it knows ([`clocks`]). A node
//! grants P if the keys are free or ours, if P is greater than the last number that it has granted for them, and if P
//! is not further ahead of its own clock than the restart window. It then remembers P for longer than the window. A
//! node that remembers no last number uses its own clock instead. So does a node whose last number may be from before
//! its last start, which is any number that is no further ahead of that moment than a window. The fencing token is a P
//! that a majority has granted.
//!
//! Why tokens grow: the majority that grants a later P' shares a node with the one that granted P. Either that node
//! remembers P; then P' > P. Or it has forgotten P, in one of two ways. It was restarted, without its data or with
//! older data: then it votes again only after a window. Or the number's own ttl has passed, which is longer than the
//! window. When it granted P, P was at most one window ahead of its clock. So by now the clock has passed P, and P' is
//! greater than the clock, even if the node has found an older number on its disk.
//!
//! This assumes three things. The clock of a node that has forgotten was not set back by more than the time that it was
//! away, nor put forward since, as the node tells its age by it. A node loses its memory only in a restart or by the
//! ttls, not by a flush or an eviction. All clients that share locks use the same window. Wrong clocks of clients, and
//! differences between the nodes' clocks below the window, cost another round, never the order. Of a hundred locks in a
//! row, none needed another round with a client whose clock was right or wrong by 20 ms, and only the first did with a
//! clock that was wrong by an hour (`cargo test --lib clocks_cost_a_second_ballot`): the client learns the nodes'
//! clocks from their replies. After a restart of a majority, a client whose clock is behind needs another round for
//! each key that was locked before.
//!
//! A node that has been up for less than the window does not vote at all, since it may have forgotten locks as well.
//! That is enough as long as no ttl is longer than the window: then what it has forgotten has expired. For the same
//! reason its reply doesn't count when a lease is adopted: what it holds for the lease may be from an old dump. Its
//! reply to a guard's renewal counts: the guard has held the lock without a gap, so no majority can have granted it to
//! another.
//!
//! # Readers
//!
//! A reader's share of a key is obtained by the votes of a majority, with a number of its own, as a lock is. A node
//! that has granted one has the key taken for everybody but other readers, for as long as one of their shares lasts. So
//! a reader and a writer, whose majorities share a node, never hold the key together. All that follows holds for
//! shares, too: a node counts for a reader if it has that reader's own share, whatever others it has. So each renewal
//! renews that share, or finds it missing and has it brought back, beside others or where the key is free; and each
//! release, on every node, ends it alone.
//!
//! A node that has granted a number grants only greater ones, also to other readers. So numbers prove the order of
//! readers as well, and readers that ask at once may outbid each other. Numbers are made by what the clients know of
//! the nodes' clocks, so they grow about as the requests are sent, and a reader that was outbid waits for a moment
//! before its next ballot. 16 readers whose requests overtake each other at random need two to three ballots each on
//! average, and the unlucky ones several more: `cargo test --lib readers_that_ask_at_once -- --nocapture` counts them,
//! and fails from four on average. Readers that ask one after the other need one ballot each.
//!
//! Writers come first, if they wait ([`announcements`]). A lock becomes a reader's share on each node by itself
//! ([`downgrade`]). There are no permits: two majorities have only one node in common for sure, which knows that both
//! are there, but not how many others hold permits on the nodes that it hasn't heard from.
//!
//! # Renewals
//!
//! A renewal counts the nodes that confirm it, and moves the guard's deadline when they are a majority. A node without
//! the key counts as "not ours". Once a majority has confirmed, such nodes are healed: they are asked for the key
//! again, and confirm later renewals like any other ([`heal`] argues why that is safe). So a guard survives any number
//! of nodes that are away one after another, and a lock that was obtained on a bare majority is on all nodes soon after
//! its first renewal.
//!
//! If several guards share a token, a node counts for a guard only if it has that guard's own grant. So each renewal of
//! a guard whose token was used before has the node record it again. A guard that made its token needs no record, until
//! another guard uses the token: a node whose record lists only others counts as one without the key, and is healed.
//!
//! # What is left behind
//!
//! 1. Every call to a node ends within its own timeout, even if nothing waits for it, and is never dropped: fred would
//!    run a dropped call later.
//! 2. An attempt that is not granted, or whose caller has gone, is undone on every node that granted it or may have, as
//!    soon as all its calls to that node have ended ([`round`]).
//! 3. No token is used for two attempts, so a late call of one can't affect the next. If the user has chosen the token,
//!    grants have ids instead, and a node undoes only what the grant with this id alone holds.
//! 4. A renewal that reaches a node after the release of its grant is undone there ([`renewal`]).

mod announcements;
mod calls;
mod catch_up;
mod clocks;
mod downgrade;
mod heal;
mod identity;
mod nodes;
mod open_rounds;
mod reads;
mod renewal;
#[cfg(test)]
mod restarted;
mod round;
mod shortened;
#[cfg(test)]
mod simulated;
mod tally;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

use self::announcements::Announcements;
use self::calls::Calls;
use self::clocks::Clocks;
use self::identity::Identity;
pub(crate) use self::nodes::{Connected, connect};
use self::open_rounds::OpenRounds;
use self::shortened::{RequestId, Shortened};
use self::tally::{Outcome, Tally};
use super::node::Node;
use super::notifications::Subscription;
use super::{
    Acquired, Answer, Capabilities, Downgraded, Ending, Extending, GRACE, HandedOver, Holder, InLine, Latest,
    LinePlace, Next, Store, Undone, Verdict, Wanted, Whose,
};
use crate::hold::Owned;
use crate::mode::Mode;
use crate::{Diagnosis, Error, Key, Loss, NodeError};

/// How far ahead numbers may be without a restart window: less than the time for which nodes remember them.
const AHEAD: Duration = Duration::from_secs(60);

/// How many calls may be in flight to one node.
const CALLS: usize = 4_096;

/// How many more calls may wait for those. If a node hangs, all further calls to it fail at once.
const WAITING: usize = 4 * CALLS;

/// Why a quorum has no permits.
const NO_PERMITS: &str = "a quorum counts no permits: two majorities of its nodes have only one node in common, which \
                          knows some of the holders of each; use one server, Sentinels or a cluster";

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
    /// The calls in flight. Each ends within its own timeout.
    calls: TaskTracker,
    /// What closing the locker waits for: everything that may still have to be undone.
    releases: TaskTracker,
    rounds: OpenRounds,
    shortened: Shortened,
    announcements: Announcements,
}

struct Member {
    address: String,
    node: Arc<dyn Node>,
    identity: Option<Arc<Identity>>,
    calls: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// It was restarted lately, and doesn't vote until this time.
    silent_until: Mutex<Option<Instant>>,
    /// Limits the locks on which the node is behind and for which it is tried again. A node that is away takes nothing
    /// from the others.
    catching_up: Arc<Semaphore>,
}

impl QuorumStore {
    /// Rounds the window up to whole seconds, as servers report their uptime in seconds.
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
                catching_up: Arc::new(Semaphore::new(catch_up::LOCKS)),
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
                rounds: OpenRounds::default(),
                shortened: Shortened::default(),
                announcements: Announcements::default(),
            }),
        }
    }

    async fn acquire(&self, wanted: &Wanted, in_line: InLine, timeout: Duration) -> Result<Acquired, Error> {
        if wanted.owned.mode == Mode::Permit {
            return Err(Error::Unsupported(NO_PERMITS));
        }
        self.quorum.check_ttl(wanted.ttl)?;
        round::attempt(&self.quorum, wanted, in_line, timeout).await
    }

    /// Ends the lock of a key on all nodes, whoever of these holds it. Once a majority has ended it, no renewal of its
    /// holder is confirmed, so none restores it on the other nodes either. When this returns, no node ends another
    /// lock by this call.
    async fn force_release(&self, key: &Key, whose: &Whose, timeout: Duration) -> Result<Verdict, Error> {
        let (quorum, timeout) = (&self.quorum, awaited(timeout));
        let started = Instant::now();
        let mut answers = quorum.ask(timeout, |node| {
            let (key, whose) = (key.clone(), whose.clone());
            Box::pin(async move { node.force_release(&key, &whose, timeout).await })
        })?;
        let (mut tally, mut replied) = (Tally::new(quorum), 0);
        let (mut was_held, mut others, mut may_run) = (false, 0, false);
        while let Some((place, answer)) = answers.next().await {
            match answer {
                Ok(ended) => {
                    tally.yes();
                    replied += 1;
                    match ended {
                        Verdict::Done => was_held = true,
                        Verdict::NotOurs(Loss::Taken) => others += 1,
                        Verdict::NotOurs(_) => {}
                    }
                }
                Err(error) => {
                    may_run |= !error.has_not_run();
                    tally.failed(place, error);
                }
            }
        }
        if may_run {
            sleep_until(calls::may_run_until(started, timeout)).await;
        }
        if replied < quorum.needed {
            return Err(tally.into_error());
        }
        // Where a majority is others', the rest was a vote that was never withdrawn.
        Ok(match was_held && others < quorum.needed {
            true => Verdict::Done,
            false if others > 0 => Verdict::NotOurs(Loss::Taken),
            false => Verdict::NotOurs(Loss::Missing),
        })
    }

    /// Releases the lock; where the keys stay taken for a `rest`, leaves them to nobody for that time.
    ///
    /// Of a token that others may use, this may end the lock for all of them. It takes nothing from who comes back by
    /// the token after this has returned: until then, it waits for all nodes, or until they can't run it any longer.
    async fn release(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let ends_others = ending == Ending::Lock && !owned.own_token;
        let (quorum, timeout) = (&self.quorum, if ends_others { awaited(timeout) } else { first(timeout) });
        let sent = Instant::now();
        let stays_until = sent + rest;
        let mut answers = Calls::new(quorum)?;
        let releasing = quorum.rounds.release(owned, ending, stays_until);
        answers.send_to_all(quorum, timeout, |node| {
            let owned = owned.clone();
            Box::pin(async move { catch_up::end_on(&*node, &owned, ending, stays_until, timeout).await })
        });
        releasing.is_sent();
        let mut tally = Tally::new(quorum);
        let mut not_ours = Loss::Missing;
        let (mut behind, mut may_run) = (Vec::new(), false);
        while let Some((place, answer)) = answers.next().await {
            releasing.answered(place, matches!(answer, Ok(Verdict::Done)));
            match answer {
                Ok(Verdict::Done) => tally.yes(),
                // It was ours since this release began, or may have been: as after a first try of unknown outcome.
                Ok(Verdict::NotOurs(Loss::Missing)) if releasing.may_be_undone(place) => tally.yes(),
                Ok(Verdict::NotOurs(loss)) => {
                    not_ours = worse(not_ours, loss);
                    tally.no();
                }
                Err(error) => {
                    behind.push(place);
                    may_run |= !error.has_not_run();
                    tally.failed(place, error);
                }
            }
            if !ends_others && tally.outcome().is_some() {
                break;
            }
        }
        if ends_others && may_run {
            sleep_until(calls::may_run_until(sent, timeout)).await;
        }
        let released = match tally.outcome() {
            Some(Outcome::Yes) => Verdict::Done,
            Some(Outcome::No) => Verdict::NotOurs(not_ours),
            // The caller tries again, on all nodes.
            Some(Outcome::Unknown) | None => return Err(tally.into_error_of_release()),
        };
        quorum.release_the_rest(owned, stays_until, timeout, releasing, behind, answers);
        Ok(released)
    }
}

/// Returns the loss that explains both. If any node has another holder, the lock was taken: the next holder's majority
/// and the one that replies share a node.
fn worse(one: Loss, other: Loss) -> Loss {
    if one == Loss::Taken { one } else { other }
}

/// Ends a call that would take longer than it may, as calls that wait to be sent do. What it leaves is done in the
/// background.
async fn within<T>(timeout: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(timeout, call).await.unwrap_or_else(|_| Err(Error::timeout()))
}

/// Returns a little less than the caller's timeout, so that this reports which nodes have not replied.
fn first(timeout: Duration) -> Duration {
    timeout.mul_f64(0.9)
}

/// Returns the timeout of a call whose end is awaited on all nodes: so short that
/// [`may_run_until`](calls::may_run_until) lies within the caller's timeout.
fn awaited(timeout: Duration) -> Duration {
    first(timeout) / 3
}

/// Returns how long to wait for a node: a small part of the ttl, which the wait reduces.
fn node_timeout(ttl: Duration, timeout: Duration) -> Duration {
    const ENOUGH: Duration = Duration::from_millis(200);
    timeout.min((ttl / 50).max(ENOUGH.min(ttl / 4))).max(Duration::from_millis(1))
}

/// Returns how long to wait for the other nodes after a majority has replied within `elapsed`, if their replies could
/// tell more.
fn grace(elapsed: Duration) -> Duration {
    (elapsed * 4).max(Duration::from_millis(2))
}

/// Refuses a ttl that is longer than the restart window: nodes could forget the lock in a restart, and vote again
/// before it has expired.
pub(crate) fn check_ttl(ttl: Duration, window: Duration) -> Result<(), Error> {
    if window.is_zero() || ttl <= whole_seconds(window) {
        return Ok(());
    }
    Err(Error::InvalidTtl("it is longer than the quorum's restart window; use a shorter one, or a longer window"))
}

/// Returns the window rounded up to whole seconds.
fn whole_seconds(window: Duration) -> Duration {
    Duration::from_secs(window.as_secs().saturating_add(u64::from(window.subsec_nanos() > 0)))
}

impl Quorum {
    fn check_ttl(&self, ttl: Duration) -> Result<(), Error> {
        check_ttl(ttl, self.window)
    }

    /// Returns how far ahead of a node's clock a number may be.
    fn ahead(&self) -> Duration {
        if self.window.is_zero() { AHEAD } else { self.window }
    }

    /// Notes that a node has run a request for an exact ttl, or never will, if its reply shows that.
    fn note_exact(&self, owned: &Owned, exact: Option<RequestId>, place: usize, answer: &Result<Verdict, Error>) {
        if let Some(id) = exact.filter(|_| answer.as_ref().map_or_else(Error::has_not_run, |_| true)) {
            self.shortened.has_ended(owned, id, place);
        }
    }

    fn node_error(&self, place: usize, error: Error) -> NodeError {
        let address = self.members.get(place).map(|member| member.address.clone()).unwrap_or_default();
        NodeError { address, error }
    }
}

impl Store for QuorumStore {
    /// It doesn't hand over: the votes for the next owner would have to arrive while those for the last are taken back.
    fn capabilities(&self) -> Capabilities {
        Capabilities { undoes_attempts: true, has_readers: true, ..Capabilities::default() }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, in_line: InLine, timeout: Duration) -> Answer<'a, Acquired> {
        // In time it says which nodes have not replied.
        Box::pin(within(timeout + GRACE, self.acquire(wanted, in_line, timeout)))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(renewal::renew(&self.quorum, owned, ttl, how, timeout))
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(within(timeout, self.release(owned, ending, Duration::ZERO, timeout)))
    }

    /// Each node leaves its keys to nobody, and by that keeps its vote for the rest of the time. A node that has lost
    /// the key does not get it again, as after any release.
    fn linger<'a>(
        &'a self,
        owned: &'a Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Answer<'a, Verdict> {
        Box::pin(within(timeout, self.release(owned, ending, rest, timeout)))
    }

    /// A round undoes its own attempt, on each node by that node's clock.
    fn undo<'a>(&'a self, owned: &'a Owned, _: &'a Latest, timeout: Duration) -> Answer<'a, Undone> {
        let released = within(timeout, self.release(owned, Ending::Grant, Duration::ZERO, timeout));
        Box::pin(async move { released.await.map(|_| Undone::Complete) })
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

    fn downgrade<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Downgraded> {
        Box::pin(downgrade::downgrade(&self.quorum, owned, timeout))
    }

    /// There is no line. A writer that waits for readers says so to the nodes again.
    fn heartbeat<'a>(&'a self, key: &'a Key, place: LinePlace, _: Duration) -> Answer<'a, bool> {
        self.quorum.still_waits(key, place);
        Box::pin(async { Ok(true) })
    }

    fn leave<'a>(&'a self, key: &'a Key, place: LinePlace, _: Duration) -> Answer<'a, ()> {
        self.quorum.withdraw(key, place);
        Box::pin(async { Ok(()) })
    }

    /// A release on any node notifies.
    fn subscribe(&self, key: &Key) -> Subscription {
        Subscription::join(self.quorum.members.iter().map(|member| member.node.subscribe(key)))
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        Box::pin(self.remaining(owned, timeout))
    }

    fn diagnose(&self, _: Option<Duration>, timeout: Duration) -> Answer<'_, Diagnosis> {
        Box::pin(self.diagnose(timeout))
    }

    /// Returns the keys of all nodes. It is an error if a majority can't be asked.
    fn find_keys<'a>(&'a self, prefix: &'a [u8], timeout: Duration) -> Answer<'a, BTreeSet<Key>> {
        Box::pin(async move {
            let (mut tally, mut all) = (Tally::new(&self.quorum), BTreeSet::new());
            let prefix: Arc<[u8]> = prefix.into();
            let mut answers = self.quorum.ask(timeout, |node| {
                let prefix = prefix.clone();
                Box::pin(async move { node.find_keys(&prefix, timeout).await })
            })?;
            while let Some((place, answer)) = answers.next().await {
                match answer {
                    Ok(keys) => {
                        all.extend(keys);
                        tally.yes();
                    }
                    Err(error) => tally.failed(place, error),
                }
            }
            match tally.outcome() {
                Some(Outcome::Yes) => Ok(all),
                _ => Err(tally.into_error()),
            }
        })
    }

    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, timeout: Duration) -> Answer<'a, Verdict> {
        Box::pin(self.force_release(key, whose, timeout))
    }

    fn holders<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Vec<Holder>> {
        Box::pin(self.holders(key, timeout))
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
