//! One attempt to obtain a lock from a majority: as many ballots as it takes, and then the cleaning up.
//!
//! It runs in a task of its own, so that it sees to its end what its asker may stop listening to.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use super::catch_up::Undo;
use super::tally::{Decision, decide};
use super::{Ballot, Quorum, Reply, Vote, first, node_timeout};
use crate::store::{Acquired, Wanted};
use crate::{Error, Token};

/// So many ballots are held at most. The second suffices unless others vote for the same keys in between.
const BALLOTS: usize = 4;

pub(super) struct Round {
    quorum: Arc<Quorum>,
    wanted: Arc<Wanted>,
    /// The attempt's name, where its token may be used by others too.
    name: Option<Token>,
    until: Instant,
    members: Vec<Standing>,
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
}

/// A vote, and the ballot that it was given in.
type Told = (usize, usize, Result<Reply, Error>);

impl Round {
    pub(super) fn new(quorum: Arc<Quorum>, wanted: Wanted, timeout: Duration) -> Self {
        let members = quorum.members.iter().map(|_| Standing::default()).collect();
        let name = (!wanted.own_token).then(Token::random);
        quorum.open_round(&wanted.owned.token);
        let until = Instant::now() + first(timeout);
        Self { quorum, wanted: Arc::new(wanted), name, until, members, split: None }
    }

    pub(super) async fn run(mut self, reply: oneshot::Sender<Result<Acquired, Error>>) {
        let (tell, mut told) = mpsc::channel((self.members.len() * BALLOTS).max(1));
        let outcome = self.ballots(&tell, &mut told, &reply).await;
        // When the last call has ended, that is the end of what can be told.
        drop(tell);
        let granted = matches!(outcome, Ok(Acquired::Granted { .. }));
        let undone = if granted { Vec::new() } else { self.undo_settled() };
        if self.name.is_some() {
            // The next attempt comes in the same token's name: it shall find this one gone.
            for undone in undone {
                drop(timeout_at(self.until, undone).await);
            }
        }
        if let Some(round) = self.split {
            // Who collided shall not come back together.
            self.pause(round).await;
        }
        // Whoever has gone can't say that it wants the lock.
        let taken = reply.send(outcome).is_ok() && granted;
        if taken {
            // A release comes after these nodes' votes in any case.
            self.members
                .iter_mut()
                .filter(|standing| standing.calls == 0)
                .for_each(|standing| standing.touched = false);
        } else if granted {
            drop(self.undo_settled());
        }
        while let Some((_, place, answer)) = told.recv().await {
            self.settle(place, &answer);
            if !taken {
                drop(self.undo_settled());
            }
        }
        // Released before its last vote had come: what that one took is taken back.
        if taken && self.quorum.was_released(&self.wanted.owned.token) {
            drop(self.undo_settled());
        }
    }

