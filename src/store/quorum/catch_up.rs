//! Catching up with nodes after a majority has decided: releases that have not reached them, and attempts to undo.
//!
//! It only makes keys free sooner: if it fails, the ttl frees them. So it is bounded in time and in number, and nothing
//! but [`Locker::close`](crate::Locker::close) waits for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use super::Quorum;
use super::calls::{Calls, GRACE};
use super::open_rounds::Releasing;
use crate::hold::Owned;
use crate::hold::timing;
use crate::mode::Mode;
use crate::report::debug;
use crate::store::node::Node;
use crate::store::{Answer, Ending, Latest, Undone, Verdict};
use crate::{Error, Loss};

/// For how many locks at a time a node that fails is tried again. For any more, it is tried once.
pub(super) const LOCKS: usize = 1_024;

/// How long a node that is away is tried again.
pub(super) const RETRY_FOR: Duration = Duration::from_secs(10);

/// How long it is tried again from the moment when the locker is closed, which waits for it.
const RETRY_FOR_WHEN_CLOSED: Duration = Duration::from_secs(3);

/// How long one try waits for a node's reply.
const TRY: Duration = Duration::from_secs(1);

/// An attempt to undo on one node.
pub(super) struct Undo {
    pub(super) owned: Owned,
    /// Until when the node may run a vote that it has not replied to.
    pub(super) latest: Arc<Latest>,
    pub(super) ttl: Duration,
    /// Until when the release that came before leaves the keys to nobody. It may not have reached the node yet.
    pub(super) stays_until: Option<Instant>,
}

impl Undo {
    /// Undoes it on one node. What a release leaves to nobody is not free before its time: a release that has not
    /// reached the node would find nothing to leave, so it is repeated first.
    fn run_on<'a>(&'a self, node: &'a dyn Node, timeout: Duration) -> Answer<'a, Undone> {
        let until = Instant::now() + timeout;
        let stays_until = self.stays_until.filter(|&time| timing::rest_until(time, Instant::now()).is_some());
        Box::pin(async move {
            if let Some(stays_until) = stays_until {
                end_on(node, &self.owned, Ending::Grant, stays_until, timeout).await?;
            }
            node.undo(&self.owned, &self.latest, until.saturating_duration_since(Instant::now())).await
        })
    }
}

impl Quorum {
    /// Undoes an attempt on one node, in the background.
    pub(super) fn undo(&self, place: usize, undo: Undo) -> Option<JoinHandle<()>> {
        let member = self.members.get(place)?;
        let runtime = Handle::try_current().ok()?;
        let (node, catching_up, releases) = (member.node.clone(), member.catching_up.clone(), self.releases.clone());
        let task = async move {
            let until = Instant::now() + undo.ttl.min(RETRY_FOR);
            let done = loop {
                match retry(&catching_up, &releases, until, |timeout| undo.run_on(&*node, timeout)).await {
                    Ok(Undone::Complete) => break Ok(()),
                    Ok(Undone::MayRun(_)) if Instant::now() >= until => break Ok(()),
                    Ok(Undone::MayRun(within)) => sleep_until(until.min(Instant::now() + within)).await,
                    Err(error) => break Err(error),
                }
            };
            if let Err(error) = done {
                let key = undo.owned.key();
                debug!(name: "tenure.undo_failed", %key, %error, "a node keeps a vote until its ttl ends");
            }
        };
        Some(self.releases.spawn_on(task, &runtime))
    }

    /// Releases on the nodes that failed, or fail later, after a majority has decided on a release. Until
    /// `stays_until`, a node leaves its keys to nobody.
    ///
    /// By then the same token may hold the lock again, so each of these ends its own grant alone.
    pub(super) fn release_the_rest(
        self: &Arc<Self>,
        owned: &Owned,
        stays_until: Instant,
        timeout: Duration,
        releasing: Releasing,
        mut behind: Vec<usize>,
        mut answers: Calls<usize, Verdict>,
    ) {
        if behind.is_empty() && answers.have_ended() {
            return;
        }
        let runtime = answers.runtime().clone();
        let (quorum, owned) = (self.clone(), owned.clone());
        let rest = async move {
            while let Some((place, answer)) = answers.next().await {
                releasing.answered(place, matches!(answer, Ok(Verdict::Done)));
                if answer.is_err() {
                    behind.push(place);
                }
            }
            for member in behind.into_iter().filter_map(|place| quorum.members.get(place)) {
                let (node, catching_up, owned) = (member.node.clone(), member.catching_up.clone(), owned.clone());
                let until = Instant::now() + RETRY_FOR.max(timeout);
                let releases = quorum.releases.clone();
                quorum.releases.spawn(async move {
                    let release = |timeout| end_on(&*node, &owned, Ending::Grant, stays_until, timeout);
                    let released = retry(&catching_up, &releases, until, release).await;
                    if let Err(error) = released {
                        let key = owned.key();
                        debug!(name: "tenure.release_failed", %key, %error, "a node keeps the key until its ttl");
                    }
                });
            }
        };
        self.releases.spawn_on(rest, &runtime);
    }
}

/// Releases on one node. Until `stays_until`, the node leaves its keys to nobody.
///
/// A node that has missed a downgrade keeps the lock of a reader's grant. That ends as well.
pub(super) fn end_on<'a>(
    node: &'a dyn Node,
    owned: &'a Owned,
    ending: Ending,
    stays_until: Instant,
    timeout: Duration,
) -> Answer<'a, Verdict> {
    let until = Instant::now() + timeout;
    let end = move |owned: Owned, ending, timeout| async move {
        match timing::rest_until(stays_until, Instant::now()) {
            Some(rest) => node.linger(&owned, ending, rest, timeout).await,
            None => node.release(&owned, ending, timeout).await,
        }
    };
    Box::pin(async move {
        let ended = end(owned.clone(), ending, timeout).await?;
        if ended != Verdict::NotOurs(Loss::Taken) || owned.mode != Mode::Read {
            return Ok(ended);
        }
        let left = || until.saturating_duration_since(Instant::now());
        let lock = Owned { mode: Mode::Exclusive, ..owned.clone() };
        match end(lock, Ending::Grant, left()).await? {
            // It may have run the downgrade in between.
            Verdict::NotOurs(Loss::Taken) => end(owned.clone(), ending, left()).await,
            ended => Ok(ended),
        }
    })
}

/// Calls a node until it replies or refuses for good, or until the time is over.
pub(super) async fn retry<'a, T>(
    catching_up: &Semaphore,
    releases: &TaskTracker,
    mut until: Instant,
    call: impl Fn(Duration) -> Answer<'a, T>,
) -> Result<T, Error> {
    let (mut failures, mut permit, mut is_closed) = (0, None, false);
    loop {
        if !is_closed && releases.is_closed() {
            is_closed = true;
            until = until.min(Instant::now() + RETRY_FOR_WHEN_CLOSED);
        }
        let within = timing::call_timeout(TRY, Instant::now(), until);
        let error = match timeout(within + GRACE, call(within)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(_) => Error::timeout(),
        };
        failures += 1;
        let remaining = until.saturating_duration_since(Instant::now());
        let pause = timing::pause_after(failures, TRY, remaining, fastrand::f64());
        if !error.is_transient() || pause >= remaining {
            return Err(error);
        }
        if permit.is_none() {
            permit = catching_up.try_acquire().ok();
        }
        if permit.is_none() {
            return Err(error);
        }
        sleep(pause).await;
    }
}
