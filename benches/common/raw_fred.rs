//! A lock written by hand on a plain fred client, the client under tenure.

use tenure::fred::clients::Client;
use tenure::fred::prelude::{Builder, ClientLike, Config, FredResult, ReconnectPolicy, Value};
use tenure::fred::types::{ClusterHash, CustomCommand};

/// The same ttl for every contender in every benchmark.
pub(crate) const TTL_MILLIS: &str = "30000";

/// A client that knows one script.
#[derive(Clone)]
pub(crate) struct RawFred {
    pub(crate) client: Client,
    /// The hash of the script.
    script: String,
}

impl RawFred {
    pub(crate) async fn connect(url: &str, script: &str) -> Self {
        let client = Builder::from_config(Config::from_url(url).expect("a URL"))
            .set_policy(ReconnectPolicy::new_constant(0, 100))
            .build()
            .expect("a client");
        client.init().await.expect("a connection");
        let script = client.custom(command("SCRIPT"), vec!["LOAD", script]).await.expect("its hash");
        Self { client, script }
    }

    /// Returns whether the key was free, and is ours now.
    pub(crate) async fn try_lock(&self, key: &str, token: &str) -> bool {
        let set = vec![key, token, "NX", "PX", TTL_MILLIS];
        let granted: Value = self.client.custom(command("SET"), set).await.expect("an answer");
        !granted.is_null()
    }

    /// Returns whether the key held the token, so the script took effect: `ARGV` is the token and the ttl in ms.
    pub(crate) async fn run_script(&self, key: &str, token: &str) -> FredResult<bool> {
        let evalsha = vec![self.script.as_str(), "1", key, token, TTL_MILLIS];
        let done: i64 = self.client.custom(command("EVALSHA"), evalsha).await?;
        Ok(done == 1)
    }
}

fn command(name: &'static str) -> CustomCommand {
    CustomCommand::new_static(name, ClusterHash::FirstKey, false)
}
