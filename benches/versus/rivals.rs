//! The rivals, and how each of them obtains and releases a lock.

use std::time::Duration;

use rslock::LockManager;
use tenure::{Driver, Locker, Token};

use crate::raw_fred::RawFred;
use crate::raw_redis::RawRedis;

/// The names that ratios refer to.
pub(crate) const RAW_FRED: &str = "raw fred";
pub(crate) const RAW_REDIS: &str = "raw redis";
pub(crate) const RSLOCK: &str = "rslock";
pub(crate) const ON_FRED_UNFENCED: &str = "tenure on fred, unfenced";
pub(crate) const ON_REDIS: &str = "tenure on redis";
pub(crate) const ON_REDIS_UNFENCED: &str = "tenure on redis, unfenced";
/// raw fred, once more. The distance of its ratio from 1 shows how precise the other ratios are.
pub(crate) const CONTROL: &str = "raw fred, again";

const TTL: Duration = Duration::from_secs(30);

/// The release script of the raw clients. tenure and rslock have their own.
const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

#[derive(Clone)]
pub(crate) enum Rival {
    Tenure {
        name: &'static str,
        locker: Locker,
        fenced: bool,
    },
    /// A client under tenure: the ratio to it is the price of the guard.
    Fred {
        name: &'static str,
        raw: RawFred,
    },
    Redis(RawRedis),
    Rslock(LockManager),
}

impl Rival {
    /// Returns every rival, each with its own connection.
    pub(crate) async fn all(url: &str) -> [Self; 8] {
        [
            Self::tenure("tenure on fred", url, Driver::Fred, true).await,
            Self::tenure(ON_FRED_UNFENCED, url, Driver::Fred, false).await,
            Self::tenure(ON_REDIS, url, Driver::Redis, true).await,
            Self::tenure(ON_REDIS_UNFENCED, url, Driver::Redis, false).await,
            Self::fred(RAW_FRED, url).await,
            Self::fred(CONTROL, url).await,
            Self::Redis(RawRedis::connect(url, COMPARE_AND_DELETE).await),
            Self::Rslock(LockManager::new(vec![url])),
        ]
    }

    async fn tenure(name: &'static str, url: &str, driver: Driver, fenced: bool) -> Self {
        let locker = Locker::builder().driver(driver).connect(url).await.expect("a connection");
        Self::Tenure { name, locker, fenced }
    }

    async fn fred(name: &'static str, url: &str) -> Self {
        Self::Fred { name, raw: RawFred::connect(url, COMPARE_AND_DELETE).await }
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Tenure { name, .. } | Self::Fred { name, .. } => name,
            Self::Redis(_) => RAW_REDIS,
            Self::Rslock(_) => RSLOCK,
        }
    }

    /// Runs one pair.
    ///
    /// # Panics
    ///
    /// If the key was not free, or is no longer ours: the figures would then mean something else. rslock doesn't report
    /// that of a release; but the next pair would find its key locked.
    pub(crate) async fn obtain_and_release(&self, key: &str) {
        match self {
            Self::Tenure { locker, fenced, .. } => with_tenure(locker, *fenced, key).await,
            Self::Fred { raw, .. } => with_fred(raw, key).await,
            Self::Redis(raw) => with_redis(raw, key).await,
            Self::Rslock(manager) => with_rslock(manager, key).await,
        }
    }
}

async fn with_tenure(locker: &Locker, fenced: bool, key: &str) {
    let guard = locker.try_lock(key).ttl(TTL).fenced(fenced).await.expect("free");
    guard.release().await.expect("held");
}

async fn with_fred(raw: &RawFred, key: &str) {
    let token = Token::random();
    assert!(raw.try_lock(key, token.as_str()).await, "free");
    assert!(raw.run_script(key, token.as_str()).await.expect("an answer"), "held");
}

async fn with_redis(raw: &RawRedis, key: &str) {
    let token = Token::random();
    assert!(raw.try_lock(key, token.as_str()).await, "free");
    assert!(raw.run_script(key, token.as_str()).await.expect("an answer"), "held");
}

async fn with_rslock(manager: &LockManager, key: &str) {
    let lock = manager.lock(key, TTL).await.expect("free");
    manager.unlock(&lock).await;
}
