//! Counting replies: what a majority has decided, as soon as the others can no longer change it. No I/O.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{Quorum, grace};
use crate::store::node::{Refusal, Vote, VoteReply};
use crate::{Error, NodeError};

/// The replies to a request that each node confirms or refuses.
pub(super) struct Tally<'a> {
    quorum: &'a Quorum,
    yes: usize,
    no: usize,
    failed: Vec<NodeError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A majority has confirmed.
    Yes,
    /// So many have refused that no majority can confirm.
    No,
    /// Neither, and the nodes that have yet to reply can't change that.
    Unknown,
}

impl<'a> Tally<'a> {
    pub(super) fn new(quorum: &'a Quorum) -> Self {
        Self { quorum, yes: 0, no: 0, failed: Vec::new() }
    }

    pub(super) fn yes(&mut self) {
        self.yes += 1;
    }

    pub(super) fn no(&mut self) {
        self.no += 1;
    }

    pub(super) fn failed(&mut self, place: usize, error: Error) {
        let error = self.quorum.node_error(place, error);
        self.failed.push(error);
    }

    pub(super) fn failures(&self) -> usize {
        self.failed.len()
    }

    pub(super) fn unanswered(&self) -> usize {
        self.quorum.members.len() - self.yes - self.no - self.failed.len()
    }

    pub(super) fn outcome(&self) -> Option<Outcome> {
        let needed = self.quorum.needed;
        let enough_to_refuse = self.quorum.members.len() - needed + 1;
        let open = self.unanswered();
        match () {
            () if self.yes >= needed => Some(Outcome::Yes),
            () if self.no >= enough_to_refuse => Some(Outcome::No),
            () if self.yes + open < needed && self.no + open < enough_to_refuse => Some(Outcome::Unknown),
            () => None,
        }
    }

    /// For a release, nodes on which the lock was gone already count as well: nothing is left to do there.
    pub(super) fn into_error_of_release(self) -> Error {
        Error::Quorum { needed: self.quorum.needed, granted: self.yes + self.no, nodes: self.failed }
    }

    pub(super) fn into_error(self) -> Error {
        Error::Quorum { needed: self.quorum.needed, granted: self.yes, nodes: self.failed }
    }
}

/// The least time to wait for the last nodes if their replies could tell more. No lock depends on it: the caller only
/// wants to know.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);

/// How long to wait for replies that could tell more, once a majority has replied.
pub(super) struct StragglerWait {
    needed: usize,
    started: Instant,
    replies: usize,
    until: Option<Instant>,
}

impl StragglerWait {
    pub(super) fn new(needed: usize) -> Self {
        Self { needed, started: Instant::now(), replies: 0, until: None }
    }

    pub(super) fn has_reply(&mut self) {
        self.replies += 1;
        if self.replies == self.needed {
            self.until = Some(Instant::now() + grace(self.started.elapsed()).max(SHORTEST_WAIT));
        }
    }

    /// Returns the next reply, but waits for it only shortly once a majority has replied.
    pub(super) async fn in_time<T>(&self, next: impl Future<Output = Option<T>>) -> Option<T> {
        match self.until {
            None => next.await,
            Some(until) => timeout_at(until, next).await.unwrap_or(None),
        }
    }
}

/// How long nodes keep a lock, by their replies: it is held on a majority until too many of them have lost it.
pub(super) struct Kept {
    needed: usize,
    /// In descending order.
    remaining: Vec<Duration>,
    stragglers: StragglerWait,
}

impl Kept {
    pub(super) fn new(needed: usize) -> Self {
        Self { needed, remaining: Vec::new(), stragglers: StragglerWait::new(needed) }
    }

    pub(super) fn push(&mut self, remaining: Duration) {
        let place = self.remaining.partition_point(|other| *other >= remaining);
        self.remaining.insert(place, remaining);
        self.stragglers.has_reply();
    }

    pub(super) fn by_majority(&self) -> Option<Duration> {
        self.remaining.get(self.needed - 1).copied()
    }

    /// Returns whether this many more replies can't change it by much.
    pub(super) fn is_known(&self, open: usize) -> bool {
        let Some(known) = self.by_majority() else { return false };
        let at_most = match self.needed.checked_sub(open + 1) {
            Some(place) => self.remaining.get(place).copied().unwrap_or(known),
            None => Duration::MAX,
        };
        at_most - known <= known / 16
    }

    /// Returns the next reply, as [`StragglerWait::in_time`] does.
    pub(super) async fn in_time<T>(&self, next: impl Future<Output = Option<T>>) -> Option<T> {
        self.stragglers.in_time(next).await
    }
}

/// The result of a round of votes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// A majority has granted, and with one number.
    Granted { number: Option<u64> },
    /// A majority would grant, but another number.
    Again,
    /// Others hold a majority of the nodes.
    Held { place: usize, remaining: Option<Duration>, refusal: Refusal },
    /// Others hold some of the nodes, and too many of the rest could not be asked: another may have a majority, or no
    /// one.
    Split { place: usize, remaining: Option<Duration>, refusal: Refusal },
    /// Too many nodes could not be asked, or do not vote.
    Failed,
}

