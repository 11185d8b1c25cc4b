//! A server as one node of a quorum.

use std::time::Duration;

use fred::bytes::Bytes;
use fred::types::Value;
use fred::types::config::Config;

use super::connection::Connection;
use super::script::Call;
use super::{
    FENCE_TTL, RedisStore, from_millis, integers, millis, names, record_ttl, renewed, unexpected, value_of, verdict,
};
use crate::Error;
use crate::hold::Owned;
use crate::store::node::{Ballot, Node, Seen, Vote, VoteReply};
use crate::store::{Answer, Extending, Verdict, Wanted};

impl RedisStore {
    /// Connects in the background, now or whenever the server comes.
    pub(crate) fn open_lazily(config: Config, prefix: String, command_timeout: Duration) -> Result<Self, Error> {
        let connection = Connection::open_lazily(config, command_timeout)?;
        Ok(Self::on(connection, prefix, 0))
    }

    /// Waits until it is connected.
    ///
    /// # Errors
    ///
    /// What has kept it from being so within `timeout`.
    pub(crate) async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        self.server().connection.ready(timeout).await
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
        let fence_ttl = FENCE_TTL.max(wanted.ttl.saturating_mul(2)).max(ballot.window.saturating_mul(2));
        let call = Call::new(
            names.into_iter().map(Value::Bytes),
            [
                Value::from(token.to_text()),
                value_of(wanted),
                millis(wanted.ttl).into(),
                Value::Integer(i64::try_from(keys.len()).unwrap_or(i64::MAX)),
                millis(fence_ttl).into(),
                Value::Integer(i64::try_from(ballot.window.as_secs()).unwrap_or(i64::MAX)),
                Value::Integer(i64::try_from(ballot.ahead.as_micros()).unwrap_or(i64::MAX)),
                Value::Integer(number),
                Value::Integer(ballot.exactly.into()),
                grant.map_or_else(|| "".into(), |grant| grant.to_string().into()),
                record_ttl(wanted.ttl).into(),
            ],
        );
        let sending = |until| wanted.latest.extend(until);
        let answer =
            self.server().run(&self.server().scripts.vote, || call.clone(), sending, timeout).await?.value()?;
        let integers = integers(&answer)?;
        let [kind, now, last, rest @ ..] = &integers[..] else { return Err(unexpected()) };
        let number = |integer: i64| u64::try_from(integer).map_err(|_| unexpected());
        let vote = match (kind, rest) {
            (1, &[0]) => Vote::Granted { number: None },
            (1, &[granted]) => Vote::Granted { number: Some(number(granted)?) },
            (0, &[ttl, place]) => {
                Vote::Held { place: usize::try_from(place - 1).unwrap_or_default(), remaining: from_millis(ttl) }
            }
            (2, []) => Vote::Behind,
            (3, []) => Vote::Ahead,
            (4, &[seconds]) => Vote::Silent { remaining: Duration::from_secs(number(seconds)?) },
            _ => return Err(unexpected()),
        };
        Ok(VoteReply { vote, seen: Seen { now: number(*now)?, last: number(*last)? } })
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
        let answer =
            self.server().run(&self.server().scripts.renew_grant, || call.clone(), |_| {}, timeout).await?.value();
        if let Ok(Value::Integer(silent @ ..-1)) = answer {
            let seconds = u64::try_from(-1 - silent).unwrap_or_default();
            return Err(Error::NotVoting { remaining: Duration::from_secs(seconds) });
        }
        verdict(answer).map(renewed)
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
