//! The waiter of one request: it asks when there is reason to, and waits in between: for its turn in this process, for
//! a notification of a release, or for a time.
//!
//! It has an [`Attempt`], which asks the server and knows nothing of the waiter, and a [`Position`].
//!
//! The order in every biased `select!` here: closing ends every wait at once; an outcome that is there already is not
//! lost to a limit that passes at the same time; the limit comes before anything that would make the waiter go on.

use std::time::Duration;

use tokio::select;
use tokio::time::{Instant, sleep_until};

use crate::acquire::answer::{Held, LastAnswer};
use crate::acquire::attempt::{Attempt, Outcome};
use crate::acquire::position::Position;
use crate::acquire::queue::{By, Claim, HEARTBEAT, Inherited, Obtained, Place, TakenOver, Ticket, Wakeup};
use crate::acquire::step::{Step, WaitFor};
use crate::hold::timing::{self, Drift};
use crate::hold::{Grant, Terms};
use crate::locker::cleanups::PendingCleanup;
use crate::retry::Pauses;
use crate::store::notifications::Subscription;
use crate::store::{InLine, Queueing};
use crate::{Error, Key, LockGuard};

/// The waiter of one request. When it is dropped, it leaves the queue and the line, and then undoes what is pending.
pub(crate) struct Waiter {
    attempt: Attempt,
    position: Position,
    /// When its time is over.
    limit: Option<Instant>,
    /// The subscription to releases of a key.
    subscription: Option<(Key, Subscription)>,
    /// It has been the first of its lane since it last waited for that.
    is_first: bool,
    /// When the server was last asked.
    asked: Instant,
    /// How long the server took for its last answer that another holds the lock.
    took: Duration,
    /// It is asking with its place in the line, so that it may enter the line after it has left.
    is_entering: bool,
    /// What its last request has done to its place in the line, if it was granted.
    place: Place,
}

impl Waiter {
    pub(crate) fn new(attempt: Attempt, limit: Option<Instant>, now: Instant) -> Self {
        let (position, asked, took) = (Position::default(), now, Duration::ZERO);
        let (is_first, is_entering, place) = (false, false, Place::default());
        Self { attempt, position, limit, subscription: None, is_first, asked, took, is_entering, place }
    }

    /// Enters the queue of this process, and waits behind those who came before.
    ///
    /// A request that may share the key with others asks at once, if nobody here waits. It enters the queue when it was
    /// refused: so those who find the key open to them don't wait for each other.
    pub(crate) async fn start(&mut self) -> Step {
        if self.attempt.context.is_shared() && !self.attempt.context.is_held_back() {
            return Step::Ask;
        }
        self.start_in_queue().await
    }

    async fn start_in_queue(&mut self) -> Step {
        self.position.enter_queue(&self.attempt.context);
        if !self.position.ticket().is_none_or(Ticket::is_first) {
            return Box::pin(self.wait_in_queue()).await;
        }
        self.is_first = true;
        // A subscription that was used not long ago. It is notified of what happens after the request is sent.
        let inherited = self.position.ticket().map(Ticket::inherit).unwrap_or_default();
        self.subscription = self.attempt.context.only_key().zip(inherited.subscription);
        self.mark();
        Step::Ask
    }

    /// Gives up the token and the position, and begins as a new request does, behind all who wait.
    pub(crate) async fn start_over(&mut self) -> Step {
        self.leave();
        self.attempt.start_over();
        self.position.start_over();
        (self.is_first, self.subscription) = (false, None);
        self.start().await
    }

    /// Returns what a request that doesn't wait is refused with, without asking the server: others of this process wait
    /// for the key.
    pub(crate) async fn held_back(&self) -> Option<Held> {
        let context = &self.attempt.context;
        let is_held_back = !context.wanted.queueing.waits() && context.is_held_back_by_answer();
        if !is_held_back {
            return None;
        }
        // Like a lock, a share is granted again to a token that has it, whoever waits.
        let is_held_already = select! {
            biased;
            () = context.closed() => false,
            is_held_already = self.attempt.is_held_already() => is_held_already,
            () = at(self.limit) => false,
        };
        (!is_held_already).then(|| Held::until(context.key(), None))
    }

    /// Asks the server once.
    pub(crate) async fn ask(&mut self) -> Outcome {
        while let Some(until) = self.attempt.late_release_until() {
            if let Some(outcome) = Box::pin(self.await_late_release(until)).await {
                return outcome;
            }
        }
        let now = Instant::now();
        self.asked = now;
        self.position.ticket().inspect(|ticket| ticket.asks_again());
        let sending = self.attempt.prepare(now, self.limit);
        self.position.expect(sending.ends());
        let in_line = self.position.in_line(&self.attempt.context);
        self.is_entering = matches!(in_line, InLine::At { .. });
        let outcome = self.attempt.send(&sending, &in_line).await;
        let has_entered = std::mem::take(&mut self.is_entering);
        self.place = Place::after(in_line);
        match &outcome {
            Outcome::Unknown(_) | Outcome::Closed if has_entered => self.position.may_enter_late(),
            Outcome::Held(_) => {
                self.took = self.asked.elapsed();
                self.position.refused(&self.attempt.context);
            }
            _ => {}
        }
        outcome
    }

