//! One connection of the subscriber, from its opening until it breaks, falls silent, or is no longer needed.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::pin;

use fred::bytes::Bytes;
use fred::bytes_utils::Str;
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, ClusterInterface, EventInterface, PubsubInterface};
use fred::types::config::{ReconnectPolicy, Server};
use fred::types::{Builder, Message};
use fred::util::redis_keyslot;
use tokio::select;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::super::connection::connect;
use super::{DOUBT, LINGER, PING_EVERY, Shared, TIMEOUT, Task};
use crate::Error;
use crate::store::notifications::ChannelState;

/// How many subscriptions without waiters are kept.
const UNUSED: usize = 256;
/// How many messages may wait to be passed on. If there are more, all waiters are notified.
const BACKLOG: usize = 4_096;

/// A connection, and what it is subscribed to.
struct Connected<'a> {
    task: &'a Task,
    client: Client,
    /// Connections that broke, as fred reports them.
    errors: Receiver<(fred::error::Error, Option<Server>)>,
    /// Connections that were made.
    reconnects: Receiver<Server>,
    subscribed: HashSet<Bytes>,
}

/// Opens a connection and passes on its messages, until there have been no subscriptions for a while.
///
/// Sets `was_open` once a channel was open.
pub(super) async fn serve(task: &Task, was_open: &mut bool) -> Result<(), Error> {
    let client = Builder::from_config(task.shared.config.clone())
        .with_connection_config(|config| {
            config.connection_timeout = TIMEOUT;
            config.internal_command_timeout = TIMEOUT;
            config.max_command_attempts = 1;
        })
        .with_performance_config(|config| {
            config.default_command_timeout = TIMEOUT;
            config.broadcast_channel_capacity = BACKLOG;
        })
        // fred follows the nodes of a cluster only if it may reconnect.
        .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
        .build()?;
    let mut driver = within(connect(&client)).await?;
    // Created before the first subscription, so they miss no event that matters.
    let (messages, errors, reconnects) = (client.message_rx(), client.error_rx(), client.reconnect_rx());
    let connected = Connected { task, client, errors, reconnects, subscribed: HashSet::new() };
    select! {
        // Messages are passed on also while `serve` waits for a reply.
        error = pass_on(messages, &task.shared) => Err(error),
        ended = connected.serve(was_open) => ended,
        // fred has given up.
        _ = &mut driver => Err(Error::timeout()),
    }
}

async fn pass_on(mut messages: Receiver<Message>, shared: &Shared) -> Error {
    loop {
        match messages.recv().await {
            Ok(message) if shared.is_for_us(&message.value) => shared.subscriptions.notify(message.channel.as_bytes()),
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => shared.subscriptions.notify_all(),
            Err(RecvError::Closed) => return Error::timeout(),
        }
    }
}

impl Connected<'_> {
    async fn serve(mut self, was_open: &mut bool) -> Result<(), Error> {
        let (mut is_used, mut last_used) = (false, Instant::now());
        let mut ping_at = last_used + PING_EVERY;
        loop {
            if is_used && Instant::now() >= ping_at {
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
                broken = self.errors.recv() => return Err(broken.map_or_else(|_| Error::timeout(), |it| it.0.into())),
                // The new connection has no subscriptions, and messages may have been missed.
                _ = self.reconnects.recv() => self.subscribe_again(),
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
            self.doubting(self.subscribe(&added)).await?;
        }
        // If the connection broke meanwhile, the subscription may belong to the old one and the reply to the new one.
        if self.errors.is_empty() && self.reconnects.is_empty() {
            // Also those that were still subscribed to for earlier waiters.
            self.task.if_last(|subscriptions| subscriptions.open(&wanted, &added));
        }
        self.subscribed.extend(added);
        // Not at once: a process that obtains lock after lock would subscribe again and again.
        let unused: Vec<Bytes> = self.subscribed.difference(&wanted).cloned().collect();
        if unused.len() > wanted.len().max(UNUSED) {
            self.unsubscribe(&unused).await?;
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
    async fn doubting(&self, call: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
        let mut call = pin!(call);
        select! {
            biased;
            answer = &mut call => return answer,
            () = sleep(DOUBT) => self.task.if_last(|subscriptions| subscriptions.close(ChannelState::Opening)),
        }
        call.await
    }

    /// Makes sure that the server still replies; on a cluster, every node with subscriptions.
    async fn ping(&mut self) -> Result<(), Error> {
        if !self.client.is_clustered() {
            return self.doubting(async { answered(within(self.client.ping(None)).await) }).await;
        }
        // fred doesn't report that a slot has moved and its subscriptions have ended. So this subscribes on each node
        // to a channel that it should have, another one each time. fred follows if the channel has moved, and knows all
        // slots then.
        let mut channels: Vec<Bytes> = self.task.shared.subscriptions.keys();
        channels.retain(|channel| self.subscribed.contains(channel));
        fastrand::shuffle(&mut channels);
        let owners = self.owners_of(&channels);
        let asked: HashMap<&Server, &Bytes> = owners.iter().flatten().zip(&channels).collect();
        let asked: Vec<Bytes> = asked.into_values().cloned().collect();
        self.doubting(self.subscribe(&asked)).await?;
        if self.owners_of(&channels) != owners {
            self.subscribe_again();
        }
        Ok(())
    }

    /// Returns the nodes that own the channels, as far as they are known.
    fn owners_of(&self, channels: &[Bytes]) -> Vec<Option<Server>> {
        let routing = self.client.cached_cluster_state();
        let owner = |channel: &Bytes| routing.as_ref()?.get_server(redis_keyslot(channel)).cloned();
        channels.iter().map(owner).collect()
    }

    async fn subscribe(&self, channels: &[Bytes]) -> Result<(), Error> {
        if self.client.is_clustered() {
            for channel in texts(channels) {
                within(self.client.ssubscribe(channel)).await?;
            }
            return Ok(());
        }
        within(self.client.subscribe(texts(channels))).await?;
        // fred returns before the server has replied. The server replies to a later command on the same connection
        // after that.
        answered(within(self.client.ping(None)).await)
    }

    async fn unsubscribe(&self, channels: &[Bytes]) -> Result<(), Error> {
        if self.client.is_clustered() {
            for channel in texts(channels) {
                within(self.client.sunsubscribe(channel)).await?;
            }
            return Ok(());
        }
        within(self.client.unsubscribe(texts(channels))).await
    }
}

/// Takes any reply of the server for a sign that it is alive, even a refusal of the command.
fn answered(answer: Result<(), Error>) -> Result<(), Error> {
    answer.or_else(|error| if error.is_refusal() { Ok(()) } else { Err(error) })
}

/// Returns the names as fred wants them. All of them are text.
fn texts(channels: &[Bytes]) -> Vec<Str> {
    channels.iter().filter_map(|channel| Str::from_inner(channel.clone()).ok()).collect()
}

async fn within<T>(call: impl Future<Output = Result<T, fred::error::Error>>) -> Result<T, Error> {
    let late = |_| Err(fred::error::Error::new(ErrorKind::Timeout, "the server did not answer in time"));
    timeout(TIMEOUT, call).await.unwrap_or_else(late).map_err(Error::Redis)
}
