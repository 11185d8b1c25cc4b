//! Who is measured, and how each of them obtains a lock and releases it.

use std::sync::Arc;
use std::time::Duration;

use redis::Script;
use redis::aio::MultiplexedConnection;
use rslock::LockManager;
use tenure::fred::clients::Client;
use tenure::fred::prelude::{Builder, ClientLike, Config, ReconnectPolicy, Value};
use tenure::fred::types::{ClusterHash, CustomCommand};
use tenure::{Locker, Token};

/// The names that ratios are taken to.
pub(crate) const RAW_FRED: &str = "raw fred";
pub(crate) const RSLOCK: &str = "rslock";
/// The same as raw fred, once more: how far its ratio is from 1 is how far the others can be trusted.
const CONTROL: &str = "raw fred, again";

const TTL: Duration = Duration::from_secs(30);
const TTL_MILLIS: &str = "30000";

/// What the raw clients release with. tenure and rslock bring their own.
const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

#[derive(Clone)]
pub(crate) enum Rival {
    Tenure {
        locker: Locker,
        fenced: bool,
    },
    /// What tenure is built on: its ratio to this one is the price of the guard.
    Fred {
        name: &'static str,
        client: Client,
        /// The hash by which the server knows the script.
        release: String,
    },
    Redis {
        connection: MultiplexedConnection,
        release: Arc<Script>,
    },
    Rslock(LockManager),
}

impl Rival {
    /// Every one with a connection of its own.
    pub(crate) async fn all(url: &str) -> [Self; 6] {
        [
            Self::tenure(url, true).await,
            Self::tenure(url, false).await,
            Self::fred(RAW_FRED, url).await,
            Self::fred(CONTROL, url).await,
            Self::redis(url).await,
            Self::Rslock(LockManager::new(vec![url])),
        ]
    }

    async fn tenure(url: &str, fenced: bool) -> Self {
        Self::Tenure { locker: Locker::connect(url).await.expect("a connection"), fenced }
    }

    async fn fred(name: &'static str, url: &str) -> Self {
        let client = Builder::from_config(Config::from_url(url).expect("a URL"))
            .set_policy(ReconnectPolicy::new_constant(0, 100))
            .build()
            .expect("a client");
        client.init().await.expect("a connection");
        let release = client.custom(fred_command("SCRIPT"), vec!["LOAD", COMPARE_AND_DELETE]).await.expect("its hash");
        Self::Fred { name, client, release }
    }

    async fn redis(url: &str) -> Self {
        let client = redis::Client::open(url).expect("a URL");
        let connection = client.get_multiplexed_async_connection().await.expect("a connection");
        // Sends the script where the server doesn't know its hash, which it then does.
        Self::Redis { connection, release: Arc::new(Script::new(COMPARE_AND_DELETE)) }
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Tenure { fenced: true, .. } => "tenure",
            Self::Tenure { fenced: false, .. } => "tenure, unfenced",
            Self::Fred { name, .. } => name,
            Self::Redis { .. } => "raw redis",
            Self::Rslock(_) => RSLOCK,
        }
    }

    /// One pair.
    ///
    /// # Panics
    ///
    /// When the key was not free, or not ours any more: what is measured then is something else. Of a release, rslock
    /// doesn't say; but the next pair would find its key locked.
    pub(crate) async fn obtain_and_release(&self, key: &str) {
        match self {
            Self::Tenure { locker, fenced } => with_tenure(locker, *fenced, key).await,
            Self::Fred { client, release, .. } => with_fred(client, release, key).await,
            Self::Redis { connection, release } => with_redis(connection.clone(), release, key).await,
            Self::Rslock(manager) => with_rslock(manager, key).await,
        }
    }
}

async fn with_tenure(locker: &Locker, fenced: bool, key: &str) {
    let guard = locker.try_lock(key).ttl(TTL).fenced(fenced).await.expect("free");
    guard.release().await.expect("held");
}

async fn with_fred(client: &Client, release: &str, key: &str) {
    let token = Token::random();
    let set = vec![key, token.as_str(), "NX", "PX", TTL_MILLIS];
    let granted: Value = client.custom(fred_command("SET"), set).await.expect("an answer");
    assert!(!granted.is_null(), "free");
    let evalsha = vec![release, "1", key, token.as_str()];
    let freed: i64 = client.custom(fred_command("EVALSHA"), evalsha).await.expect("an answer");
    assert_eq!(freed, 1, "held");
}

fn fred_command(name: &'static str) -> CustomCommand {
    CustomCommand::new_static(name, ClusterHash::FirstKey, false)
}

async fn with_redis(mut connection: MultiplexedConnection, release: &Script, key: &str) {
    let token = Token::random();
    let mut set = redis::cmd("SET");
    set.arg(key).arg(token.as_str()).arg("NX").arg("PX").arg(TTL_MILLIS);
    let granted: redis::Value = set.query_async(&mut connection).await.expect("an answer");
    assert_eq!(granted, redis::Value::Okay, "free");
    let freed: i64 = release.key(key).arg(token.as_str()).invoke_async(&mut connection).await.expect("an answer");
    assert_eq!(freed, 1, "held");
}

async fn with_rslock(manager: &LockManager, key: &str) {
    let lock = manager.lock(key, TTL).await.expect("free");
    manager.unlock(&lock).await;
}
