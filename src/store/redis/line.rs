//! The line for a key, in which those who wait for it stand in all processes.
//!
//! It is a sorted set beside the lock key (`scripts/line.lua`). Whoever frees the lock gives it to the head of the line
//! in the same step, and tells that process, which confirms by asking. A process that has died is skipped [`ALIVE`] after
//! its last sign of life; one that doesn't confirm loses its turn after a second.

use std::time::Duration;

use fred::bytes::Bytes;
use fred::types::Value;
use tokio::time::Instant;

use super::args::{decimal, fence_ttl, id_or_empty, millis, record_ttl, value_of};
use super::script::Call;
use super::{RedisStore, names, replies};
use crate::store::{Acquired, LinePlace, Wanted};
use crate::{Error, Key};

/// How long the processes that wait for a key count as alive after a sign of life.
const ALIVE: Duration = Duration::from_millis(1_500);

impl RedisStore {
    /// Takes the lock if it is free and nobody else's turn; otherwise takes this place in the line, if there is one.
    pub(super) async fn acquire_in_line(
        &self,
        wanted: &Wanted,
        key: &Key,
        place: Option<LinePlace>,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let name = self.name(key);
        let (ttl, fence_ttl) = (millis(wanted.ttl), fence_ttl(wanted.ttl));
        let fence = wanted.fenced.then(|| names::fence_of(&name));
        let keys = lock_and_line(&name).into_iter().chain([names::grants_of(&name)]).chain(fence);
        let keys: Vec<Value> = keys.map(Value::Bytes).collect();
        let place = place.map_or_else(|| "".into(), |place| self.place(place));
        let (ttls, record_ttl) = ([decimal(ttl), decimal(fence_ttl)], record_ttl(wanted.ttl).into());
        let grant = id_or_empty(wanted.owned.grant);
        let args = [value_of(wanted)].into_iter().chain(ttls).chain([place, alive(), grant, record_ttl]);
        let call = Call::new(keys.into_iter(), args.chain(self.notify(&name)));
        let (until, writing) = self.server().writing(timeout);
        let sending = |until| wanted.latest.extend(until);
        let script = &self.server().scripts.acquire_in_line;
        let reply = self.server().run(script, || call.clone(), sending, timeout).await?.value()?;
        let Some(acquired) = replies::acquired_in_line(&reply)? else {
            return self.acquire_whole(wanted, None, until.saturating_duration_since(Instant::now())).await;
        };
        if matches!(acquired, Acquired::Granted { .. }) {
            self.server().replicated(writing, until).await?;
        }
        Ok(acquired)
    }

    pub(super) async fn enter(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<(), Error> {
        let [_, line, alive_key] = lock_and_line(&self.name(key)).map(Value::Bytes);
        let call = Call::new([line, alive_key].into_iter(), [self.place(place), alive()]);
        self.server().run(&self.server().scripts.enter, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    pub(super) async fn heartbeat(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<bool, Error> {
        let name = self.name(key);
        let args = [self.place(place), alive()].into_iter().chain(self.notify(&name));
        let call = Call::new(lock_and_line(&name).map(Value::Bytes).into_iter(), args);
        let reply = self.server().run(&self.server().scripts.heartbeat, || call.clone(), |_| {}, timeout).await?;
        Ok(replies::is_in_line(&reply.value()?))
    }

    pub(super) async fn leave(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<(), Error> {
        let name = self.name(key);
        let args = [self.place(place)].into_iter().chain(self.notify(&name));
        let call = Call::new(lock_and_line(&name).map(Value::Bytes).into_iter(), args);
        self.server().run(&self.server().scripts.leave, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    /// The place as scripts know it. One that is shared ends otherwise than that of one waiter.
    pub(super) fn place(&self, place: LinePlace) -> Value {
        let kind = if place.is_shared { 's' } else { 'w' };
        format!("{}:{kind}{}", self.process, place.number).into()
    }

    /// How the waiters for a key are notified, and on which channel.
    pub(super) fn notify(&self, name: &Bytes) -> [Value; 2] {
        let channel = names::channel_of(name).unwrap_or_else(|| name.clone());
        [Value::from_static_str(self.publish()), Value::Bytes(channel)]
    }
}

/// For how long a process counts as alive from now on, as an argument.
pub(super) fn alive() -> Value {
    decimal(millis(ALIVE))
}

/// The lock key, its line, and who of that is alive.
pub(super) fn lock_and_line(name: &Bytes) -> [Bytes; 3] {
    [name.clone(), names::line_of(name), names::alive_of(name)]
}

#[cfg(test)]
mod tests;
