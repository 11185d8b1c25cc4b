//! Calls to nodes: sent in order, bounded in time and number, and seen to their end whether anybody listens or not.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use fred::error::ErrorKind;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Member, Node, Quorum};
use crate::Error;
use crate::store::Answer;

/// By how much a node may overrun its timeout before its call is given up on from outside.
pub(super) const GRACE: Duration = Duration::from_millis(5);

/// The nodes' answers as they come, by the node's place.
pub(super) type Answers<T> = mpsc::Receiver<(usize, Result<T, Error>)>;

impl Quorum {
    /// Asks all nodes at once. Answers come as they do; the calls end by themselves, also when nobody listens any more.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        timeout: Duration,
        call: impl Fn(Arc<dyn Node>) -> Answer<'static, T>,
    ) -> Result<Answers<T>, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let (tell, answers) = mpsc::channel(self.members.len().max(1));
        for (place, member) in self.members.iter().enumerate() {
            let tell = tell.clone();
            // There is room for one answer of each; an error means that nobody listens any more.
            let tell = move |answer| drop(tell.try_send((place, answer)));
            self.call(&runtime, member, timeout, call(member.node.clone()), tell);
        }
        Ok(answers)
    }

    /// Calls one node. The call is on its way when this returns, ahead of all later ones to the same node.
    pub(super) fn call<T: Send + 'static>(
        &self,
        runtime: &Handle,
        member: &Member,
        within: Duration,
        mut call: Answer<'static, T>,
        tell: impl FnOnce(Result<T, Error>) + Send + 'static,
    ) {
        let Ok(permit) = member.calls.clone().try_acquire_owned() else {
            return tell(Err(too_many_calls()));
        };
        // Sent by its first poll: were that left to the task, a later call could overtake it.
        if let Poll::Ready(answer) = call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return tell(answer);
        }
        let call = async move {
            tell(timeout(within + GRACE, call).await.unwrap_or_else(|_| Err(Error::timeout())));
            drop(permit);
        };
        self.calls.spawn_on(call, runtime);
    }
}

fn too_many_calls() -> Error {
    let details = "too many calls are waiting for this node already";
    fred::error::Error::new(ErrorKind::Backpressure, details).into()
}
