//! The embedded store: the same contract in one process, on tokio's clock.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::listen::{Line, Listeners, Listening};
use super::{Acquired, Answer, Each, HandedOver, Holder, Released, Renewed, Store, Together, Wanted};
use crate::hold::Owned;
use crate::{Key, Loss, Token};

/// Locks in a map. No operation waits, so none can time out.
#[derive(Debug)]
pub(crate) struct MemoryStore {
    held: Mutex<Held>,
    listeners: Listeners<Key>,
}

#[derive(Debug)]
struct Held {
    locks: HashMap<Key, Entry>,
    /// One counter for all keys: it grows for each of them.
    last_fence: u64,
    /// Expired entries are swept out whenever the map has doubled since the last time.
    sweep_at: usize,
    /// Ties tokio's clock, which tests may pause, to the wall clock that fencing tokens start from.
    epoch: (Instant, Duration),
}

#[derive(Clone, Debug)]
struct Entry {
    token: Token,
    metadata: Box<[u8]>,
    expires: Instant,
    fence: Option<u64>,
}

impl MemoryStore {
    pub(crate) fn new() -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = (Instant::now(), since_1970);
        let held = Mutex::new(Held { locks: HashMap::new(), last_fence: 0, sweep_at: 64, epoch });
        Self { held, listeners: Listeners::new() }
    }

    pub(super) fn acquire_now(&self, wanted: &Wanted) -> Acquired {
        self.held().acquire(wanted)
    }

    pub(super) fn renew_now(&self, owned: &Owned, ttl: Duration, exact: bool) -> Renewed {
        self.held().renew(owned, ttl, exact)
    }

    pub(super) fn release_now(&self, owned: &Owned) -> Released {
        let released = self.held().release(owned);
        owned.keys.iter().for_each(|key| self.listeners.tell(key));
        released
    }

    pub(super) fn hand_over_now(&self, from: &Owned, to: &Wanted) -> HandedOver {
        let mut held = self.held();
        if let Released::NotOurs(loss) = held.release(from) {
            return HandedOver::NotOurs(loss);
        }
        match held.acquire(to) {
            Acquired::Granted { fencing_token } => HandedOver::Done { fencing_token },
            // Nobody can have come in between.
            Acquired::Held { .. } | Acquired::NotNext { .. } => HandedOver::NotOurs(Loss::Taken),
        }
    }

    pub(super) fn listen_now(&self, key: &Key) -> Listening {
        self.listeners.listen(key.clone(), Line::Open).0
    }

    /// As a server does that is restarted without its data.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.held().locks.clear();
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn live(&self, key: &Key, now: Instant) -> Option<&Entry> {
        self.locks.get(key).filter(|entry| now < entry.expires)
    }

    /// Which loss explains that not all keys hold the token, if they don't.
    fn not_ours(&self, owned: &Owned, now: Instant) -> Option<Loss> {
        let mut loss = None;
        for key in &owned.keys {
            match self.live(key, now) {
                Some(entry) if entry.token == owned.token => {}
                Some(_) => return Some(Loss::Taken),
                None => loss = Some(Loss::Missing),
            }
        }
        loss
    }

    fn acquire(&mut self, wanted: &Wanted) -> Acquired {
        let now = Instant::now();
        let Owned { keys, token, .. } = &wanted.owned;
        // Never shorter than it is: another of the same token may rely on it.
        let mut expires = now + wanted.ttl;
        let mut repeated = None;
        for (place, key) in keys.iter().enumerate() {
            match self.live(key, now) {
                Some(entry) if entry.token == *token => {
                    expires = expires.max(entry.expires);
                    repeated = entry.fence;
                }
                Some(entry) => return Acquired::Held { place, remaining: Some(entry.expires - now) },
                None => {}
            }
        }
        // Minted once for one holder: a repeat answers the same.
        let repeated = repeated.filter(|_| self.not_ours(&wanted.owned, now).is_none());
        let fence = wanted.fenced.then(|| repeated.unwrap_or_else(|| self.next_fence(now)));
        for key in keys {
            let metadata = wanted.metadata.clone();
            self.locks.insert(key.clone(), Entry { token: token.clone(), metadata, expires, fence });
        }
        if self.locks.len() >= self.sweep_at {
            self.locks.retain(|_, entry| now < entry.expires);
            self.sweep_at = (self.locks.len() * 2).max(64);
        }
        Acquired::Granted { fencing_token: fence }
    }

    fn next_fence(&mut self, now: Instant) -> u64 {
        let (start, since_1970) = self.epoch;
        let micros = (since_1970 + now.saturating_duration_since(start)).as_micros();
        self.last_fence = u64::try_from(micros).unwrap_or(0).max(self.last_fence + 1);
        self.last_fence
    }

    fn renew(&mut self, owned: &Owned, ttl: Duration, exact: bool) -> Renewed {
        let now = Instant::now();
        if let Some(loss) = self.not_ours(owned, now) {
            return Renewed::NotOurs(loss);
        }
        for key in &owned.keys {
            if let Some(entry) = self.locks.get_mut(key) {
                entry.expires = if exact { now + ttl } else { entry.expires.max(now + ttl) };
            }
        }
        Renewed::Extended
    }

    fn release(&mut self, owned: &Owned) -> Released {
        let now = Instant::now();
        let loss = self.not_ours(owned, now);
        for key in &owned.keys {
            if self.live(key, now).is_some_and(|entry| entry.token == owned.token) {
                self.locks.remove(key);
            }
        }
        loss.map_or(Released::Freed, Released::NotOurs)
    }

    fn remaining(&self, owned: &Owned) -> Option<Duration> {
        let now = Instant::now();
        if self.not_ours(owned, now).is_some() {
            return None;
        }
        owned.keys.iter().filter_map(|key| self.live(key, now)).map(|entry| entry.expires - now).min()
    }

    fn inspect(&self, key: &Key) -> Option<Holder> {
        let now = Instant::now();
        self.live(key, now).map(|entry| Holder {
            token: entry.token.clone(),
            metadata: entry.metadata.to_vec(),
            remaining: Some(entry.expires - now),
            fencing_token: entry.fence,
        })
    }
}