/// Returns the result of one round of votes as soon as it is certain. `votes` has one place for each node; if it
/// `is_late`, the missing votes count as failed.
pub(super) fn decide(votes: &[Option<Result<VoteReply, Error>>], needed: usize, is_late: bool) -> Option<Decision> {
    let mut numbers: BTreeMap<Option<u64>, usize> = BTreeMap::new();
    let mut held = Vec::new();
    let (mut open, mut willing, mut failed) = (0, 0, 0);
    for vote in votes {
        match vote.as_ref().map(|answer| answer.as_ref().map(|reply| reply.vote)) {
            None if is_late => failed += 1,
            None => open += 1,
            Some(Ok(Vote::Granted { number })) => {
                *numbers.entry(number).or_default() += 1;
                willing += 1;
            }
            Some(Ok(Vote::Behind | Vote::Ahead)) => willing += 1,
            Some(Ok(Vote::Held { place, remaining, .. })) => held.push((remaining.unwrap_or(Duration::MAX), place)),
            Some(Ok(Vote::Silent { .. }) | Err(_)) => failed += 1,
        }
    }
    let best = numbers.iter().max_by_key(|&(_, &count)| count);
    let (number, granted) = best.map_or((None, 0), |(&number, &count)| (number, count));
    if granted >= needed {
        return Some(Decision::Granted { number });
    }
    if granted + open >= needed {
        return None;
    }
    if willing >= needed {
        return Some(Decision::Again);
    }
    if willing + open >= needed {
        return None;
    }
    if willing + held.len() >= needed {
        // This many of the others must expire, the earliest first.
        held.sort_unstable();
        let (remaining, place) = held.get(needed - willing - 1).copied().unwrap_or_default();
        let remaining = Some(remaining).filter(|&remaining| remaining < Duration::MAX);
        let is_split = held.len() < needed;
        let refusal = refusal(votes, is_split, is_late);
        return Some(match is_split {
            true => Decision::Split { place, remaining, refusal },
            false => Decision::Held { place, remaining, refusal },
        });
    }
    (failed > votes.len() - needed).then_some(Decision::Failed)
}

/// Returns which nodes refused a round, and which are ignored while its request waits. A refused request gives back what
/// it was granted, which notifies all who wait, itself included: without this, it would ask again and again.
///
/// Where others hold a majority, only what is released there can make another majority possible. Where they hold less,
/// a node that failed can as well, and is heeded.
fn refusal(votes: &[Option<Result<VoteReply, Error>>], is_split: bool, is_late: bool) -> Refusal {
    let mut keys = votes.iter().filter_map(held_place);
    let first = keys.next();
    // A waiter is subscribed to one key. If nodes refused because of several, any of them may be what becomes free.
    let is_one_key = keys.all(|key| Some(key) == first);
    let is_ignored = |vote: &Option<Result<VoteReply, Error>>| match vote {
        Some(Ok(VoteReply { vote: Vote::Held { .. }, .. })) => false,
        Some(Ok(VoteReply { vote: Vote::Silent { .. }, .. }) | Err(_)) => !is_split,
        Some(Ok(_)) => true,
        None => !is_split || !is_late,
    };
    let (places, is_refused) = (votes.iter().enumerate(), |vote| held_place(vote).is_some());
    Refusal {
        by: places.clone().filter(|(_, vote)| is_refused(vote)).map(|(place, _)| place).collect(),
        ignored: places.filter(|(_, vote)| is_one_key && is_ignored(vote)).map(|(place, _)| place).collect(),
    }
}

