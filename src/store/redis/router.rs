//! Sends commands to the server, or, in a cluster, to the node that decides about their keys.
//!
//! While a slot of a cluster moves, its keys are spread over two nodes. The old node still owns the slot: it serves
//! the keys that it has, and replies `ASK` for those that it doesn't have. The new node serves these to a client that
//! sends `ASKING` right before. Both reply `TRYAGAIN` to a command with several keys of which they have only some.
//! Once the slot has moved, the old node replies `MOVED`.
//!
//! fred 10.1 can't follow an `ASK`. It writes `ASKING` behind the commands in flight and takes the next frame for its
//! reply, whichever command that replies to. From then on every caller on that connection gets the reply of another.
//! Then fred sends the command to the old node again. Measured on Redis 7.0 with a half-moved slot: in 10 s, 48 to 92
//! locks that others held were granted, with the fencing tokens of other keys, and guards were told that they had lost
//! theirs; no `ASK` led to a decision, so locks with a ttl of 2 s expired while their slot moved for 8 s. With
//! `max_redirections: 0` in its configuration fred follows nothing, but then reports only "Too many redirections.",
//! without the node. In the options of a single call, zero means the configured number, 5 by default. So:
//!
//! 1. In a cluster no command travels on fred's cluster client, which may follow an `ASK`, for us or for other code
//!    that shares it. It provides the configuration and the map of the slots, and sends nothing.
//! 2. Commands go over plain connections of our own to single nodes. fred doesn't interpret redirections there; they
//!    are read and followed here. A command that was redirected has not run.
//! 3. `ASKING` and its command are written together, and a connection for these carries nothing else. If only `ASKING`
//!    were written, the next command would run as if it had asked.
//! 4. A plain connection never reconnects. After a failure it is dropped with everything that is queued on it, so
//!    nothing is sent late or twice.
//! 5. Every call ends within its timeout. `TRYAGAIN` and too many redirections are transient errors: nothing has run.
//!    A request that gets `TRYAGAIN` is repeated until its timeout.
//! 6. Idle connections are closed, and the number of open ones is bounded.
//!
//! The new node replies `TRYAGAIN` as long as one of several keys doesn't exist. So a lock that was never taken, and
//! has no fence key yet, could not be obtained until the slot has moved. The router obtains it all the same: when the
//! old node has replied `ASK` for each of the keys by itself, all of them are on the new node or nowhere, and stay so,
//! since the old node creates no key in a slot that is leaving it. Then the script runs on the new node with only its
//! first key declared; the other keys are passed as arguments.
//!
//! A decision about a key that has moved takes two round trips, and one about a new lock takes five: 0.6 ms and 1.2 ms
//! on loopback, in a debug build that takes 0.3 ms for one. Operations on keys of a half-moved slot are not batched: a
//! batch has keys on both nodes, so neither could run it.
//!
//! A connection to each node has a second advantage. fred reconnects to all nodes of a cluster together, so a dead node
//! holds up the commands to all others until the cluster has replaced it. Here a dead node only holds up its own
//! commands. The router asks the other nodes where the dead node's slots are now, as they know before fred's map does.

mod cluster;
mod node;
pub(super) mod redirection;

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use self::cluster::Cluster;
use super::driver::{Connection, Value};
use super::script::into_ours;
#[cfg(feature = "redis")]
use super::url::Address;
use crate::Error;
#[cfg(feature = "redis")]
use crate::RedisError;

/// The first pause after `TRYAGAIN`. It doubles three times.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// Sends commands to the node that decides about their keys.
pub(super) struct Router {
    connection: Arc<dyn Connection>,
    /// `None` if the connection is not one to a cluster.
    cluster: Option<Cluster>,
}

/// How a script is sent.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a> {
    /// `EVALSHA` or `EVAL`.
    pub(super) command: &'static str,
    /// The text of the script, if it may run with its keys as arguments while their slot moves.
    pub(super) source: Option<&'a Bytes>,
}

impl Router {
    pub(super) fn new(connection: Arc<dyn Connection>) -> Self {
        let cluster = connection.nodes().map(Cluster::new);
        Self { connection, cluster }
    }

    /// Makes future connections to nodes use the runtime that the client's own connections use.
    pub(super) fn live_on(&self, runtime: impl FnOnce() -> Option<Handle>) {
        if let Some(cluster) = &self.cluster {
            cluster.live_on(runtime());
        }
    }

