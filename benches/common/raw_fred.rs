//! A lock by hand on a plain fred client: what tenure is built on.

use tenure::fred::clients::Client;
use tenure::fred::prelude::{Builder, ClientLike, Config, FredResult, ReconnectPolicy, Value};
use tenure::fred::types::{ClusterHash, CustomCommand};

/// The same for everybody in every benchmark.
pub(crate) const TTL_MILLIS: &str = "30000";

/// A client that knows one script.
#[derive(Clone)]
pub(crate) struct RawFred {
    pub(crate) client: Client,
    /// The hash by which the server knows it.
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

    /// Whether the key was free, and is ours now.
    pub(crate) async fn try_lock(&self, key: &str, token: &str) -> bool {
        let set = vec![key, token, "NX", "PX", TTL_MILLIS];
        let granted: Value = self.client.custom(command("SET"), set).await.expect("an answer");
        !granted.is_null()
    }

    /// Whether the key held the token, and the script has done its work: `ARGV` is the token and the ttl in ms.
    pub(crate) async fn run_script(&self, key: &str, token: &str) -> FredResult<bool> {
        let evalsha = vec![self.script.as_str(), "1", key, token, TTL_MILLIS];
        let done: i64 = self.client.custom(command("EVALSHA"), evalsha).await?;
        Ok(done == 1)
    }
}

fn command(name: &'static str) -> CustomCommand {
    CustomCommand::new_static(name, ClusterHash::FirstKey, false)
}