    async fn ballots(
        &mut self,
        tell: &mpsc::Sender<Told>,
        told: &mut mpsc::Receiver<Told>,
        reply: &oneshot::Sender<Result<Acquired, Error>>,
    ) -> Result<Acquired, Error> {
        let mut votes: Vec<Option<Result<Reply, Error>>> = Vec::new();
        for ballot in 0..BALLOTS {
            if reply.is_closed() {
                return Err(Error::timeout());
            }
            let started = Instant::now();
            let asked = self.quorum.clocks.now();
            let last = votes.iter().flatten().flatten().map(|reply| reply.seen.last);
            let number = self.wanted.fenced.then(|| self.quorum.clocks.propose(last));
            self.ask(ballot, number, tell)?;
            votes = self.members.iter().map(|_| None).collect();
            let decision = loop {
                let Some((of, place, answer)) = told.recv().await else { break Decision::Failed };
                self.settle(place, &answer);
                if let Ok(reply) = &answer {
                    self.quorum.clocks.learn(place, asked, reply.seen);
                }
                if of != ballot {
                    continue;
                }
                if let Some(vote) = votes.get_mut(place) {
                    *vote = Some(answer);
                }
                if let Some(decision) = decide(&votes, self.quorum.needed) {
                    break decision;
                }
            };
            match decision {
                Decision::Granted { number } => return Ok(Acquired::Granted { fencing_token: number }),
                Decision::Held { place, remaining, split } => {
                    self.split = split.then(|| started.elapsed());
                    return Ok(Acquired::Held { place, remaining });
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
    fn ask(&mut self, ballot: usize, number: Option<u64>, tell: &mpsc::Sender<Told>) -> Result<(), Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let left = self.until.saturating_duration_since(Instant::now());
        let timeout = node_timeout(self.wanted.ttl, left);
        let wish = Ballot {
            number,
            exactly: ballot > 0,
            window: self.quorum.window,
            ahead: self.quorum.ahead(),
            attempt: self.name.clone(),
        };
        for (place, (member, standing)) in self.quorum.members.iter().zip(&mut self.members).enumerate() {
            standing.calls += 1;
            let (node, wanted, wish, tell) = (member.node.clone(), self.wanted.clone(), wish.clone(), tell.clone());
            let call = Box::pin(async move { node.vote(&wanted, &wish, timeout).await });
            // There is room for every answer; an error means that the runtime shuts down.
            let tell = move |answer| drop(tell.try_send((ballot, place, answer)));
            self.quorum.call(&runtime, member, timeout, call, tell);
        }
        Ok(())
    }

    fn settle(&mut self, place: usize, answer: &Result<Reply, Error>) {
        let Some(standing) = self.members.get_mut(place) else { return };
        standing.calls -= 1;
        match answer {
            Ok(reply) => standing.touched |= matches!(reply.vote, Vote::Granted { .. }),
            Err(error) if error.is_refusal() => {}
            Err(_) => {
                standing.touched = true;
                standing.doubtful = true;
            }
        }
    }

    /// Takes back what this attempt may have left on nodes that owe it no more answers. Once for each node.
    fn undo_settled(&mut self) -> Vec<tokio::task::JoinHandle<()>> {
        let mut undone = Vec::new();
        for (place, standing) in self.members.iter_mut().enumerate() {
            if standing.calls > 0 || !std::mem::take(&mut standing.touched) {
                continue;
            }
            let undo = Undo {
                owned: self.wanted.owned.clone(),
                name: self.name.clone(),
                doubtful: standing.doubtful,
                ttl: self.wanted.ttl,
            };
            undone.extend(self.quorum.undo(place, undo));
        }
        undone
    }

    async fn pause(&self, round: Duration) {
        let longest = (round * 4).clamp(Duration::from_millis(1), Duration::from_millis(50));
        let left = self.until.saturating_duration_since(Instant::now());
        sleep(longest.mul_f64(fastrand::f64()).min(left)).await;
    }

    /// Why there is no majority, node by node.
    fn failure(&self, votes: Vec<Option<Result<Reply, Error>>>) -> Error {
        let mut granted = 0;
        let mut nodes = Vec::new();
        for (place, vote) in votes.into_iter().enumerate() {
            let error = match vote {
                Some(Ok(Reply { vote: Vote::Granted { .. }, .. })) => {
                    granted += 1;
                    continue;
                }
                // Not the reason; and the node may be well.
                None | Some(Ok(Reply { vote: Vote::Held { .. }, .. })) => continue,
                Some(Ok(Reply { vote: Vote::Silent { remaining }, .. })) => Error::NotVoting { remaining },
                Some(Ok(Reply { vote: Vote::Behind, .. })) => Error::Outbid("it has granted a higher one meanwhile"),
                Some(Ok(Reply { vote: Vote::Ahead, .. })) => {
                    Error::Outbid("its clock is further behind those of the others than the restart window")
                }
                Some(Err(error)) => error,
            };
            nodes.push(self.quorum.node_error(place, error));
        }
        Error::Quorum { needed: self.quorum.needed, granted, nodes }
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        self.quorum.close_round(&self.wanted.owned.token);
    }
}
