//! Keys that several hold together: readers, and holders of permits.
//!
//! While a key is shared, it holds a marker that every other script and library takes for the lock of another. Who
//! shares it, and until when, lies beside it (`scripts/shares.lua`). All waiters for the key stand in one line,
//! whatever they want it for, and no share is taken that somebody else in the line waits for: so readers that keep
//! coming don't keep a writer out.
//!
//! The three keys of a shared lock are renewed and released in one call. While a slot of a cluster moves, they may be
//! on two nodes for a moment: then neither can run it, and it is sent again until its time is over.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::args::{decimal, flag, id_of, millis, record_ttl, seconds};
use super::replicas::within;
use super::router::patiently;
use super::script::{Call, Reply, Returned, Script};
use super::{RedisStore, line, names, replies};
use crate::hold::{GrantId, Owned};
use crate::mode::Mode;
use crate::store::Latest;
use crate::store::{Acquired, Downgraded, Ending, Extending, Holder, InLine, Undone, Verdict, Wanted};
use crate::{Error, Key, RedisError};

impl RedisStore {
    /// Takes a share of a key, or a place in the line for it.
    pub(super) async fn acquire_shared(
        &self,
        wanted: &Wanted,
        in_line: InLine,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let Owned { token, grant, mode, .. } = &wanted.owned;
        let name = self.name(only_key(&wanted.owned)?);
        let fence = wanted.fenced.then(|| names::fence_of(&name));
        let keys: Vec<Bytes> = line::lock_and_line(&name).into_iter().chain(beside(&name)).chain(fence).collect();
        let (place, stays) = match in_line {
            InLine::At { place, stays, .. } => (self.place(place), stays),
            InLine::No | InLine::Behind => ("".into(), false),
        };
        let limit = match mode {
            Mode::Permit => i64::try_from(wanted.limit).unwrap_or(i64::MAX),
            Mode::Read | Mode::Exclusive => 0,
        };
        let args = [
            token.to_bytes(),
            Bytes::copy_from_slice(&wanted.metadata),
            decimal(millis(wanted.ttl)),
            decimal(self.fence_ttl(wanted.ttl)),
            place,
            line::alive(),
            flag(stays),
            id_of(*grant),
            marker_of(*mode),
            decimal(limit),
        ];
        let call = Call::new(keys.into_iter(), args.into_iter().chain(self.notify(&name)));
        let (until, writing) = self.server().writing(timeout);
        let sending = |until| wanted.latest.extend(until);
        let script = &self.server().scripts.acquire_shared;
        let reply = self.server().run(script, || call.clone(), sending, timeout).await;
        let reply = reply.and_then(Reply::value).map_err(|error| explain(error, &name))?;
        // It never leaves the decision to another script.
        let acquired = replies::acquired_in_line(&reply)?.ok_or_else(replies::unexpected)?;
        if matches!(acquired, Acquired::Granted { .. }) {
            self.server().replicated(writing, until).await?;
        }
        Ok(acquired)
    }

    pub(super) async fn renew_shared(
        &self,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let timeout = within(timeout, ttl, self.server().min_replicas);
        let call = self.renewal_of_share(owned, ttl, how, Duration::ZERO)?;
        let (until, writing) = self.server().writing(timeout);
        let reply = self.run_patiently(&self.server().scripts.renew_shared, &call, until).await;
        let verdict = match reply {
            Ok(Reply { outcome: Ok(Returned::Code(1)), .. }) => Verdict::Done,
            reply => replies::verdict(reply.and_then(Reply::value))?,
        };
        if verdict == Verdict::Done {
            self.server().replicated(writing, until).await?;
        }
        Ok(verdict)
    }

    /// Returns the call of `renew_shared.lua`. The window is that of a quorum's node, or zero.
    pub(super) fn renewal_of_share(
        &self,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        window: Duration,
    ) -> Result<Call, Error> {
        let how = how.of(owned);
        let name = self.name(only_key(owned)?);
        let earlier = match how {
            Extending::Claim { earlier } | Extending::GiveBack { earlier } => id_of(earlier),
            Extending::AtLeast | Extending::Exactly | Extending::KeepRecord | Extending::Ensure => "".into(),
        };
        let how = how.name().unwrap_or("least").into();
        let args = [
            owned.token.to_bytes(),
            decimal(millis(ttl)),
            how,
            id_of(owned.grant),
            earlier,
            marker_of(owned.mode),
            seconds(window),
        ];
        Ok(Call::new(lock_and_beside(&name).into_iter(), args))
    }

