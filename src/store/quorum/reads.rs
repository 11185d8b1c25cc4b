//! What a majority of the nodes replies about a lock, without a change to it; and what all of them tell about
//! themselves.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::tally::{Kept, Outcome, StragglerWait, Tally};
use super::{QuorumStore, first};
use crate::hold::Owned;
use crate::store::Holder;
use crate::{Diagnosis, Error, Finding, Key, NodeError, Severity, Token, Topic};

impl QuorumStore {
    /// Looks at all nodes. Those that can't be asked are among what is found.
    pub(super) async fn diagnose(&self, timeout: Duration) -> Result<Diagnosis, Error> {
        let (quorum, timeout) = (&self.quorum, first(timeout));
        let window = Some(quorum.window);
        let mut answers = quorum.ask(timeout, |node| Box::pin(async move { node.diagnose(window, timeout).await }))?;
        let mut all = Diagnosis::default();
        let mut away = 0;
        while let Some((place, answer)) = answers.next().await {
            let found = answer.unwrap_or_else(|error| {
                away += 1;
                let NodeError { address, error } = quorum.node_error(place, error);
                let finding = Finding {
                    severity: Severity::Warning,
                    topic: Topic::Reachability,
                    server: Some(address),
                    what: format!("this node could not be asked: {error}"),
                    advice: "locks are held by the others meanwhile; look at the node".to_owned(),
                };
                Diagnosis { servers: Vec::new(), findings: vec![finding] }
            });
            all.extend(found);
        }
        if quorum.members.len() - away < quorum.needed {
            let finding = Finding {
                severity: Severity::Danger,
                topic: Topic::Reachability,
                server: None,
                what: format!("{away} of {} nodes could not be asked: no majority grants locks", quorum.members.len()),
                advice: "bring some of them back".to_owned(),
            };
            all.extend(Diagnosis { servers: Vec::new(), findings: vec![finding] });
        }
        Ok(all)
    }

    pub(super) async fn remaining(&self, owned: &Owned, timeout: Duration) -> Result<Option<Duration>, Error> {
        let (quorum, timeout) = (&self.quorum, first(timeout));
        let mut answers = quorum.ask(timeout, |node| {
            let owned = owned.clone();
            Box::pin(async move { node.remaining(&owned, timeout).await })
        })?;
        let mut tally = Tally::new(quorum);
        let mut kept = Kept::new(quorum.needed);
        while let Some((place, answer)) = kept.in_time(answers.next()).await {
            match answer {
                Ok(Some(remaining)) => {
                    kept.push(remaining);
                    tally.yes();
                }
                Ok(None) => tally.no(),
                Err(error) => tally.failed(place, error),
            }
            match tally.outcome() {
                Some(Outcome::Yes) if kept.is_known(tally.unanswered()) => break,
                Some(Outcome::Yes) | None => {}
                Some(Outcome::No) => return Ok(None),
                Some(Outcome::Unknown) => break,
            }
        }
        kept.by_majority().map(Some).ok_or_else(|| tally.into_error())
    }

    /// Returns the holder of the key on a majority; `None` once no one can hold it on a majority. Of several readers,
    /// the one that stays longest.
    pub(super) async fn inspect(&self, key: &Key, timeout: Duration) -> Result<Option<Holder>, Error> {
        let until = Instant::now() + timeout;
        let inspected = self.inspect_one(key, timeout).await;
        // Of several readers, each node may have returned another one.
        match inspected {
            Ok(Inspected::Several) => {
                let left = until.saturating_duration_since(Instant::now());
                Ok(self.holders(key, left).await?.into_iter().next())
            }
            Ok(Inspected::One(holder)) => Ok(holder),
            Err(error) => Err(error),
        }
    }

