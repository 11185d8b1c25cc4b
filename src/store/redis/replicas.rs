//! Waiting until replicas have acknowledged a write: `WAIT`, right after it.
//!
//! 1. `WAIT` counts the replicas that have everything that was written on its own connection. On another connection it
//!    may count a replica that lacks the write. So a count is valid only if the connection was the same from before the
//!    write until after the reply, and if there was a write: from Redis 7.2 on, what others wrote doesn't count. So
//!    what obtains or renews a lock always writes it, even as it is.
//! 2. It blocks its connection, and everything that is sent after it. So it waits for a part of the call's time only,
//!    which leaves time to undo what was not replicated. What has had no reply meanwhile is no sign of a dead
//!    connection.
//! 3. Refusals and releases wait for no replica.
//! 4. One `WAIT` at a time: the server runs those on one connection one after the other, so each would block it for as
//!    long again. It counts for all whose writes it follows. The others wait for their turn, but the task whose turn it
//!    is may never be polled again: after half of the time that the replicas have, another one takes it over.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::args::decimal;
use super::driver::{Connection, Sent, heard};
use super::replies::unexpected;
use super::script::into_ours;
use crate::Error;

/// A connection on which something is about to be written.
pub(super) struct Writing {
    needed: usize,
    /// How many connections had been made before.
    connections: u64,
}

impl Writing {
    /// Returns `None` if no replica has to acknowledge the write.
    pub(super) fn on(connection: &dyn Connection, needed: usize) -> Option<Self> {
        (needed > 0).then(|| Self { needed, connections: connection.connections_made() })
    }

    /// Waits until enough replicas have acknowledged the write, but no longer than `until`.
    ///
    /// # Errors
    ///
    /// [`Error::NotReplicated`] if too few replicas have, or the connection has changed, and any error of the call. The
    /// primary has the write all the same.
    pub(super) async fn acknowledged(
        self,
        waits: &Waits,
        connection: &dyn Connection,
        until: Instant,
    ) -> Result<(), Error> {
        let now = Instant::now();
        let replicas_have_until = now + until.saturating_duration_since(now).mul_f64(SHARE_FOR_WAIT);
        let write = waits.add_write();
        // Given back when this is dropped, with or without a reply.
        let turn = waits.turn(replicas_have_until).await;
        let mut acknowledged = waits.count(write, self.connections);
        if acknowledged < self.needed && turn.is_some() {
            waits.ask(self.needed, connection, replicas_have_until, until).await?;
            acknowledged = waits.count(write, self.connections);
        }
        match acknowledged >= self.needed {
            true => Ok(()),
            false => Err(Error::NotReplicated { needed: self.needed, acknowledged }),
        }
    }
}

/// What those share that wait for replicas on one connection (invariant 4).
#[derive(Debug)]
pub(super) struct Waits {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Whose turn it is to send `WAIT`.
    turn: Arc<Semaphore>,
    /// How many writes have been added.
    writes: u64,
    last: Option<Count>,
    /// On which connection there is a `WAIT` without a reply, and until when it may last. Its caller may have left.
    unanswered: Option<(u64, Instant)>,
}

/// The reply to a `WAIT`.
#[derive(Debug)]
struct Count {
    /// The connection that it was on.
    connection: u64,
    /// So many writes had been added before it was sent.
    writes: u64,
    acknowledged: usize,
}

impl Waits {
    pub(super) fn new() -> Self {
        let turn = Arc::new(Semaphore::new(1));
        Self { state: Mutex::new(State { turn, writes: 0, last: None, unanswered: None }) }
    }

    /// Adds a write to which the server has replied, and returns its number.
    fn add_write(&self) -> u64 {
        let mut state = self.state();
        state.writes += 1;
        state.writes
    }

    /// Waits for the turn to send `WAIT`, but no longer than `until`.
    async fn turn(&self, until: Instant) -> Option<OwnedSemaphorePermit> {
        let (now, first) = (Instant::now(), self.state().turn.clone());
        let take_over_at = now + until.saturating_duration_since(now) / 2;
        if let Ok(turn) = timeout_at(take_over_at, first.clone().acquire_owned()).await {
            return turn.ok();
        }
        let next = {
            let mut state = self.state();
            if Arc::ptr_eq(&state.turn, &first) {
                state.turn = Arc::new(Semaphore::new(1));
            }
            state.turn.clone()
        };
        timeout_at(until, next.acquire_owned()).await.ok()?.ok()
    }

    /// Returns how many replicas are known to have acknowledged that write on that connection.
    fn count(&self, write: u64, connection: u64) -> usize {
        let state = self.state();
        let counts = |last: &&Count| last.connection == connection && last.writes >= write;
        state.last.as_ref().filter(counts).map_or(0, |last| last.acknowledged)
    }

    /// Asks the server how many replicas have all writes that have been added. They have time until
    /// `replicas_have_until`, its reply until `until`.
    async fn ask(
        &self,
        needed: usize,
        connection: &dyn Connection,
        replicas_have_until: Instant,
        until: Instant,
    ) -> Result<(), Error> {
        let (sent, now) = (Sent::in_part(connection), Instant::now());
        if replicas_have_until.saturating_duration_since(now) < SHORTEST_WAIT {
            return Ok(());
        }
        let (writes, waits_for, blocked_until) = {
            let mut state = self.state();
            let before = state.unanswered.filter(|(of, _)| *of == sent.made).map_or(now, |(_, until)| until.max(now));
            // Behind one whose caller has left or is not polled, it gets what that one leaves of the time. Most often
            // that one is over.
            let waits_for = replicas_have_until.saturating_duration_since(before).max(SHORTEST_WAIT);
            let blocked_until = before + waits_for;
            state.unanswered = Some((sent.made, blocked_until));
            (state.writes, waits_for, blocked_until)
        };
        connection.blocks(blocked_until);
        let [needed, millis] = [u128::try_from(needed).unwrap_or(u128::MAX), waits_for.as_millis()]
            .map(|number| decimal(i64::try_from(number).unwrap_or(i64::MAX)));
        let reply = connection.send("WAIT", vec![needed, millis], until).await.map_err(into_ours);
        if !reply.as_ref().is_err_and(Error::is_timeout) {
            // Replies come in order. Behind this one, another may still have none.
            self.state().unanswered.take_if(|(_, last)| *last <= blocked_until);
            connection.no_longer_blocks(blocked_until);
        }
        let reply = heard(connection, sent, reply)?;
        let acknowledged = usize::try_from(reply.as_i64().ok_or_else(unexpected)?).unwrap_or_default();
        if connection.connections_made() == sent.made {
            self.state().last = Some(Count { connection: sent.made, writes, acknowledged });
        }
        Ok(())
    }

    /// Nothing panics while it holds this mutex, so a poisoned one is still valid.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// To the server, zero means to wait for ever.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// The part of a call's time that replicas have (invariant 2).
const SHARE_FOR_WAIT: f64 = 0.8;

/// Returns how long a call may take that waits for replicas: what it obtains is of no use after the ttl.
pub(super) fn within(timeout: Duration, ttl: Duration, needed: usize) -> Duration {
    if needed == 0 { timeout } else { timeout.min(ttl) }
}
