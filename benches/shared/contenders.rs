//! Who is measured: tenure on both of its clients, and what its users have had so far.

use std::sync::Arc;
use std::time::Duration;

use distributed_lock_core::traits::{
    DistributedReaderWriterLock, DistributedSemaphore, LockHandle, ReaderWriterLockProvider, SemaphoreProvider,
};
use distributed_lock_redis::{RedisLockProvider, RedisReadLockHandle, RedisSemaphoreHandle, RedisWriteLockHandle};
use redis::aio::MultiplexedConnection;
use redis::{Script, Value};
use tenure::{Driver, LockGuard, Locker};
use tokio::time::sleep;

const TTL: Duration = Duration::from_secs(30);
/// The pause between two tries, of those that poll.
const POLL: Duration = Duration::from_millis(10);

/// What a task wants of the key.
#[derive(Clone, Copy)]
pub(crate) enum Share {
    Write,
    Read,
    Permit(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    Fred,
    RedisRs,
    /// `distributed-lock-redis`: its lock for readers and writers tries once, so it is polled.
    DistributedLock,
    /// A sorted set of holders and a script, polled, as it is written by hand on a plain client.
    ByHand,
}

impl Contender {
    pub(crate) const ALL: [Self; 4] = [Self::Fred, Self::RedisRs, Self::DistributedLock, Self::ByHand];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fred => "tenure, fred",
            Self::RedisRs => "tenure, redis-rs",
            Self::DistributedLock => "distributed-lock-redis 0.2",
            Self::ByHand => "by hand, polled",
        }
    }

    pub(crate) fn has_readers(self) -> bool {
        self != Self::ByHand
    }

    pub(crate) async fn connect(self, url: &str) -> Client {
        let tenure = |driver| Locker::builder().ttl(TTL).driver(driver).connect(url);
        match self {
            Self::Fred => Client::Tenure(tenure(Driver::Fred).await.expect("a connection")),
            Self::RedisRs => Client::Tenure(tenure(Driver::Redis).await.expect("a connection")),
            Self::DistributedLock => {
                let provider = RedisLockProvider::builder().url(url).expiry(TTL).build();
                Client::DistributedLock(Arc::new(provider.await.expect("a connection")))
            }
            Self::ByHand => {
                let client = redis::Client::open(url).expect("a URL");
                Client::ByHand(client.get_multiplexed_async_connection().await.expect("a connection"))
            }
        }
    }
}

#[derive(Clone)]
pub(crate) enum Client {
    Tenure(Locker),
    DistributedLock(Arc<RedisLockProvider>),
    ByHand(MultiplexedConnection),
}

pub(crate) enum Guard {
    Tenure(LockGuard),
    Writer(RedisWriteLockHandle),
    Reader(RedisReadLockHandle),
    Permit(RedisSemaphoreHandle),
    ByHand(MultiplexedConnection, String, String),
}

impl Client {
    pub(crate) async fn obtain(&self, key: &str, share: Share) -> Guard {
        match self {
            Self::Tenure(locker) => {
                let request = match share {
                    Share::Write => locker.lock(key),
                    Share::Read => locker.read(key),
                    Share::Permit(limit) => locker.permit(key, limit),
                };
                Guard::Tenure(request.await.expect("a guard"))
            }
            Self::DistributedLock(provider) => match share {
                Share::Permit(limit) => {
                    let semaphore = provider.create_semaphore(key, u32::try_from(limit).expect("a small number"));
                    Guard::Permit(semaphore.acquire(None).await.expect("a permit"))
                }
                Share::Write | Share::Read => loop {
                    let lock = provider.create_reader_writer_lock(key);
                    let obtained = match share {
                        Share::Write => lock.try_acquire_write().await.map(|handle| handle.map(Guard::Writer)),
                        _ => lock.try_acquire_read().await.map(|handle| handle.map(Guard::Reader)),
                    };
                    if let Some(guard) = obtained.expect("an answer") {
                        return guard;
                    }
                    sleep(POLL).await;
                },
            },
            Self::ByHand(connection) => {
                let limit = if let Share::Permit(limit) = share { limit } else { 1 };
                let name = format!("{:032x}", fastrand::u128(..));
                let script = Script::new(ENTER);
                let mut call = script.key(key);
                call.arg(&name).arg(limit).arg(u64::try_from(TTL.as_millis()).expect("a short time"));
                let mut connection = connection.clone();
                while !call.invoke_async::<bool>(&mut connection).await.expect("an answer") {
                    sleep(POLL).await;
                }
                Guard::ByHand(connection, key.to_owned(), name)
            }
        }
    }
}

/// Removes those whose time is over, and adds a holder if there is room.
const ENTER: &str = "
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
    if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
        return 0
    end
    redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1
";

impl Guard {
    pub(crate) async fn release(self) {
        match self {
            Self::Tenure(guard) => guard.release().await.expect("its release"),
            Self::Writer(handle) => handle.release().await.expect("its release"),
            Self::Reader(handle) => handle.release().await.expect("its release"),
            Self::Permit(handle) => handle.release().await.expect("its release"),
            Self::ByHand(mut connection, key, name) => {
                let mut remove = redis::cmd("ZREM");
                remove.arg(key).arg(name);
                let _: Value = remove.query_async(&mut connection).await.expect("an answer");
            }
        }
    }
}
