//! Where a request stands: in the queue of its process, and in the server's line.

use tokio::time::{Instant, timeout_at};

use crate::Key;
use crate::acquire::context::Context;
use crate::acquire::queue::{HEARTBEAT, Leftovers, Ticket};
use crate::locker::shared::Shared;
use crate::report::debug;
use crate::store::{GRACE, InLine, LinePlace, Queueing};

/// Where a request stands. A request for several keys is in no queue, and one that doesn't wait stands nowhere.
///
/// Its owner calls [`leave_queue`](Self::leave_queue) and [`leave_line`](Self::leave_line), in this order, before it
/// drops it.
#[derive(Default)]
pub(crate) struct Position {
    /// In the queue of this process. A ticket of the plain lane also stands for the place that its lane shares.
    ticket: Option<Ticket>,
    /// In the line, with a place that no other request has.
    own_place: Option<OwnPlace>,
    /// The server has said that another holds the lock, so there is something to wait for.
    was_refused: bool,
    /// The own place may not be in the line any longer: it has to be entered again.
    may_be_out_of_line: bool,
    /// A request of unknown outcome may still enter the own place into the line.
    may_enter_late: bool,
}

/// A heartbeat that is ready to be sent.
pub(crate) struct Heartbeat {
    key: Key,
    place: LinePlace,
    until: Instant,
}

impl Heartbeat {
    /// Returns whether the request may go on waiting: otherwise it has to ask.
    pub(crate) async fn send(self, context: &Context) -> bool {
        let Self { key, place, until } = self;
        let Shared { store, command_timeout, .. } = &*context.shared;
        match timeout_at(until, store.heartbeat(&key, place, *command_timeout)).await {
            Ok(Ok(waits)) => waits,
            Ok(Err(error)) => {
                debug!(name: "tenure.heartbeat_failed", %key, %error, "no heartbeat; the place may be lost");
                true
            }
            Err(_) => true,
        }
    }
}

struct OwnPlace {
    key: Key,
    place: LinePlace,
    heartbeat: Instant,
}

impl OwnPlace {
    fn new(key: Key, place: LinePlace) -> Self {
        Self { key, place, heartbeat: Instant::now() + HEARTBEAT }
    }
}

impl Position {
    /// Enters the queue for the key, at its end.
    pub(crate) fn enter_queue(&mut self, context: &Context) {
        let (None, Some(key)) = (&self.ticket, context.only_key()) else { return };
        let ticket = context.shared.queues.enter(key, context.wanted.clone());
        if !ticket.is_first() {
            context.shared.supervise_queues(&context.runtime);
        }
        self.was_refused = ticket.is_contended();
        self.ticket = Some(ticket);
    }

    pub(crate) fn ticket(&self) -> Option<&Ticket> {
        self.ticket.as_ref()
    }

    /// Announces that the waiter will be polled by then, unless nobody polls it any longer.
    pub(crate) fn expect(&self, until: Instant) {
        self.ticket.iter().for_each(|ticket| ticket.expect(until));
    }

    /// Notes that the server has said that another holds the lock.
    pub(crate) fn refused(&mut self, context: &Context) {
        self.was_refused = true;
        if self.ticket.is_some() {
            context.shared.supervise_queues(&context.runtime);
        }
    }

    /// Returns how the next attempt stands in the line: with the place that the request has, or takes by this attempt.
    pub(crate) fn in_line(&mut self, context: &Context) -> InLine {
        let queueing = context.wanted.queueing;
        if !context.has_places() || queueing == Queueing::None {
            return InLine::No;
        }
        // What is free for one who shares it may be what another waits for.
        let no = if context.is_shared() { InLine::Behind } else { InLine::No };
        match (&self.ticket, context.only_key()) {
            // It asks before its turn, by a token that may hold the lock already. The place is for those before it.
            (Some(ticket), Some(_)) if queueing == Queueing::Shared && !ticket.is_first() => no,
            (Some(ticket), Some(key))
                if queueing == Queueing::Own
                    || self.was_refused
                    || ticket.may_be_in_line()
                    // Then the place costs the store nothing, or no more than the refusal that it follows.
                    || !context.has_line() =>
            {
                ticket.enters_line();
                let place = ticket.line_place();
                if !place.is_shared {
                    self.own_place = Some(OwnPlace::new(key, place));
                }
                InLine::At { key: 0, place, stays: ticket.keeps_place() }
            }
            (None, Some(_)) if queueing == Queueing::Behind => InLine::Behind,
            (None, None) => match &self.own_place {
                Some(OwnPlace { key, place, .. }) => {
                    let at = context.wanted.owned.keys.iter().position(|other| other == key);
                    InLine::At { key: at.unwrap_or_default(), place: *place, stays: false }
                }
                None => no,
            },
            _ => no,
        }
    }

    /// Notes that what was sent with the place in the line may enter it for as long as the server may run it.
    pub(crate) fn may_enter_late(&mut self) {
        match &self.ticket {
            Some(ticket) if ticket.line_place().is_shared => ticket.may_enter_late(),
            _ => self.may_enter_late = true,
        }
    }

