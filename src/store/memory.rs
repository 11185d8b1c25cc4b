//! The embedded store: the same contract within one process, on tokio's clock.

mod line;
mod share;

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::task::consume_budget;
use tokio::time::Instant;

pub(crate) use self::line::PlaceOf;
use self::line::{Lines, Request, WaitsFor};
use self::share::{Member, Share};
use super::notifications::{ChannelState, Subscription, Subscriptions};
use super::{
    Acquired, Answer, Answers, Capabilities, Downgraded, Ending, Extending, HandedOver, Holder, InLine, Latest,
    LinePlace, Next, Store, Undone, Verdict, Wanted, Whose,
};
use crate::hold::timing::MAX_TTL;
use crate::hold::{GrantId, Owned};
use crate::mode::Mode;
use crate::{Key, Loss, Token};

/// A map of locks. Operations wait only for tokio's cooperative budget, so none can time out.
pub(crate) struct MemoryStore {
    held: Mutex<Held>,
    subscriptions: Subscriptions,
    /// The number of the last of the [lockers](Self::new_locker).
    last_locker: AtomicU64,
}

struct Held {
    locks: HashMap<Key, Entry>,
    /// The keys that several share. No key is live in both maps.
    shares: HashMap<Key, Share>,
    /// Those who wait for keys that others hold.
    lines: Lines,
    /// One counter for all keys, so fencing tokens grow for each key.
    last_fence: u64,
    /// The size of all maps at which expired entries are removed next: twice their size after the last time.
    sweep_at: usize,
    /// Maps tokio's clock, which tests may pause, to the wall clock, from which fencing tokens start.
    epoch: (Instant, Duration),
}

struct Entry {
    token: Token,
    metadata: Box<[u8]>,
    expires: Instant,
    fence: Option<u64>,
    /// The grants that rely on the lock. If empty, only the grant of the request that created the token.
    grants: Vec<Reliance>,
    /// Until when the key must stay taken for a grant that has ended, whatever becomes of the others.
    kept: Option<Instant>,
}

/// A grant that relies on a lock, as recorded by `grants.lua`.
#[derive(Clone, Copy, Debug)]
struct Reliance {
    grant: Option<GrantId>,
    /// The longest ttl that the grant has requested. `None` if unknown, as for the grant that has no id.
    ttl: Option<Duration>,
}

impl Entry {
    /// Returns a key that stays taken although nobody holds the lock.
    fn nobodys(expires: Instant) -> Self {
        let (token, metadata) = (Token::nobody(), Box::default());
        Self { token, metadata, expires, fence: None, grants: Vec::new(), kept: None }
    }

    fn grants(&self) -> Vec<Reliance> {
        match self.grants.is_empty() {
            true => vec![Reliance { grant: None, ttl: None }],
            false => self.grants.clone(),
        }
    }

    /// Returns the grants that rely on the lock, except this one.
    fn others(&self, grant: Option<GrantId>) -> Vec<Reliance> {
        self.grants().into_iter().filter(|other| other.grant != grant).collect()
    }

    /// Leaves the lock to the others of its grants, when one has ended.
    fn leave_to(&mut self, others: Vec<Reliance>, now: Instant) {
        if others.len() == self.grants().len() {
            return;
        }
        // Each of the other grants renews the lock for its own ttl, or its holder has died.
        let longest = others.iter().try_fold(Duration::ZERO, |longest, other| Some(longest.max(other.ttl?)));
        if let Some(longest) = longest {
            self.expires = self.expires.min(now + longest);
        }
        self.expires = self.expires.max(self.kept.unwrap_or(now));
        self.grants = others;
    }

    /// Adds a grant that relies on the lock for at least this ttl.
    fn rely(&mut self, grant: Option<GrantId>, ttl: Duration) {
        let known = self.grants.iter().find(|known| known.grant == grant).and_then(|known| known.ttl);
        let mut grants = self.others(grant);
        let ttl = grant.map(|_| known.map_or(ttl, |known| known.max(ttl)));
        grants.push(Reliance { grant, ttl });
        self.grants = grants;
    }
}

