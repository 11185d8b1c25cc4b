//! Connections for subscriptions.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use fred::bytes_utils::Str;
use fred::clients::Client;
use fred::error::Error;
use fred::interfaces::{ClientLike, ClusterInterface, EventInterface, FredResult, PubsubInterface};
use fred::types::config::{Config, ReconnectPolicy, Server};
use fred::types::{Builder, Message};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use super::super::task::Home;
use super::super::{Calling, Driving, Listener, Listening, PubSub, SUBSCRIBING};
use super::{connect, late};
use crate::store::redis::slot::slot_of;
use crate::{RedisError, RedisErrorKind};

/// How many messages may wait to be passed on. If there are more, all waiters are notified.
const BACKLOG: usize = 4_096;

pub(super) struct FredPubSub {
    config: Config,
    home: Home<FredResult<()>>,
}

impl FredPubSub {
    pub(super) fn new(config: Config, home: Home<FredResult<()>>) -> Self {
        Self { config, home }
    }
}

impl PubSub for FredPubSub {
    fn runtime(&self) -> Option<Handle> {
        self.home.runtime()
    }

    fn open(&self, listener: Arc<dyn Listener>) -> Calling<'_, (Box<dyn Listening>, Driving)> {
        Box::pin(async move {
            let client = Builder::from_config(self.config.clone())
                .with_connection_config(|config| {
                    config.connection_timeout = SUBSCRIBING;
                    config.internal_command_timeout = SUBSCRIBING;
                    config.max_command_attempts = 1;
                })
                .with_performance_config(|config| {
                    config.default_command_timeout = SUBSCRIBING;
                    config.broadcast_channel_capacity = BACKLOG;
                })
                // fred follows the nodes of a cluster only if it may reconnect.
                .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
                .build()?;
            let mut driver = within(connect(&client)).await?;
            // Created before the first subscription, so they miss no event that matters.
            let (messages, errors, reconnects) = (client.message_rx(), client.error_rx(), client.reconnect_rx());
            let driving: Driving = Box::pin(async move {
                select! {
                    error = pass_on(messages, &*listener) => error,
                    // fred has given up.
                    _ = &mut driver => late(),
                }
            });
            Ok((Box::new(Connected { client, errors, reconnects }) as Box<dyn Listening>, driving))
        })
    }
}

async fn pass_on(mut messages: Receiver<Message>, listener: &dyn Listener) -> RedisError {
    loop {
        match messages.recv().await {
            Ok(message) => {
                listener.message(message.channel.as_bytes(), message.value.as_bytes().unwrap_or_default());
            }
            Err(RecvError::Lagged(_)) => listener.missed(),
            Err(RecvError::Closed) => return late(),
        }
    }
}

struct Connected {
    client: Client,
    /// Connections that broke, as fred reports them.
    errors: Receiver<(Error, Option<Server>)>,
    /// Connections that were made.
    reconnects: Receiver<Server>,
}

impl Connected {
    async fn subscribe(&self, channels: &[Bytes]) -> Result<(), RedisError> {
        if self.client.is_clustered() {
            for channel in texts(channels) {
                within(self.client.ssubscribe(channel)).await?;
            }
            return Ok(());
        }
        within(self.client.subscribe(texts(channels))).await?;
        // fred returns before the server has replied. The server replies to a later command on the same connection
        // after that.
        self.ping().await
    }

    async fn ping(&self) -> Result<(), RedisError> {
        match within(self.client.ping(None)).await {
            // Any reply of the server is a sign that it is alive, even a refusal of the command.
            Err(error) if error.code().is_some() && error.kind() != RedisErrorKind::Timeout => Ok(()),
            answer => answer,
        }
    }

    /// Returns the nodes that own the channels, as far as they are known.
    fn owners_of(&self, channels: &[Bytes]) -> Vec<Option<Server>> {
        let routing = self.client.cached_cluster_state();
        let owner = |channel: &Bytes| routing.as_ref()?.get_server(slot_of(channel)).cloned();
        channels.iter().map(owner).collect()
    }
}

impl Listening for Connected {
    fn subscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        Box::pin(self.subscribe(channels))
    }

    fn unsubscribe<'a>(&'a self, channels: &'a [Bytes]) -> Calling<'a, ()> {
        Box::pin(async move {
            if self.client.is_clustered() {
                for channel in texts(channels) {
                    within(self.client.sunsubscribe(channel)).await?;
                }
                return Ok(());
            }
            within(self.client.unsubscribe(texts(channels))).await
        })
    }

    fn check(&self, mut channels: Vec<Bytes>) -> Calling<'_, bool> {
        Box::pin(async move {
            if !self.client.is_clustered() {
                return self.ping().await.map(|()| true);
            }
            // fred doesn't report that a slot has moved and its subscriptions have ended. So this subscribes on each
            // node to a channel that it should have, another one each time. fred follows if the channel has moved, and
            // knows all slots then.
            fastrand::shuffle(&mut channels);
            let owners = self.owners_of(&channels);
            let asked: HashMap<&Server, &Bytes> = owners.iter().flatten().zip(&channels).collect();
            let asked: Vec<Bytes> = asked.into_values().cloned().collect();
            self.subscribe(&asked).await?;
            Ok(self.owners_of(&channels) == owners)
        })
    }

    fn disturbed(&mut self) -> Calling<'_, ()> {
        Box::pin(async {
            select! {
                broken = self.errors.recv() => Err(broken.map_or_else(|_| late(), |(error, _)| error.into())),
                // The new connection has no subscriptions, and messages may have been missed.
                _ = self.reconnects.recv() => Ok(()),
            }
        })
    }

    fn is_undisturbed(&self) -> bool {
        self.errors.is_empty() && self.reconnects.is_empty()
    }
}

/// Returns the names as fred wants them. All of them are text.
fn texts(channels: &[Bytes]) -> Vec<Str> {
    channels.iter().filter_map(|channel| Str::from_inner(channel.clone()).ok()).collect()
}

async fn within<T>(call: impl Future<Output = FredResult<T>>) -> Result<T, RedisError> {
    Ok(timeout(SUBSCRIBING, call).await.map_err(|_| late())??)
}
