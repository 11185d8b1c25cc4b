//! The line for a key, in which its waiters stand in the order of their arrival, whatever their process.
//!
//! It is a sorted set beside the lock key (`scripts/line.lua`). The script that frees the lock gives it to the head of
//! the line in the same step, and notifies that process, which confirms by an acquire. A process that has died is
//! skipped [`ALIVE`] after its last heartbeat. One that doesn't confirm loses its turn after a second.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::args::{decimal, id_or_empty, millis, record_ttl, value_of};
use super::script::Call;
use super::{RedisStore, names, replies};
use crate::store::{Acquired, LinePlace, Wanted};
use crate::{Error, Key};

/// How long a process that waits for a key counts as alive after a heartbeat.
const ALIVE: Duration = Duration::from_millis(1_500);

impl RedisStore {
    /// Takes the lock if it is free and it is no other's turn; otherwise takes the given place in the line, if any.
    pub(super) async fn acquire_in_line(
        &self,
        wanted: &Wanted,
        key: &Key,
        place: Option<LinePlace>,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let name = self.name(key);
        let (ttl, fence_ttl) = (millis(wanted.ttl), self.fence_ttl(wanted.ttl));
        let fence = wanted.fenced.then(|| names::fence_of(&name));
        let keys = lock_and_line(&name).into_iter().chain([names::grants_of(&name)]).chain(fence);
        let keys: Vec<Bytes> = keys.collect();
        let place = place.map_or_else(|| "".into(), |place| self.place(place));
        let (ttls, record_ttl) = ([decimal(ttl), decimal(fence_ttl)], decimal(record_ttl(wanted.ttl)));
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
        let [_, line, alive_key] = lock_and_line(&self.name(key));
        let call = Call::new([line, alive_key].into_iter(), [self.place(place), alive()]);
        self.server().run(&self.server().scripts.enter, || call.clone(), |_| {}, timeout).await?.outcome.map(drop)
    }

    pub(super) async fn heartbeat(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<bool, Error> {
        let name = self.name(key);
        let args = [self.place(place), alive()].into_iter().chain(self.notify(&name));
        let call = Call::new(lock_and_line(&name).into_iter(), args);
        let reply = self.server().run(&self.server().scripts.heartbeat, || call.clone(), |_| {}, timeout).await?;
        Ok(replies::is_in_line(&reply.value()?))
    }

    pub(super) async fn leave(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<(), Error> {
        let name = self.name(key);
        let args = [self.place(place)].into_iter().chain(self.notify(&name));
        let call = Call::new(lock_and_line(&name).into_iter(), args);
        self.server().run(&self.server().scripts.leave, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    /// Returns the name of the place at the server. A shared place and the place of one waiter have different names.
    pub(super) fn place(&self, place: LinePlace) -> Bytes {
        let kind = if place.is_shared { 's' } else { 'w' };
        format!("{}:{kind}{}", self.process, place.number).into()
    }

    /// Returns the command that notifies the waiters for a key, and their channel.
    pub(super) fn notify(&self, name: &Bytes) -> [Bytes; 2] {
        let channel = names::channel_of(name).unwrap_or_else(|| name.clone());
        [self.publish().into(), channel]
    }
}

/// Returns [`ALIVE`] as an argument.
pub(super) fn alive() -> Bytes {
    decimal(millis(ALIVE))
}

/// Returns the names of the lock key, of its line, and of the hash of processes that are alive.
pub(super) fn lock_and_line(name: &Bytes) -> [Bytes; 3] {
    [name.clone(), names::line_of(name), names::alive_of(name)]
}

#[cfg(test)]
mod tests;
