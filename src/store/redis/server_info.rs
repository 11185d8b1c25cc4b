//! What a server says of itself that matters to a quorum.

use std::time::Duration;

use fred::interfaces::{ClientLike, EventInterface};
use fred::types::config::{Options, Server};
use fred::types::{ClusterHash, CustomCommand, Value};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::Instant;

use super::RedisStore;
use crate::Error;

/// What a server has reported about itself. What it doesn't report is assumed to be well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerInfo {
    /// Identifies the process, whatever address it is reached by.
    pub(crate) run_id: Option<String>,
    /// It follows another server, and refuses every lock.
    pub(crate) is_replica: bool,
    /// It followed another server until it was promoted, and may lack some of what was granted there.
    pub(crate) was_promoted: bool,
    /// It replies before what it has granted is on disk.
    pub(crate) may_forget: bool,
}

impl ServerInfo {
    /// `appendfsync` is unknown where the server may not be asked for its configuration.
    fn read(info: &str, appendfsync: Option<&str>) -> Self {
        let field = |name: &str| {
            let mut lines = info.lines().filter_map(|line| line.trim_end().split_once(':'));
            lines.find_map(|(field, value)| (field == name).then_some(value))
        };
        let is_replica = field("role") == Some("slave");
        Self {
            run_id: field("run_id").map(str::to_owned),
            is_replica,
            was_promoted: !is_replica && field("second_repl_offset").is_some_and(|offset| offset != "-1"),
            may_forget: field("aof_enabled") == Some("0") || appendfsync.is_some_and(|when| when != "always"),
        }
    }

    /// Returns what deserves a warning now and did not before.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            run_id: None,
            is_replica: self.is_replica && !before.is_replica,
            was_promoted: self.was_promoted && !before.was_promoted,
            may_forget: self.may_forget && !before.may_forget,
        }
    }
}

/// The connections that are made from now on.
pub(crate) struct Reconnects(Receiver<Server>);

impl Reconnects {
    /// Returns whether any were made since the last call.
    pub(crate) fn were_made(&mut self) -> bool {
        let mut were_made = false;
        // Both an event and the notice that some were missed count.
        while !self.0.is_empty() && !matches!(self.0.try_recv(), Err(TryRecvError::Closed | TryRecvError::Empty)) {
            were_made = true;
        }
        were_made
    }
}

impl RedisStore {
    pub(crate) fn reconnects(&self) -> Reconnects {
        Reconnects(self.server().client().reconnect_rx())
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.server().client().is_connected()
    }

    /// Asks the server for its role, its run id and its persistence.
    pub(crate) async fn info(&self, timeout: Duration) -> Result<ServerInfo, Error> {
        let until = Instant::now() + timeout;
        let info = self.ask(CustomCommand::new_static("INFO", ClusterHash::FirstKey, false), &[], until).await?;
        let config = CustomCommand::new_static("CONFIG", ClusterHash::FirstKey, false);
        // The server may refuse this, which is no reason to refuse the server.
        let config = self.ask(config, &["GET", "appendfsync"], until).await.unwrap_or(Value::Null);
        let appendfsync = match config {
            Value::Map(map) => map.inner().into_values().next(),
            Value::Array(parts) => parts.into_iter().nth(1),
            _ => None,
        };
        let appendfsync = appendfsync.and_then(Value::into_string);
        Ok(ServerInfo::read(&info.into_string().unwrap_or_default(), appendfsync.as_deref()))
    }

    async fn ask(&self, command: CustomCommand, args: &[&'static str], until: Instant) -> Result<Value, Error> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let options = Options { max_attempts: Some(1), timeout: Some(left), ..Options::default() };
        let args = args.iter().map(|arg| Value::from_static_str(arg)).collect();
        Ok(self.server().client().with_options(&options).custom::<Value, Value>(command, args).await?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fred::types::config::Config;
    use tenure_test_support::{Server, eventually};

    use super::{RedisStore, ServerInfo};

    async fn info(server: &Server) -> ServerInfo {
        let store =
            RedisStore::open_lazily(Config::from_url(&server.url()).unwrap(), String::new(), Duration::from_secs(2));
        let store = store.unwrap();
        store.ready(Duration::from_secs(10)).await.unwrap();
        store.info(Duration::from_secs(10)).await.unwrap()
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_replica_that_was_promoted_is_told_from_a_server_of_its_own() {
        let primary = Server::start();
        let replica = primary.start_replica();
        let (own, following) = (info(&primary).await, info(&replica).await);
        assert!(!own.is_replica && !own.was_promoted && own.run_id.is_some(), "{own:?}");
        assert!(following.is_replica && following.run_id != own.run_id, "{following:?}");
        replica.cli(&["REPLICAOF", "NO", "ONE"]);
        let promoted = eventually("it is promoted", async || Some(info(&replica).await).filter(|now| !now.is_replica));
        assert!(promoted.await.was_promoted);
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn a_server_says_whether_it_may_forget() {
        for (args, may_forget) in [
            (&[][..], true),
            (&["--appendonly", "yes", "--appendfsync", "everysec"], true),
            (&["--appendonly", "yes", "--appendfsync", "always"], false),
        ] {
            let server = Server::start_with(args);
            assert_eq!(info(&server).await.may_forget, may_forget, "{args:?}");
        }
    }

    #[test]
    fn a_server_that_says_nothing_is_trusted() {
        assert_eq!(ServerInfo::read("", None), ServerInfo::default());
    }
}
