//! Renewing, releasing and undoing locks that an owner has, or may have; and ending those of any owner.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::args::{LEAST, count_of, decimal, flag, id_of, millis, record_ttl, seconds};
use super::dispatch::SHARED_LANE;
use super::operation::{self, Operation, What};
use super::replicas::within;
use super::script::Call;
use super::{RedisStore, names, replies, router};
use crate::hold::Owned;
use crate::store::{Ending, Extending, Latest, Store, Undone, Verdict, Whose};
use crate::{Error, Key, Token};

impl RedisStore {
    pub(super) async fn renew(
        &self,
        owned: &Owned,
        ttl: Duration,
        how: Extending,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let (how, timeout) = (how.of(owned), within(timeout, ttl, self.server().min_replicas));
        // What is ensured may rely on any grant of the token. A guard relies on its own; where others may use its token,
        // the record tells whether the key is there for that. It is not looked at without need: in a half moved slot, a
        // node decides on one key, and not on a key and a record that there may not be.
        let is_by_token = match how {
            Extending::Ensure => !self.is_node,
            _ => owned.own_token,
        };
        match (&*owned.keys, how) {
            ([key], Extending::AtLeast | Extending::Ensure)
                if is_by_token || self.is_node && how == Extending::AtLeast =>
            {
                return self.run_owned(key, &owned.token, self.renewal(key, ttl), timeout).await;
            }
            _ => {}
        }
        let (script, call) = match how.name() {
            None if is_by_token && !self.is_node => {
                let args = [owned.token.to_bytes(), decimal(millis(ttl))];
                (&self.server().scripts.renew, Call::new(self.names(owned), args))
            }
            _ => (&self.server().scripts.renew_grant, self.renewal_of_grant(owned, ttl, how, Duration::ZERO)),
        };
        let (until, writing) = self.server().writing(timeout);
        let reply = match self.server().run(script, || call.clone(), |_| {}, timeout).await {
            Err(error) if error.is_redirection() && owned.keys.len() > 1 => {
                return self.one_by_one(owned, EachKey::Renew(ttl, how), until).await;
            }
            reply => reply?.value(),
        };
        let verdict = replies::verdict(reply)?;
        if verdict == Verdict::Done {
            self.server().replicated(writing, until).await?;
        }
        Ok(verdict)
    }

    /// Returns the renewal of a grant without an id to at least this ttl.
    fn renewal(&self, key: &Key, ttl: Duration) -> What {
        What::Renew { ttl: millis(ttl), record: self.is_node.then(|| names::grants_of(&self.name(key))) }
    }

    /// Returns the call of `renew_grant.lua`. The window is that of a quorum's node, or zero.
    pub(super) fn renewal_of_grant(&self, owned: &Owned, ttl: Duration, how: Extending, window: Duration) -> Call {
        let earlier = match how {
            Extending::Claim { earlier } | Extending::GiveBack { earlier } => id_of(earlier),
            _ => "".into(),
        };
        let args = [
            owned.token.to_bytes(),
            decimal(millis(ttl)),
            count_of(owned),
            how.name().unwrap_or(if how == Extending::Ensure { "ensure" } else { LEAST }).into(),
            id_of(owned.grant),
            decimal(record_ttl(ttl)),
            earlier,
            seconds(window),
        ];
        Call::new(self.names_with_records(owned), args)
    }

    pub(super) async fn renew_batch(
        &self,
        locks: &[(&Owned, Duration)],
        timeout: Duration,
    ) -> Vec<Result<Verdict, Error>> {
        if locks.iter().any(|(owned, _)| owned.mode.is_shared()) {
            let each = locks.iter().map(|(owned, ttl)| Store::renew(self, owned, *ttl, Extending::AtLeast, timeout));
            return router::all(each).await;
        }
        let renewal = |&(owned, ttl): &(&Owned, Duration)| {
            let key = owned.key();
            Operation::new(self.name(&key), &owned.token, self.renewal(&key, ttl))
        };
        let decisions = self.batcher.run_all(SHARED_LANE, locks.iter().map(renewal).collect(), timeout).await;
        decisions.into_iter().map(|decision| decision?.verdict()).collect()
    }

    pub(super) async fn release(&self, owned: &Owned, ending: Ending, timeout: Duration) -> Result<Verdict, Error> {
        let what = match (&*owned.keys, owned.grant, ending) {
            ([_], None, Ending::Lock) if owned.own_token => What::Release { publish: self.publish() },
            ([key], None, Ending::Grant) => {
                What::EndGrant { publish: self.publish(), record: names::grants_of(&self.name(key)) }
            }
            _ => {
                let until = Instant::now() + timeout;
                return match Box::pin(self.release_whole(owned, ending, timeout)).await {
                    Err(error) if error.is_redirection() && owned.keys.len() > 1 => {
                        Box::pin(self.one_by_one(owned, EachKey::Release(ending), until)).await
                    }
                    released => released.map(|(verdict, _)| verdict),
                };
            }
        };
        self.run_owned(&owned.key(), &owned.token, what, timeout).await
    }

    pub(super) async fn linger(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let until = Instant::now() + timeout;
        match self.linger_whole(owned, ending, rest, timeout).await {
            Err(error) if error.is_redirection() && owned.keys.len() > 1 => {
                Box::pin(self.one_by_one(owned, EachKey::Linger(ending, rest), until)).await
            }
            released => released,
        }
    }