    async fn inspect_one(&self, key: &Key, timeout: Duration) -> Result<Inspected, Error> {
        let (quorum, timeout) = (&self.quorum, first(timeout));
        let mut answers = quorum.ask(timeout, |node| {
            let key = key.clone();
            Box::pin(async move { node.inspect(&key, timeout).await })
        })?;
        let mut tally = Tally::new(quorum);
        let mut holders: HashMap<Token, (Vec<Holder>, Kept)> = HashMap::new();
        let mut holder_of_most: Option<Token> = None;
        loop {
            let next = match holder_of_most.as_ref().and_then(|token| holders.get_mut(token)) {
                Some((_, kept)) => kept.in_time(answers.next()).await,
                None => answers.next().await,
            };
            let Some((place, answer)) = next else { break };
            match answer {
                Ok(Some(holder)) => {
                    tally.no();
                    let new = || (Vec::new(), Kept::new(quorum.needed));
                    let (same, kept) = holders.entry(holder.token.clone()).or_insert_with(new);
                    kept.push(holder.remaining.unwrap_or(Duration::MAX));
                    if same.len() + 1 >= quorum.needed {
                        holder_of_most = Some(holder.token.clone());
                    }
                    same.push(holder);
                }
                Ok(None) => tally.no(),
                Err(error) => tally.failed(place, error),
            }
            let most = holders.values().map(|(same, _)| same.len()).max().unwrap_or_default();
            if most + tally.unanswered() + tally.failures() < quorum.needed {
                return Ok(if holders.len() > 1 { Inspected::Several } else { Inspected::One(None) });
            }
            let known = holder_of_most.as_ref().and_then(|token| holders.get(token));
            if known.is_some_and(|(_, kept)| kept.is_known(tally.unanswered())) {
                break;
            }
        }
        match holder_of_most.and_then(|token| holders.remove(&token)) {
            Some((same, kept)) => Ok(Inspected::One(summary(&same, kept.by_majority()))),
            None if holders.len() > 1 => Ok(Inspected::Several),
            None => Err(tally.into_error()),
        }
    }

    /// Returns all who hold the key on a majority: those that stay longest first.
    ///
    /// # Errors
    ///
    /// [`Error::Quorum`] where nodes that have not replied could decide whether somebody holds it.
    pub(super) async fn holders(&self, key: &Key, timeout: Duration) -> Result<Vec<Holder>, Error> {
        let (quorum, timeout) = (&self.quorum, first(timeout));
        let mut answers = quorum.ask(timeout, |node| {
            let key = key.clone();
            Box::pin(async move { node.holders(&key, timeout).await })
        })?;
        let mut tally = Tally::new(quorum);
        let mut all: HashMap<Token, Vec<Holder>> = HashMap::new();
        let mut stragglers = StragglerWait::new(quorum.needed);
        while let Some((place, answer)) = stragglers.in_time(answers.next()).await {
            match answer {
                Ok(holders) => {
                    stragglers.has_reply();
                    tally.no();
                    // A node names each holder once, whatever it lists.
                    let mut named = HashSet::new();
                    for holder in holders.into_iter().filter(|holder| named.insert(holder.token.clone())) {
                        all.entry(holder.token.clone()).or_default().push(holder);
                    }
                }
                Err(error) => tally.failed(place, error),
            }
        }
        let unknown = tally.unanswered() + tally.failures();
        if all.values().any(|same| same.len() < quorum.needed && same.len() + unknown >= quorum.needed)
            || unknown >= quorum.needed
        {
            return Err(tally.into_error());
        }
        let mut holders: Vec<Holder> = all.values().filter_map(|same| on_majority(same, quorum.needed)).collect();
        let longest = |holder: &Holder| holder.remaining.unwrap_or(Duration::MAX);
        holders.sort_by_key(|holder| std::cmp::Reverse(longest(holder)));
        Ok(holders)
    }
}

/// What the nodes reply about the holder of a key.
enum Inspected {
    One(Option<Holder>),
    /// They name several, and none on a majority.
    Several,
}

/// Returns the holder that so many nodes name, each with the time that it has left there.
fn on_majority(same: &[Holder], needed: usize) -> Option<Holder> {
    let mut remaining: Vec<Duration> = same.iter().map(|holder| holder.remaining.unwrap_or(Duration::MAX)).collect();
    remaining.sort_unstable_by(|one, other| other.cmp(one));
    summary(same, Some(*remaining.get(needed - 1)?))
}

/// Combines what a majority has replied about one holder with how long a majority keeps its lock.
fn summary(same: &[Holder], kept: Option<Duration>) -> Option<Holder> {
    let remaining = kept.filter(|kept| *kept < Duration::MAX);
    let fence = same.iter().map(|holder| holder.fencing_token).max_by_key(|fence| {
        // The fencing token is the number that most nodes know; a single node may know an earlier or a later one.
        (same.iter().filter(|other| other.fencing_token == *fence).count(), *fence)
    });
    let holder = same.first()?.clone();
    Some(Holder { remaining, fencing_token: fence.flatten(), ..holder })
}
