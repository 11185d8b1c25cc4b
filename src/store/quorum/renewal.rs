//! One renewal on all nodes: until a majority has decided, and then what is left to do.
//!
//! The caller polls it. When the caller has the verdict, or stops waiting, a task waits for the other replies. It
//! brings the lock back to nodes that have lost it ([`heal`](super::heal)), and undoes what took effect after a
//! release: where several grants share the token, a renewal writes its grant into the node's record. If it arrives
//! after the release of that grant, nobody would end the grant there, and the node would keep the key for its ttl after
//! all others.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::calls::{Calls, may_run_until};
use super::catch_up::Undo;
use super::open_rounds::OpenRound;
use super::shortened::{self, RequestId};
use super::tally::{Outcome, Tally};
use super::{Quorum, first, node_timeout, worse};
use crate::hold::Owned;
use crate::store::{Extending, Latest, Verdict};
use crate::{Error, Loss};

/// Renews a lock on a majority of the nodes.
pub(super) async fn renew(
    quorum: &Arc<Quorum>,
    owned: &Owned,
    ttl: Duration,
    how: Extending,
    timeout: Duration,
) -> Result<Verdict, Error> {
    quorum.check_ttl(ttl)?;
    let mut asking = Asking(Some(Renewal::send(quorum, owned, ttl, how, timeout)?));
    let Some((renewal, answers)) = &mut asking.0 else { return Err(Error::NoRuntime) };
    let verdict = renewal.verdict(answers).await;
    if let Some((renewal, answers)) = asking.0.take() {
        renewal.leave(matches!(verdict, Ok(Verdict::Done)), answers);
    }
    verdict
}

/// A renewal whose caller waits for the verdict, until this is dropped.
struct Asking(Option<(Renewal, Answers)>);

type Answers = Calls<usize, Verdict>;

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some((renewal, answers)) = self.0.take() {
            renewal.leave(false, answers);
        }
    }
}

pub(super) struct Renewal {
    pub(super) quorum: Arc<Quorum>,
    pub(super) open: OpenRound,
    pub(super) owned: Owned,
    pub(super) ttl: Duration,
    how: Extending,
    /// Its number among the requests for an exact ttl.
    exact: Option<RequestId>,
    /// The deadline that it sets, or a little earlier.
    pub(super) until: Instant,
    /// Until when a node may run it without having replied.
    may_run_until: Instant,
    /// A node that has confirmed it.
    pub(super) confirmed: Option<usize>,
    /// Nodes without the key.
    missing: Vec<usize>,
    /// Nodes that may have run it after a release.
    late: Vec<usize>,
    /// Nodes that may have run it, or may yet.
    doubtful: Vec<usize>,
}

impl Renewal {
    fn send(
        quorum: &Arc<Quorum>,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        timeout: Duration,
    ) -> Result<(Self, Answers), Error> {
        let mut answers = Calls::new(quorum)?;
        let sent = Instant::now();
        let exact = (how == Extending::Exactly).then(|| {
            // Twice, for the uncertainty of the node's clock.
            let until = sent + timeout.saturating_mul(2);
            quorum.shortened.begin(owned, ttl, quorum.members.len(), until)
        });
        // Before it is sent, so that it knows of every release which comes after it.
        let open = quorum.rounds.open(&recorded(owned, how));
        let timeout = node_timeout(ttl, first(timeout));
        // A node that was restarted lately may remember a lock that has been released since.
        let window = quorum.window;
        answers.send_to_all(quorum, timeout, |node| {
            let owned = owned.clone();
            Box::pin(async move {
                match how.begins() && !window.is_zero() {
                    true => node.renew_if_it_votes(&owned, ttl, how, window, timeout).await,
                    false => node.renew(&owned, ttl, how, timeout).await,
                }
            })
        });
        let renewal = Self {
            quorum: quorum.clone(),
            open,
            owned: owned.clone(),
            ttl,
            how,
            exact,
            // This takes off more than the drift, and more than the error in what we know of the node's clock.
            until: sent + ttl.mul_f64(0.9),
            may_run_until: may_run_until(sent, timeout),
            confirmed: None,
            missing: Vec::new(),
            late: Vec::new(),
            doubtful: Vec::new(),
        };
        Ok((renewal, answers))
    }

