//! Locks on one Redis or Valkey server, one that Sentinels watch over, or a cluster, through fred.

mod connection;
mod names;
mod script;
mod vote;

use std::time::Duration;

use fred::bytes::Bytes;
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::types::Value;

use self::connection::Connection;
use self::script::{Call, Scripts};
use super::{Acquired, Answer, Holder, Released, Renewed, Store, Wanted};
use crate::hold::Owned;
use crate::{Error, Key, Loss, Token};

/// For how long the server remembers the last fencing token of a key, at least. Should it forget, its clock takes over:
/// the memory only matters where that clock steps back, by less than this.
const FENCE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug)]
pub(crate) struct RedisStore {
    connection: Connection,
    prefix: String,
    scripts: Scripts,
}

impl RedisStore {
    /// Connects to the URL with a client of our own, whose settings suit locks.
    pub(crate) async fn connect(url: &str, prefix: String, timeout: Duration) -> Result<Self, Error> {
        let connection = Connection::open(url, timeout).await?;
        Ok(Self { connection, prefix, scripts: Scripts::new() })
    }

    /// Uses the caller's client. Nothing is assumed of its settings: each call brings its own.
    pub(crate) fn with_client(client: Client, prefix: String) -> Self {
        Self { connection: Connection::borrowed(client), prefix, scripts: Scripts::new() }
    }

    fn client(&self) -> &Client {
        self.connection.client()
    }

    /// The key as the server knows it.
    fn name(&self, key: &Key) -> Bytes {
        if self.prefix.is_empty() {
            return key.to_bytes();
        }
        [self.prefix.as_bytes(), key.as_bytes()].concat().into()
    }

    fn names<'a>(&'a self, owned: &'a Owned) -> impl ExactSizeIterator<Item = Value> + 'a {
        owned.keys.iter().map(|key| Value::Bytes(self.name(key)))
    }

    async fn acquire(&self, wanted: &Wanted, timeout: Duration) -> Result<Acquired, Error> {
        let Owned { keys, token } = &wanted.owned;
        let mut names: Vec<Bytes> = keys.iter().map(|key| self.name(key)).collect();
        self.check_slots(&names)?;
        if wanted.fenced {
            let fences: Vec<Bytes> = names.iter().map(names::fence_of).collect();
            names.extend(fences);
        }
        let call = Call::new(
            names.into_iter().map(Value::Bytes),
            [
                Value::from(token.as_str()),
                value_of(wanted),
                millis(wanted.ttl),
                Value::Integer(i64::try_from(keys.len()).unwrap_or(i64::MAX)),
                millis(FENCE_TTL.max(wanted.ttl.saturating_mul(2))),
            ],
        );
        let answer = self.connection.watch(self.scripts.acquire.run(self.client(), call, timeout)).await?;
        match integers(&answer)?[..] {
            [1, 0] => Ok(Acquired::Granted { fencing_token: None }),
            [1, fence] => Ok(Acquired::Granted { fencing_token: u64::try_from(fence).ok() }),
            [0, ttl, place] => {
                let place = usize::try_from(place - 1).unwrap_or_default();
                Ok(Acquired::Held { place, remaining: from_millis(ttl) })
            }
            _ => Err(unexpected()),
        }
    }

    async fn renew(&self, owned: &Owned, ttl: Duration, exact: bool, timeout: Duration) -> Result<Renewed, Error> {
        let args = [owned.token.as_str().into(), millis(ttl), Value::Integer(exact.into())];
        let call = Call::new(self.names(owned), args);
        let answer = self.connection.watch(self.scripts.renew.run(self.client(), call, timeout)).await;
        Ok(match verdict(answer)? {
            Ok(()) => Renewed::Extended,
            Err(loss) => Renewed::NotOurs(loss),
        })
    }

    async fn release(&self, owned: &Owned, timeout: Duration) -> Result<Released, Error> {
        let call = Call::new(self.names(owned), [owned.token.as_str().into()]);
        let answer = self.connection.watch(self.scripts.release.run(self.client(), call, timeout)).await;
        Ok(match verdict(answer)? {
            Ok(()) => Released::Freed,
            Err(loss) => Released::NotOurs(loss),
        })
    }

