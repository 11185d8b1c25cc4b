//! A server as one node of a quorum.

use std::time::Duration;

use bytes::Bytes;

use super::args::{count_of, decimal, id_or_empty, millis, record_ttl, seconds, value_of};
use super::driver::{self, Driver, WithoutConnection};
use super::script::Call;
use super::url::Target;
use super::{RedisStore, names, replies};
use crate::Error;
use crate::hold::Owned;
use crate::store::node::{Ballot, Node, VoteReply};
use crate::store::{Answer, Extending, Verdict, Wanted};

impl RedisStore {
    /// Connects in the background, now or when the server comes up.
    pub(crate) fn open_lazily(
        driver: Driver,
        target: &Target,
        prefix: String,
        command_timeout: Duration,
    ) -> Result<Self, Error> {
        let without = WithoutConnection::CallsFail;
        Ok(Self::on(driver::open_lazily(driver, target, command_timeout, without)?, prefix, 0))
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
        let Owned { keys, token, grant, .. } = &wanted.owned;
        let mut names: Vec<Bytes> = keys.iter().map(|key| self.name(key)).collect();
        let locks = names.clone();
        if ballot.number.is_some() {
            names.extend(locks.iter().map(names::fence_of));
        }
        if grant.is_some() {
            names.extend(locks.iter().map(names::grants_of));
        }
        let number = ballot.number.map_or(0, |number| i64::try_from(number).unwrap_or(i64::MAX));
        // A number may be that much ahead of the clock, which must have passed it when it is forgotten.
        let ahead = ballot.ahead.max(ballot.window).saturating_mul(2);
        let fence_ttl = self.fence_ttl.max(wanted.ttl.saturating_mul(2)).max(ahead);
        let call = Call::new(
            names.into_iter(),
            [
                token.to_bytes(),
                value_of(wanted),
                decimal(millis(wanted.ttl)),
                count_of(&wanted.owned),
                decimal(millis(fence_ttl)),
                seconds(ballot.window),
                decimal(i64::try_from(ballot.ahead.as_micros()).unwrap_or(i64::MAX)),
                decimal(number),
                decimal(ballot.exactly.into()),
                id_or_empty(*grant),
                decimal(record_ttl(wanted.ttl)),
            ],
        );
        let sending = |until| wanted.latest.extend(until);
        let script = &self.server().scripts.vote;
        let reply = self.server().run(script, || call.clone(), sending, timeout).await?.value()?;
        replies::vote(&reply)
    }

    async fn renew_if_it_votes(
        &self,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        window: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let call = self.renewal_of_grant(owned, ttl, how.of(owned), window);
        let script = &self.server().scripts.renew_grant;
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
}
