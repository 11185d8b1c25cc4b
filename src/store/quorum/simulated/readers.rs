//! What a simulated server knows of the readers of one key, and of the writers that wait for them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::hold::{GrantId, Owned};
use crate::store::node::ANNOUNCED;
use crate::store::{Ending, Extending, Holder, LinePlace, Verdict, Wanted};
use crate::{Loss, Token};

#[derive(Debug, Default)]
pub(super) struct Readers(Vec<Reader>);

#[derive(Clone, Debug)]
struct Reader {
    token: Token,
    grant: Option<GrantId>,
    expires: Instant,
    number: Option<u64>,
}

impl Readers {
    fn live(&self) -> impl Iterator<Item = &Reader> {
        self.0.iter().filter(|reader| Instant::now() < reader.expires)
    }

    fn of(&self, token: &Token) -> impl Iterator<Item = &Reader> {
        self.live().filter(move |reader| reader.token == *token)
    }

    /// Returns when the last of them expires, if there is one.
    pub(super) fn until(&self) -> Option<Instant> {
        self.live().map(|reader| reader.expires).max()
    }

    pub(super) fn has(&self, token: &Token) -> bool {
        self.of(token).next().is_some()
    }

    pub(super) fn number_of(&self, token: &Token) -> Option<u64> {
        self.of(token).find_map(|reader| reader.number)
    }

    pub(super) fn enter(&mut self, wanted: &Wanted, number: Option<u64>) {
        let Owned { token, grant, .. } = &wanted.owned;
        self.add(token, *grant, Instant::now() + wanted.ttl, number);
    }

    pub(super) fn add(&mut self, token: &Token, grant: Option<GrantId>, expires: Instant, number: Option<u64>) {
        self.0.retain(|reader| Instant::now() < reader.expires);
        let number = number.or_else(|| self.number_of(token));
        for reader in self.0.iter_mut().filter(|reader| reader.token == *token) {
            reader.number = number;
        }
        match self.0.iter_mut().find(|reader| reader.token == *token && reader.grant == grant) {
            Some(reader) => reader.expires = reader.expires.max(expires),
            None => self.0.push(Reader { token: token.clone(), grant, expires, number }),
        }
    }

    pub(super) fn renew(&mut self, owned: &Owned, ttl: Duration, how: Extending) -> Verdict {
        let (from, to) = match how {
            Extending::Claim { earlier } => (earlier, owned.grant),
            Extending::GiveBack { earlier } => (owned.grant, earlier),
            _ => (owned.grant, owned.grant),
        };
        let (now, until) = (Instant::now(), Instant::now() + ttl);
        let is =
            |reader: &&mut Reader, grant| now < reader.expires && reader.token == owned.token && reader.grant == grant;
        let place = [from, to].into_iter().find(|grant| self.0.iter_mut().any(|reader| is(&&mut *reader, *grant)));
        let Some(reader) = place.and_then(|grant| self.0.iter_mut().find(|reader| is(reader, grant))) else {
            return Verdict::NotOurs(Loss::Missing);
        };
        reader.grant = to;
        match how {
            Extending::GiveBack { .. } => {}
            Extending::Exactly => reader.expires = until,
            _ => reader.expires = reader.expires.max(until),
        }
        Verdict::Done
    }

    /// Leaves the places of those that end to nobody for a `rest`.
    pub(super) fn end(&mut self, owned: &Owned, ending: Ending, rest: Option<Duration>) -> Verdict {
        let ends =
            |reader: &Reader| reader.token == owned.token && (ending == Ending::Lock || reader.grant == owned.grant);
        let is_ours = self.live().any(ends);
        self.0.retain(|reader| Instant::now() < reader.expires && !ends(reader));
        if let Some(rest) = rest.filter(|_| is_ours) {
            let (token, expires) = (Token::nobody(), Instant::now() + rest);
            self.0.push(Reader { token, grant: None, expires, number: None });
        }
        if is_ours { Verdict::Done } else { Verdict::NotOurs(Loss::Missing) }
    }

    pub(super) fn remaining(&self, owned: &Owned) -> Option<Duration> {
        let is_any = owned.grant == Some(GrantId::UNKNOWN);
        let own = self.of(&owned.token).filter(|reader| is_any || reader.grant == owned.grant);
        own.map(|reader| reader.expires - Instant::now()).max()
    }

    pub(super) fn holders(&self) -> Vec<Holder> {
        let named = self.live().filter(|reader| reader.token != Token::nobody());
        let holder = |reader: &Reader| Holder {
            token: reader.token.clone(),
            metadata: Vec::new(),
            remaining: Some(reader.expires - Instant::now()),
            fencing_token: reader.number,
        };
        let mut holders: Vec<_> = named.map(holder).collect();
        holders.sort_by_key(|holder| std::cmp::Reverse(holder.remaining));
        holders
    }
}

/// The writers that wait, by the numbers of their places, and until when each is remembered.
#[derive(Debug, Default)]
pub(super) struct Writers(HashMap<u64, Instant>);

impl Writers {
    pub(super) fn announce(&mut self, place: LinePlace) {
        self.0.insert(place.number, Instant::now() + ANNOUNCED);
    }

    pub(super) fn withdraw(&mut self, place: LinePlace) {
        self.0.remove(&place.number);
    }

    /// Returns for how long a writer at another place waits, unless it is heard of again.
    pub(super) fn wait_for(&self, own: Option<LinePlace>) -> Option<Duration> {
        let others = self.0.iter().filter(|(place, _)| own.is_none_or(|own| own.number != **place));
        let until = others.map(|(_, until)| *until).max()?;
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}
