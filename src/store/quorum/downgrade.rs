//! Turning a lock into a reader's share, on each node by itself.
//!
//! Why no writer gets in meanwhile: each node that has the lock turns it into a share in one step, and keeps that for as
//! long as it would have kept the lock. So whether a node has run this or not, it is no writer's, and the nodes that
//! confirmed the last renewal are a majority until the deadline, which stays as it is. From then on, only a renewal of
//! the share moves it, which a majority of shares has to confirm.
//!
//! Why nobody believes to be alone who isn't: before the nodes are asked, the guard stops to count as held
//! (`hold/downgrade.rs`). Another guard of the same token may rely on the lock as well; its grant is recorded on a
//! majority of the nodes, and these refuse.
//!
//! What a minority has not run: a node that didn't have the lock gets the share like any other reader's
//! ([`heal`](super::heal)). One that was away is asked again for a while; until then it keeps the lock as it was, for no
//! longer than its ttl, and confirms no renewal. The release of a share ends it there as well.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::calls::Calls;
use super::catch_up::{PATIENCE, retry};
use super::tally::{Outcome, Tally};
use super::{Quorum, first, worse};
use crate::hold::Owned;
use crate::store::Downgraded;
use crate::{Error, Loss};

/// Turns a lock into a reader's share on a majority of the nodes.
pub(super) async fn downgrade(quorum: &Arc<Quorum>, owned: &Owned, timeout: Duration) -> Result<Downgraded, Error> {
    let timeout = first(timeout);
    let mut answers = quorum.ask(timeout, |node| {
        let owned = owned.clone();
        Box::pin(async move { node.downgrade(&owned, timeout).await })
    })?;
    let mut tally = Tally::new(quorum);
    let (mut behind, mut refusal) = (Vec::new(), Downgraded::NotOurs(Loss::Missing));
    while let Some((place, answer)) = answers.next().await {
        match answer {
            Ok(Downgraded::Done) => tally.yes(),
            Ok(refused) => {
                refusal = match (refusal, refused) {
                    (Downgraded::NotOurs(one), Downgraded::NotOurs(other)) => Downgraded::NotOurs(worse(one, other)),
                    // Then the lock is there, at least in part.
                    _ => Downgraded::NotNow,
                };
                tally.no();
            }
            Err(error) => {
                behind.push(place);
                tally.failed(place, error);
            }
        }
        match tally.outcome() {
            Some(Outcome::Yes) => {
                quorum.downgrade_the_rest(owned, behind, answers);
                return Ok(Downgraded::Done);
            }
            Some(Outcome::No) => return Ok(refusal),
            // The caller tries again, on all nodes.
            Some(Outcome::Unknown) => break,
            None => {}
        }
    }
    Err(tally.into_error())
}

impl Quorum {
    /// Asks the nodes again that failed, or fail later, after a majority has run a downgrade.
    fn downgrade_the_rest(
        self: &Arc<Self>,
        owned: &Owned,
        mut behind: Vec<usize>,
        mut answers: Calls<usize, Downgraded>,
    ) {
        if behind.is_empty() && answers.have_ended() {
            return;
        }
        let runtime = answers.runtime().clone();
        let (quorum, owned) = (self.clone(), owned.clone());
        let rest = async move {
            while let Some((place, answer)) = answers.next().await {
                if answer.is_err() {
                    behind.push(place);
                }
            }
            for member in behind.into_iter().filter_map(|place| quorum.members.get(place)) {
                let (node, catching_up, owned) = (member.node.clone(), member.catching_up.clone(), owned.clone());
                let (until, releases) = (Instant::now() + PATIENCE, quorum.releases.clone());
                quorum.releases.spawn(async move {
                    let downgrade = |timeout| node.downgrade(&owned, timeout);
                    if let Err(error) = retry(&catching_up, &releases, until, downgrade).await {
                        let key = owned.key();
                        debug!(name: "tenure.downgrade_failed", %key, %error, "a node keeps the lock until its ttl");
                    }
                });
            }
        };
        self.releases.spawn_on(rest, &runtime);
    }
}
