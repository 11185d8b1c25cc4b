//! The queue for a key that all processes stand in.
//!
//! A sorted set beside the lock key holds the tokens of those who wait, by their arrival; a hash says until when each
//! counts as alive. Who is next takes the lock when it is free, nobody else who queues does. One that has died is
//! skipped [`ALIVE`] after its last sign of life.

use std::time::Duration;

use fred::bytes::Bytes;
use fred::types::Value;
use tokio::time::Instant;

use super::operation::{channels, unexpected};
use super::script::Call;
use super::{RedisStore, fence_ttl, from_millis, granted, millis, names, record_ttl, value_of};
use crate::hold::Owned;
use crate::store::{Acquired, Queueing, Wanted};
use crate::{Error, Key, Token};

/// How long who waits counts as alive after a sign of life. By so much a dead one delays the others.
pub(crate) const ALIVE: Duration = Duration::from_millis(1_500);

impl RedisStore {
    pub(super) async fn acquire_in_line(
        &self,
        wanted: &Wanted,
        key: &Key,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let name = self.name(key);
        let (ttl, fence_ttl) = (millis(wanted.ttl), fence_ttl(wanted.ttl));
        let fence = wanted.fenced.then(|| names::fence_of(&name));
        let keys = lock_and_queue(&name).into_iter().chain([names::grants_of(&name)]).chain(fence);
        let keys: Vec<Value> = keys.map(Value::Bytes).collect();
        let queues = Value::Integer((wanted.queueing == Queueing::Queued).into());
        let grant = wanted.owned.grant.map_or_else(|| "".into(), |grant| grant.to_string().into());
        let (value, record_ttl) = (value_of(wanted), record_ttl(wanted.ttl).into());
        let args = [value, ttl.into(), fence_ttl.into(), millis(ALIVE).into(), queues, grant, record_ttl];
        let call = Call::new(keys.into_iter(), args);
        let (until, writing) = self.server().writing(timeout);
        let answer = self
            .server()
            .run(&self.server().scripts.acquire_fair, || call.clone(), |until| wanted.latest.extend(until), timeout)
            .await?
            .value()?;
        if let Value::Array(parts) = &answer {
            return match &parts[..] {
                [Value::String(next), Value::Integer(remaining)] => Ok(Acquired::NotNext {
                    next: Token::from_server(next.as_bytes()),
                    remaining: from_millis(*remaining).unwrap_or_default(),
                }),
                _ => Err(unexpected()),
            };
        }
        match answer {
            Value::Integer(-1) => Ok(Acquired::Held { place: 0, remaining: None }),
            Value::Integer(held @ ..-1) => Ok(Acquired::Held { place: 0, remaining: from_millis(-2 - held) }),
            Value::Integer(fence) => {
                self.server().replicated(writing, until).await?;
                Ok(granted(fence))
            }
            // The key holds the token already, which is in the queue no more.
            Value::String(said) if *said == *"ALONE" => {
                self.acquire_whole(wanted, until.saturating_duration_since(Instant::now())).await
            }
            _ => Err(unexpected()),
        }
    }

    pub(super) async fn attend(&self, key: &Key, tokens: &[Token], timeout: Duration) -> Result<(), Error> {
        let [_, queue, alive] = lock_and_queue(&self.name(key));
        let tokens = tokens.iter().map(|token| Value::from(token.to_text()));
        let args = std::iter::once(millis(ALIVE).into()).chain(tokens);
        let call = Call::new([queue, alive].map(Value::Bytes).into_iter(), args);
        self.server().run(&self.server().scripts.attend, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    pub(super) async fn leave(&self, owned: &Owned, timeout: Duration) -> Result<(), Error> {
        let [key] = &*owned.keys else { return Ok(()) };
        let name = self.name(key);
        let keys = lock_and_queue(&name).map(Value::Bytes);
        let mut call = Call::new(keys.into_iter(), [owned.token.to_text().into(), self.publish().into()]);
        call.args(channels([&name]));
        self.server().run(&self.server().scripts.leave, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }
}

/// The names that the scripts of a queue begin with.
pub(super) fn lock_and_queue(name: &Bytes) -> [Bytes; 3] {
    [name.clone(), names::queue_of(name), names::alive_of(name)]
}
