//! Acquiring locks, and handing one over.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use super::args::{count_of, decimal, flag, id_of, id_or_empty, millis, record_ttl, value_of};
use super::operation::{Operation, What};
use super::replicas::within;
use super::script::Call;
use super::{RedisStore, line, names, replies};
use crate::hold::Owned;
use crate::report::debug;
use crate::store::{Acquired, Ending, HandedOver, InLine, LinePlace, Next, Store, Wanted};
use crate::{Error, Loss};

impl RedisStore {
    pub(super) async fn acquire(&self, wanted: &Wanted, in_line: InLine, timeout: Duration) -> Result<Acquired, Error> {
        self.check_replicas()?;
        let timeout = within(timeout, wanted.ttl, self.server().min_replicas);
        let until = (self.server().min_replicas > 0).then(|| Instant::now() + timeout);
        let acquired = self.try_acquire(wanted, in_line, timeout).await;
        if let (Some(until), Err(Error::NotReplicated { .. })) = (until, &acquired) {
            Box::pin(self.give_back(&wanted.owned, until)).await;
        }
        acquired
    }

    /// Releases what was not replicated, before that is reported. Should it fail, the caller has to undo the attempt,
    /// as after any failure.
    ///
    /// The next attempt may use this token again, so nothing may end it later: where the outcome is unknown, this waits
    /// until the server can't run the release any longer. It gets a third of the time, for what is not known of the
    /// server's clock; and it is no operation of a batch, which may be run for as long as any of the others has time.
    async fn give_back(&self, owned: &Owned, until: Instant) {
        let left = until.saturating_duration_since(Instant::now()) / 3;
        let released = match owned.mode.is_shared() {
            true => Store::release(self, owned, Ending::Grant, left).await.map(drop),
            false => self.release_whole(owned, Ending::Grant, left).await.map(drop),
        };
        if released.is_err_and(|error| !error.has_not_run()) {
            sleep_until(until).await;
        }
    }

    async fn try_acquire(&self, wanted: &Wanted, in_line: InLine, mut timeout: Duration) -> Result<Acquired, Error> {
        let Owned { keys, token, grant, mode, .. } = &wanted.owned;
        if mode.is_shared() {
            return Box::pin(self.acquire_shared(wanted, in_line, timeout)).await;
        }
        let place = match in_line {
            InLine::At { place, .. } => Some(place),
            InLine::No | InLine::Behind => None,
        };
        let is_shared = place.is_some_and(|place| place.is_shared);
        if let (InLine::Behind | InLine::At { .. }, [key]) = (in_line, &**keys) {
            if !is_shared {
                return Box::pin(self.acquire_in_line(wanted, key, place, timeout)).await;
            }
            if self.has_line() {
                let until = Instant::now() + timeout;
                match Box::pin(self.acquire_in_line(wanted, key, place, timeout)).await {
                    // Without permission for the line's keys, requests wait without a line, unless the user has asked
                    // for one.
                    Err(error) if error.refusal() == Some("NOPERM") => self.stop_using_lines(&error),
                    acquired => return acquired,
                }
                timeout = until.saturating_duration_since(Instant::now());
            }
        }
        let (ttl, fence_ttl) = (millis(wanted.ttl), self.fence_ttl(wanted.ttl));
        if let ([key], None) = (&**keys, grant) {
            let name = self.name(key);
            let fence = wanted.fenced.then(|| (names::fence_of(&name), fence_ttl));
            let what = What::Acquire { value: value_of(wanted), ttl, fence, latest: wanted.latest.clone() };
            return self.run(Operation::new(name, token, what), timeout).await?.acquired();
        }
        match in_line {
            InLine::At { key, place, .. } if keys.len() > 1 && self.has_line() => {
                let until = Instant::now() + timeout;
                match Box::pin(self.acquire_whole(wanted, Some((key, place)), timeout)).await {
                    Err(error) if error.refusal() == Some("NOPERM") => self.stop_using_lines(&error),
                    acquired => return acquired,
                }
                timeout = until.saturating_duration_since(Instant::now());
            }
            _ => {}
        }
        Box::pin(self.acquire_whole(wanted, None, timeout)).await
    }