    /// Ends a grant, or the share of a token, which still counts by nobody's name for the rest of its time. Returns the
    /// server's time in ms as well.
    async fn end_share(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Result<(Verdict, u64), Error> {
        let name = self.name(only_key(owned)?);
        let all = flag(ending == Ending::Lock);
        let args = [owned.token.to_bytes(), id_of(owned.grant), all, marker_of(owned.mode), decimal(millis(rest))];
        let args = args.into_iter().chain(self.notify(&name)).chain([names::line_of(&name)]);
        let call = Call::new(lock_and_beside(&name).into_iter(), args);
        let reply = self.run_patiently(&self.server().scripts.end_share, &call, Instant::now() + timeout).await?;
        let now = reply.now.unwrap_or_default();
        Ok((replies::verdict(reply.value())?, now))
    }

    pub(super) async fn release_shared(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        self.end_share(owned, ending, rest, timeout).await.map(|(verdict, _)| verdict)
    }

    pub(super) async fn undo_shared(&self, owned: &Owned, latest: &Latest, timeout: Duration) -> Result<Undone, Error> {
        let (_, now) = self.end_share(owned, Ending::Grant, Duration::ZERO, timeout).await?;
        Ok(latest.remaining(now).map_or(Undone::Complete, Undone::MayRun))
    }

    pub(super) async fn downgrade(&self, owned: &Owned, timeout: Duration) -> Result<Downgraded, Error> {
        let name = self.name(only_key(owned)?);
        let before = [name.clone(), names::line_of(&name), names::grants_of(&name)];
        let keys: Vec<Bytes> = before.into_iter().chain(beside(&name)).chain([names::fence_of(&name)]).collect();
        let (token, readers) = (owned.token.to_bytes(), marker_of(Mode::Read));
        let args = [token, id_of(owned.grant), readers, decimal(record_ttl(Duration::ZERO))];
        let call = Call::new(keys.into_iter(), args.into_iter().chain(self.notify(&name)));
        let reply = self.run_patiently(&self.server().scripts.downgrade, &call, Instant::now() + timeout).await;
        replies::downgraded(&reply.and_then(Reply::value).map_err(|error| explain(error, &name))?)
    }

    pub(super) async fn remaining_shared(&self, owned: &Owned, timeout: Duration) -> Result<Option<Duration>, Error> {
        let name = self.name(only_key(owned)?);
        let grant = match owned.grant {
            Some(GrantId::UNKNOWN) => "".into(),
            grant => id_of(grant),
        };
        let call =
            Call::new(lock_and_beside(&name).into_iter(), [owned.token.to_bytes(), grant, marker_of(owned.mode)]);
        let reply =
            self.server().run(&self.server().scripts.remaining_shared, || call.clone(), |_| {}, timeout).await?;
        replies::remaining(&reply.value()?)
    }

    /// Returns all who hold the key: those that stay longest first.
    pub(super) async fn holders(&self, key: &Key, timeout: Duration) -> Result<Vec<Holder>, Error> {
        let until = Instant::now() + timeout;
        let (mut all, mut cursor) = (Vec::<Holder>::new(), Bytes::from_static(b"0"));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let page = self.page_of_holders(key, cursor, left).await?;
            all.extend(page.holders);
            match page.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        all.sort_by(|a, b| b.remaining.unwrap_or(Duration::MAX).cmp(&a.remaining.unwrap_or(Duration::MAX)));
        // The server may return one on two pages.
        let mut seen = std::collections::HashSet::new();
        all.retain(|holder| seen.insert(holder.token.clone()));
        Ok(all)
    }

    /// Returns the one that stays longest of those who share a key.
    pub(super) async fn longest_holder(&self, key: &Key, timeout: Duration) -> Result<Option<Holder>, Error> {
        Ok(self.page_of_holders(key, Bytes::new(), timeout).await?.holders.into_iter().next())
    }

    async fn page_of_holders(&self, key: &Key, cursor: Bytes, timeout: Duration) -> Result<replies::Holders, Error> {
        let name = self.name(key);
        let keys: Vec<Bytes> = [name.clone(), names::fence_of(&name)].into_iter().chain(beside(&name)).collect();
        let call = Call::new(keys.into_iter(), [cursor]);
        let reply = self.run_patiently(&self.server().scripts.holders, &call, Instant::now() + timeout).await;
        replies::holders(reply.and_then(Reply::value).map_err(|error| explain(error, &name))?)
    }

    /// Runs a script once. While its keys are on two nodes of a cluster, which then run nothing, it is sent again.
    async fn run_patiently(&self, script: &Script, call: &Call, until: Instant) -> Result<Reply, Error> {
        let timeout = until.saturating_duration_since(Instant::now());
        let run = |left| async move {
            let reply = self.server().run(script, || call.clone(), |_| {}, left).await?;
            match reply.outcome {
                // The keys were found to be elsewhere while the script ran, before it wrote.
                Err(error) if error.is_redirection() => Err(error),
                _ => Ok(reply),
            }
        };
        Box::pin(patiently(timeout, run)).await
    }
}

/// Returns the names of the set of holders, and of the records of their shares.
fn beside(name: &Bytes) -> [Bytes; 2] {
    [names::holders_of(name), names::shares_of(name)]
}

pub(super) fn lock_and_beside(name: &Bytes) -> [Bytes; 3] {
    let [holders, shares] = beside(name);
    [name.clone(), holders, shares]
}

/// Returns what a lock key holds while it is shared. As in `scripts/marker.lua`.
pub(super) fn marker_of(mode: Mode) -> Bytes {
    Bytes::from_static(match mode {
        Mode::Read | Mode::Exclusive => b"\n\nr",
        Mode::Permit => b"\n\np",
    })
}

fn only_key(owned: &Owned) -> Result<&Key, Error> {
    match &*owned.keys {
        [key] => Ok(key),
        _ => Err(Error::Unsupported("only a request for one key can share it")),
    }
}

/// Adds to a refusal for want of permissions what it is that readers and permits need.
fn explain(error: Error, name: &Bytes) -> Error {
    match error {
        Error::Redis(error) if error.code() == Some("NOPERM") => {
            let [line, alive] = [names::line_of(name), names::alive_of(name)];
            let [holders, shares] = beside(name);
            let text = |name: &Bytes| name.escape_ascii().to_string();
            let keys = [&line, &alive, &holders, &shares].map(text).join(" ");
            let text = format!(
                "{}; readers and permits need the keys {keys}, and the commands for waiters that the \
                README lists, as well as ZCOUNT, ZRANGEBYSCORE and HSCAN",
                error.details()
            );
            RedisError::new(error.kind(), text).into()
        }
        error => error,
    }
}

#[cfg(test)]
mod tests;