impl MemoryStore {
    pub(crate) fn new() -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = (Instant::now(), since_1970);
        let (locks, shares, lines) = (HashMap::new(), HashMap::new(), Lines::default());
        let held = Held { locks, shares, lines, last_fence: 0, sweep_at: 64, epoch };
        Self { held: Mutex::new(held), subscriptions: Subscriptions::new(), last_locker: AtomicU64::new(0) }
    }

    /// Returns a number for one more of several lockers on this store, whose places it tells apart by that. A locker
    /// that has the store to itself is number 0.
    pub(super) fn new_locker(&self) -> u64 {
        self.last_locker.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Acquires the keys. A request for one key that waits has a place in the line for it.
    pub(super) fn acquire_now(&self, wanted: &Wanted, whose: Option<PlaceOf>) -> Acquired {
        let Some(whose) = whose else { return self.held().acquire(wanted, None) };
        let (acquired, opens) = self.held().acquire_in_line(wanted, whose);
        if opens {
            self.subscriptions.notify(wanted.owned.key().as_bytes());
        }
        acquired
    }

    pub(super) fn renew_now(&self, owned: &Owned, ttl: Duration, how: Extending) -> Verdict {
        self.held().renew(owned, ttl, how)
    }

    pub(super) fn release_now(&self, owned: &Owned, ending: Ending) -> Verdict {
        let released = self.held().release(owned, ending);
        owned.keys.iter().for_each(|key| self.subscriptions.notify(key.as_bytes()));
        released
    }

    pub(super) fn linger_now(&self, owned: &Owned, ending: Ending, rest: Duration) -> Verdict {
        let released = self.held().linger(owned, ending, rest);
        owned.keys.iter().for_each(|key| self.subscriptions.notify(key.as_bytes()));
        released
    }

    pub(super) fn undo_now(&self, owned: &Owned, latest: &Latest) -> Undone {
        self.release_now(owned, Ending::Grant);
        latest.remaining(self.millis(Instant::now())).map_or(Undone::Complete, Undone::MayRun)
    }

    /// Returns the time in ms, on the clock by which requests expire.
    pub(super) fn millis(&self, instant: Instant) -> u64 {
        let (start, _) = self.held().epoch;
        u64::try_from(instant.saturating_duration_since(start).as_millis()).unwrap_or(u64::MAX)
    }

    /// Hands a lock over to a waiter of the same locker, whose place leaves the line if it is there.
    pub(super) fn hand_over_now(
        &self,
        from: &Owned,
        ending: Ending,
        to: &Wanted,
        next: &Next,
        locker: u64,
    ) -> HandedOver {
        let mut held = self.held();
        if ending == Ending::Grant && held.is_shared(from) {
            return HandedOver::NotNow;
        }
        if let Verdict::NotOurs(loss) = held.release(from, ending) {
            return HandedOver::NotOurs(loss);
        }
        let (key, whose) = (to.owned.key(), PlaceOf { locker, place: next.place });
        if !next.may_keep && held.has_to_wait(to, whose).is_some() {
            held.enter(&key, whose, WaitsFor::One(to.owned.mode));
            drop(held);
            self.subscriptions.notify(key.as_bytes());
            return HandedOver::PassedBy;
        }
        match held.acquire(to, None) {
            Acquired::Granted { fencing_token } => {
                held.lines.leave(&key, whose);
                let reserved = fencing_token.map_or(0, |_| next.tokens.saturating_sub(1));
                held.last_fence += reserved;
                // A grant to the token again, which a later holder of this process may have by then, has the last.
                let entry = to.owned.keys.first().and_then(|key| held.locks.get_mut(key));
                entry.into_iter().for_each(|entry| entry.fence = entry.fence.map(|fence| fence + reserved));
                HandedOver::Done { fencing_token, alone: !next.may_keep }
            }
            // The mutex was held since the release, so nobody else can have the lock.
            Acquired::Held { .. } => HandedOver::NotOurs(Loss::Taken),
        }
    }

    /// Enters the line for one of several keys.
    pub(super) fn enter_now(&self, key: &Key, whose: PlaceOf) {
        self.held().enter(key, whose, WaitsFor::Several);
    }

    pub(super) fn heartbeat_now(&self, key: &Key, whose: PlaceOf) -> bool {
        let (mut held, now) = (self.held(), Instant::now());
        // Nobody is notified of a key that was deleted by hand.
        let is_free = held.live(key, now).is_none() && held.shared_until(key, now).is_none();
        held.lines.heartbeat(key, whose, now) && !is_free
    }

    pub(super) fn leave_now(&self, key: &Key, whose: PlaceOf) {
        self.held().lines.leave(key, whose);
        // Those who were held back may share the key now.
        self.subscriptions.notify(key.as_bytes());
    }

    pub(super) fn downgrade_now(&self, owned: &Owned) -> Downgraded {
        let downgraded = self.held().downgrade(owned);
        owned.keys.iter().for_each(|key| self.subscriptions.notify(key.as_bytes()));
        downgraded
    }

    pub(super) fn remaining_now(&self, owned: &Owned) -> Option<Duration> {
        self.held().remaining(owned)
    }

    pub(super) fn force_release_now(&self, key: &Key, whose: &Whose) -> Verdict {
        let ended = self.held().force_release(key, whose);
        self.subscriptions.notify(key.as_bytes());
        ended
    }

    pub(crate) fn inspect_now(&self, key: &Key) -> Option<Holder> {
        self.held().inspect(key)
    }

    pub(super) fn holders_now(&self, key: &Key) -> Vec<Holder> {
        self.held().holders(key)
    }

    pub(super) fn subscribe_now(&self, key: &Key) -> Subscription {
        self.subscriptions.subscribe(key.to_bytes(), ChannelState::Open).0
    }

    /// Returns the holder of the key, and when the lock expires unless it is renewed.
    #[cfg(test)]
    pub(crate) fn holder(&self, key: &Key) -> Option<(Token, Instant)> {
        self.held().live(key, Instant::now()).map(|entry| (entry.token.clone(), entry.expires))
    }

    /// Returns who holds the key, in any mode, with what stays for nobody: mode, token, grant of a share, and when it
    /// expires unless it is renewed.
    #[cfg(test)]
    pub(crate) fn held_by(&self, key: &Key) -> Vec<(Mode, Token, Option<GrantId>, Instant)> {
        let (held, now) = (self.held(), Instant::now());
        let alone = held.live(key, now).map(|entry| (Mode::Exclusive, entry.token.clone(), None, entry.expires));
        let shares = held.shares.get(key).into_iter().flat_map(|share| {
            share.live(now).map(|member| (share.mode, member.token.clone(), member.grant, member.expires))
        });
        alone.into_iter().chain(shares).collect()
    }

    /// Returns whether somebody stands in the line for the key.
    #[cfg(test)]
    pub(crate) fn is_waited_for(&self, key: &Key) -> bool {
        self.held().lines.is_waited_for(key, Instant::now())
    }

    /// Returns the grants that rely on a key which is not shared.
    #[cfg(test)]
    pub(crate) fn grants_of(&self, key: &Key) -> Vec<Option<GrantId>> {
        let held = self.held();
        let entry = held.live(key, Instant::now());
        entry.map(Entry::grants).unwrap_or_default().iter().map(|reliance| reliance.grant).collect()
    }

    /// Returns what others may share the key as, and when the last share ends.
    #[cfg(test)]
    pub(crate) fn shared(&self, key: &Key) -> Option<(Mode, Instant)> {
        let (held, now) = (self.held(), Instant::now());
        Some(held.shares.get(key)?.mode).zip(held.shared_until(key, now))
    }

    /// Deletes a key without a notification, as a user might by hand. Returns whether it was there.
    pub(crate) fn delete(&self, key: &Key) -> bool {
        self.held().delete(key)
    }

    /// Makes this token the holder of a key, whoever holds it.
    pub(crate) fn give(&self, key: &Key, token: Token, ttl: Duration) {
        let mut held = self.held();
        let (metadata, fence) = (Box::default(), Some(held.next_fence(Instant::now())));
        let expires = Instant::now() + ttl.min(MAX_TTL);
        held.shares.remove(key);
        held.locks.insert(key.clone(), Entry { token, metadata, expires, fence, grants: Vec::new(), kept: None });
    }

    /// Returns how many keys have subscriptions.
    #[cfg(test)]
    pub(crate) fn subscriptions(&self) -> usize {
        self.subscriptions.len()
    }

    /// Forgets all locks, like a server that is restarted without its data.
    pub(crate) fn forget(&self) {
        let mut held = self.held();
        held.locks.clear();
        held.shares.clear();
        held.lines.clear();
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn live(&self, key: &Key, now: Instant) -> Option<&Entry> {
        self.locks.get(key).filter(|entry| now < entry.expires)
    }

    /// Returns until when others share the key, if they do.
    fn shared_until(&self, key: &Key, now: Instant) -> Option<Instant> {
        self.shares.get(key).and_then(|share| share.expires(now))
    }

    /// Returns the loss that explains why not all keys hold the token, if they don't.
    fn not_ours(&self, owned: &Owned, now: Instant) -> Option<Loss> {
        let mut loss = None;
        for key in &owned.keys {
            match self.live(key, now) {
                Some(entry) if entry.token == owned.token => {}
                Some(_) => return Some(Loss::Taken),
                None if self.shared_until(key, now).is_some() => return Some(Loss::Taken),
                None => loss = Some(Loss::Missing),
            }
        }
        loss
    }

    /// Returns the share in which the grant may be, or the loss that explains why it is in none.
    fn share(&mut self, owned: &Owned, now: Instant) -> Result<&mut Share, Loss> {
        let [key] = &*owned.keys else { return Err(Loss::Missing) };
        if self.live(key, now).is_some() {
            return Err(Loss::Taken);
        }
        match self.shares.get_mut(key) {
            Some(share) if share.mode == owned.mode => Ok(share),
            Some(share) if share.expires(now).is_some() => Err(Loss::Taken),
            _ => Err(Loss::Missing),
        }
    }

    fn acquire_share(&mut self, wanted: &Wanted, whose: Option<PlaceOf>) -> Acquired {
        let now = Instant::now();
        let held = |until: Instant| Acquired::held(0, Some(until - now));
        // A request that shares a key has no other.
        let key = wanted.owned.key();
        if let Some(entry) = self.live(&key, now) {
            return held(entry.expires);
        }
        let mode = wanted.owned.mode;
        let request = Request { mode, whose, since: wanted.since };
        if let Some(until) = self.lines.before(&key, &request, now) {
            // A token that shares the key already would wait for itself.
            let is_in = |share: &Share| share.mode == mode && share.has_token(&wanted.owned.token, now);
            if !self.shares.get(&key).is_some_and(is_in) {
                return held(until);
            }
        }
        let before = self.shares.remove(&key);
        let until = before.as_ref().and_then(|share| share.expires(now));
        let mut share = match (before, until) {
            (Some(share), _) if share.mode == mode => share,
            (Some(share), Some(until)) => {
                self.shares.insert(key, share);
                return held(until);
            }
            _ => Share::new(mode),
        };
        let acquired = share.acquire(wanted, now, || self.next_fence(now));
        self.shares.insert(key, share);
        self.sweep(now);
        acquired
    }

    /// Ends a shared grant, or all of its token.
    fn end_share(&mut self, owned: &Owned, ending: Ending, rest: Option<Duration>) -> Verdict {
        let now = Instant::now();
        let ended = match self.share(owned, now) {
            Ok(share) => share.end(owned, ending, rest, now),
            Err(loss) => return Verdict::NotOurs(loss),
        };
        if self.shared_until(&owned.key(), now).is_none() {
            self.shares.remove(&owned.key());
        }
        ended
    }

    fn downgrade(&mut self, owned: &Owned) -> Downgraded {
        let now = Instant::now();
        let reader = Owned { mode: Mode::Read, ..owned.clone() };
        if self.share(&reader, now).is_ok_and(|share| share.has(&reader, now)) {
            return Downgraded::Done;
        }
        if let Some(loss) = self.not_ours(owned, now) {
            return Downgraded::NotOurs(loss);
        }
        if self.is_shared(owned) {
            return Downgraded::NotNow;
        }
        let key = owned.key();
        if let Some(Entry { token, metadata, expires, fence, .. }) = self.locks.remove(&key) {
            let mut share = Share::new(Mode::Read);
            share.add(Member { token, grant: owned.grant, metadata, expires, fence });
            self.shares.insert(key, share);
        }
        Downgraded::Done
    }

    /// Enters the line. Returns whether the place was there for something else.
    fn enter(&mut self, key: &Key, whose: PlaceOf, waits_for: WaitsFor) -> bool {
        let now = Instant::now();
        let has_changed = self.lines.enter(key, whose, waits_for, now);
        self.sweep(now);
        has_changed
    }

    fn size(&self) -> usize {
        self.locks.len() + self.shares.len() + self.lines.len()
    }

    /// Removes expired entries, if there are many entries.
    fn sweep(&mut self, now: Instant) {
        if self.size() >= self.sweep_at {
            self.locks.retain(|_, entry| now < entry.expires);
            self.shares.retain(|_, share| share.expires(now).is_some());
            self.lines.sweep(now);
            self.sweep_at = (self.size() * 2).max(64);
        }
    }

    /// Returns whether other grants rely on one of the keys, or an earlier grant wants it to stay taken.
    fn is_shared(&self, owned: &Owned) -> bool {
        let now = Instant::now();
        let mut entries = owned.keys.iter().filter_map(|key| self.live(key, now));
        let has_others = |entry: &Entry| !entry.others(owned.grant).is_empty() || entry.kept.is_some_and(|at| now < at);
        entries.any(|entry| entry.token == owned.token && has_others(entry))
    }

    /// Acquires a key when it is the turn of this place, or enters the line for it. If the key is granted, the place
    /// leaves the line. Also returns whether the key may be open now to those behind it.
    fn acquire_in_line(&mut self, wanted: &Wanted, whose: PlaceOf) -> (Acquired, bool) {
        let (key, mode) = (wanted.owned.key(), wanted.owned.mode);
        let acquired = match self.has_to_wait(wanted, whose) {
            Some(remaining) => Acquired::held(0, Some(remaining)),
            None => self.acquire(wanted, Some(whose)),
        };
        let opens = match acquired {
            Acquired::Granted { .. } => self.lines.leave(&key, whose) && mode.is_shared(),
            Acquired::Held { .. } => self.enter(&key, whose, WaitsFor::One(mode)),
        };
        (acquired, opens)
    }

    /// Returns for how long a request that wants a free key alone waits for other lockers, unless they give another
    /// sign of life.
    fn has_to_wait(&self, wanted: &Wanted, whose: PlaceOf) -> Option<Duration> {
        let (key, mode, now) = (wanted.owned.key(), wanted.owned.mode, Instant::now());
        // A token that holds the key already would wait for itself. And a share looks by itself.
        if mode.is_shared() || self.live(&key, now).is_some() {
            return None;
        }
        let until = self.lines.before(&key, &Request { mode, whose: Some(whose), since: now }, now);
        until.map(|until| until - now)
    }

    fn acquire(&mut self, wanted: &Wanted, whose: Option<PlaceOf>) -> Acquired {
        if wanted.owned.mode.is_shared() {
            return self.acquire_share(wanted, whose);
        }
        let now = Instant::now();
        let Owned { keys, token, grant, .. } = &wanted.owned;
        // The greatest fencing token of the keys, as some may have been granted later than others; none if any key has
        // none.
        let mut repeated = Some(0);
        for (place, key) in keys.iter().enumerate() {
            match self.live(key, now) {
                Some(entry) if entry.token == *token => {
                    repeated = repeated.zip(entry.fence).map(|(one, other)| one.max(other));
                }
                Some(entry) => return Acquired::held(place, Some(entry.expires - now)),
                None => {
                    if let Some(until) = self.shared_until(key, now) {
                        return Acquired::held(place, Some(until - now));
                    }
                }
            }
        }
        // A holder has one fencing token: a repeated request returns the same one.
        let repeated = repeated.filter(|_| self.not_ours(&wanted.owned, now).is_none());
        let fence = wanted.fenced.then(|| repeated.unwrap_or_else(|| self.next_fence(now)));
        for key in keys {
            let metadata = wanted.metadata.clone();
            let ours = self.live(key, now).map(|entry| (entry.grants.clone(), entry.expires, entry.kept));
            let is_first = ours.is_none();
            let (grants, until, kept) = ours.unwrap_or_else(|| (Vec::new(), now, None));
            // Never earlier than the current expiry: another grant of the same token may rely on it.
            let expires = until.max(now + wanted.ttl);
            let mut entry = Entry { token: token.clone(), metadata, expires, fence, grants, kept };
            match grant {
                Some(_) if is_first => entry.grants = vec![Reliance { grant: *grant, ttl: Some(wanted.ttl) }],
                Some(_) => entry.rely(*grant, wanted.ttl),
                None => {}
            }
            self.locks.insert(key.clone(), entry);
        }
        self.sweep(now);
        Acquired::Granted { fencing_token: fence }
    }

    fn next_fence(&mut self, now: Instant) -> u64 {
        let (start, since_1970) = self.epoch;
        let micros = (since_1970 + now.saturating_duration_since(start)).as_micros();
        self.last_fence = u64::try_from(micros).unwrap_or(0).max(self.last_fence + 1);
        self.last_fence
    }

    fn renew(&mut self, owned: &Owned, ttl: Duration, how: Extending) -> Verdict {
        let (how, now) = (how.of(owned), Instant::now());
        if owned.mode.is_shared() {
            return match self.share(owned, now) {
                Ok(share) => share.renew(owned, ttl, how, now),
                Err(loss) => Verdict::NotOurs(loss),
            };
        }
        if let Some(loss) = self.not_ours(owned, now) {
            return Verdict::NotOurs(loss);
        }
        let relies = |entry: &Entry| entry.grants().iter().any(|one| one.grant.is_none());
        if matches!(how, Extending::AtLeast | Extending::Exactly)
            && owned.grant.is_none()
            && !owned.keys.iter().filter_map(|key| self.locks.get(key)).all(relies)
        {
            // The key was lost, and is held for other grants of the token by now.
            return Verdict::NotOurs(Loss::Missing);
        }
        for key in &owned.keys {
            if let Some(entry) = self.locks.get_mut(key) {
                match how {
                    Extending::Claim { earlier } => {
                        let ttl = owned.grant.map(|_| ttl);
                        entry.grants = entry.others(earlier);
                        entry.grants.push(Reliance { grant: owned.grant, ttl });
                    }
                    Extending::GiveBack { earlier } => {
                        let others = entry.others(owned.grant);
                        if others.len() < entry.grants().len() {
                            let ttl = earlier.map(|_| ttl);
                            entry.grants = others;
                            if entry.grants.is_empty() {
                                entry.grants.push(Reliance { grant: earlier, ttl });
                            }
                        }
                        continue;
                    }
                    Extending::Exactly | Extending::KeepRecord if owned.grant.is_some() => {
                        entry.rely(owned.grant, ttl);
                    }
                    Extending::AtLeast | Extending::Exactly | Extending::KeepRecord | Extending::Ensure => {}
                }
                let is_exact = how == Extending::Exactly && entry.others(owned.grant).is_empty();
                let least = (now + ttl).max(entry.kept.unwrap_or(now));
                entry.expires = if is_exact { least } else { entry.expires.max(least) };
            }
        }
        Verdict::Done
    }

    fn delete(&mut self, key: &Key) -> bool {
        let now = Instant::now();
        let was_shared = self.shared_until(key, now).is_some();
        self.shares.remove(key);
        self.locks.remove(key).is_some_and(|entry| now < entry.expires) || was_shared
    }

    fn force_release(&mut self, key: &Key, whose: &Whose) -> Verdict {
        if self.holders(key).iter().any(|holder| !whose.includes(&holder.token)) {
            return Verdict::NotOurs(Loss::Taken);
        }
        if self.delete(key) { Verdict::Done } else { Verdict::NotOurs(Loss::Missing) }
    }

    fn release(&mut self, owned: &Owned, ending: Ending) -> Verdict {
        if owned.mode.is_shared() {
            return self.end_share(owned, ending, None);
        }
        let now = Instant::now();
        let loss = self.not_ours(owned, now);
        for key in &owned.keys {
            let Some(entry) = self.locks.get_mut(key) else { continue };
            if now >= entry.expires || entry.token != owned.token {
                continue;
            }
            let others = entry.others(owned.grant);
            match entry.kept.filter(|kept| now < *kept && ending == Ending::Grant) {
                Some(kept) if others.is_empty() => *entry = Entry::nobodys(kept),
                _ if ending == Ending::Lock || others.is_empty() => drop(self.locks.remove(key)),
                _ => entry.leave_to(others, now),
            }
        }
        loss.map_or(Verdict::Done, Verdict::NotOurs)
    }

    fn linger(&mut self, owned: &Owned, ending: Ending, rest: Duration) -> Verdict {
        if owned.mode.is_shared() {
            return self.end_share(owned, ending, Some(rest));
        }
        let now = Instant::now();
        let loss = self.not_ours(owned, now);
        for key in &owned.keys {
            let Some(entry) = self.locks.get_mut(key) else { continue };
            if now >= entry.expires || entry.token != owned.token {
                continue;
            }
            let until = entry.kept.map_or(now + rest, |kept| kept.max(now + rest));
            let others = entry.others(owned.grant);
            if ending == Ending::Lock || others.is_empty() {
                *entry = Entry::nobodys(until);
            } else if others.len() < entry.grants().len() {
                entry.kept = Some(until);
                entry.leave_to(others, now);
            }
        }
        loss.map_or(Verdict::Done, Verdict::NotOurs)
    }

    fn remaining(&self, owned: &Owned) -> Option<Duration> {
        let now = Instant::now();
        if owned.mode.is_shared() {
            let share = self.shares.get(&owned.key()).filter(|share| share.mode == owned.mode)?;
            return share.remaining(owned, now);
        }
        if self.not_ours(owned, now).is_some() {
            return None;
        }
        owned.keys.iter().filter_map(|key| self.live(key, now)).map(|entry| entry.expires - now).min()
    }

    fn inspect(&self, key: &Key) -> Option<Holder> {
        self.holders(key).into_iter().next()
    }

    fn holders(&self, key: &Key) -> Vec<Holder> {
        let now = Instant::now();
        let exclusive = self.live(key, now).filter(|entry| entry.token != Token::nobody()).map(|entry| Holder {
            token: entry.token.clone(),
            metadata: entry.metadata.to_vec(),
            remaining: Some(entry.expires - now),
            fencing_token: entry.fence,
        });
        let shared = self.shares.get(key).into_iter().flat_map(|share| share.holders(now));
        let mut holders: Vec<_> = exclusive.into_iter().chain(shared).collect();
        holders.sort_by_key(|holder| Reverse(holder.remaining));
        // A token counts once, by whichever of its grants stays longest.
        let mut seen = HashSet::new();
        holders.retain(|holder| seen.insert(holder.token.clone()));
        holders
    }
}

impl Store for MemoryStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            hands_over: true,
            renews_batches: true,
            has_readers: true,
            has_permits: true,
            has_line_for_several: true,
            ..Capabilities::default()
        }
    }

    fn acquire<'a>(&'a self, wanted: &'a Wanted, _: InLine, _: Duration) -> Answer<'a, Acquired> {
        in_turn(move || self.acquire_now(wanted, None))
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, how: Extending, _: Duration) -> Answer<'a, Verdict> {
        in_turn(move || self.renew_now(owned, ttl, how))
    }

    fn renew_batch<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], _: Duration) -> Answers<'a, Verdict> {
        Box::pin(async {
            consume_budget().await;
            locks.iter().map(|(owned, ttl)| Ok(self.renew_now(owned, *ttl, Extending::AtLeast))).collect()
        })
    }

    fn release<'a>(&'a self, owned: &'a Owned, ending: Ending, _: Duration) -> Answer<'a, Verdict> {
        in_turn(move || self.release_now(owned, ending))
    }

    fn linger<'a>(&'a self, owned: &'a Owned, ending: Ending, rest: Duration, _: Duration) -> Answer<'a, Verdict> {
        in_turn(move || self.linger_now(owned, ending, rest))
    }

    fn undo<'a>(&'a self, owned: &'a Owned, latest: &'a Latest, _: Duration) -> Answer<'a, Undone> {
        in_turn(move || self.undo_now(owned, latest))
    }

    fn hand_over<'a>(
        &'a self,
        from: &'a Owned,
        ending: Ending,
        to: &'a Wanted,
        next: &'a Next,
        _: Duration,
    ) -> Answer<'a, HandedOver> {
        in_turn(move || self.hand_over_now(from, ending, to, next, 0))
    }

    fn downgrade<'a>(&'a self, owned: &'a Owned, _: Duration) -> Answer<'a, Downgraded> {
        in_turn(move || self.downgrade_now(owned))
    }

    fn enter<'a>(&'a self, key: &'a Key, place: LinePlace, _: Duration) -> Answer<'a, ()> {
        in_turn(move || self.enter_now(key, PlaceOf { locker: 0, place }))
    }

    fn heartbeat<'a>(&'a self, key: &'a Key, place: LinePlace, _: Duration) -> Answer<'a, bool> {
        in_turn(move || self.heartbeat_now(key, PlaceOf { locker: 0, place }))
    }

    fn leave<'a>(&'a self, key: &'a Key, place: LinePlace, _: Duration) -> Answer<'a, ()> {
        in_turn(move || self.leave_now(key, PlaceOf { locker: 0, place }))
    }

    fn subscribe(&self, key: &Key) -> Subscription {
        self.subscribe_now(key)
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, _: Duration) -> Answer<'a, Option<Duration>> {
        in_turn(move || self.remaining_now(owned))
    }

    fn find_keys<'a>(&'a self, prefix: &'a [u8], _: Duration) -> Answer<'a, BTreeSet<Key>> {
        in_turn(move || {
            let (held, now) = (self.held(), Instant::now());
            let locks = held.locks.iter().filter(|(_, entry)| now < entry.expires).map(|(key, _)| key);
            let shares = held.shares.keys().filter(|key| held.shared_until(key, now).is_some());
            locks.chain(shares).filter(|key| key.as_bytes().starts_with(prefix)).cloned().collect()
        })
    }

    fn force_release<'a>(&'a self, key: &'a Key, whose: &'a Whose, _: Duration) -> Answer<'a, Verdict> {
        in_turn(move || self.force_release_now(key, whose))
    }

    fn holders<'a>(&'a self, key: &'a Key, _: Duration) -> Answer<'a, Vec<Holder>> {
        in_turn(move || self.holders_now(key))
    }

    fn inspect<'a>(&'a self, key: &'a Key, _: Duration) -> Answer<'a, Option<Holder>> {
        in_turn(move || self.inspect_now(key))
    }
}

