//! The nodes of a cluster, as fred's map has them, and plain connections to single nodes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fred::clients::Client;
use fred::interfaces::{ClientLike, ClusterInterface};
use fred::types::Value as FredValue;
use fred::types::cluster::ClusterRouting;
use fred::types::config::{Config, Server, ServerConfig};
use tokio::time::{Instant, timeout, timeout_at};

use super::super::{Calling, Ended, NodeConnection, Nodes, Value};
use super::{closing, connect, convert, custom, late, once, options};
use crate::store::redis::url::Address;
use crate::{RedisError, RedisErrorKind};

/// The longest that connecting may take.
const CONNECTING: Duration = Duration::from_secs(2);

/// The nodes as a client knows them. It sends nothing to any of them.
pub(super) struct FredNodes {
    client: Client,
    /// The client's configuration, for connections to single nodes.
    config: Config,
}

impl FredNodes {
    pub(super) fn of(client: Client) -> Self {
        let config = client.client_config();
        Self { client, config }
    }

    /// Returns the server as the client's map has it, with the name in its certificate.
    fn known(&self, node: &Address) -> Server {
        let routing = self.client.cached_cluster_state();
        let node = convert::server_at(node);
        let same = |routing: &ClusterRouting| {
            routing.slots().iter().map(|range| &range.primary).find(|known| **known == node).cloned()
        };
        routing.as_ref().and_then(same).unwrap_or(node)
    }
}

impl Nodes for FredNodes {
    fn seeds(&self) -> Vec<Address> {
        self.config.server.hosts().iter().map(convert::address_of).collect()
    }

    fn owner_of(&self, slot: u16) -> Option<Address> {
        self.client.cached_cluster_state()?.get_server(slot).map(convert::address_of)
    }

    fn primaries(&self) -> Vec<Address> {
        let routing = self.client.cached_cluster_state();
        let ranges = routing.iter().flat_map(|routing| routing.slots());
        ranges.map(|range| convert::address_of(&range.primary)).collect()
    }

    fn refresh(&self) {
        // One poll queues the request. Its result may take as long as the node is away; nobody waits for it.
        let mut request = Box::pin(self.client.sync_cluster());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let _: bool = request.as_mut().poll(&mut context).is_ready();
    }

    fn open(&self, node: &Address) -> Calling<'static, (Arc<dyn NodeConnection>, Ended)> {
        let server = ServerConfig::Centralized { server: self.known(node) };
        let config = Config { server, fail_fast: true, ..self.config.clone() };
        let mut connection = self.client.connection_config().clone();
        connection.connection_timeout = connection.connection_timeout.min(CONNECTING);
        connection.internal_command_timeout = connection.internal_command_timeout.min(CONNECTING);
        connection.max_command_attempts = 1;
        // A refusal concerns its own command, not all that are in flight.
        connection.reconnect_errors = Vec::new();
        connection.reconnect_on_auth_error = false;
        connection.max_command_buffer_len = 0;
        let patience = connection.connection_timeout * 2;
        // Without a policy it never reconnects.
        let client = Client::new(config, Some(self.client.perf_config()), Some(connection), None);
        Box::pin(async move {
            let late =
                |_| RedisError::new(RedisErrorKind::Timeout, "a node of the cluster could not be reached in time");
            let driver = timeout(patience, connect(&client)).await.map_err(late)??;
            let ended: Ended = Box::pin(async move { drop(driver.await) });
            Ok((Arc::new(FredNode(client)) as Arc<dyn NodeConnection>, ended))
        })
    }
}

struct FredNode(Client);

impl NodeConnection for FredNode {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(async move { once(&self.0, command, args, until).await.map_err(|error| closing(&self.0, error)) })
    }

    /// fred writes the commands of a pipeline in one go, so nothing comes in between.
    fn send_asking(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(async move {
            let calls = self.0.pipeline().with_options(&options(until)?);
            let _: FredValue = calls.custom(custom("ASKING"), Vec::<Bytes>::new()).await?;
            let _: FredValue = calls.custom(custom(command), args).await?;
            let answers = timeout_at(until, calls.try_all::<FredValue>()).await.map_err(|_| late())?;
            let mut answers = answers.into_iter();
            // Either one error for both, or a reply to each.
            match (answers.next(), answers.next()) {
                (Some(Ok(_)), Some(answer)) => answer.map(Value::from).map_err(|error| closing(&self.0, error.into())),
                (Some(Err(error)), _) => Err(closing(&self.0, error.into())),
                _ => Err(late()),
            }
        })
    }
}