    /// Waits while the server may run a release that would end what is about to be obtained. Returns the outcome, if
    /// something else ends that.
    async fn await_late_release(&self, until: Instant) -> Option<Outcome> {
        self.position.expect(until);
        select! {
            biased;
            () = self.attempt.context.closed() => Some(Outcome::Closed),
            () = at(self.limit) => Some(Outcome::NotAsked(Error::late_release())),
            () = sleep_until(until) => None,
        }
    }

    /// Returns by what the waiter has obtained the lock, if the server has granted its last request.
    pub(crate) fn by_asking(&self) -> By {
        By::Asking(self.place)
    }

    /// Returns the request's place among the waiters of this process, if it has one.
    pub(crate) fn ticket(&self) -> Option<&Ticket> {
        self.position.ticket()
    }

    /// Returns how far the server's clock may be off.
    pub(crate) fn drift(&self) -> Drift {
        self.attempt.context.shared.settings.drift
    }

    /// Returns whether the limit ended the last attempt before the server usually answers.
    pub(crate) fn was_cut_short(&self) -> bool {
        self.asked.elapsed() < self.took * 2 && self.limit.is_some_and(|limit| Instant::now() >= limit)
    }

    /// Claims a lock that was granted or handed over. Returns what to do instead, where it can't be used: it was taken
    /// back before its answer came, or the locker is being closed.
    pub(crate) fn claim(&self) -> Option<Step> {
        match self.position.ticket()?.claim() {
            Claim::Kept(pending) => (!pending.is_none_or(PendingCleanup::complete)).then_some(Step::Close),
            Claim::TakenBack => Some(Step::StartOver),
        }
    }

    /// Starts the guard of a lock that was granted and claimed, and leaves the queue and the line.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], where the locker is closed and the attempt is being undone.
    pub(crate) fn succeed(&mut self, grant: Grant, terms: Terms, obtained: Obtained) -> Result<LockGuard, Error> {
        let subscription = self.subscription.take().map(|(_, subscription)| subscription);
        match self.position.ticket() {
            Some(ticket) => ticket.pass_on(subscription, obtained, &self.attempt.context.wanted.owned.token),
            None => drop(subscription),
        }
        let guard = self.attempt.succeed(grant, terms)?;
        self.position.leave_with_lock(&self.attempt.context);
        Ok(guard)
    }

    /// Waits until it makes sense to ask again. `learned` is what the request has learned itself.
    pub(crate) async fn wait(&mut self, wait_for: WaitFor, learned: Option<&LastAnswer>) -> Step {
        if self.attempt.context.is_shared() && self.position.ticket().is_none() {
            // It has asked before it entered the queue.
            self.position.enter_queue(&self.attempt.context);
            self.position.refused(&self.attempt.context);
            // What others there have learned before is older.
            self.position.ticket().inspect(|ticket| ticket.set_last_answer(learned.cloned()));
            if !self.position.ticket().is_none_or(Ticket::is_first) {
                return self.wait_in_queue().await;
            }
            self.is_first = true;
            if self.attempt.context.wanted.queueing == Queueing::Own {
                // Its place is not in the line yet.
                return Step::Ask;
            }
        }
        self.is_first &= self.position.ticket().is_some_and(Ticket::is_first);
        match wait_for {
            WaitFor::Release(held) => self.wait_for_release(held).await,
            WaitFor::Pause { failures } => {
                let pause = timing::poll_after(failures, None, fastrand::f64());
                self.wait_until(Instant::now() + pause, Listen::No).await
            }
        }
    }

    /// Waits for the next of the pauses that the user has chosen.
    pub(crate) async fn pause(&self, pauses: &mut Pauses) -> Step {
        let Some(pause) = pauses.next() else { return Step::GiveUp };
        let wake = timing::after(Instant::now(), pause);
        // A pause that the limit cuts short is waited for all the same: the request was not told to give up earlier.
        let (wake, step) = match self.limit {
            Some(limit) if wake >= limit => (limit, Step::GiveUp),
            _ => (wake, Step::Ask),
        };
        select! {
            biased;
            () = self.attempt.context.closed() => Step::Close,
            () = sleep_until(wake) => step,
        }
    }

