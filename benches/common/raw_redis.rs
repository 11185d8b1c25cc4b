//! A lock written by hand on the redis crate's multiplexed connection.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Script};

use crate::raw_fred::TTL_MILLIS;

/// A connection, and one script.
#[derive(Clone)]
pub(crate) struct RawRedis {
    connection: MultiplexedConnection,
    script: Arc<Script>,
}

impl RawRedis {
    pub(crate) async fn connect(url: &str, script: &str) -> Self {
        let client = redis::Client::open(url).expect("a URL");
        let connection = client.get_multiplexed_async_connection().await.expect("a connection");
        // The script's text is sent only if the server doesn't know its hash yet.
        Self { connection, script: Arc::new(Script::new(script)) }
    }

    /// Returns whether the key was free, and is ours now.
    pub(crate) async fn try_lock(&self, key: &str, token: &str) -> bool {
        let mut set = redis::cmd("SET");
        set.arg(key).arg(token).arg("NX").arg("PX").arg(TTL_MILLIS);
        let granted: redis::Value = set.query_async(&mut self.connection.clone()).await.expect("an answer");
        granted == redis::Value::Okay
    }

    /// Returns whether the key held the token, so the script took effect: `ARGV` is the token and the ttl in ms.
    pub(crate) async fn run_script(&self, key: &str, token: &str) -> RedisResult<bool> {
        let mut call = self.script.key(key);
        call.arg(token).arg(TTL_MILLIS);
        let done: i64 = call.invoke_async(&mut self.connection.clone()).await?;
        Ok(done == 1)
    }
}
