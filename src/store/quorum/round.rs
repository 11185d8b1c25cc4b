//! One attempt to obtain a lock from a majority: as many ballots as it takes, and then the cleanup.
//!
//! The caller polls it. When the caller has its result, or stops waiting, a task does what is left.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::calls::{Calls, may_run_until};
use super::catch_up::Undo;
use super::open_rounds::OpenRound;
use super::tally::{Decision, decide};
use super::{Quorum, first, grace, node_timeout};
use crate::report::debug;
use crate::store::node::{Ballot, HeldBy, Vote, VoteReply};
use crate::store::{Acquired, InLine, Latest, LinePlace, Wanted};
use crate::{Error, Key};

/// The most ballots of one attempt. The second suffices unless others obtain the same keys in between.
const BALLOTS: usize = 4;

/// The same for a reader, with whom other readers may obtain the key in between.
const BALLOTS_OF_READERS: usize = 16;

/// The longest pause of a reader before its next ballot.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How long to wait for the reply to a release that may make another release unnecessary.
const ANSWER: Duration = Duration::from_secs(1);

/// Tries once to obtain the lock.
pub(super) async fn attempt(
    quorum: &Arc<Quorum>,
    wanted: &Wanted,
    in_line: InLine,
    timeout: Duration,
) -> Result<Acquired, Error> {
    let mut asking = Asking(Some(Round::new(quorum.clone(), wanted.clone(), in_line, timeout)?));
    let Some(round) = &mut asking.0 else { return Err(Error::NoRuntime) };
    let outcome = round.ballots().await;
    let granted = matches!(outcome, Ok(Acquired::Granted { .. }));
    if !granted {
        round.give_back().await;
    }
    if let Some(round) = asking.0.take() {
        round.leave(granted);
    }
    outcome
}

/// A round whose caller waits for the result, until this is dropped.
struct Asking(Option<Round>);

impl Drop for Asking {
    /// A caller that has gone no longer wants the lock.
    fn drop(&mut self) {
        if let Some(round) = self.0.take() {
            round.leave(false);
        }
    }
}

struct Round {
    quorum: Arc<Quorum>,
    open: OpenRound,
    wanted: Arc<Wanted>,
    /// The place of a request that waits, and the key that it has this place for.
    place: Option<(Key, LinePlace)>,
    until: Instant,
    /// Until when a node may run a vote that it has not replied to.
    may_run_until: Instant,
    members: Vec<NodeState>,
    /// The votes in flight, by ballot and node.
    calls: Calls<(usize, usize), VoteReply>,
    /// How long the round of votes took that was split: perhaps no request has got a majority.
    split: Option<Duration>,
}

/// The state of this attempt on one node.
#[derive(Default)]
struct NodeState {
    /// How many calls are in flight.
    calls: usize,
    /// How many were made.
    asked: usize,
    /// The node has granted something, or may have.
    touched: bool,
    /// A call has failed with an unknown outcome: the node may have run it, or may yet.
    doubtful: bool,
    /// Until when the node may run the votes.
    latest: Arc<Latest>,
}

impl Round {
    fn new(quorum: Arc<Quorum>, wanted: Wanted, in_line: InLine, timeout: Duration) -> Result<Self, Error> {
        let calls = Calls::new(&quorum)?;
        let place = match in_line {
            InLine::At { key, place, .. } => wanted.owned.keys.get(key).cloned().map(|key| (key, place)),
            InLine::No | InLine::Behind => None,
        };
        let members = quorum.members.iter().map(|_| NodeState::default()).collect();
        let open = quorum.rounds.open(&wanted.owned);
        let until = Instant::now() + first(timeout);
        let may_run_until = Instant::now();
        let wanted = Arc::new(wanted);
        Ok(Self { quorum, open, wanted, place, until, may_run_until, members, calls, split: None })
    }

