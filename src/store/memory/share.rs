//! The holders of a key that several share: readers, or owners of a permit.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::hold::{GrantId, Owned};
use crate::mode::Mode;
use crate::store::{Acquired, Ending, Extending, Holder, Verdict, Wanted};
use crate::{Loss, Token};

/// Those who share a key. It is taken while one of them is there.
pub(super) struct Share {
    pub(super) mode: Mode,
    members: Vec<Member>,
}

/// A shared grant. Only its own renewals move its expiry.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) token: Token,
    pub(super) grant: Option<GrantId>,
    pub(super) metadata: Box<[u8]>,
    pub(super) expires: Instant,
    pub(super) fence: Option<u64>,
}

impl Member {
    fn is(&self, token: &Token, grant: Option<GrantId>) -> bool {
        self.token == *token && self.grant == grant
    }
}

impl Share {
    pub(super) fn new(mode: Mode) -> Self {
        Self { mode, members: Vec::new() }
    }

    /// Returns when the last of its members expires, if one is there.
    pub(super) fn expires(&self, now: Instant) -> Option<Instant> {
        self.live(now).map(|member| member.expires).max()
    }

    pub(super) fn holders(&self, now: Instant) -> impl Iterator<Item = Holder> + '_ {
        self.live(now).filter(|member| member.token != Token::nobody()).map(move |member| Holder {
            token: member.token.clone(),
            metadata: member.metadata.to_vec(),
            remaining: Some(member.expires - now),
            fencing_token: member.fence,
        })
    }

    pub(super) fn live(&self, now: Instant) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| now < member.expires)
    }

    /// Returns for how long a permit has to be waited for, if all of them are taken.
    fn is_full(&self, limit: usize, now: Instant) -> Option<Duration> {
        let (mut tokens, mut nobodys) = (HashSet::new(), 0);
        for member in self.live(now) {
            if member.token == Token::nobody() {
                nobodys += 1;
            } else {
                tokens.insert(&member.token);
            }
        }
        let first = self.live(now).map(|member| member.expires - now).min()?;
        (tokens.len() + nobodys >= limit).then_some(first)
    }

    /// Admits the request, or refuses it. Mints a fencing token by `next_fence` for a token that has none yet.
    pub(super) fn acquire(&mut self, wanted: &Wanted, now: Instant, next_fence: impl FnOnce() -> u64) -> Acquired {
        let Owned { token, grant, mode, .. } = &wanted.owned;
        self.members.retain(|member| now < member.expires);
        let is_in = self.members.iter().any(|member| member.token == *token);
        if let (false, Mode::Permit, Some(first)) = (is_in, mode, self.is_full(wanted.limit, now)) {
            return Acquired::held(0, Some(first));
        }
        // A holder has one fencing token: a repeated request returns the same one.
        let repeated = self.members.iter().filter(|member| member.token == *token).find_map(|member| member.fence);
        let fence = wanted.fenced.then(|| repeated.unwrap_or_else(next_fence));
        let (expires, metadata) = (now + wanted.ttl, wanted.metadata.clone());
        match self.members.iter_mut().find(|member| member.is(token, *grant)) {
            Some(member) => {
                let expires = member.expires.max(expires);
                *member = Member { expires, metadata, fence, ..member.clone() };
            }
            None => self.add(Member { token: token.clone(), grant: *grant, metadata, expires, fence }),
        }
        Acquired::Granted { fencing_token: fence }
    }

    pub(super) fn add(&mut self, member: Member) {
        self.members.push(member);
    }

    pub(super) fn has_token(&self, token: &Token, now: Instant) -> bool {
        self.live(now).any(|member| member.token == *token)
    }

    pub(super) fn has(&self, owned: &Owned, now: Instant) -> bool {
        self.live(now).any(|member| member.is(&owned.token, owned.grant))
    }

    pub(super) fn renew(&mut self, owned: &Owned, ttl: Duration, how: Extending, now: Instant) -> Verdict {
        let (from, to) = match how {
            Extending::Claim { earlier } => (earlier, owned.grant),
            Extending::GiveBack { earlier } => (owned.grant, earlier),
            Extending::AtLeast | Extending::Exactly | Extending::KeepRecord | Extending::Ensure => {
                (owned.grant, owned.grant)
            }
        };
        let place = |grant| {
            let is_it = |member: &Member| now < member.expires && member.is(&owned.token, grant);
            self.members.iter().position(is_it)
        };
        // Of a repeated claim, the first may have replaced the earlier grant already.
        let Some(place) = place(from).or_else(|| place(to)) else { return Verdict::NotOurs(Loss::Missing) };
        let mut member = self.members.swap_remove(place);
        match how {
            Extending::GiveBack { .. } => {}
            Extending::Exactly => member.expires = now + ttl,
            _ => member.expires = member.expires.max(now + ttl),
        }
        // The grant may be there already, and stays as long as it would have.
        if let Some(place) = self.members.iter().position(|other| other.is(&owned.token, to)) {
            member.expires = member.expires.max(self.members.swap_remove(place).expires);
        }
        member.grant = to;
        self.add(member);
        Verdict::Done
    }

    /// Ends the grant, or all of its token. If there is a `rest`, nobody has them until then.
    pub(super) fn end(&mut self, owned: &Owned, ending: Ending, rest: Option<Duration>, now: Instant) -> Verdict {
        let is_in = self.has(owned, now);
        let ends =
            |member: &Member| member.token == owned.token && (ending == Ending::Lock || member.grant == owned.grant);
        self.members.retain(|member| now < member.expires && !ends(member));
        if let (true, Some(rest)) = (is_in, rest) {
            let (token, metadata) = (Token::nobody(), Box::default());
            self.add(Member { token, grant: None, metadata, expires: now + rest, fence: None });
        }
        if is_in { Verdict::Done } else { Verdict::NotOurs(Loss::Missing) }
    }

    /// Returns how long the grant lasts unless it is renewed; for the unknown grant, the longest of its token's.
    pub(super) fn remaining(&self, owned: &Owned, now: Instant) -> Option<Duration> {
        let is_any = owned.grant == Some(GrantId::UNKNOWN);
        let of_token = self.live(now).filter(|member| member.token == owned.token);
        let own = of_token.filter(|member| is_any || member.grant == owned.grant);
        own.map(|member| member.expires - now).max()
    }
}