    async fn remaining(&self, owned: &Owned, timeout: Duration) -> Result<Option<Duration>, Error> {
        let call = Call::new(self.names(owned), [owned.token.as_str().into()]);
        let answer = self.connection.watch(self.scripts.remaining.run(self.client(), call, timeout)).await?;
        Ok(match integer(&answer)? {
            -2 => None,
            // Somebody has taken the ttl away; the next renewal gives it back.
            -1 => Some(Duration::MAX),
            ttl => from_millis(ttl),
        })
    }

    async fn inspect(&self, key: &Key, timeout: Duration) -> Result<Option<Holder>, Error> {
        let name = self.name(key);
        let fence = names::fence_of(&name);
        let call = Call::new([name, fence].map(Value::Bytes).into_iter(), []);
        let answer = self.connection.watch(self.scripts.inspect.run(self.client(), call, timeout)).await?;
        if answer.is_null() {
            return Ok(None);
        }
        let Value::Array(parts) = answer else { return Err(unexpected()) };
        let Ok([held, ttl, fence]) = <[Value; 3]>::try_from(parts) else { return Err(unexpected()) };
        let held = held.into_owned_bytes().ok_or_else(unexpected)?;
        let mut parts = held.splitn(2, |&b| b == b'\n');
        let (token, metadata) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Ok(Some(Holder {
            // What other libraries put there may be no text at all.
            token: Token::from_server(token),
            metadata: metadata.to_vec(),
            remaining: from_millis(integer(&ttl)?),
            fencing_token: fence.as_str().and_then(|fence| fence.parse().ok()),
        }))
    }

    /// On a cluster one script can only touch one slot: said before anything is sent.
    fn check_slots(&self, names: &[Bytes]) -> Result<(), Error> {
        use fred::interfaces::ClientLike;
        use fred::util::redis_keyslot;
        let in_one_slot =
            || names.windows(2).all(|pair| matches!(pair, [a, b] if redis_keyslot(a) == redis_keyslot(b)));
        match names.len() > 1 && self.client().is_clustered() && !in_one_slot() {
            true => Err(Error::CrossSlot),
            false => Ok(()),
        }
    }
}

/// What a lock key holds.
fn value_of(wanted: &Wanted) -> Value {
    let token = wanted.owned.token.as_str();
    match &*wanted.metadata {
        [] => Value::from(token),
        metadata => Value::Bytes([token.as_bytes(), b"\n", metadata].concat().into()),
    }
}

/// The answer to a renewal or a release: whether the keys held our token.
fn verdict(answer: Result<Value, Error>) -> Result<Result<(), Loss>, Error> {
    match answer {
        // Not a string: surely not our lock.
        Err(error) if error.code() == Some("WRONGTYPE") => Ok(Err(Loss::Taken)),
        Err(error) => Err(error),
        Ok(answer) => match integer(&answer)? {
            1 => Ok(Ok(())),
            0 => Ok(Err(Loss::Missing)),
            _ => Ok(Err(Loss::Taken)),
        },
    }
}

fn integer(answer: &Value) -> Result<i64, Error> {
    answer.as_i64().ok_or_else(unexpected)
}

fn integers(answer: &Value) -> Result<Vec<i64>, Error> {
    match answer {
        Value::Array(parts) => parts.iter().map(integer).collect(),
        _ => Err(unexpected()),
    }
}

fn unexpected() -> Error {
    fred::error::Error::new(ErrorKind::Protocol, "the script answered what it never answers").into()
}

fn millis(duration: Duration) -> Value {
    Value::Integer(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

/// A ttl as the server tells it; below zero it has none.
fn from_millis(ttl: i64) -> Option<Duration> {
    u64::try_from(ttl).ok().map(Duration::from_millis)
}

impl Store for RedisStore {
    fn acquire<'a>(&'a self, wanted: &'a Wanted, timeout: Duration) -> Answer<'a, Acquired> {
        Box::pin(self.acquire(wanted, timeout))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, exact: bool, timeout: Duration) -> Answer<'a, Renewed> {
        Box::pin(self.renew(owned, ttl, exact, timeout))
    }

    fn release<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Released> {
        Box::pin(self.release(owned, timeout))
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Duration>> {
        Box::pin(self.remaining(owned, timeout))
    }

    fn inspect<'a>(&'a self, key: &'a Key, timeout: Duration) -> Answer<'a, Option<Holder>> {
        Box::pin(self.inspect(key, timeout))
    }
}