    /// Collects the replies until they decide it.
    async fn verdict(&mut self, answers: &mut Answers) -> Result<Verdict, Error> {
        let quorum = self.quorum.clone();
        let mut tally = Tally::new(&quorum);
        let mut not_ours = Loss::Missing;
        while let Some((place, answer)) = answers.next().await {
            self.note(place, &answer);
            match answer {
                Ok(Verdict::Done) if quorum.shortened.may_shorten(&self.owned, self.exact, place, self.ttl) => {
                    tally.failed(place, shortened::may_be_set_late());
                }
                Ok(Verdict::Done) => tally.yes(),
                Ok(Verdict::NotOurs(loss)) => {
                    not_ours = worse(not_ours, loss);
                    tally.no();
                }
                Err(error) => tally.failed(place, error),
            }
            match tally.outcome() {
                Some(Outcome::Yes) => return Ok(Verdict::Done),
                Some(Outcome::No) => return Ok(Verdict::NotOurs(not_ours)),
                Some(Outcome::Unknown) => break,
                None => {}
            }
        }
        Err(tally.into_error())
    }

    fn note(&mut self, place: usize, answer: &Result<Verdict, Error>) {
        self.quorum.note_exact(&self.owned, self.exact, place, answer);
        match answer {
            Ok(Verdict::Done) => {
                self.confirmed = self.confirmed.or(Some(place));
                if self.open.is_released() {
                    self.late.push(place);
                }
            }
            Ok(Verdict::NotOurs(Loss::Missing)) => self.missing.push(place),
            Ok(Verdict::NotOurs(_)) => {}
            Err(error) if error.has_not_run() => {}
            Err(_) => self.doubtful.push(place),
        }
    }

    /// Ends the renewal for its caller. `confirmed` if a majority has confirmed it.
    fn leave(mut self, confirmed: bool, answers: Answers) {
        // Only a guard's renewal heals.
        let heals = confirmed && self.how == Extending::AtLeast;
        let may_be_late = self.owned.grant.is_some();
        if !may_be_late {
            // Without a record, what is late finds the key gone.
            self.late.clear();
            self.doubtful.clear();
        }
        if !heals {
            self.missing.clear();
        }
        let is_awaited = (heals || may_be_late || self.exact.is_some()) && !answers.have_ended();
        if !is_awaited && self.missing.is_empty() && self.late.is_empty() && self.doubtful.is_empty() {
            return;
        }
        // Closing the locker waits for what may have to be undone.
        let tasks = if may_be_late { &self.quorum.releases } else { &self.quorum.calls };
        let (tasks, runtime) = (tasks.clone(), answers.runtime().clone());
        tasks.spawn_on(self.finish(heals, answers), &runtime);
    }

    async fn finish(mut self, heals: bool, mut answers: Answers) {
        loop {
            while let Some(place) = self.missing.pop() {
                if heals {
                    self.heal(place).await;
                }
            }
            let Some((place, answer)) = answers.next().await else { break };
            self.note(place, &answer);
        }
        if self.owned.grant.is_none() {
            return;
        }
        if !self.doubtful.is_empty() {
            sleep_until(self.may_run_until).await;
            if self.open.is_released() {
                self.late.append(&mut self.doubtful);
            }
        }
        let late = std::mem::take(&mut self.late);
        for place in late {
            self.undo(place, Arc::default()).await;
        }
    }

    /// Undoes on one node what took effect there after the release.
    pub(super) async fn undo(&self, place: usize, latest: Arc<Latest>) {
        let stays_until = self.open.release_is_sent().await;
        self.open.undoes(place);
        let owned = recorded(&self.owned, self.how);
        drop(self.quorum.undo(place, Undo { owned, latest, ttl: self.ttl, stays_until }));
    }
}

/// Returns the owner with the grant that the renewal writes into the records.
fn recorded(owned: &Owned, how: Extending) -> Owned {
    match how {
        Extending::GiveBack { earlier } => Owned { grant: earlier, ..owned.clone() },
        _ => owned.clone(),
    }
}