    /// Waits behind others of this process, and then as the first.
    async fn wait_in_queue(&mut self) -> Step {
        select! {
            biased;
            () = self.attempt.context.closed() => return Step::Close,
            is_held = self.attempt.is_held_already() => if is_held {
                return Step::Ask;
            },
            () = at(self.limit) => return Step::GiveUp,
        }
        select! {
            biased;
            () = self.attempt.context.closed() => return Step::Close,
            () = self.position.enter_line(&self.attempt.context) => {}
            () = at(self.limit) => return Step::GiveUp,
        }
        self.wait_as_next(None).await
    }

    async fn wait_for_release(&mut self, held: Held) -> Step {
        let key = self.attempt.context.only_key().unwrap_or(held.key);
        select! {
            biased;
            () = self.attempt.context.closed() => return Step::Close,
            () = self.position.enter_line_for(&self.attempt.context, &key) => {}
            () = at(self.limit) => return Step::GiveUp,
        }
        if self.position.has_to_enter_line(&self.attempt.context) && self.mark() {
            // It asked as one that has nobody to wait for, and without its place.
            return Step::Ask;
        }
        self.wait_as_next(Some(Held { key, ..held })).await
    }

    /// Waits to be the first, and then for a release or a time. `held` is what is known of the lock.
    async fn wait_as_next(&mut self, mut held: Option<Held>) -> Step {
        if !self.is_first && self.position.ticket().is_some() {
            if let Some(step) = self.wait_to_be_first().await {
                return step;
            }
            let Inherited { subscription, held_until, is_shared } =
                self.position.ticket().map(Ticket::inherit).unwrap_or_default();
            if let (Some(subscription), Some(key)) = (subscription, self.attempt.context.only_key()) {
                // The waiter before has obtained the lock, and has left what it knew.
                held = Some(Held::until(key.clone(), held_until));
                self.subscription = Some((key, subscription));
            }
            // A holder that can't hand the lock over to this waiter gives it to the line, which this one is not in. And
            // a waiter that shares the key may enter beside the one before.
            if (is_shared || !self.attempt.context.can_be_handed_over()) && self.mark() {
                return Step::Ask;
            }
        }
        // A waiter that hasn't asked knows nothing but that it is the first.
        let only_key = || self.attempt.context.only_key().map(|key| Held::until(key, None));
        let Some(Held { key, until, refusal }) = held.or_else(only_key) else { return Step::Ask };
        if self.subscription.as_ref().is_none_or(|(to, _)| *to != key) {
            if let Some(step) = self.subscribe(key).await {
                return step;
            }
        }
        // Requests that are refused give back what they got there, and by that would wake each other again and again.
        self.subscription.iter_mut().for_each(|(_, subscription)| subscription.heed(refusal));
        let remaining = until.map(|until| until.saturating_duration_since(Instant::now()));
        let poll_every = self.attempt.context.shared.settings.poll_every;
        let pause = timing::look_after(remaining, poll_every, fastrand::f64());
        self.wait_until(Instant::now() + pause, Listen::Yes).await
    }

    /// Waits to be the first of its lane. Returns what to do instead, if something else ends that.
    async fn wait_to_be_first(&mut self) -> Option<Step> {
        let (ticket, context) = (self.position.ticket()?, &self.attempt.context);
        let wakeup = loop {
            // Nothing else would wake it if the waiter before it is no longer polled.
            let supervise = context.shared.supervise_queues(&context.runtime);
            select! {
                biased;
                () = context.closed() => return Some(Step::Close),
                wakeup = ticket.until_first() => break wakeup,
                () = at(self.limit) => return Some(Step::GiveUp),
                () = at(supervise) => {}
            }
        };
        match wakeup {
            Wakeup::First => {
                self.is_first = true;
                None
            }
            other => Some(self.woken(other)),
        }
    }

    /// Subscribes to releases of the key, and waits until the subscription is open, or can't be had for now. Returns
    /// what to do instead of waiting for a release, if so.
    async fn subscribe(&mut self, key: Key) -> Option<Step> {
        let shared = &self.attempt.context.shared;
        let mut subscription = shared.store.subscribe(&key);
        let open_by = Instant::now() + shared.command_timeout;
        self.position.expect(open_by);
        let opened = select! {
            biased;
            () = shared.closed.cancelled() => Err(Step::Close),
            wakeup = handed_over(self.position.ticket()) => Err(self.woken(wakeup)),
            () = at(self.limit) => Err(Step::GiveUp),
            () = subscription.opened() => Ok(()),
            // Then it listens to what comes, and polls.
            () = sleep_until(open_by) => Ok(()),
        };
        subscription.mark();
        // What was released before it was open is found by asking.
        let found_by_asking = subscription.is_open().then_some(Step::Ask);
        self.subscription = Some((key, subscription));
        opened.map_or_else(Some, |()| found_by_asking)
    }