    /// Sends a command and returns the reply of the node that ran it. The command runs at most once, and the call ends
    /// by `until`.
    ///
    /// `args` builds the arguments; it is called again only if the command has to be sent to another node. The third
    /// argument, after the script and the number of keys, must be the first key.
    pub(super) async fn send(
        &self,
        sent: Sent<'_>,
        args: impl Fn() -> Vec<Bytes> + Sync,
        until: Instant,
    ) -> Result<Value, Error> {
        match &self.cluster {
            None => self.connection.send(sent.command, args(), until).await.map_err(into_ours),
            // Boxed to keep the future of the common path small.
            Some(cluster) => Box::pin(cluster.send(sent, &args, until)).await,
        }
    }

    /// Drops the connections to nodes, because one of them can't be trusted.
    pub(super) fn replace(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.replace();
        }
    }

    /// Returns whether keys may be moving from one node to another.
    pub(super) fn is_clustered(&self) -> bool {
        self.cluster.is_some()
    }

    /// Returns whether a node has recently replied that the slot is half moved. Operations on its keys are then sent
    /// one by one: neither node could run a batch of them.
    pub(super) fn is_moving(&self, slot: u16) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.is_moving(slot))
    }
}

/// Repeats a call while its keys are on two nodes, until `timeout` is over. They are usually together again after a few
/// milliseconds, as keys of a slot move in batches.
///
/// This is not part of [`Router::send`], where it would hold up other commands on the same path.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Error>>>(
    timeout: Duration,
    call: impl Fn(Duration) -> F,
) -> Result<T, Error> {
    let until = Instant::now() + timeout;
    // A repeated call that times out would have an unknown outcome; the outcome of this one is known.
    let last_repeat = until - timeout / 4;
    let mut pause = TRY_AGAIN;
    loop {
        let answer = call(until.saturating_duration_since(Instant::now())).await;
        match &answer {
            Err(error) if error.refusal() == Some("TRYAGAIN") && Instant::now() + pause < last_repeat => {
                sleep(pause).await;
            }
            _ => return answer,
        }
        pause = (pause * 2).min(TRY_AGAIN * 8);
    }
}

/// Returns the node to which a `MOVED` of the node `here` leads.
#[cfg(feature = "redis")]
pub(super) fn moved_to(error: &RedisError, here: &Address) -> Option<Address> {
    match redirection::elsewhere(&Error::Redis(error.clone()), here) {
        Some(redirection::Elsewhere::Moved(to)) => Some(to),
        _ => None,
    }
}

/// Runs all of the futures at once, and returns their outputs in order.
pub(super) async fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.map(|future| (Some(Box::pin(future)), None)).collect();
    poll_fn(|context| {
        let mut is_done = true;
        for (future, output) in &mut running {
            let Some(polled) = future.as_mut().map(|future| future.as_mut().poll(context)) else { continue };
            match polled {
                Poll::Ready(ready) => (*future, *output) = (None, Some(ready)),
                Poll::Pending => is_done = false,
            }
        }
        if is_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.cluster.as_ref().map(Cluster::len);
        f.debug_struct("Router").field("nodes", &nodes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RedisError, RedisErrorKind};

    #[tokio::test(start_paused = true)]
    async fn all_run_at_once_and_return_in_their_order() {
        let began = Instant::now();
        let futures = [3, 1, 2].map(|n| async move {
            sleep(Duration::from_secs(n)).await;
            n
        });
        assert_eq!(all(futures.into_iter()).await, [3, 1, 2]);
        assert_eq!(began.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn split_keys_are_asked_for_until_they_meet_or_most_of_the_time_is_over() {
        let began = Instant::now();
        let timeout = Duration::from_secs(2);
        let split = || Error::from(RedisError::new(RedisErrorKind::Unknown, "TRYAGAIN Multiple keys"));
        let meets = |after| {
            patiently(timeout, move |_| async move { (began.elapsed() > after).then_some(()).ok_or_else(split) })
        };
        meets(Duration::from_secs(1)).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(1_100));
        assert_eq!(meets(timeout * 2).await.unwrap_err().code(), Some("TRYAGAIN"));
        assert!(began.elapsed() < Duration::from_secs(3));
        let fails = patiently(timeout, |_| async { Err::<(), _>(Error::timeout()) });
        assert!(fails.await.unwrap_err().is_transient());
    }
}