impl Store for MemoryStore {
    fn acquire<'a>(&'a self, wanted: &'a Wanted, _: Duration) -> Answer<'a, Acquired> {
        Box::pin(async { Ok(self.acquire_now(wanted)) })
    }

    fn renew<'a>(&'a self, owned: &'a Owned, ttl: Duration, exact: bool, _: Duration) -> Answer<'a, Renewed> {
        Box::pin(async move { Ok(self.renew_now(owned, ttl, exact)) })
    }

    fn together(&self) -> Option<&dyn Together> {
        Some(self)
    }

    fn release<'a>(&'a self, owned: &'a Owned, _: Duration) -> Answer<'a, Released> {
        Box::pin(async { Ok(self.release_now(owned)) })
    }

    fn hands_over(&self) -> bool {
        true
    }

    fn hand_over<'a>(&'a self, from: &'a Owned, to: &'a Wanted, _: Duration) -> Answer<'a, HandedOver> {
        Box::pin(async { Ok(self.hand_over_now(from, to)) })
    }

    fn listen(&self, key: &Key) -> Listening {
        self.listen_now(key)
    }

    fn remaining<'a>(&'a self, owned: &'a Owned, _: Duration) -> Answer<'a, Option<Duration>> {
        Box::pin(async { Ok(self.held().remaining(owned)) })
    }

    fn inspect<'a>(&'a self, key: &'a Key, _: Duration) -> Answer<'a, Option<Holder>> {
        Box::pin(async { Ok(self.held().inspect(key)) })
    }
}

impl Together for MemoryStore {
    fn renew_all<'a>(&'a self, locks: &'a [(&'a Owned, Duration)], _: Duration) -> Each<'a, Renewed> {
        Box::pin(async { locks.iter().map(|(owned, ttl)| Ok(self.renew_now(owned, *ttl, false))).collect() })
    }
}