    async fn ballots(&mut self) -> Result<Acquired, Error> {
        if let Some((key, place)) = self.place.as_ref().filter(|_| self.wanted.owned.mode.is_shared()) {
            // A writer that waited with this place has gone.
            self.quorum.withdraw(key, *place);
        }
        let mut votes: Vec<Option<Result<VoteReply, Error>>> = Vec::new();
        // Calls that wait to be sent to a node arrive later than the clock that their number was made for.
        let mut took = Duration::ZERO;
        let is_shared = self.wanted.owned.mode.is_shared();
        for ballot in 0..if is_shared { BALLOTS_OF_READERS } else { BALLOTS } {
            let started = Instant::now();
            let asked = self.quorum.clocks.now();
            let willing = votes.iter().flatten().flatten().filter(|reply| reply.vote.is_willing());
            let seen = willing.map(|reply| reply.seen);
            let number =
                self.wanted.fenced.then(|| self.quorum.clocks.propose(seen, (took * 2).min(self.quorum.ahead() / 2)));
            self.ask(ballot, number);
            votes = self.members.iter().map(|_| None).collect();
            let decision = self.collect_votes(ballot, asked, started, &mut votes).await;
            took = started.elapsed();
            self.announce(&decision, &votes);
            match decision {
                Decision::Granted { number } => return Ok(Acquired::Granted { fencing_token: number }),
                Decision::Held { place, remaining, refusal } => {
                    return Ok(Acquired::Held { place, remaining, refusal });
                }
                Decision::Split { place, remaining, refusal } => {
                    self.split = Some(started.elapsed());
                    if self.wanted.queueing.waits() {
                        return Ok(Acquired::Held { place, remaining, refusal });
                    }
                    // An unknown outcome is no refusal.
                    break;
                }
                Decision::Again => {
                    debug!(name: "tenure.ballot", ballot, "the nodes want another number");
                    if is_shared {
                        let_readers_go_first(ballot, took, self.until).await;
                    }
                }
                Decision::Failed => break,
            }
            if Instant::now() >= self.until {
                break;
            }
        }
        Err(self.failure(votes))
    }

    /// Announces a writer that waits for readers to leave, or takes that back.
    fn announce(&self, decision: &Decision, votes: &[Option<Result<VoteReply, Error>>]) {
        let Some((key, place)) = self.place.as_ref().filter(|_| !self.wanted.owned.mode.is_shared()) else { return };
        match decision {
            Decision::Granted { .. } => self.quorum.withdraw(key, *place),
            Decision::Held { .. } | Decision::Split { .. } if self.wanted.queueing.waits() => {
                let waits_for_readers = |reply: &VoteReply| match reply.vote {
                    Vote::Held { place, by: HeldBy::Readers, .. } => self.wanted.owned.keys.get(place) == Some(key),
                    _ => false,
                };
                if votes.iter().flatten().flatten().any(waits_for_readers) {
                    self.quorum.announce(key, *place);
                }
            }
            Decision::Held { .. } | Decision::Split { .. } | Decision::Again | Decision::Failed => {}
        }
    }

    /// Collects the votes of a ballot until they decide it. `asked` is what our clock showed when the nodes were asked.
    async fn collect_votes(
        &mut self,
        ballot: usize,
        asked: u64,
        started: Instant,
        votes: &mut [Option<Result<VoteReply, Error>>],
    ) -> Decision {
        let needed = self.quorum.needed;
        let mut wait_until = None;
        loop {
            let next = match wait_until {
                None => self.calls.next().await,
                Some(until) => match timeout_at(until, self.calls.next()).await {
                    Ok(next) => next,
                    Err(_) => return decide(votes, needed, true).unwrap_or(Decision::Failed),
                },
            };
            let Some(((of, place), answer)) = next else { return Decision::Failed };
            self.note_vote(place, &answer);
            if let Ok(reply) = &answer {
                self.quorum.clocks.learn(place, asked, reply.seen);
            }
            if of != ballot {
                continue;
            }
            if let Some(vote) = votes.get_mut(place) {
                *vote = Some(answer);
            }
            if let Some(decision) = decide(votes, needed, false) {
                return decision;
            }
            // A waiter tries again anyway, and sooner than a slow node replies.
            let answered = votes.iter().filter(|vote| matches!(vote, Some(Ok(_)))).count();
            if self.wanted.queueing.waits() && answered >= needed {
                wait_until = wait_until.or_else(|| Some(Instant::now() + grace(started.elapsed())));
            }
        }
    }

    /// Asks all nodes for their vote.
    fn ask(&mut self, ballot: usize, number: Option<u64>) {
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = node_timeout(self.wanted.ttl, left);
        self.may_run_until = may_run_until(Instant::now(), timeout);
        let wish = Ballot {
            number,
            exactly: ballot > 0,
            window: self.quorum.window,
            ahead: self.quorum.ahead(),
            place: self.place.as_ref().map(|(_, place)| *place),
            heals: false,
        };
        for (place, (member, state)) in self.quorum.members.iter().zip(&mut self.members).enumerate() {
            state.calls += 1;
            state.asked += 1;
            // Each node has its own clock.
            let wanted = Wanted { latest: state.latest.clone(), ..Wanted::clone(&self.wanted) };
            let (node, wish) = (member.node.clone(), wish.clone());
            let call = Box::pin(async move { node.vote(&wanted, &wish, timeout).await });
            self.calls.send((ballot, place), member, timeout, call);
        }
    }

    fn note_vote(&mut self, place: usize, answer: &Result<VoteReply, Error>) {
        let Some(state) = self.members.get_mut(place) else { return };
        state.calls -= 1;
        match answer {
            Ok(reply) => state.touched |= matches!(reply.vote, Vote::Granted { .. }),
            Err(error) if error.has_not_run() => {}
            Err(_) => {
                state.touched = true;
                state.doubtful = true;
            }
        }
    }