/// Runs an operation, which never returns pending itself, within tokio's cooperative budget: a task that does nothing
/// but lock and release lets other tasks run. It yields before it runs, so an operation that is dropped has not run.
pub(super) fn in_turn<'a, T: Send + 'a>(run: impl FnOnce() -> T + Send + 'a) -> Answer<'a, T> {
    Box::pin(async {
        consume_budget().await;
        Ok(run())
    })
}

impl fmt::Debug for MemoryStore {
    /// Shows the number of locks, but not their contents.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let locks = self.held().locks.len();
        f.debug_struct("MemoryStore").field("locks", &locks).field("subscriptions", &self.subscriptions).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Waker};

    use tokio::time::sleep;

    use super::*;
    use crate::Locker;
    use crate::store::faulty::{Fault, FaultyStore};

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Repeats `work` in a task until a timer has fired, which needs other tasks to get their turn.
    async fn leaves_others_their_turn<F: Future<Output = ()> + Send>(work: impl Fn(Locker) -> F + Send + 'static) {
        let fired = Arc::new(AtomicBool::new(false));
        let busy = tokio::spawn({
            let fired = fired.clone();
            async move {
                let (locker, started) = (Locker::in_memory(), std::time::Instant::now());
                while !fired.load(Ordering::Relaxed) {
                    work(locker.clone()).await;
                    assert!(started.elapsed().as_secs() < 20, "the timer is starved");
                }
            }
        });
        sleep(ms(5)).await;
        fired.store(true, Ordering::Relaxed);
        busy.await.unwrap();
    }

    #[tokio::test]
    async fn a_task_that_only_locks_and_releases_leaves_others_their_turn() {
        leaves_others_their_turn(|locker| async move { locker.lock("k").await.unwrap().release().await.unwrap() })
            .await;
        leaves_others_their_turn(|locker| async move { drop(locker.lock("k").await.unwrap()) }).await;
        leaves_others_their_turn(|locker| async move {
            let _held = locker.try_lock("k").await;
            drop(locker.try_lock("k").await.unwrap_err());
        })
        .await;
        leaves_others_their_turn(|locker| async move { drop(locker.inspect("k").await.unwrap()) }).await;
    }

    #[test]
    fn outside_a_runtime_nothing_is_left_to_a_turn() {
        let store = MemoryStore::new();
        let key = Key::from("k");
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..1_000 {
            assert!(store.inspect(&key, ms(1)).as_mut().poll(&mut cx).is_ready());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_left_of_a_key_that_was_waited_for_and_ended_by_expiry() {
        let store = Arc::new(MemoryStore::new());
        let locker = Locker::builder().build(Box::new(FaultyStore::new(store.clone(), |_| Fault::None)), None);
        for n in 0..10 {
            let expires = locker.lock(format!("k{n}")).ttl(ms(1_000)).no_renewal().await.unwrap();
            expires.into_lease();
            // One request waits until the key is free, and one gives up.
            let waiter = tokio::spawn(locker.lock(format!("k{n}")).into_future());
            locker.lock(format!("k{n}")).wait_at_most(ms(500)).await.unwrap_err();
            waiter.await.unwrap().unwrap().into_lease();
        }
        // A queue is kept for a moment, as a request that waited is often followed by another.
        sleep(ms(1_500)).await;
        assert_eq!(store.subscriptions.len(), 0);
    }
}
