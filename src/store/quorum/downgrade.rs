//! Turning a lock into a reader's share, on each node by itself.
//!
//! Why no writer gets in meanwhile: each node that has the lock turns it into a share in one step, and keeps that for
//! as long as it would have kept the lock. So whether a node has run this or not, it is no writer's, and the nodes that
//! confirmed the last renewal are a majority until the deadline, which stays as it is. From then on, only a renewal of
//! the share moves it, which a majority of shares has to confirm.
//!
//! Why nobody believes to be alone who isn't: before the nodes are asked, the guard stops to count as held
//! (`hold/downgrade.rs`). Another guard of the same token may rely on the lock as well; its grant is recorded on a
//! majority of the nodes, and these refuse.
//!
//! What a minority has not run: a node that didn't have the lock gets the share like any other reader's
//! ([`heal`](super::heal)). One that was away is asked again for a while; until then it keeps the lock as it was, for
//! no longer than its ttl, and confirms no renewal. The release of a share ends it there as well ([`end_on`]).
//!
//! What is run after the release of the share finds a node's lock gone, or makes a share of what came late, too. That
//! share is undone: a downgrade is an open round from before it is sent.
//!
//! [`end_on`]: super::catch_up::end_on

use std::sync::Arc;
use std::time::Duration;

use crate::report::debug;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::calls::{Calls, may_run_until};
use super::catch_up::{RETRY_FOR, Undo, retry};
use super::open_rounds::OpenRound;
use super::tally::{Outcome, Tally};
use super::{Quorum, first, worse};
use crate::hold::Owned;
use crate::mode::Mode;
use crate::store::Downgraded;
use crate::{Error, Loss};

/// Turns a lock into a reader's share on a majority of the nodes. If this is dropped, a task waits for the replies all
/// the same.
pub(super) async fn downgrade(quorum: &Arc<Quorum>, owned: &Owned, timeout: Duration) -> Result<Downgraded, Error> {
    let timeout = first(timeout);
    let may_run_until = may_run_until(Instant::now(), timeout);
    // What it leaves is a reader's: a late release of the lock ends none of that.
    let open = quorum.rounds.open(&Owned { mode: Mode::Read, ..owned.clone() });
    let answers = quorum.ask(timeout, |node| {
        let owned = owned.clone();
        Box::pin(async move { node.downgrade(&owned, timeout).await })
    })?;
    let runtime = answers.runtime().clone();
    let downgrading = Downgrading { quorum: quorum.clone(), open, owned: owned.clone(), may_run_until };
    let (decide, decided) = oneshot::channel();
    // Closing the locker waits for what may have to be undone.
    quorum.releases.spawn_on(downgrading.run(answers, decide), &runtime);
    decided.await.map_err(|_| Error::timeout())?
}

struct Downgrading {
    quorum: Arc<Quorum>,
    open: OpenRound,
    owned: Owned,
    /// Until when a node may run it without having replied.
    may_run_until: Instant,
}

impl Downgrading {
    async fn run(self, mut answers: Calls<usize, Downgraded>, decide: oneshot::Sender<Result<Downgraded, Error>>) {
        let mut decide = Some(decide);
        let mut tally = Some(Tally::new(&self.quorum));
        // Nodes that replied after the release, that have not run it, and that may have.
        let (mut late, mut behind, mut doubtful) = (Vec::new(), Vec::new(), Vec::new());
        let mut is_done = false;
        let mut refusal = Downgraded::NotOurs(Loss::Missing);
        while let Some((place, answer)) = answers.next().await {
            match &answer {
                Ok(Downgraded::Done) if self.open.is_released() => late.push(place),
                Ok(_) => {}
                Err(error) if error.has_not_run() => behind.push(place),
                Err(_) => doubtful.push(place),
            }
            let Some(mut counted) = tally.take() else { continue };
            match answer {
                Ok(Downgraded::Done) => counted.yes(),
                Ok(refused) => {
                    refusal = combine(refusal, refused);
                    counted.no();
                }
                Err(error) => counted.failed(place, error),
            }
            let verdict = match counted.outcome() {
                Some(Outcome::Yes) => Ok(Downgraded::Done),
                Some(Outcome::No) => Ok(refusal),
                // The caller tries again, on all nodes.
                Some(Outcome::Unknown) => Err(counted.into_error()),
                None => {
                    tally = Some(counted);
                    continue;
                }
            };
            is_done = matches!(verdict, Ok(Downgraded::Done));
            // A caller that has gone releases whatever it is.
            decide.take().map(|decide| decide.send(verdict));
        }
        drop(tally);
        for place in late {
            self.undo(place).await;
        }
        if is_done {
            behind.extend(doubtful);
            self.catch_up(behind).await;
        } else if !doubtful.is_empty() {
            sleep_until(self.may_run_until).await;
            for place in doubtful {
                self.undo_if_released(place).await;
            }
        }
    }

    /// Asks the nodes again that failed, after a majority has run it.
    async fn catch_up(self, places: Vec<usize>) {
        let shared = Arc::new(self);
        for place in places {
            let downgrading = shared.clone();
            shared.quorum.releases.spawn(async move {
                let Some(member) = downgrading.quorum.members.get(place) else { return };
                let (until, releases) = (Instant::now() + RETRY_FOR, &downgrading.quorum.releases);
                let downgrade = |timeout| member.node.downgrade(&downgrading.owned, timeout);
                if let Err(error) = retry(&member.catching_up, releases, until, downgrade).await {
                    let key = downgrading.owned.key();
                    debug!(name: "tenure.downgrade_failed", %key, %error, "a node keeps the lock until its ttl");
                }
                downgrading.undo_if_released(place).await;
            });
        }
    }

    async fn undo_if_released(&self, place: usize) {
        if self.open.is_released() {
            self.undo(place).await;
        }
    }

    /// Undoes on one node what took effect there after the release.
    async fn undo(&self, place: usize) {
        let stays_until = self.open.release_is_sent().await;
        self.open.undoes(place);
        let owned = Owned { mode: Mode::Read, ..self.owned.clone() };
        drop(self.quorum.undo(place, Undo { owned, latest: Arc::default(), ttl: RETRY_FOR, stays_until }));
    }
}

/// Returns the refusal that explains both.
fn combine(one: Downgraded, other: Downgraded) -> Downgraded {
    match (one, other) {
        (Downgraded::NotOurs(one), Downgraded::NotOurs(other)) => Downgraded::NotOurs(worse(one, other)),
        // Then the lock is there, at least in part.
        _ => Downgraded::NotNow,
    }
}