    fn stop_using_lines(&self, error: &Error) {
        debug!(name: "tenure.without_line", %error, "no permission for the keys of the line; waiters poll");
        self.without_line.store(true, Ordering::Relaxed);
    }

    /// Acquires by the script that handles every case. `place` is the one that a request for several keys has in the
    /// line for one of them, with the number of that key.
    pub(super) async fn acquire_whole(
        &self,
        wanted: &Wanted,
        place: Option<(usize, LinePlace)>,
        timeout: Duration,
    ) -> Result<Acquired, Error> {
        let Owned { keys, token, grant, .. } = &wanted.owned;
        let mut names: Vec<Bytes> = keys.iter().map(|key| self.name(key)).collect();
        self.check_slots(&names)?;
        let locks = names.clone();
        if place.is_some() {
            names.extend(locks.iter().map(names::line_of));
            names.extend(locks.iter().map(names::alive_of));
        }
        if grant.is_some() {
            names.extend(locks.iter().map(names::grants_of));
        }
        if wanted.fenced {
            names.extend(locks.iter().map(names::fence_of));
        }
        let args = [
            token.to_bytes(),
            value_of(wanted),
            decimal(millis(wanted.ttl)),
            count_of(&wanted.owned),
            decimal(self.fence_ttl(wanted.ttl)),
            id_or_empty(*grant),
            decimal(record_ttl(wanted.ttl)),
            place.map_or_else(|| "".into(), |(_, place)| self.place(place)),
            place.map_or_else(|| "".into(), |(key, _)| decimal(i64::try_from(key + 1).unwrap_or_default())),
        ];
        let call = Call::new(names.into_iter(), args);
        let (until, writing) = self.server().writing(timeout);
        let sending = |until| wanted.latest.extend(until);
        let reply = self.server().run(&self.server().scripts.acquire, || call.clone(), sending, timeout).await?;
        let acquired = replies::acquired(&reply.value()?)?;
        if matches!(acquired, Acquired::Granted { .. }) {
            self.server().replicated(writing, until).await?;
        }
        Ok(acquired)
    }

    pub(super) async fn hand_over(
        &self,
        from: &Owned,
        ending: Ending,
        to: &Wanted,
        next: &Next,
        timeout: Duration,
    ) -> Result<HandedOver, Error> {
        let [key] = &*from.keys else { return Ok(HandedOver::NotOurs(Loss::Missing)) };
        let name = self.name(key);
        let fence = to.fenced.then(|| names::fence_of(&name));
        let keys = line::lock_and_line(&name).into_iter().chain([names::grants_of(&name)]).chain(fence);
        let keys: Vec<Bytes> = keys.collect();
        // Without permission for the line's keys, no hand-over tries them.
        let has_line = self.has_line();
        let grant = match ending {
            Ending::Grant => id_of(from.grant),
            Ending::Lock if from.own_token => "".into(),
            Ending::Lock => "*".into(),
        };
        let args = [
            from.token.to_bytes(),
            value_of(to),
            decimal(millis(to.ttl)),
            decimal(self.fence_ttl(to.ttl)),
            self.place(next.place),
            line::alive(),
            flag(next.may_keep || !has_line),
            decimal(if to.fenced { i64::try_from(next.tokens).unwrap_or(1) } else { 0 }),
            grant,
            flag(next.in_line && has_line),
        ];
        let call = Call::new(keys.into_iter(), args.into_iter().chain(self.notify(&name)));
        let sending = |until| to.latest.extend(until);
        let reply = self.server().run(&self.server().scripts.hand_over, || call.clone(), sending, timeout).await?;
        replies::handed_over(&reply.outcome?)
    }
}