    /// Returns whether the request has asked without its place in the line, and has to take it now that another holds
    /// the lock.
    pub(crate) fn has_to_enter_line(&self, context: &Context) -> bool {
        let may_share = self.was_refused && context.has_line() && context.wanted.queueing == Queueing::Shared;
        let ticket = self.ticket.as_ref().filter(|_| may_share);
        ticket.is_some_and(|ticket| ticket.is_first() && !ticket.may_be_in_line())
    }

    /// Enters the line with the place of a fair request, also while others of this process come first.
    pub(crate) async fn enter_line(&mut self, context: &Context) {
        let (Queueing::Own, Some(key), Some(ticket)) = (context.wanted.queueing, context.only_key(), &self.ticket)
        else {
            return;
        };
        let place = ticket.line_place();
        if context.has_line() {
            self.enter(context, key, place).await;
        }
    }

    /// Enters the line for that key of several which another holds, and leaves the line for the one before. Does
    /// nothing for a request of one key.
    pub(crate) async fn enter_line_for(&mut self, context: &Context, key: &Key) {
        if context.only_key().is_some() || !context.wanted.queueing.waits() || !context.has_places() {
            return;
        }
        let before = self.own_place.as_ref().filter(|own| own.key == *key).map(|own| own.place);
        let place = match before {
            Some(_) if !self.may_be_out_of_line => return,
            Some(place) => place,
            None => {
                self.leave_line(context);
                context.shared.queues.new_line_place()
            }
        };
        self.enter(context, key.clone(), place).await;
    }

    async fn enter(&mut self, context: &Context, key: Key, place: LinePlace) {
        self.own_place = Some(OwnPlace::new(key.clone(), place));
        self.may_be_out_of_line = false;
        // Also if this is dropped before the reply comes.
        let before = std::mem::replace(&mut self.may_enter_late, true);
        let entered = context.shared.store.enter(&key, place, context.shared.command_timeout).await;
        self.may_enter_late = before || entered.as_ref().is_err_and(|error| !error.has_not_run());
        if let Err(error) = entered {
            debug!(name: "tenure.heartbeat_failed", %key, %error, "not in the line yet");
        }
    }

    /// Returns when the next heartbeat is due, where the request is in the line.
    pub(crate) fn next_heartbeat(&self) -> Option<Instant> {
        match &self.ticket {
            Some(ticket) => ticket.next_heartbeat(),
            None => self.own_place.as_ref().map(|own| own.heartbeat),
        }
    }

    /// Prepares a heartbeat, if the request has a place in a line.
    pub(crate) fn begin_heartbeat(&mut self, context: &Context) -> Option<Heartbeat> {
        let sent = Instant::now();
        let until = sent + context.shared.command_timeout + GRACE;
        let (key, place) = match (&self.ticket, &mut self.own_place) {
            (Some(ticket), _) => {
                ticket.enters_line();
                (context.key(), ticket.line_place())
            }
            (None, Some(own)) => {
                own.heartbeat = sent + HEARTBEAT;
                (own.key.clone(), own.place)
            }
            (None, None) => return None,
        };
        self.expect(until);
        Some(Heartbeat { key, place, until })
    }

    /// Notes the reply to a heartbeat: whether the place is in the line, and it is not its turn.
    pub(crate) fn heartbeat_replied(&mut self, waits: bool) {
        self.may_be_out_of_line |= !waits;
    }

    /// Leaves the queue. Returns what is left to clean up, if it was in one.
    pub(crate) fn leave_queue(&mut self) -> Option<Leftovers> {
        self.ticket.take().map(|ticket| ticket.leave())
    }

    /// Leaves the line with a shared place, in the background, for the last waiter that had it.
    pub(crate) fn leave_shared_place(context: &Context, left: &Leftovers) {
        if let Some(place) = left.line.filter(|place| place.is_shared) {
            leave(context, context.key(), place, left.may_enter_late);
        }
    }

    /// Leaves the line with the own place, in the background. Where that fails, the others need a moment to skip it.
    pub(crate) fn leave_line(&mut self, context: &Context) {
        let again = std::mem::take(&mut self.may_enter_late);
        if let Some(OwnPlace { key, place, .. }) = self.own_place.take() {
            leave(context, key, place, again);
        }
    }

    /// Leaves the queue and the line after the lock was granted.
    pub(crate) fn leave_with_lock(&mut self, context: &Context) {
        // A request for several keys has left the line only if it was its turn: it may have found them free.
        let Some(ticket) = self.ticket.take() else { return self.leave_line(context) };
        // The grant took the own place out of the line. So this has to be left only if something may still enter it.
        // What may be left of a shared place, the ticket knows.
        if !self.may_enter_late {
            self.own_place = None;
        }
        self.leave_line(context);
        let left = ticket.leave();
        debug_assert!(left.taken_over.is_none(), "whoever has claimed a lock is handed no other");
        Self::leave_shared_place(context, &left);
    }

    /// Prepares for entering the queue again, as a new request does.
    pub(crate) fn start_over(&mut self) {
        self.was_refused = false;
    }
}

fn leave(context: &Context, key: Key, place: LinePlace, again: bool) {
    if context.has_places() {
        context.shared.leave_line(key, place, again, &context.runtime);
    }
}
