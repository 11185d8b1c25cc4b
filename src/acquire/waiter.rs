//! Waiter for a lock that another holds: for its turn in this process, then for news of the lock, or for its time.

use std::time::Duration;

use tokio::select;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::Key;
use crate::acquire::attempt::Attempt;
use crate::acquire::queue::{HEARTBEAT, Inherited, Obtained, Ticket, Wakeup};
use crate::hold::Grant;
use crate::hold::timing;
use crate::store::listen::Listening;

/// The waiting of one request.
pub(crate) struct Waiter<'a> {
    /// Also without any news the lock is looked at, this often.
    poll_every: Duration,
    limit: Option<Instant>,
    closed: &'a CancellationToken,
    /// To the news of a key.
    listening: Option<(Key, Listening)>,
    first: bool,
    /// How long the server took to answer.
    took: Duration,
}

/// Why it ended.
pub(crate) enum Woken {
    /// The lock may be free.
    Ask,
    /// It was handed over.
    Granted(Grant),
    /// It was handed over, and taken back.
    TakenBack,
    /// The limit has passed.
    Late,
    Closed,
}

/// What is known of the lock.
pub(crate) enum Known {
    /// Held by another, for so long unless renewed.
    Held { key: Key, remaining: Option<Duration> },
    /// So many attempts in a row have failed.
    Nothing { failures: u32 },
}

impl<'a> Waiter<'a> {
    pub(crate) fn new(poll_every: Duration, limit: Option<Instant>, closed: &'a CancellationToken) -> Self {
        Self { poll_every, limit, closed, listening: None, first: false, took: Duration::ZERO }
    }

    /// It waits as a new request does.
    pub(crate) fn start_over(&mut self) {
        (self.first, self.listening) = (false, None);
    }

    /// Takes its place in this process, and waits behind those who came before.
    pub(crate) async fn behind_others(&mut self, attempt: &mut Attempt) -> Woken {
        attempt.queue_up();
        if attempt.place().is_none_or(Ticket::is_first) {
            self.first = true;
            // What was listened with not long ago: it hears of what happens after the request is sent.
            let Inherited { listening, .. } = attempt.place().map(Ticket::inherit).unwrap_or_default();
            self.listening = attempt.only_key().zip(listening);
            if let Some((_, listening)) = &mut self.listening {
                listening.mark();
            }
            return Woken::Ask;
        }
        Box::pin(self.queue_up(attempt)).await
    }

    async fn queue_up(&mut self, attempt: &mut Attempt) -> Woken {
        select! {
            biased;
            () = self.closed.cancelled() => return Woken::Closed,
            is_held = attempt.is_held_already() => if is_held {
                return Woken::Ask;
            },
            () = at(self.limit) => return Woken::Late,
        }
        select! {
            biased;
            () = self.closed.cancelled() => return Woken::Closed,
            () = attempt.stand_in_line() => {}
            () = at(self.limit) => return Woken::Late,
        }
        self.wait_as_next(attempt, None).await
    }

    /// Waits until it makes sense to ask again.
    pub(crate) async fn wait(&mut self, attempt: &mut Attempt, known: Known, took: Duration) -> Woken {
        self.took = took;
        self.first &= attempt.place().is_some_and(Ticket::is_first);
        match known {
            Known::Held { key, remaining } => {
                let key = attempt.only_key().unwrap_or(key);
                if let Some(woken) = self.stand_in_line_for(attempt, &key).await {
                    return woken;
                }
                if let (true, Some((_, listening))) = (attempt.is_to_enter_line(), &mut self.listening) {
                    // It asked as one that has nobody to wait for.
                    listening.mark();
                    return Woken::Ask;
                }
                let held_until = remaining.map(|remaining| Instant::now() + remaining);
                self.wait_as_next(attempt, Some((key, held_until))).await
            }
            Known::Nothing { failures } => {
                let pause = timing::poll_after(failures, None, fastrand::f64());
                self.until(attempt, Instant::now() + pause, true).await
            }
        }
    }

    /// Takes a place in the line for one of several keys.
    async fn stand_in_line_for(&self, attempt: &mut Attempt, key: &Key) -> Option<Woken> {
        select! {
            biased;
            () = self.closed.cancelled() => Some(Woken::Closed),
            () = attempt.stand_in_line_for(key) => None,
            () = at(self.limit) => Some(Woken::Late),
        }
    }

