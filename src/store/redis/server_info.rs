//! What a server says of itself that matters to a quorum.

use std::time::Duration;

use tokio::time::Instant;

use super::RedisStore;
use super::driver::Value;
use super::script::into_ours;
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

impl RedisStore {
    /// Returns how many connections to the server have been made.
    pub(crate) fn connections_made(&self) -> u64 {
        self.server().connection.connections_made()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.server().connection.is_connected()
    }

    /// Asks the server for its role, its run id and its persistence.
    pub(crate) async fn info(&self, timeout: Duration) -> Result<ServerInfo, Error> {
        let until = Instant::now() + timeout;
        let info = self.ask("INFO", &[], until).await?;
        // The server may refuse this, which is no reason to refuse the server.
        let config = self.ask("CONFIG", &["GET", "appendfsync"], until).await.unwrap_or(Value::Nil);
        let appendfsync = match &config {
            Value::Array(parts) => parts.get(1).and_then(Value::to_text),
            _ => None,
        };
        Ok(ServerInfo::read(&info.to_text().unwrap_or_default(), appendfsync.as_deref()))
    }

    async fn ask(&self, command: &'static str, args: &[&'static str], until: Instant) -> Result<Value, Error> {
        let until = until.max(Instant::now() + Duration::from_millis(1));
        let args = args.iter().map(|&arg| arg.into()).collect();
        self.server().connection.send(command, args, until).await.map_err(into_ours)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tenure_test_support::{Server, eventually};

    use super::super::driver::Driver;
    use super::super::url;
    use super::{RedisStore, ServerInfo};

    async fn info(server: &Server) -> ServerInfo {
        let target = url::parse(&server.url()).unwrap();
        let store = RedisStore::open_lazily(Driver::default(), &target, String::new(), Duration::from_secs(2)).unwrap();
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