    /// Undoes what this attempt may have left on nodes without calls in flight. Once for each node. Where
    /// a release wants the keys to stay taken until a time, it leaves them to nobody until then.
    fn undo_on_idle_nodes(&mut self, stays_until: Option<Instant>) -> Vec<tokio::task::JoinHandle<()>> {
        let mut undone = Vec::new();
        for (place, state) in self.members.iter_mut().enumerate() {
            if state.calls > 0 || !std::mem::take(&mut state.touched) {
                continue;
            }
            let undo = Undo {
                owned: self.wanted.owned.clone(),
                latest: if state.doubtful { state.latest.clone() } else { Arc::default() },
                ttl: self.wanted.ttl,
                stays_until,
            };
            undone.extend(self.quorum.undo(place, undo));
        }
        undone
    }

    /// Undoes what nodes have granted, before the attempt returns without the lock.
    async fn give_back(&mut self) {
        let undone = self.undo_on_idle_nodes(None);
        if !self.wanted.owned.own_token {
            // The next attempt uses the same token, and must find this one gone.
            for undone in undone {
                drop(timeout_at(self.until, undone).await);
            }
        }
        if let Some(round) = self.split {
            // Requests that collided must not come back together.
            let longest = (round * 4).clamp(Duration::from_millis(1), Duration::from_millis(50));
            let left = self.until.saturating_duration_since(Instant::now());
            sleep(longest.mul_f64(fastrand::f64()).min(left)).await;
        }
    }

    /// Ends the round for its caller. `taken` if the caller has got the lock.
    fn leave(mut self, taken: bool) {
        if taken {
            self.open.begin();
            // A release reaches these nodes after their votes in any case.
            self.members
                .iter_mut()
                .filter(|state| state.calls == 0 && !state.doubtful)
                .for_each(|state| state.touched = false);
        }
        if self.calls.have_ended() && !self.members.iter().any(|state| state.touched) {
            return;
        }
        let (releases, runtime) = (self.quorum.releases.clone(), self.calls.runtime().clone());
        releases.spawn_on(self.finish(taken), &runtime);
    }

    async fn finish(mut self, taken: bool) {
        if !taken {
            drop(self.undo_on_idle_nodes(None));
        }
        while let Some(((_, place), answer)) = self.calls.next().await {
            self.note_vote(place, &answer);
            if !taken {
                drop(self.undo_on_idle_nodes(None));
            }
        }
        if taken && self.members.iter().any(|state| state.doubtful) {
            sleep_until(self.may_run_until).await;
        }
        // The lock was released before the last vote arrived. Undoes what that vote took, unless the release has
        // reached the node after the vote.
        if taken && self.open.is_released() {
            let stays_until = self.open.release_is_sent().await;
            let until = Instant::now() + ANSWER;
            for (place, state) in self.members.iter_mut().enumerate() {
                // Of several votes, the node may have freed one before it ran another.
                if state.touched && !state.doubtful && state.asked == 1 {
                    state.touched = !self.open.is_freed(place, until).await;
                }
                if state.touched {
                    self.open.undoes(place);
                }
            }
            drop(self.undo_on_idle_nodes(stays_until));
        }
    }

    /// Returns why there is no majority, node by node.
    fn failure(&self, votes: Vec<Option<Result<VoteReply, Error>>>) -> Error {
        let mut granted = 0;
        let mut nodes = Vec::new();
        for (place, vote) in votes.into_iter().enumerate() {
            let error = match vote {
                Some(Ok(VoteReply { vote: Vote::Granted { .. }, .. })) => {
                    granted += 1;
                    continue;
                }
                // This is not the reason, and the node may be well.
                None | Some(Ok(VoteReply { vote: Vote::Held { .. }, .. })) => continue,
                Some(Ok(VoteReply { vote: Vote::Silent { remaining }, .. })) => Error::NotVoting { remaining },
                Some(Ok(VoteReply { vote: Vote::Behind, .. })) => {
                    Error::Outbid("it has granted a higher one meanwhile")
                }
                Some(Ok(VoteReply { vote: Vote::Ahead, .. })) => {
                    Error::Outbid("its clock is further behind those of the others than the restart window")
                }
                Some(Err(error)) => error,
            };
            nodes.push(self.quorum.node_error(place, error));
        }
        Error::Quorum { needed: self.quorum.needed, granted, nodes }
    }
}

/// Waits for a moment of random length, which grows with the ballots. Numbers grow with the time at which they are
/// made. So readers that ask one after the other, further apart than their calls take, don't outbid each other.
async fn let_readers_go_first(ballot: usize, took: Duration, until: Instant) {
    let longest = took.saturating_mul(1 << ballot.min(8)).min(LONGEST_PAUSE);
    sleep(longest.mul_f64(fastrand::f64()).min(until.saturating_duration_since(Instant::now()))).await;
}
