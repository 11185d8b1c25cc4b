//! A server as one node of a quorum.

use std::time::Duration;

use bytes::Bytes;

use super::args::{count_of, decimal, flag, id_of, millis, record_ttl, seconds, value_of};
use super::driver::{self, Driver, WithoutConnection};
use super::script::Call;
use super::shared::{lock_and_beside, marker_of};
use super::url::Target;
use super::{RedisStore, names, replies};
use crate::hold::Owned;
use crate::mode::Mode;
use crate::store::node::{ANNOUNCED, Ballot, Node, VoteReply};
use crate::store::{Answer, Extending, LinePlace, Verdict, Wanted};
use crate::{Error, Key};

impl RedisStore {
    /// Connects in the background, now or when the server comes up.
    pub(crate) fn open_lazily(
        driver: Driver,
        target: &Target,
        prefix: String,
        command_timeout: Duration,
    ) -> Result<Self, Error> {
        let without = WithoutConnection::CallsFail;
        let store = Self::on(driver::open_lazily(driver, target, command_timeout, without)?, prefix, 0);
        Ok(Self { is_node: true, ..store })
    }

    /// Waits until it is connected.
    ///
    /// # Errors
    ///
    /// Returns why it was not connected within `timeout`.
    pub(crate) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        Ok(self.server().connection.ready(timeout).await?)
    }

    async fn vote(&self, wanted: &Wanted, ballot: &Ballot, timeout: Duration) -> Result<VoteReply, Error> {
        let (script, call) = match wanted.owned.mode.is_shared() {
            true => (&self.server().scripts.vote_shared, self.vote_for_reader(wanted, ballot)),
            false => (&self.server().scripts.vote, self.vote_for_writer(wanted, ballot)),
        };
        let sending = |until| wanted.latest.extend(until);
        let reply = self.server().run(script, || call.clone(), sending, timeout).await?.value()?;
        replies::vote(&reply)
    }

    fn vote_for_writer(&self, wanted: &Wanted, ballot: &Ballot) -> Call {
        let Owned { keys, token, grant, .. } = &wanted.owned;
        let mut names: Vec<Bytes> = keys.iter().map(|key| self.name(key)).collect();
        let locks = names.clone();
        if ballot.number.is_some() {
            names.extend(locks.iter().map(names::fence_of));
        }
        // The key that is brought back may be there already, for another grant of the token.
        let is_recorded = grant.is_some() || ballot.heals;
        if is_recorded {
            names.extend(locks.iter().map(names::grants_of));
        }
        Call::new(
            names.into_iter(),
            [
                token.to_bytes(),
                value_of(wanted),
                decimal(millis(wanted.ttl)),
                count_of(&wanted.owned),
                self.fence_ttl_of(wanted, ballot),
                seconds(ballot.window),
                decimal(i64::try_from(ballot.ahead.as_micros()).unwrap_or(i64::MAX)),
                number_of(ballot),
                flag(ballot.exactly),
                if is_recorded { id_of(*grant) } else { "".into() },
                decimal(record_ttl(wanted.ttl)),
            ],
        )
    }

    /// Returns the ttl of the fence keys, as an argument.
    fn fence_ttl_of(&self, wanted: &Wanted, ballot: &Ballot) -> Bytes {
        // A number may be that much ahead of the clock, which must have passed it when it is forgotten.
        let ahead = ballot.ahead.max(ballot.window).saturating_mul(2);
        decimal(millis(self.fence_ttl.max(wanted.ttl.saturating_mul(2)).max(ahead)))
    }

    fn vote_for_reader(&self, wanted: &Wanted, ballot: &Ballot) -> Call {
        let name = self.name(&wanted.owned.key());
        let fence = ballot.number.map(|_| names::fence_of(&name));
        let keys: Vec<Bytes> =
            lock_and_beside(&name).into_iter().chain([names::intent_of(&name)]).chain(fence).collect();
        Call::new(
            keys.into_iter(),
            [
                wanted.owned.token.to_bytes(),
                wanted.metadata.to_vec().into(),
                decimal(millis(wanted.ttl)),
                self.fence_ttl_of(wanted, ballot),
                seconds(ballot.window),
                decimal(i64::try_from(ballot.ahead.as_micros()).unwrap_or(i64::MAX)),
                number_of(ballot),
                flag(ballot.exactly),
                id_of(wanted.owned.grant),
                marker_of(Mode::Read),
                ballot.place.map_or_else(Bytes::new, |place| self.place(place)),
                flag(ballot.heals),
            ],
        )
    }

    async fn metadata(&self, owned: &Owned, timeout: Duration) -> Result<Option<Box<[u8]>>, Error> {
        let args = [owned.token.to_bytes(), id_of(owned.grant), marker_of(Mode::Read)];
        let call = Call::new(lock_and_beside(&self.name(&owned.key())).into_iter(), args);
        let script = &self.server().scripts.metadata;
        let reply = self.server().run(script, || call.clone(), |_| {}, timeout).await?.value()?;
        replies::metadata(reply)
    }

    async fn announce(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<(), Error> {
        let intent = names::intent_of(&self.name(key));
        let call = Call::new([intent].into_iter(), [self.place(place), decimal(millis(ANNOUNCED))]);
        let script = &self.server().scripts.announce;
        self.server().run(script, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    async fn withdraw(&self, key: &Key, place: LinePlace, timeout: Duration) -> Result<(), Error> {
        let name = self.name(key);
        let [publish, channel] = self.notify(&name);
        let args = [self.place(place), marker_of(Mode::Read), publish, channel];
        let call = Call::new([name.clone(), names::intent_of(&name)].into_iter(), args);
        let script = &self.server().scripts.withdraw;
        self.server().run(script, || call.clone(), |_| {}, timeout).await?.value().map(drop)
    }

    async fn renew_if_it_votes(
        &self,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        window: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let scripts = &self.server().scripts;
        let (script, call) = match owned.mode.is_shared() {
            true => (&scripts.renew_shared, self.renewal_of_share(owned, ttl, how, window)?),
            false => (&scripts.renew_grant, self.renewal_of_grant(owned, ttl, how.of(owned), window)),
        };
        let reply = self.server().run(script, || call.clone(), |_| {}, timeout).await?.value();
        replies::verdict_of_node(reply)
    }
}

impl Node for RedisStore {
    fn renew_if_it_votes<'a>(
        &'a self,
        owned: &'a Owned,
        ttl: Duration,
        how: Extending,
        window: Duration,
        timeout: Duration,
    ) -> Answer<'a, Verdict> {
        Box::pin(self.renew_if_it_votes(owned, ttl, how, window, timeout))
    }

    fn vote<'a>(&'a self, wanted: &'a Wanted, ballot: &'a Ballot, timeout: Duration) -> Answer<'a, VoteReply> {
        Box::pin(self.vote(wanted, ballot, timeout))
    }

    fn metadata<'a>(&'a self, owned: &'a Owned, timeout: Duration) -> Answer<'a, Option<Box<[u8]>>> {
        Box::pin(self.metadata(owned, timeout))
    }

    fn announce<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        Box::pin(self.announce(key, place, timeout))
    }

    fn withdraw<'a>(&'a self, key: &'a Key, place: LinePlace, timeout: Duration) -> Answer<'a, ()> {
        Box::pin(self.withdraw(key, place, timeout))
    }
}

/// Returns the ballot's number, as an argument.
fn number_of(ballot: &Ballot) -> Bytes {
    decimal(ballot.number.map_or(0, |number| i64::try_from(number).unwrap_or(i64::MAX)))
}
