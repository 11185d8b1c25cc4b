//! One attempt to obtain a lock from a majority: as many ballots as it takes, and then the cleaning up.
//!
//! Its asker drives it. What is left when that has its answer, or stops waiting for one, is seen to its end by a task.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::debug;

use super::calls::{Calls, may_run_until};
use super::catch_up::Undo;
use super::rounds::OpenRound;
use super::tally::{Decision, decide};
use super::{Quorum, first, grace, node_timeout};
use crate::Error;
use crate::store::node::{Ballot, Vote, VoteReply};
use crate::store::{Acquired, Latest, Wanted};

/// So many ballots are held at most. The second suffices unless others vote for the same keys in between.
const BALLOTS: usize = 4;

/// For how long a release's answer is waited for where it may make another one needless.
const ANSWER: Duration = Duration::from_secs(1);

/// Asks once for what is wanted.
pub(super) async fn attempt(quorum: &Arc<Quorum>, wanted: &Wanted, timeout: Duration) -> Result<Acquired, Error> {
    let mut asking = Asking(Some(Round::new(quorum.clone(), wanted.clone(), timeout)?));
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

/// Somebody waits for the round's outcome, until this is dropped.
struct Asking(Option<Round>);

impl Drop for Asking {
    /// Whoever has gone can't say that it wants the lock.
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
    until: Instant,
    /// Until when a vote that has not been answered may be run.
    may_run_until: Instant,
    members: Vec<Standing>,
    /// The votes on their way, by ballot and node.
    calls: Calls<(usize, usize), VoteReply>,
    /// How long the round of votes took in which nobody need have got a majority.
    split: Option<Duration>,
}

/// How one node stands to this attempt.
#[derive(Default)]
struct Standing {
    /// Calls on their way.
    calls: usize,
    /// It has granted something, or may have.
    touched: bool,
    /// A call failed, so that nobody knows whether it was run, or will be.
    doubtful: bool,
    /// Until when.
    latest: Arc<Latest>,
}

impl Round {
    fn new(quorum: Arc<Quorum>, wanted: Wanted, timeout: Duration) -> Result<Self, Error> {
        let calls = Calls::new(&quorum)?;
        let members = quorum.members.iter().map(|_| Standing::default()).collect();
        let open = quorum.rounds.open(&wanted.owned);
        let until = Instant::now() + first(timeout);
        let may_run_until = Instant::now();
        Ok(Self { quorum, open, wanted: Arc::new(wanted), until, may_run_until, members, calls, split: None })
    }

    async fn ballots(&mut self) -> Result<Acquired, Error> {
        let mut votes: Vec<Option<Result<VoteReply, Error>>> = Vec::new();
        // Calls that stand in line for a node come later than the clock that they were made for.
        let mut took = Duration::ZERO;
        for ballot in 0..BALLOTS {
            let started = Instant::now();
            let asked = self.quorum.clocks.now();
            let last = votes.iter().flatten().flatten().map(|reply| reply.seen.last);
            let number =
                self.wanted.fenced.then(|| self.quorum.clocks.propose(last, (took * 2).min(self.quorum.ahead() / 2)));
            self.ask(ballot, number);
            votes = self.members.iter().map(|_| None).collect();
            let mut wait_until = None;
            let decision = loop {
                let next = match wait_until {
                    None => self.calls.next().await,
                    Some(until) => match timeout_at(until, self.calls.next()).await {
                        Ok(next) => next,
                        Err(_) => break decide(&votes, self.quorum.needed, true).unwrap_or(Decision::Failed),
                    },
                };
                let Some(((of, place), answer)) = next else { break Decision::Failed };
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
                if let Some(decision) = decide(&votes, self.quorum.needed, false) {
                    break decision;
                }
                // Who waits asks again anyway: sooner than one slow node answers, which may be the last to be asked.
                let answered = votes.iter().filter(|vote| matches!(vote, Some(Ok(_)))).count();
                if self.wanted.queueing.waits() && answered >= self.quorum.needed {
                    wait_until = wait_until.or_else(|| Some(Instant::now() + grace(started.elapsed())));
                }
            };
            took = started.elapsed();
            match decision {
                Decision::Granted { number } => return Ok(Acquired::Granted { fencing_token: number }),
                Decision::Held { place, remaining } => return Ok(Acquired::Held { place, remaining }),
                Decision::Split { place, remaining } => {
                    self.split = Some(started.elapsed());
                    if self.wanted.queueing.waits() {
                        return Ok(Acquired::Held { place, remaining });
                    }
                    // Unknown is no refusal.
                    break;
                }
                Decision::Again => {
                    debug!(name: "tenure.ballot", ballot, "the nodes want another number");
                }
                Decision::Failed => break,
            }
            if Instant::now() >= self.until {
                break;
            }
        }
        Err(self.failure(votes))
    }

    /// Asks all nodes for their vote.
    fn ask(&mut self, ballot: usize, number: Option<u64>) {
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = node_timeout(self.wanted.ttl, left);
        self.may_run_until = may_run_until(Instant::now(), timeout);
        let wish = Ballot { number, exactly: ballot > 0, window: self.quorum.window, ahead: self.quorum.ahead() };
        for (place, (member, standing)) in self.quorum.members.iter().zip(&mut self.members).enumerate() {
            standing.calls += 1;
            // Each node has a clock of its own.
            let wanted = Wanted { latest: standing.latest.clone(), ..Wanted::clone(&self.wanted) };
            let (node, wish) = (member.node.clone(), wish.clone());
            let call = Box::pin(async move { node.vote(&wanted, &wish, timeout).await });
            self.calls.send((ballot, place), member, timeout, call);
        }
    }

    fn note_vote(&mut self, place: usize, answer: &Result<VoteReply, Error>) {
        let Some(standing) = self.members.get_mut(place) else { return };
        standing.calls -= 1;
        match answer {
            Ok(reply) => standing.touched |= matches!(reply.vote, Vote::Granted { .. }),
            Err(error) if error.has_not_run() => {}
            Err(_) => {
                standing.touched = true;
                standing.doubtful = true;
            }
        }
    }

    /// Takes back what this attempt may have left on nodes that owe it no more answers. Once for each node.
    fn undo_on_idle_nodes(&mut self) -> Vec<tokio::task::JoinHandle<()>> {
        let mut undone = Vec::new();
        for (place, standing) in self.members.iter_mut().enumerate() {
            if standing.calls > 0 || !std::mem::take(&mut standing.touched) {
                continue;
            }
            let undo = Undo {
                owned: self.wanted.owned.clone(),
                latest: standing.doubtful.then(|| standing.latest.clone()),
                ttl: self.wanted.ttl,
            };
            undone.extend(self.quorum.undo(place, undo));
        }
        undone
    }

    /// Takes back what it was granted, before it is said that there is no lock.
    async fn give_back(&mut self) {
        let undone = self.undo_on_idle_nodes();
        if !self.wanted.owned.own_token {
            // The next attempt comes in the same token's name: it shall find this one gone.
            for undone in undone {
                drop(timeout_at(self.until, undone).await);
            }
        }
        if let Some(round) = self.split {
            // Who collided shall not come back together.
            let longest = (round * 4).clamp(Duration::from_millis(1), Duration::from_millis(50));
            let left = self.until.saturating_duration_since(Instant::now());
            sleep(longest.mul_f64(fastrand::f64()).min(left)).await;
        }
    }

    /// Nobody waits for the outcome any more. `taken`: it was the lock, and it has been told.
    fn leave(mut self, taken: bool) {
        if taken {
            self.open.begin();
            // A release comes after these nodes' votes in any case.
            self.members
                .iter_mut()
                .filter(|standing| standing.calls == 0 && !standing.doubtful)
                .for_each(|standing| standing.touched = false);
        }
        if self.calls.have_ended() && !self.members.iter().any(|standing| standing.touched) {
            return;
        }
        let (releases, runtime) = (self.quorum.releases.clone(), self.calls.runtime().clone());
        releases.spawn_on(self.finish(taken), &runtime);
    }

    async fn finish(mut self, taken: bool) {
        if !taken {
            drop(self.undo_on_idle_nodes());
        }
        while let Some(((_, place), answer)) = self.calls.next().await {
            self.note_vote(place, &answer);
            if !taken {
                drop(self.undo_on_idle_nodes());
            }
        }
        if taken && self.members.iter().any(|standing| standing.doubtful) {
            sleep_until(self.may_run_until).await;
        }
        // Released before its last vote had come: what that one took is taken back, unless the release has come to the
        // node after it.
        if taken && self.open.was_released() {
            let until = Instant::now() + ANSWER;
            for (place, standing) in self.members.iter_mut().enumerate() {
                if standing.touched && !standing.doubtful {
                    standing.touched = !self.open.is_freed(place, until).await;
                }
            }
            drop(self.undo_on_idle_nodes());
        }
    }

    /// Why there is no majority, node by node.
    fn failure(&self, votes: Vec<Option<Result<VoteReply, Error>>>) -> Error {
        let mut granted = 0;
        let mut nodes = Vec::new();
        for (place, vote) in votes.into_iter().enumerate() {
            let error = match vote {
                Some(Ok(VoteReply { vote: Vote::Granted { .. }, .. })) => {
                    granted += 1;
                    continue;
                }
                // Not the reason; and the node may be well.
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