    async fn wait_as_next(&mut self, attempt: &mut Attempt, known: Option<(Key, Option<Instant>)>) -> Woken {
        let mut known = known;
        if !self.first && attempt.place().is_some() {
            match self.turn(attempt).await {
                Ok(()) => {}
                Err(woken) => return woken,
            }
            let Inherited { listening, held_until } = attempt.place().map(Ticket::inherit).unwrap_or_default();
            if let (Some(listening), Some(key)) = (listening, attempt.only_key()) {
                // The one before has got the lock, and left what it knew.
                known = Some((key.clone(), held_until));
                self.listening = Some((key, listening));
            }
            if !attempt.can_be_handed() {
                // Whoever has the lock now gives it to the line, which this one is not in.
                if let Some((_, listening)) = &mut self.listening {
                    listening.mark();
                    return Woken::Ask;
                }
            }
        }
        // Without having asked, nothing is known but that it is the first.
        let Some((key, held_until)) = known.or_else(|| attempt.only_key().map(|key| (key, None))) else {
            return Woken::Ask;
        };
        if self.listening.as_ref().is_none_or(|(to, _)| *to != key) {
            let mut listening = attempt.listen(&key);
            let opened = self.open(attempt, &mut listening).await;
            listening.mark();
            let is_open = listening.is_open();
            self.listening = Some((key, listening));
            match opened {
                // What was released before is found by asking.
                None if is_open => return Woken::Ask,
                None => {}
                Some(woken) => return woken,
            }
        }
        let wake = timing::look_after(
            held_until.map(|until| until.saturating_duration_since(Instant::now())),
            self.poll_every,
            fastrand::f64(),
        );
        self.until(attempt, Instant::now() + wake, false).await
    }

    /// Waits to be the first, and nothing more.
    async fn turn(&mut self, attempt: &mut Attempt) -> Result<(), Woken> {
        let limit = self.limit;
        let Some(place) = attempt.place() else { return Ok(()) };
        let turn = select! {
            biased;
            () = self.closed.cancelled() => return Err(Woken::Closed),
            turn = place.until_first() => turn,
            () = at(limit) => return Err(Woken::Late),
        };
        match turn {
            Wakeup::First => {
                self.first = true;
                Ok(())
            }
            other => Err(attempt.handed(other)),
        }
    }

    /// Waits for the line to open, if it can be had.
    async fn open(&self, attempt: &mut Attempt, listening: &mut Listening) -> Option<Woken> {
        let patience = Instant::now() + attempt.command_timeout();
        attempt.expect(patience);
        let turn = select! {
            biased;
            () = self.closed.cancelled() => return Some(Woken::Closed),
            turn = granted(attempt.place()) => turn,
            () = at(self.limit) => return Some(Woken::Late),
            () = listening.opened() => return None,
            () = sleep_until(patience) => return None,
        };
        Some(attempt.handed(turn))
    }

    async fn until(&mut self, attempt: &mut Attempt, wake: Instant, failed: bool) -> Woken {
        let limit = self.limit;
        loop {
            // Also where it has no sign of life to give: who is polled no more is found out by that.
            let poll = Instant::now() + HEARTBEAT;
            let heartbeat = attempt.next_heartbeat();
            attempt.expect(poll);
            let turn = select! {
                biased;
                () = self.closed.cancelled() => return Woken::Closed,
                turn = granted(attempt.place()) => turn,
                () = at(limit) => return Woken::Late,
                // After a failure news are no reason to hurry.
                () = news(&mut self.listening), if !failed => {
                    self.let_others_go_first(attempt).await;
                    return Woken::Ask;
                }
                () = sleep_until(wake) => return Woken::Ask,
                () = at(heartbeat) => {
                    select! {
                        biased;
                        () = self.closed.cancelled() => return Woken::Closed,
                        waits = attempt.heartbeat() => match waits {
                            true => continue,
                            false => return Woken::Ask,
                        },
                        () = at(limit) => return Woken::Late,
                    }
                }
                () = sleep_until(poll) => continue,
            };
            return attempt.handed(turn);
        }
    }

    /// Where votes can be split, those who come at once split them again and again: so one comes a moment later than
    /// another, by chance.
    async fn let_others_go_first(&self, attempt: &Attempt) {
        const LONGEST: Duration = Duration::from_millis(5);
        if !attempt.is_voted_on() {
            return;
        }
        let moment = self.took.mul_f64(2.0 * fastrand::f64());
        select! {
            () = self.closed.cancelled() => {}
            () = sleep_until(Instant::now() + moment.min(LONGEST)) => {}
        }
    }

    /// The lock is held from now on: who comes next needs to know no more.
    pub(crate) fn pass_on(self, attempt: &Attempt, got: Obtained) {
        if let Some(place) = attempt.place() {
            place.pass_on(self.listening.map(|(_, listening)| listening), got);
        }
    }
}

async fn granted(place: Option<&Ticket>) -> Wakeup {
    match place {
        Some(place) => place.until_handed_over().await,
        None => std::future::pending().await,
    }
}

async fn news(listening: &mut Option<(Key, Listening)>) {
    match listening {
        Some((_, listening)) => listening.news().await,
        None => std::future::pending().await,
    }
}

async fn at(limit: Option<Instant>) {
    match limit {
        Some(limit) => sleep_until(limit).await,
        None => std::future::pending().await,
    }
}