    /// Waits until `wake`, or until something happens before that.
    async fn wait_until(&mut self, wake: Instant, listen: Listen) -> Step {
        loop {
            // Also where no heartbeat is due: a waiter that isn't polled any longer is found out by that.
            let poll = Instant::now() + HEARTBEAT;
            let heartbeat = self.position.next_heartbeat();
            self.position.expect(poll);
            let wakeup = select! {
                biased;
                () = self.attempt.context.closed() => return Step::Close,
                wakeup = handed_over(self.position.ticket()) => wakeup,
                () = at(self.limit) => return Step::GiveUp,
                () = notified(&mut self.subscription), if listen == Listen::Yes => {
                    self.let_others_go_first().await;
                    return Step::Ask;
                }
                () = sleep_until(wake) => return Step::Ask,
                () = at(heartbeat) => match self.send_heartbeat(wake, listen).await {
                    Some(step) => return step,
                    None => continue,
                },
                () = sleep_until(poll) => continue,
            };
            return self.woken(wakeup);
        }
    }

    /// Sends a heartbeat, and waits for its reply. As that may take long, all that would end the wait for the lock ends
    /// this as well. Returns what to do then.
    async fn send_heartbeat(&mut self, wake: Instant, listen: Listen) -> Option<Step> {
        let context = &self.attempt.context;
        let heartbeat = self.position.begin_heartbeat(context)?;
        let wakeup = select! {
            biased;
            () = context.closed() => return Some(Step::Close),
            wakeup = handed_over(self.position.ticket()) => wakeup,
            waits = heartbeat.send(context) => {
                self.position.heartbeat_replied(waits);
                return (!waits).then_some(Step::Ask);
            }
            () = at(self.limit) => return Some(Step::GiveUp),
            () = notified(&mut self.subscription), if listen == Listen::Yes => {
                self.let_others_go_first().await;
                return Some(Step::Ask);
            }
            () = sleep_until(wake) => return Some(Step::Ask),
        };
        Some(self.woken(wakeup))
    }

    /// Waits for a moment of random length. Where votes can be split, waiters that ask at the same time split them
    /// again and again.
    async fn let_others_go_first(&self) {
        const LONGEST: Duration = Duration::from_millis(5);
        if !self.attempt.context.is_voted_on() {
            return;
        }
        let moment = self.took.mul_f64(2.0 * fastrand::f64());
        // In any order: what follows is the same, as the next attempt ends at once when the locker is closed.
        select! {
            () = self.attempt.context.closed() => {}
            () = sleep_until(Instant::now() + moment.min(LONGEST)) => {}
        }
    }

    /// Returns what to do after a wakeup other than to be the first.
    fn woken(&mut self, wakeup: Wakeup) -> Step {
        match wakeup {
            Wakeup::HandedOver(grant, pending) => {
                // Pending until a guard has it.
                self.attempt.keep_pending(pending);
                Step::Take(grant)
            }
            Wakeup::TakenOver(grant, TakenOver { wanted, pending }) => {
                self.attempt.take_over(wanted, pending);
                Step::Take(grant)
            }
            Wakeup::Unknown(pending) => {
                self.attempt.doubt(pending);
                self.position.may_enter_late();
                Step::Ask
            }
            Wakeup::NotHandedOver | Wakeup::First => Step::Ask,
            Wakeup::TakenBack => Step::StartOver,
        }
    }

    /// Ignores all notifications until now. Returns whether there is a subscription.
    fn mark(&mut self) -> bool {
        self.subscription.iter_mut().for_each(|(_, subscription)| subscription.mark());
        self.subscription.is_some()
    }

    /// Leaves the queue and the line, in the background as far as the server has to be told.
    fn leave(&mut self) {
        if std::mem::take(&mut self.is_entering) {
            self.position.may_enter_late();
        }
        if let Some(mut left) = self.position.leave_queue() {
            if left.may_hold {
                self.attempt.keep_pending(left.pending.take());
            }
            if let Some(TakenOver { wanted, pending }) = left.taken_over.take() {
                // The attempt releases it when it is dropped or starts over.
                self.attempt.take_over(wanted, pending);
            }
            Position::leave_shared_place(&self.attempt.context, &left);
        }
        self.position.leave_line(&self.attempt.context);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.subscription = None;
        self.leave();
        // The attempt, which is dropped next, undoes what is pending.
    }
}

/// Whether a waiter reacts to notifications. After a failure they are no reason to hurry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listen {
    Yes,
    No,
}

async fn handed_over(ticket: Option<&Ticket>) -> Wakeup {
    match ticket {
        Some(ticket) => ticket.until_handed_over().await,
        None => std::future::pending().await,
    }
}

async fn notified(subscription: &mut Option<(Key, Subscription)>) {
    match subscription {
        Some((_, subscription)) => subscription.notified().await,
        None => std::future::pending().await,
    }
}

async fn at(limit: Option<Instant>) {
    match limit {
        Some(limit) => sleep_until(limit).await,
        None => std::future::pending().await,
    }
}