/// Returns the index of the key that another holds.
fn held_place(vote: &Option<Result<VoteReply, Error>>) -> Option<usize> {
    match vote {
        Some(Ok(VoteReply { vote: Vote::Held { place, .. }, .. })) => Some(*place),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::node::{HeldBy, Nodes, Seen};

    fn vote(vote: Vote) -> Option<Result<VoteReply, Error>> {
        Some(Ok(VoteReply { vote, seen: Seen { now: 0, last: 0 } }))
    }

    fn granted(number: u64) -> Option<Result<VoteReply, Error>> {
        vote(Vote::Granted { number: Some(number) })
    }

    fn held(ms: u64) -> Option<Result<VoteReply, Error>> {
        vote(Vote::Held { place: 0, remaining: Some(Duration::from_millis(ms)), by: HeldBy::Another })
    }

    fn failed() -> Option<Result<VoteReply, Error>> {
        Some(Err(Error::timeout()))
    }

    #[test]
    fn a_majority_with_one_number_grants_without_the_others() {
        assert_eq!(decide(&[granted(7), None, granted(7)], 2, false), Some(Decision::Granted { number: Some(7) }));
        assert_eq!(decide(&[granted(7), None, failed()], 2, false), None);
        let unfenced = || vote(Vote::Granted { number: None });
        assert_eq!(decide(&[unfenced(), held(1), unfenced()], 2, false), Some(Decision::Granted { number: None }));
    }

    #[test]
    fn a_majority_with_several_numbers_is_asked_again() {
        assert_eq!(decide(&[granted(7), granted(8), failed()], 2, false), Some(Decision::Again));
        assert_eq!(decide(&[vote(Vote::Behind), None, vote(Vote::Ahead)], 2, false), Some(Decision::Again));
        assert_eq!(decide(&[vote(Vote::Behind), None, None], 2, false), None);
    }

    #[test]
    fn a_waiter_comes_back_when_enough_nodes_may_be_free() {
        let told = |votes: &[_], needed| match decide(votes, needed, false) {
            Some(Decision::Held { remaining, .. }) => (remaining.map(|left| left.as_millis()), false),
            Some(Decision::Split { remaining, .. }) => (remaining.map(|left| left.as_millis()), true),
            other => panic!("{other:?}"),
        };
        // Two must let go where none is ours, one where one is.
        assert_eq!(told(&[held(5), held(9), None], 2), (Some(9), false));
        assert_eq!(told(&[held(5), held(9), granted(1)], 2), (Some(5), false));
        assert_eq!(told(&[held(5), granted(1), failed()], 2), (Some(5), true));
        let for_ever = || vote(Vote::Held { place: 0, remaining: None, by: HeldBy::Another });
        assert_eq!(told(&[for_ever(), held(9), for_ever()], 2), (None, false));
    }

    #[test]
    fn who_is_refused_waits_for_a_release_on_the_nodes_that_refused() {
        let refusal = |votes: &[_]| match decide(votes, 2, false) {
            Some(Decision::Held { refusal, .. } | Decision::Split { refusal, .. }) => refusal,
            other => panic!("{other:?}"),
        };
        let nodes = |places: &[usize]| Nodes::from_iter(places.iter().copied());
        for last in [None, granted(1), vote(Vote::Behind), failed()] {
            assert_eq!(refusal(&[held(5), held(9), last]), Refusal { by: nodes(&[0, 1]), ignored: nodes(&[2]) });
        }
        assert_eq!(refusal(&[held(5), held(9), held(5)]), Refusal { by: nodes(&[0, 1, 2]), ignored: nodes(&[]) });
        // The one that failed may be the one that becomes free.
        let split = refusal(&[held(5), granted(1), failed()]);
        assert_eq!(split, Refusal { by: nodes(&[0]), ignored: nodes(&[1]) });
        let late = decide(&[held(5), granted(1), None], 2, true);
        assert!(matches!(late, Some(Decision::Split { refusal, .. }) if refusal == split), "{late:?}");
        // Another key may be what becomes free.
        let other = vote(Vote::Held { place: 1, remaining: None, by: HeldBy::Another });
        assert_eq!(refusal(&[held(5), other, None]), Refusal { by: nodes(&[0, 1]), ignored: nodes(&[]) });
    }

    #[test]
    fn who_waits_can_do_without_the_last_vote() {
        let votes = [held(5), granted(1), None];
        assert_eq!(decide(&votes, 2, false), None);
        assert!(matches!(decide(&votes, 2, true), Some(Decision::Split { .. })));
        assert_eq!(decide(&[vote(Vote::Behind), granted(1), None], 2, true), Some(Decision::Again));
    }

    #[test]
    fn too_many_nodes_that_cannot_be_asked_are_a_failure_and_no_refusal() {
        assert_eq!(decide(&[failed(), failed(), None], 2, false), Some(Decision::Failed));
        assert_eq!(decide(&[failed(), held(5), failed()], 2, false), Some(Decision::Failed));
        let silent = || vote(Vote::Silent { remaining: Duration::from_secs(9) });
        assert_eq!(decide(&[silent(), None, silent()], 2, false), Some(Decision::Failed));
    }

    proptest! {
        /// What is decided early is what would have been decided with all answers in, but for grants that could be
        /// late: those are never decided against.
        #[test]
        fn an_early_decision_never_refuses_what_the_others_could_still_grant(
            kinds in prop::collection::vec(0_u8..6, 1..8),
            known in prop::collection::vec(any::<bool>(), 8),
        ) {
            let votes = || kinds.iter().map(|kind| match kind {
                0 | 1 => granted(7),
                2 => held(9),
                3 => vote(Vote::Behind),
                4 => granted(8),
                _ => failed(),
            });
            let needed = kinds.len() / 2 + 1;
            let whole: Vec<_> = votes().collect();
            let whole = decide(&whole, needed, false);
            prop_assert!(whole.is_some(), "all votes are in");
            let part: Vec<_> = votes().zip(&known).map(|(vote, &known)| vote.filter(|_| known)).collect();
            if let Some(early) = decide(&part, needed, false) {
                prop_assert_eq!(
                    matches!(early, Decision::Granted { .. }),
                    matches!(whole, Some(Decision::Granted { .. }))
                );
            }
        }
    }
}
