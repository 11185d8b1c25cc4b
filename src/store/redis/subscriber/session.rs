//! One connection of the subscriber, from its opening until it breaks, falls silent, or is no longer needed.

use std::collections::HashSet;

use bytes::Bytes;
use tokio::select;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::super::driver::{Calling, Listening};
use super::{DOUBT, LINGER, PING_EVERY, TIMEOUT, Task};
use crate::Error;
use crate::store::notifications::ChannelState;

/// How many subscriptions without waiters are kept.
const UNUSED: usize = 256;

/// A connection, and what it is subscribed to.
struct Connected<'a> {
    task: &'a Task,
    connection: Box<dyn Listening>,
    subscribed: HashSet<Bytes>,
    /// How many connections the store had made before.
    made: u64,
}

/// Opens a connection and passes on its messages, until there have been no subscriptions for a while.
///
/// Sets `was_open` once a channel was open.
pub(super) async fn serve(task: &Task, was_open: &mut bool) -> Result<(), Error> {
    let made = (task.shared.made)();
    let opening = timeout(TIMEOUT, task.shared.pub_sub.open(task.shared.clone()));
    let (connection, driving) = opening.await.map_err(|_| Error::timeout())??;
    let connected = Connected { task, connection, subscribed: HashSet::new(), made };
    select! {
        // Messages are passed on also while `serve` waits for a reply.
        error = driving => Err(error.into()),
        ended = connected.serve(was_open) => ended,
    }
}

impl Connected<'_> {
    async fn serve(mut self, was_open: &mut bool) -> Result<(), Error> {
        let (mut is_used, mut last_used) = (false, Instant::now());
        let mut ping_at = last_used + PING_EVERY;
        loop {
            if is_used && Instant::now() >= ping_at {
                if (self.task.shared.made)() != self.made {
                    self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Opening));
                    return Ok(());
                }
                self.ping().await?;
                ping_at = Instant::now() + PING_EVERY;
            }
            is_used = self.sync_subscriptions().await?;
            *was_open |= is_used;
            if is_used {
                last_used = Instant::now();
            } else if last_used.elapsed() >= LINGER {
                return Ok(());
            }
            // Then it also notices that there are no subscriptions left.
            let look_at = if is_used { ping_at } else { last_used + LINGER };
            select! {
                replaced = self.connection.disturbed() => {
                    replaced?;
                    // The new connection has no subscriptions, and messages may have been missed.
                    self.subscribe_again();
                }
                () = self.task.added.notified() => {}
                () = sleep_until(look_at) => {}
            }
        }
    }

    /// Subscribes to the channels that waiters want, and opens them. Returns whether there are any.
    async fn sync_subscriptions(&mut self) -> Result<bool, Error> {
        let wanted: HashSet<Bytes> = self.task.shared.subscriptions.keys().into_iter().collect();
        let added: Vec<Bytes> = wanted.difference(&self.subscribed).cloned().collect();
        if !added.is_empty() {
            self.doubting(self.connection.subscribe(&added)).await?;
        }
        // If the connection broke meanwhile, the subscription may belong to the old one and the reply to the new one.
        if self.connection.is_undisturbed() {
            // Also those that were still subscribed to for earlier waiters.
            self.task.if_last(|subscriptions| subscriptions.open(&wanted, &added));
        }
        self.subscribed.extend(added);
        // Not at once: a process that obtains lock after lock would subscribe again and again.
        let unused: Vec<Bytes> = self.subscribed.difference(&wanted).cloned().collect();
        if unused.len() > wanted.len().max(UNUSED) {
            self.connection.unsubscribe(&unused).await?;
            self.subscribed = wanted.clone();
        }
        Ok(!wanted.is_empty())
    }

    /// Forgets all subscriptions, so that they are made again. Until then there are no notifications.
    fn subscribe_again(&mut self) {
        self.subscribed.clear();
        self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Opening));
    }

    /// Waits for a reply of the server. If it takes long, the connection may be silent: then this closes all channels,
    /// and all waiters check. The caller must call [`sync_subscriptions`](Self::sync_subscriptions) afterwards.
    async fn doubting<T>(&self, mut call: Calling<'_, T>) -> Result<T, Error> {
        select! {
            biased;
            answer = &mut call => return Ok(answer?),
            () = sleep(DOUBT) => self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Opening)),
        }
        Ok(call.await?)
    }

    /// Makes sure that the server still replies; on a cluster, every node with subscriptions.
    async fn ping(&mut self) -> Result<(), Error> {
        let mut channels: Vec<Bytes> = self.task.shared.subscriptions.keys();
        channels.retain(|channel| self.subscribed.contains(channel));
        if !self.doubting(self.connection.check(channels)).await? {
            self.subscribe_again();
        }
        Ok(())
    }
}
