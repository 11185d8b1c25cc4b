//! The queue for a key that all processes stand in.
//!
//! A sorted set beside the lock key holds the tokens of those who wait, by their arrival; a hash says until when each counts
//! as alive. Who is next takes the lock when it is free, nobody else who queues does. One that has died is skipped
//! [`ALIVE`] after its last sign of life.

use std::time::Duration;

use fred::bytes::Bytes;
use fred::types::Value;

use super::operation::{Decision, Operation, What};
use super::script::Call;
use super::{RedisStore, acquired, fence_ttl, from_millis, integers, millis, names, unexpected, value_of};
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
        let (value, ttl, fence_ttl) = (value_of(wanted), millis(wanted.ttl), fence_ttl(wanted.ttl));
        let fence = wanted.fenced.then(|| names::fence_of(&name));
        let keys: Vec<Value> = lock_and_queue(&name).into_iter().chain(fence.clone()).map(Value::Bytes).collect();
        let queues = Value::Integer((wanted.queueing == Queueing::Queued).into());
        let args = [value.clone(), ttl.into(), fence_ttl.into(), millis(ALIVE).into(), queues];
        let call = Call::new(keys.into_iter(), args);
        let (until, writing) = self.server().writing(timeout);
        let answer = self.server().run(&self.server().scripts.acquire_fair, || call.clone(), timeout).await?;
        if let Value::Array(parts) = &answer {
            return match &parts[..] {
                [Value::String(next), Value::Integer(remaining)] => Ok(Acquired::NotNext {
                    next: Token::from_server(next.as_bytes()),
                    remaining: from_millis(*remaining).unwrap_or_default(),
                }),
                _ => Err(unexpected()),
            };
        }
        let what = What::Acquire { value, ttl, fence: fence.map(|fence| (fence, fence_ttl)) };
        let operation = Operation { name, token: wanted.owned.token.clone(), what };
        let decision = match operation.read(&answer) {
            Some(decision) => decision?,
            None => {
                let answer = self.server().run(&self.server().scripts.acquire, || operation.again(), timeout).await?;
                match integers(&answer)?[..] {
                    [1, fence] => Decision::Granted(fence),
                    [0, ttl, _] => Decision::Held(ttl),
                    _ => return Err(unexpected()),
                }
            }
        };
        if let Decision::Granted(_) = decision {
            self.server().replicated(writing, until).await?;
        }
        acquired(decision)
    }

    pub(super) async fn attend(&self, key: &Key, tokens: &[Token], timeout: Duration) -> Result<(), Error> {
        let [_, queue, alive] = lock_and_queue(&self.name(key));
        let tokens = tokens.iter().map(|token| Value::from(token.to_text()));
        let args = std::iter::once(millis(ALIVE).into()).chain(tokens);
        let call = Call::new([queue, alive].map(Value::Bytes).into_iter(), args);
        self.server().run(&self.server().scripts.attend, || call.clone(), timeout).await.map(drop)
    }

    pub(super) async fn leave(&self, owned: &Owned, timeout: Duration) -> Result<(), Error> {
        let [key] = &*owned.keys else { return Ok(()) };
        let keys = lock_and_queue(&self.name(key)).map(Value::Bytes);
        let call = Call::new(keys.into_iter(), [owned.token.to_text().into(), self.publish().into()]);
        self.server().run(&self.server().scripts.leave, || call.clone(), timeout).await.map(drop)
    }
}

/// The names that the scripts of a queue begin with.
pub(super) fn lock_and_queue(name: &Bytes) -> [Bytes; 3] {
    [name.clone(), names::queue_of(name), names::alive_of(name)]
}
