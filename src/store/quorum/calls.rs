//! Calls to nodes: sent in order, bounded in time and number, and run to their end even if nothing waits for them.
//!
//! The caller polls its calls itself: with a task for each, every reply would have to wake one more thread. When the
//! caller has enough replies, or is dropped, a task runs the remaining calls to their end.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use super::{Member, Quorum};
use crate::error::NOT_SENT;
use crate::store::Answer;
use crate::store::node::Node;
use crate::{Error, RedisError, RedisErrorKind};

/// How much longer than its timeout a call may take before it is given up from outside.
pub(super) const GRACE: Duration = Duration::from_millis(5);

/// Calls in flight, each with the caller's name for it.
pub(super) struct Calls<K: Send + 'static, T: Send + 'static> {
    under_way: UnderWay<K, T>,
    /// Those that had a reply when they were sent.
    answered: VecDeque<(K, Result<T, Error>)>,
    runtime: Handle,
    tracker: TaskTracker,
}

struct UnderWay<K, T> {
    calls: Vec<Call<K, T>>,
    /// Created when it is first needed, and set to the time when the first of the calls is overdue.
    overdue: Option<Pin<Box<Sleep>>>,
}

struct Call<K, T> {
    of: K,
    answer: Answer<'static, T>,
    until: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Quorum {
    /// Calls all nodes at once. Each reply comes with the index of its node.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        timeout: Duration,
        call: impl Fn(Arc<dyn Node>) -> Answer<'static, T>,
    ) -> Result<Calls<usize, T>, Error> {
        let mut calls = Calls::new(self)?;
        calls.send_to_all(self, timeout, call);
        Ok(calls)
    }
}

impl<T: Send + 'static> Calls<usize, T> {
    /// Calls all nodes. Each reply comes with the index of its node.
    pub(super) fn send_to_all(
        &mut self,
        quorum: &Quorum,
        timeout: Duration,
        call: impl Fn(Arc<dyn Node>) -> Answer<'static, T>,
    ) {
        for (place, member) in quorum.members.iter().enumerate() {
            self.send(place, member, timeout, call(member.node.clone()));
        }
    }
}

impl<K: Send + 'static, T: Send + 'static> Calls<K, T> {
    pub(super) fn new(quorum: &Quorum) -> Result<Self, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let under_way = UnderWay { calls: Vec::new(), overdue: None };
        Ok(Self { under_way, answered: VecDeque::new(), runtime, tracker: quorum.calls.clone() })
    }

    /// Calls one node. When this returns, the call has been sent, ahead of all later ones to the same node; or it waits
    /// to be sent, behind earlier ones, for as long as a call may take.
    pub(super) fn send(&mut self, of: K, member: &Member, within: Duration, call: Answer<'static, T>) {
        let now = Instant::now();
        let permit = member.calls.clone().try_acquire_owned();
        let call = match &member.identity {
            None => call,
            Some(identity) if permit.is_ok() => identity.before(within, call),
            // The address may lead to another server by the time the call is sent.
            Some(identity) => identity.at_last(within, call),
        };
        let (mut call, permit, until) = match permit {
            Ok(permit) => (call, permit, now + within + GRACE),
            Err(_) => match member.waiting.clone().try_acquire_owned() {
                Ok(place) => (wait_to_be_sent(member.calls.clone(), within, call), place, now + within * 2 + GRACE),
                Err(_) => return self.answered.push_back((of, Err(too_many_calls()))),
            },
        };
        // The first poll sends it. If that were left for later, a later call could overtake this one.
        if let Poll::Ready(answer) = call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return self.answered.push_back((of, answer));
        }
        self.under_way.calls.push(Call { of, answer: call, until, _permit: permit });
    }

    /// Returns the next reply, or `None` when all calls have ended.
    ///
    /// Cancel safe: dropping the future loses no reply.
    pub(super) async fn next(&mut self) -> Option<(K, Result<T, Error>)> {
        if let Some(answered) = self.answered.pop_front() {
            return Some(answered);
        }
        poll_fn(|context| self.under_way.poll_next(context)).await
    }

    pub(super) fn have_ended(&self) -> bool {
        self.under_way.calls.is_empty() && self.answered.is_empty()
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl<K, T> UnderWay<K, T> {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(K, Result<T, Error>)>> {
        // They are few, so polling all of them costs less than finding out which one has woken the task.
        let mut first_overdue: Option<(usize, Instant)> = None;
        for (index, call) in self.calls.iter_mut().enumerate() {
            if let Poll::Ready(answer) = call.answer.as_mut().poll(context) {
                return Poll::Ready(Some((self.calls.swap_remove(index).of, answer)));
            }
            if first_overdue.is_none_or(|(_, first)| call.until < first) {
                first_overdue = Some((index, call.until));
            }
        }
        let Some((index, until)) = first_overdue else { return Poll::Ready(None) };
        let overdue = self.overdue.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if overdue.deadline() != until {
            overdue.as_mut().reset(until);
        }
        ready!(overdue.as_mut().poll(context));
        Poll::Ready(Some((self.calls.swap_remove(index).of, Err(Error::timeout()))))
    }
}

impl<K: Send + 'static, T: Send + 'static> Drop for Calls<K, T> {
    /// No call in flight is dropped: fred would run it later, at any time.
    fn drop(&mut self) {
        if self.under_way.calls.is_empty() {
            return;
        }
        let (calls, overdue) = (mem::take(&mut self.under_way.calls), self.under_way.overdue.take());
        let mut rest = UnderWay { calls, overdue };
        let rest = async move { while poll_fn(|context| rest.poll_next(context)).await.is_some() {} };
        self.tracker.spawn_on(rest, &self.runtime);
    }
}

/// Returns until when a node may run a call that is made now and given up later: it may wait for as long as it may
/// take, and the same time again accounts for what we don't know of the node's clock.
pub(super) fn may_run_until(sent: Instant, within: Duration) -> Instant {
    sent + within * 3
}

/// Waits for a permit. The semaphore is first in, first out, so a call is sent before all later ones.
fn wait_to_be_sent<T: 'static>(
    calls: Arc<Semaphore>,
    within: Duration,
    call: Answer<'static, T>,
) -> Answer<'static, T> {
    Box::pin(async move {
        let Ok(Ok(_permit)) = timeout(within, calls.acquire_owned()).await else { return Err(too_many_calls()) };
        call.await
    })
}

fn too_many_calls() -> Error {
    let details = format!("too many calls are waiting for this node already{NOT_SENT}");
    RedisError::new(RedisErrorKind::Backpressure, details).into()
}