    /// Leaves all keys to nobody for the rest of their time, in one call.
    async fn linger_whole(
        &self,
        owned: &Owned,
        ending: Ending,
        rest: Duration,
        timeout: Duration,
    ) -> Result<Verdict, Error> {
        let locks: Vec<Bytes> = owned.keys.iter().map(|key| self.name(key)).collect();
        let records = locks.iter().filter(|_| has_records(owned, ending)).map(names::grants_of);
        let keys: Vec<Bytes> = locks.iter().cloned().chain(records).collect();
        let grant = match ending {
            Ending::Lock => "".into(),
            Ending::Grant => id_of(owned.grant),
        };
        let publish = self.publish().into();
        let args = [owned.token.to_bytes(), count_of(owned), publish, grant, decimal(millis(rest))];
        let mut call = Call::new(keys.into_iter(), args);
        call.args(operation::channels(&locks));
        let reply = self.server().run(&self.server().scripts.linger, || call.clone(), |_| {}, timeout).await?;
        replies::verdict(reply.value())
    }

    /// Releases all keys, with their records, in one call. Returns the server's time in ms as well.
    pub(super) async fn release_whole(
        &self,
        owned: &Owned,
        ending: Ending,
        timeout: Duration,
    ) -> Result<(Verdict, u64), Error> {
        let (token, count) = (owned.token.to_bytes(), count_of(owned));
        let publish = self.publish().into();
        let locks: Vec<Bytes> = owned.keys.iter().map(|key| self.name(key)).collect();
        let scripts = &self.server().scripts;
        let lines = locks.iter().map(names::line_of);
        let records = locks.iter().filter(|_| has_records(owned, ending)).map(names::grants_of);
        let keys: Vec<Bytes> = locks.iter().cloned().chain(lines).chain(records).collect();
        let keys = keys.into_iter();
        let (script, mut call) = match ending {
            Ending::Lock => (&scripts.release, Call::new(keys, [token, count, publish])),
            Ending::Grant => (&scripts.end_grant, Call::new(keys, [token, count, publish, id_of(owned.grant)])),
        };
        call.args(operation::channels(&locks));
        let reply = self.server().run(script, || call.clone(), |_| {}, timeout).await?;
        let now = reply.now.unwrap_or_default();
        Ok((replies::verdict(reply.value())?, now))
    }

    pub(super) async fn undo(&self, owned: &Owned, latest: &Latest, timeout: Duration) -> Result<Undone, Error> {
        let (_, now) = self.release_whole(owned, Ending::Grant, timeout).await?;
        Ok(latest.remaining(now).map_or(Undone::Complete, Undone::MayRun))
    }

    /// Ends the lock of a key, whoever of these holds it.
    pub(super) async fn force_release(&self, key: &Key, whose: &Whose, timeout: Duration) -> Result<Verdict, Error> {
        let name = self.name(key);
        let beside = [names::grants_of(&name), names::holders_of(&name), names::shares_of(&name)];
        let keys: Vec<Bytes> = [name.clone(), names::line_of(&name)].into_iter().chain(beside).collect();
        let mut call = Call::new(keys.into_iter(), self.notify(&name));
        if let Whose::Only(tokens) = whose {
            call.args([flag(true)]);
            call.args(tokens.iter().map(Token::to_bytes));
        }
        let script = &self.server().scripts.force_release;
        let reply = self.server().run(script, || call.clone(), |_| {}, timeout).await?;
        // A key of another type is no lock, so its error is none of the verdicts.
        replies::verdict(Ok(reply.value()?))
    }

    /// Returns the lock keys, then their records of grants.
    fn names_with_records(&self, owned: &Owned) -> impl ExactSizeIterator<Item = Bytes> {
        let locks: Vec<Bytes> = owned.keys.iter().map(|key| self.name(key)).collect();
        let records: Vec<Bytes> = locks.iter().map(names::grants_of).collect();
        [locks, records].concat().into_iter()
    }

    async fn run_owned(&self, key: &Key, token: &Token, what: What, timeout: Duration) -> Result<Verdict, Error> {
        self.run(Operation::new(self.name(key), token, what), timeout).await?.verdict()
    }

    /// Runs an operation on each of the keys by itself, as none could run on all at once: they are on two nodes while
    /// their slot moves. Returns the loss of any key that is no longer ours.
    async fn one_by_one(&self, owned: &Owned, what: EachKey, until: Instant) -> Result<Verdict, Error> {
        let (mut all, mut done, mut failure) = (Verdict::Done, 0, None);
        for key in &*owned.keys {
            let one = Owned { keys: [key.clone()].into(), ..owned.clone() };
            let left = until.saturating_duration_since(Instant::now());
            let verdict = match what {
                EachKey::Renew(ttl, how) => Store::renew(self, &one, ttl, how, left).await,
                EachKey::Release(ending) => Store::release(self, &one, ending, left).await,
                EachKey::Linger(ending, rest) => Store::linger(self, &one, ending, rest, left).await,
            };
            match verdict {
                Ok(verdict) => {
                    done += 1;
                    // The first loss counts.
                    all = if all == Verdict::Done { verdict } else { all };
                }
                // A refusal doesn't hide that the outcome for another key is unknown.
                Err(error) if failure.as_ref().is_none_or(Error::has_not_run) => failure = Some(error),
                Err(_) => {}
            }
        }
        match failure {
            None => Ok(all),
            // A refusal would mean that nothing has run.
            Some(error) if done > 0 && error.has_not_run() => Err(Error::timeout()),
            Some(error) => Err(error),
        }
    }
}

/// What [`RedisStore::one_by_one`] does to each key.
#[derive(Clone, Copy)]
enum EachKey {
    Renew(Duration, Extending),
    Release(Ending),
    Linger(Ending, Duration),
}

/// Returns whether its keys may have records of grants that the end of a lock has to read or delete.
fn has_records(owned: &Owned, ending: Ending) -> bool {
    ending == Ending::Grant || !owned.own_token
}
