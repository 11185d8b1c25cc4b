//! What nodes still owe when a majority has decided: releases that have not reached them, and attempts to take back.
//!
//! All of it is for promptness alone: where it comes to nothing, the ttl frees the key. So it is bounded, in time and
//! in number, and nobody waits for it but [`Locker::close`](crate::Locker::close).

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::Quorum;
use super::calls::{Calls, GRACE};
use super::rounds::Releasing;
use crate::Error;
use crate::hold::Owned;
use crate::hold::timing;
use crate::store::{Answer, Ending, Latest, Undone, Verdict};

/// With so many locks a node may be behind at a time. Of any more, it is told once.
pub(super) const LOCKS: usize = 1_024;

/// For how long a node that is away is tried again.
const PATIENCE: Duration = Duration::from_secs(10);

/// And from when the locker is closed: somebody waits for it then.
const PATIENCE_WHEN_CLOSED: Duration = Duration::from_secs(3);

/// For how long one try waits for a node's answer.
const TRY: Duration = Duration::from_secs(1);

/// An attempt to take back on one node.
pub(super) struct Undo {
    pub(super) owned: Owned,
    /// Until when a vote of it may be run that has not been answered.
    pub(super) latest: Option<Arc<Latest>>,
    pub(super) ttl: Duration,
}

impl Quorum {
    /// Takes an attempt back on one node, in the background.
    pub(super) fn undo(&self, place: usize, undo: Undo) -> Option<JoinHandle<()>> {
        let member = self.members.get(place)?;
        let runtime = Handle::try_current().ok()?;
        let (node, arrears, releases) = (member.node.clone(), member.arrears.clone(), self.releases.clone());
        let task = async move {
            let Undo { owned, latest, ttl } = undo;
            let until = Instant::now() + ttl.min(PATIENCE);
            let latest = latest.unwrap_or_default();
            let done = loop {
                match retry(&arrears, &releases, until, |timeout| node.undo(&owned, &latest, timeout)).await {
                    Ok(Undone::Complete) => break Ok(()),
                    Ok(Undone::MayRun(_)) if Instant::now() >= until => break Ok(()),
                    Ok(Undone::MayRun(within)) => sleep_until(until.min(Instant::now() + within)).await,
                    Err(error) => break Err(error),
                }
            };
            if let Err(error) = done {
                debug!(name: "tenure.undo_failed", key = %owned.key(), %error, "a node keeps a vote until its ttl ends");
            }
        };
        Some(self.releases.spawn_on(task, &runtime))
    }

    /// A majority has answered a release: sees to the nodes that failed, or have yet to answer.
    ///
    /// By then the lock may be held again, by the same token: each of these ends its own grant alone.
    pub(super) fn release_the_rest(
        self: &Arc<Self>,
        owned: &Owned,
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
                let (node, arrears, owned) = (member.node.clone(), member.arrears.clone(), owned.clone());
                let until = Instant::now() + PATIENCE.max(timeout);
                let releases = quorum.releases.clone();
                quorum.releases.spawn(async move {
                    let released = retry(&arrears, &releases, until, |timeout| node.release(&owned, Ending::Grant, timeout)).await;
                    if let Err(error) = released {
                        debug!(name: "tenure.release_failed", key = %owned.key(), %error, "a node keeps the key until its ttl");
                    }
                });
            }
        };
        self.releases.spawn_on(rest, &runtime);
    }
}

/// Calls a node until it answers, refuses for good, or it is that late.
async fn retry<'a, T>(
    arrears: &Semaphore,
    releases: &TaskTracker,
    mut until: Instant,
    call: impl Fn(Duration) -> Answer<'a, T>,
) -> Result<T, Error> {
    let (mut failures, mut permit, mut is_closed) = (0, None, false);
    loop {
        if !is_closed && releases.is_closed() {
            is_closed = true;
            until = until.min(Instant::now() + PATIENCE_WHEN_CLOSED);
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
            permit = arrears.try_acquire().ok();
        }
        if permit.is_none() {
            return Err(error);
        }
        sleep(pause).await;
    }
}
