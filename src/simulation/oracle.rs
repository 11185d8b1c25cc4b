//! Checks the promises of the crate in a universe, against what its server did and what its guards report.
//!
//! At every event (a call is run at the server, a lock is obtained, an actor has done something):
//!
//! 1. Two guards of one key are not both held, unless a user has given them the same token, or both are readers, or
//!    both have a permit. Never more tokens have a permit than the limit allows.
//! 2. A guard that is held has its keys at the server until its deadline. The exception is a guard whose lock was ended
//!    on purpose: by an explicit release with the same token, or by deleting the key by hand. It learns of that later.
//! 3. Fencing tokens grow in the order of grants. A token that shares a key keeps its own.
//!
//! Whenever a call fails, and at the end:
//!
//! 4. When all delays have passed, only the leases remain that were left on purpose, or that an adoption which failed
//!    has given the lock back to: no key that would stay for long, no queue, no subscription, no task. When those
//!    leases have expired, nothing remains at all.
//! 5. `NotObtained` is returned only if another held the lock at some time during the call.
//! 6. Every call ends in time.
//! 7. No lock is idle for long while somebody waits for it, whoever isn't polled.
//!
//! Of locks with bounds:
//!
//! 8. No guard is held beyond its limit, and none of its renewals asks for more than what is left until then.
//! 9. After a release, a drop, or the end at its limit, the keys of a guard stay taken until its minimum is over: no
//!    call frees them, none hands them over, and nobody in the process gets them. Not promised where somebody else has
//!    ended the lock on purpose, or a lease was made of it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::hold::{GrantId, Hold, Owned, Peek};
use crate::mode::Mode;
use crate::store::faulty::{Fault, Operation, Ran};
use crate::store::memory::MemoryStore;
use crate::store::{Acquired, Downgraded, Ending, Extending, HandedOver, Holder, Verdict, Wanted};
use crate::{Error, Key, Lease, LockGuard, Loss, Token};

/// The operation that the current calls are part of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Doing {
    /// Whether somebody has requested the release of the lock.
    pub(super) release: bool,
    /// The guard that the operation is for.
    pub(super) guard: Option<usize>,
}

thread_local! {
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
    static DOING: Cell<Doing> = const { Cell::new(Doing { release: false, guard: None }) };
}

/// Does the work, and marks all its calls as part of `what`.
pub(super) async fn doing<F: Future>(what: Doing, work: F) -> F::Output {
    let mut work = pin!(work);
    poll_fn(|context| {
        let before = DOING.replace(what);
        let polled = work.as_mut().poll(context);
        DOING.set(before);
        polled
    })
    .await
}

/// Records that a lock was obtained or adopted. The crate calls this, so that no guard is missed; it does nothing
/// outside a universe. `locker` identifies the locker.
pub(crate) fn born(hold: &Arc<Hold>, locker: usize) {
    let world = WORLD.with_borrow(Clone::clone);
    if let Some(world) = world {
        world.born(hold, locker);
    }
}

/// A broken promise.
#[derive(Clone, Debug)]
pub(super) struct Violation {
    /// The promise, and how it was broken: the same text for all violations with one cause.
    pub(super) what: String,
    pub(super) details: String,
}

pub(super) struct World {
    pub(super) store: Arc<MemoryStore>,
    pub(super) keys: Vec<Key>,
    /// Whether the server is a real one, which can only be queried.
    is_outside: bool,
    start: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    guards: Vec<Tracked>,
    calls: Vec<Call>,
    /// The identities of the lockers.
    lockers: Vec<usize>,
    /// The holders of each key at the server.
    history: BTreeMap<Key, Vec<Span>>,
    /// The greatest limit of permits that was asked for.
    limit: usize,
    /// The last event of a key that a token held.
    last: HashMap<(Key, Token), Last>,
    /// Locks that were ended on purpose: all that the token had requested before that instant.
    ended: Vec<(Key, Token, Instant)>,
    /// Keys that were deleted by hand at some time.
    deleted: HashSet<Key>,
    /// When a request for the key was last refused because others stood in the line, and for no other reason.
    behind: HashMap<Key, Instant>,
    fences: HashMap<Key, u64>,
    /// The first fencing token. It comes from the clock, so the trace counts from it.
    first_fence: Option<u64>,
    granted: HashMap<Token, HashSet<u64>>,
    /// The fencing tokens of guards that took the lock over without the server.
    taken_over: HashMap<Token, HashSet<u64>>,
    /// How many calls with a token were granted, or adopted its lease.
    grants: HashMap<Token, usize>,
    /// Tokens that one request created for itself, and for which it was granted a lock.
    own: HashSet<Token>,
    /// Tokens of guards that somebody uses for other requests, as if they had been read at the server.
    seen: HashSet<Token>,
    leases: Vec<Left>,
    /// The grants of leases that locks were given back to, with their tokens: nobody else had those locks then.
    given_back: HashSet<(Token, GrantId)>,
    /// From when until when requests went on.
    requests: Vec<(Instant, Option<Instant>)>,
    labels: HashMap<Token, String>,
    /// How many tasks are about to release all that a locker's watchdogs watch.
    releasing_all: HashMap<usize, usize>,
    violations: Vec<Violation>,
    trace: Option<Vec<String>>,
    /// When the last late call runs.
    late_until: Option<Instant>,
    stalls: usize,
    /// The delays of notifications: each subscription has its own.
    delays: BTreeSet<u64>,
}

struct Tracked {
    hold: Weak<Hold>,
    /// The address of the hold: it distinguishes those that exist at the same time.
    at: usize,
    client: usize,
    keys: Box<[Key]>,
    mode: Mode,
    token: Token,
    sent: Instant,
    born: Instant,
    /// How it ended, as far as it was seen.
    loss: Option<Loss>,
    /// When that was seen.
    over: Option<Instant>,
    /// Whether its token was made for one request, so that nobody else may hold a lock by it at the same time.
    own_token: bool,
    grant: Option<GrantId>,
    /// The bounds of its request.
    limit: Option<Instant>,
    stays_until: Instant,
    /// A lease was made of it, which has no bounds; or somebody else has ended the lock on purpose.
    has_no_bounds: bool,
}

impl Tracked {
    /// Returns whether this was a time for which it held a key.
    fn has_had(&self, span: &Span) -> bool {
        let is_its = (span.mode, &span.token) == (self.mode, &self.token);
        is_its && (self.mode == Mode::Exclusive || span.grant == self.grant)
    }

    /// Returns whether its keys have to stay taken although it has ended.
    fn is_to_stay(&self, now: Instant) -> bool {
        let loss = self.loss.or_else(|| self.hold.upgrade()?.peek().verdict.err());
        let has_least = matches!(loss, Some(Loss::Released | Loss::LimitReached));
        // While no release arrives at the server, the ttl frees the lock, as after a crash.
        let has_expired = self.hold.upgrade().is_some_and(|hold| hold.kept_until() < now);
        has_least && !has_expired && !self.has_no_bounds && now < self.stays_until
    }
}

struct Call {
    client: usize,
    sent: Instant,
    /// When it last ran.
    ran: Option<Instant>,
    doing: Doing,
    fault: Fault,
}

/// A time for which a token held a key, or one of its grants had a share of it.
struct Span {
    mode: Mode,
    token: Token,
    grant: Option<GrantId>,
    from: Instant,
    until: Instant,
}

/// The last event of a key that a token held.
#[derive(Clone, Debug)]
enum Last {
    Granted(u64),
    SetTtl(u64),
    Released(u64),
}

/// A request that goes on.
pub(super) struct Asking {
    world: Arc<World>,
    number: usize,
    from: Instant,
    mode: Mode,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.world.state().requests[self.number].1 = Some(Instant::now());
    }
}

struct Left {
    lease: Lease,
    /// Whether nobody has adopted it yet.
    left: bool,
}

impl World {
    /// Returns a world that records everything that happens on this thread from now on.
    pub(super) fn begin(keys: Vec<Key>, traced: bool) -> Arc<Self> {
        Self::new(keys, traced, false)
    }

    /// Returns such a world for a server that can only be queried.
    pub(super) fn begin_outside(keys: Vec<Key>) -> Arc<Self> {
        Self::new(keys, false, true)
    }

    fn new(keys: Vec<Key>, traced: bool, is_outside: bool) -> Arc<Self> {
        let state = State { trace: traced.then(Vec::new), ..State::default() };
        let (store, start) = (Arc::new(MemoryStore::new()), Instant::now());
        let world = Arc::new(Self { store, keys, is_outside, start, state: Mutex::new(state) });
        WORLD.set(Some(world.clone()));
        world
    }

    /// Returns what the world has recorded.
    pub(super) fn end(&self) -> (Vec<Violation>, Vec<String>) {
        WORLD.set(None);
        let mut state = self.state();
        (std::mem::take(&mut state.violations), state.trace.take().unwrap_or_default())
    }

    /// Gives a token a name for the trace.
    pub(super) fn name(&self, token: &Token, name: String) {
        self.state().labels.insert(token.clone(), name);
    }

    pub(super) fn knows_locker(&self, locker: usize) {
        self.state().lockers.push(locker);
    }

    pub(super) fn trace(&self, line: impl FnOnce() -> String) {
        if self.state().trace.is_some() {
            let line = line();
            self.state().note(self.start, line);
        }
    }

    pub(super) fn stalled(&self) {
        self.state().stalls += 1;
    }

    pub(super) fn stalls(&self) -> usize {
        self.state().stalls
    }

    pub(super) fn violate(&self, what: impl Into<String>, details: String) {
        self.state().violate(self.start, what.into(), details);
    }

    /// Returns the number by which the trace names a guard.
    pub(super) fn id(&self, guard: &LockGuard) -> Option<usize> {
        let at = Arc::as_ptr(&guard.hold()) as usize;
        self.state().guards.iter().rposition(|tracked| tracked.at == at)
    }

    fn born(&self, hold: &Arc<Hold>, locker: usize) {
        let mut state = self.state();
        let client = state.lockers.iter().position(|&known| known == locker).unwrap_or(usize::MAX);
        let Peek { sent, limit, stays_until, .. } = hold.peek();
        let at = Arc::as_ptr(hold) as usize;
        let (keys, token) = (hold.owned.keys.clone(), hold.owned.token.clone());
        let id = state.guards.len();
        let label = state.label(&token);
        state.note(self.start, format!("guard {id} of client {client}: {keys:?} by {label}, {hold:?}"));
        if let Some(fence) = hold.fencing_token {
            let granted = state.granted.get(&token);
            let is_granted = granted.is_some_and(|fences| fences.contains(&fence));
            // A hand-over by the server reserves some more (`acquire/take_over.rs`).
            let is_spare =
                granted.is_some_and(|fences| fences.iter().any(|first| (1..=16).contains(&fence.wrapping_sub(*first))));
            if !is_granted && is_spare {
                // Promise 3. A lease that is taken up, and a reader that was the writer, have that of the guard before;
                // other readers may have entered since.
                let is_known = !state.taken_over.entry(token.clone()).or_default().insert(fence);
                let is_repeated = is_known && (hold.owned.grant.is_some() || hold.owned.mode == Mode::Read);
                for key in &*keys {
                    let before = state.fences.get(key).copied();
                    let is_greater = is_repeated || before.is_none_or(|before| before < fence);
                    if !is_greater && !state.deleted.contains(key) {
                        state.violate(self.start, "fencing tokens don't grow".into(), format!("guard {id}"));
                    }
                    state.fences.insert(key.clone(), before.map_or(fence, |before| before.max(fence)));
                }
            }
            if !self.is_outside && !is_granted && !is_spare {
                state.violate(self.start, "a fencing token that was not granted".into(), format!("guard {id}"));
            }
        }
        let now = Instant::now();
        let own_token = hold.owned.own_token;
        let mode = hold.owned.mode;
        // A reader that was the writer goes on with its bounds.
        let was_it = |guard: &&mut Tracked| guard.token == token && guard.mode == Mode::Exclusive && mode == Mode::Read;
        state.guards.iter_mut().filter(was_it).for_each(|guard| guard.has_no_bounds = true);
        // Promise 9. By the same token, it has taken the lock over.
        let before = |guard: &Tracked| own_token && guard.own_token && guard.token == token && guard.is_to_stay(now);
        if state.guards.iter().any(before) {
            state.violate(self.start, "a lock is handed over that has to stay taken".into(), format!("to {id}"));
        }
        state.guards.push(Tracked {
            hold: Arc::downgrade(hold),
            at,
            client,
            keys,
            mode,
            token,
            sent,
            born: now,
            loss: None,
            over: None,
            own_token,
            grant: hold.owned.grant,
            limit,
            stays_until,
            has_no_bounds: false,
        });
        drop(state);
        self.check();
    }

    pub(super) fn sent(&self, client: usize, operation: Operation, fault: Fault) -> u64 {
        let mut state = self.state();
        let now = Instant::now();
        let late = match fault {
            Fault::RunAfter(delay) | Fault::Doubled(delay) | Fault::Twice(delay) => Some(now + delay),
            _ => None,
        };
        state.late_until = state.late_until.max(late);
        let mut doing = DOING.get();
        doing.release |= state.releasing_all.get(&client).is_some_and(|&n| n > 0);
        state.calls.push(Call { client, sent: now, ran: None, doing, fault });
        let call = state.calls.len() - 1;
        state.note_with(self.start, || format!("call {call} of client {client}: {operation:?}, {fault:?}, {doing:?}"));
        call as u64
    }

    pub(super) fn releasing_all(&self, client: usize, begins: bool) {
        let mut state = self.state();
        let count = state.releasing_all.entry(client).or_default();
        *count = if begins { *count + 1 } else { *count - 1 };
    }

    /// Records that the server has run a call.
    pub(super) fn ran(&self, call: u64, ran: &Ran<'_>) {
        let mut state = self.state();
        let now = Instant::now();
        state.calls[call as usize].ran = Some(now);
        match ran {
            Ran::Acquire(wanted, acquired) => {
                if let Acquired::Held { place, .. } = acquired {
                    let key = &wanted.owned.keys[*place];
                    let is_open = self.store.held_by(key).iter().all(|held| {
                        let mode = wanted.owned.mode;
                        mode.is_shared() && held.0 == mode
                    });
                    if is_open && self.store.is_waited_for(key) {
                        state.behind.insert(key.clone(), now);
                    }
                }
                if let Acquired::Granted { fencing_token } = acquired {
                    state.admitted(self, call, wanted);
                    if wanted.owned.grant.is_none() {
                        state.own.insert(wanted.owned.token.clone());
                    }
                    state.granted(self, call, &wanted.owned.keys, &wanted.owned.token, *fencing_token);
                }
                let (label, first) = (state.label(&wanted.owned.token), state.first_fence);
                state.note_with(self.start, || {
                    let acquired = relative(&format!("{acquired:?}"), first);
                    let Owned { keys, mode, .. } = &wanted.owned;
                    format!("  call {call}: {label} acquires {keys:?} for {:?}, {mode:?}: {acquired}", wanted.ttl)
                });
            }
            Ran::Renew(owned, ttl, how, renewed) => {
                if matches!(how, Extending::AtLeast | Extending::Exactly) {
                    state.renewed(self, call, owned, *ttl);
                }
                if let (Extending::Claim { .. }, Verdict::Done) = (how, renewed) {
                    *state.grants.entry(owned.token.clone()).or_default() += 1;
                }
                if let (Extending::GiveBack { earlier: earlier @ Some(grant) }, Verdict::Done) = (how, renewed) {
                    if owned.keys.iter().any(|key| self.store.grants_of(key) == [*earlier]) {
                        state.given_back.insert((owned.token.clone(), *grant));
                    }
                }
                if let (Extending::Exactly, Verdict::Done) = (how, renewed) {
                    for key in &owned.keys {
                        state.last.insert((key.clone(), owned.token.clone()), Last::SetTtl(call));
                    }
                }
                let label = state.label(&owned.token);
                state.note_with(self.start, || {
                    format!("  call {call}: {label} renews {:?} {how:?} {ttl:?}: {renewed:?}", owned.keys)
                });
            }
            Ran::Release(owned, ending, released) => {
                state.released(call, &owned.keys, &owned.token, *ending, self);
                let label = state.label(&owned.token);
                state.note_with(self.start, || {
                    format!("  call {call}: {label} releases {:?}, {ending:?}: {released:?}", owned.keys)
                });
            }
            Ran::Linger(owned, ending, rest, released) => {
                state.released(call, &owned.keys, &owned.token, *ending, self);
                let label = state.label(&owned.token);
                state.note_with(self.start, || {
                    format!("  call {call}: {label} leaves {:?} for {rest:?}, {ending:?}: {released:?}", owned.keys)
                });
            }
            Ran::Undo(owned, undone) => {
                state.released(call, &owned.keys, &owned.token, Ending::Grant, self);
                let label = state.label(&owned.token);
                state.note_with(self.start, || format!("  call {call}: {label} undoes {:?}: {undone:?}", owned.keys));
            }
            Ran::HandOver(from, ending, to, handed_over) => {
                if let HandedOver::Done { .. } | HandedOver::PassedBy = handed_over {
                    state.released(call, &from.keys, &from.token, *ending, self);
                }
                if let HandedOver::Done { fencing_token, .. } = handed_over {
                    state.granted(self, call, &to.owned.keys, &to.owned.token, *fencing_token);
                }
                let (one, other) = (state.label(&from.token), state.label(&to.owned.token));
                let first = state.first_fence;
                state.note_with(self.start, || {
                    let handed_over = relative(&format!("{handed_over:?}"), first);
                    format!("  call {call}: {one} hands {:?} over to {other}, {ending:?}: {handed_over}", from.keys)
                });
            }
            Ran::Downgrade(owned, downgraded) => {
                if let Downgraded::Done = downgraded {
                    for key in &owned.keys {
                        state.last.insert((key.clone(), owned.token.clone()), Last::Granted(call));
                    }
                }
                let label = state.label(&owned.token);
                let note = || format!("  call {call}: {label} downgrades {:?}: {downgraded:?}", owned.keys);
                state.note_with(self.start, note);
            }
        }
        state.look(self);
        drop(state);
        self.check();
    }

    /// Deletes a key, as a user might by hand.
    pub(super) fn delete(&self, key: &Key) {
        let mut state = self.state();
        for (_, token, ..) in self.store.held_by(key) {
            state.ended.push((key.clone(), token, Instant::now()));
        }
        state.deleted.insert(key.clone());
        let are_of_it = |guard: &&mut Tracked| guard.keys.contains(key);
        state.guards.iter_mut().filter(are_of_it).for_each(|guard| guard.has_no_bounds = true);
        self.store.delete(key);
        state.note(self.start, format!("{key} is deleted by hand"));
        state.look(self);
        drop(state);
        self.check();
    }

    /// Checks promises 1 and 2.
    pub(super) fn check(&self) {
        let mut state = self.state();
        let mut holders: HashMap<Key, Vec<(usize, Mode, Token)>> = HashMap::new();
        let now = Instant::now();
        for id in 0..state.guards.len() {
            let Some(hold) = state.guards[id].hold.upgrade() else {
                state.guards[id].over.get_or_insert(now);
                continue;
            };
            let seen = hold.peek();
            if let Err(loss) = seen.verdict {
                state.guards[id].over.get_or_insert(now);
                if state.guards[id].loss.replace(loss).is_none() {
                    state.note_with(self.start, || format!("guard {id} is over: {loss:?}"));
                    if let (Loss::Taken | Loss::Missing, true) = (loss, state.has_been_there(id)) {
                        state.violate(
                            self.start,
                            format!("a guard reports {loss:?} though it was held all along"),
                            format!("guard {id}"),
                        );
                    }
                }
                continue;
            }
            if state.guards[id].limit.is_some_and(|limit| limit <= now || limit < seen.deadline) {
                state.violate(self.start, "a guard is held beyond its limit".into(), format!("guard {id}"));
            }
            let Tracked { keys, mode, token, sent, own_token, grant, .. } = &state.guards[id];
            let (mode, grant, is_own) = (*mode, *grant, *own_token && !state.seen.contains(token));
            for key in keys.clone() {
                let ended = |(of, by, at): &(Key, Token, Instant)| *of == key && by == token && sent <= at;
                if state.ended.iter().any(ended) {
                    continue;
                }
                let at_server = self.store.held_by(&key);
                let is_its = |(in_mode, by, of, _): &(Mode, Token, Option<GrantId>, Instant)| {
                    *in_mode == mode && by == token && (mode == Mode::Exclusive || *of == grant)
                };
                let is_there = at_server.iter().any(|held| is_its(held) && held.3 >= seen.deadline);
                let mut violations = Vec::new();
                let others = holders.entry(key.clone()).or_default();
                let excludes = |(_, other, by): &&(usize, Mode, Token)| {
                    *other != mode || mode == Mode::Exclusive && (by != token || is_own)
                };
                if let Some((other, _, by)) = others.iter().find(excludes) {
                    let labels = (state.peek_label(by), state.peek_label(token));
                    violations.push(("two holders at once".to_owned(), format!("guards {other} and {id}: {labels:?}")));
                } else {
                    others.push((id, mode, token.clone()));
                    let permits: HashSet<_> = others.iter().map(|(_, _, by)| by).collect();
                    if mode == Mode::Permit && permits.len() > state.limit && !self.is_outside {
                        violations.push(("too many permits at once".to_owned(), format!("guards {others:?}")));
                    }
                }
                if !is_there && !self.is_outside {
                    let holder = at_server.into_iter().find(is_its).map(|(_, by, _, until)| (by, until));
                    violations.push(state.why_not_there(id, &key, seen.deadline, self.start, holder));
                }
                if !violations.is_empty() {
                    let (token, sent) = (token.clone(), Instant::now().max(*sent));
                    // Once is enough.
                    state.ended.push((key.clone(), token, sent));
                    for (what, details) in violations {
                        state.violate(self.start, what, details);
                    }
                    break;
                }
            }
        }
    }

    /// Records that a request begins. It goes on until what is returned is dropped.
    pub(super) fn asks(self: &Arc<Self>, mode: Mode) -> Asking {
        let (from, mut state) = (Instant::now(), self.state());
        state.requests.push((from, None));
        Asking { world: self.clone(), number: state.requests.len() - 1, from, mode }
    }

    /// Checks promise 5. Until a request has `heard` of the present, it only knows the server's last reply. A request
    /// is also refused while others are served before it: those in the queue of a process, and those in the line.
    pub(super) fn failed(&self, error: &Error, asking: &Asking, own: Option<&Token>, heard: Duration) {
        let Error::NotObtained { key, attempts, .. } = error else { return };
        let Asking { from, mode, number, .. } = *asking;
        let mut state = self.state();
        let mut others = state.requests.iter().enumerate().filter(|(other, _)| *other != number);
        if mode.is_shared() && others.any(|(_, (_, until))| until.is_none_or(|until| until >= from)) {
            return;
        }
        if state.behind.get(key).is_some_and(|at| *at >= from) {
            return;
        }
        // Nobody is notified of a deletion by hand: the server's last reply is all that is known.
        if self.is_outside || state.deleted.contains(key) {
            return;
        }
        let spans = state.history.get(key).into_iter().flatten();
        let heard = if *attempts == 0 { heard } else { Duration::ZERO };
        let during: Vec<_> = spans.filter(|span| span.until + heard >= from).collect();
        let what = match own {
            _ if during.is_empty() => {
                format!("NotObtained though nobody held it, {}", if *attempts == 0 { "never asked" } else { "asked" })
            }
            // A request that the server told so. Other requests may not have been able to ask.
            Some(own) if during.iter().all(|span| span.token == *own && span.mode == mode) && *attempts > 0 => {
                "NotObtained though only its own token held it".into()
            }
            _ => return,
        };
        state.violate(self.start, what, format!("{error}"));
    }

    /// Records that the explicit release of a guard has returned: what comes of it later, nobody has requested. A call
    /// that is delivered twice is no call that the crate can know of.
    pub(super) fn has_released(&self, id: usize) {
        for call in &mut self.state().calls {
            let is_twice = matches!(call.fault, Fault::Doubled(_) | Fault::Twice(_));
            call.doing.release &= call.doing.guard != Some(id) || is_twice;
        }
    }

    /// Checks promise 5 for a release.
    pub(super) fn not_released(&self, id: usize, error: &Error) {
        let Error::NotHeld { loss: Loss::Taken | Loss::Missing, .. } = error else { return };
        let mut state = self.state();
        let Tracked { keys, token, mode, own_token, .. } = &state.guards[id];
        if mode.is_shared() && !own_token {
            // Its own share may have been over, and the release ends the others of its token all the same.
            return;
        }
        let by_itself = |key: &Key| match state.last.get(&(key.clone(), token.clone())) {
            Some(&Last::Released(call)) => state.calls[call as usize].doing.guard == Some(id),
            _ => false,
        };
        if keys.iter().all(by_itself) {
            state.violate(
                self.start,
                "a release reports the loss of what it has released".into(),
                format!("guard {id}"),
            );
        }
    }

    /// Checks promise 7 for a request that has waited since `from`.
    pub(super) fn was_not_idle(&self, key: &Key, from: Instant, longest: Duration) {
        let mut state = self.state();
        let mut held: Vec<_> = state.guards.iter().filter(|guard| guard.keys.contains(key)).collect();
        held.sort_by_key(|guard| guard.born);
        let (now, mut idle_since, mut idle) = (Instant::now(), from, Duration::ZERO);
        for guard in held {
            idle = idle.max(guard.born.min(now).saturating_duration_since(idle_since));
            idle_since = idle_since.max(guard.over.unwrap_or(now));
        }
        idle = idle.max(now.saturating_duration_since(idle_since));
        if idle > longest {
            state.violate(self.start, "a lock is idle for long while somebody waits".into(), format!("{idle:?}"));
        }
    }

    /// Records that a lock is left on purpose, until it expires.
    pub(super) fn leave(&self, lease: Lease) {
        let mut state = self.state();
        let label = state.label(lease.token());
        state.note(self.start, format!("left: {:?} by {label}", lease.keys()));
        let are_of_it = |guard: &&mut Tracked| guard.token == *lease.token() && *guard.keys == *lease.keys();
        state.guards.iter_mut().filter(are_of_it).for_each(|guard| guard.has_no_bounds = true);
        state.leases.push(Left { lease, left: true });
    }

    /// Returns some lease, which may have been adopted before.
    pub(super) fn some_lease(&self, rng: &mut fastrand::Rng) -> Option<(usize, Lease)> {
        let state = self.state();
        let place = rng.choice(0..state.leases.len())?;
        Some((place, state.leases[place].lease.clone()))
    }

    /// Records that a lease has been adopted, so it is no longer left.
    pub(super) fn taken_up(&self, place: usize) {
        self.state().leases[place].left = false;
    }

    /// Returns the token of some guard, which is no longer that of one request alone.
    pub(super) fn some_token(&self, rng: &mut fastrand::Rng) -> Option<Token> {
        let mut state = self.state();
        let place = rng.choice(0..state.guards.len())?;
        let token = state.guards[place].token.clone();
        state.seen.insert(token.clone());
        Some(token)
    }

    /// Returns the shortest delay that no other notification has now. With equal delays, tokio would wake one of them
    /// by chance, and a history would differ from one time to the next.
    pub(super) fn take_delay(&self) -> u64 {
        let mut state = self.state();
        let delay = (1..).find(|delay| !state.delays.contains(delay)).unwrap();
        state.delays.insert(delay);
        delay
    }

    pub(super) fn give_back_delay(&self, delay: u64) {
        self.state().delays.remove(&delay);
    }

    pub(super) fn late_until(&self) -> Instant {
        self.state().late_until.unwrap_or(self.start)
    }

    pub(super) fn obtained(&self) -> usize {
        self.state().guards.len()
    }

    /// Returns how many locks were handed over in a process without the server: those by a token that is a request's
    /// own and was used before.
    pub(super) fn taken_over(&self) -> usize {
        let state = self.state();
        let mut before = HashSet::new();
        let alone = state.guards.iter().filter(|guard| guard.own_token && guard.mode == Mode::Exclusive);
        alone.filter(|guard| !before.insert(&guard.token)).count()
    }

    /// Records that everything these tokens hold is about to be ended on purpose; for `None`, everything that any token
    /// holds.
    pub(super) fn ends_outside(&self, token: Option<&Token>) {
        if !self.is_outside {
            return;
        }
        let mut state = self.state();
        // The longest time that the call may take.
        let until = Instant::now() + Duration::from_secs(2);
        let State { guards, ended, .. } = &mut *state;
        for guard in guards.iter().filter(|guard| token.is_none_or(|token| guard.token == *token)) {
            ended.extend(guard.keys.iter().map(|key| (key.clone(), guard.token.clone(), until)));
        }
    }

    /// Returns the guards of a key that are held, with their deadlines.
    pub(super) fn claims(&self, key: &Key) -> Vec<(usize, Instant)> {
        let state = self.state();
        let claim = |(id, guard): (usize, &Tracked)| {
            let seen = guard.hold.upgrade()?.peek();
            (seen.verdict.is_ok() && guard.keys.contains(key)).then_some((id, seen.deadline))
        };
        state.guards.iter().enumerate().filter_map(claim).collect()
    }

    /// Checks promise 2 after the server was asked, when these claims had been made, who holds the key. Guards that are
    /// still held were held when it replied.
    pub(super) fn compare(&self, key: &Key, claims: Vec<(usize, Instant)>, holders: &[Holder]) {
        let mut state = self.state();
        for (id, deadline) in claims {
            let guard = &state.guards[id];
            let Some(hold) = guard.hold.upgrade() else { continue };
            let seen = hold.peek();
            let ended = |(of, by, at): &(Key, Token, Instant)| of == key && *by == guard.token && guard.sent <= *at;
            if seen.verdict.is_err() || state.ended.iter().any(ended) {
                continue;
            }
            let holder = holders.iter().find(|holder| holder.token == guard.token);
            let remaining = holder.and_then(|holder| holder.remaining);
            // The server counts in milliseconds.
            let until = remaining.map(|remaining| Instant::now() + remaining + Duration::from_millis(1));
            if until.is_none_or(|until| until < deadline.min(seen.deadline)) {
                let details = format!("guard {id} and {key}, held for {:?}; at the server: {remaining:?}", hold.ttl());
                state.ended.push((key.clone(), hold.owned.token.clone(), Instant::now()));
                state.violate(self.start, "a guard is held, but not at the server".into(), details);
            }
        }
    }

    /// Checks promise 4 against what the server replies.
    pub(super) fn left_outside(&self, key: &Key, holder: &Holder) {
        let mut state = self.state();
        let left = |left: &Left| left.left && *left.lease.token() == holder.token && left.lease.keys().contains(key);
        let is_short = holder.remaining.is_some_and(|remaining| remaining < Duration::from_secs(5));
        // Tokens with more than one grant are an open issue (`universe.rs`).
        let grants = state.guards.iter().filter(|guard| guard.token == holder.token).count();
        let is_shared = holder.token.as_str().starts_with("shared") || grants > 1;
        if !is_short && !is_shared && !state.leases.iter().any(left) {
            let details = format!("{key}, for {:?}, after {grants} guards", holder.remaining);
            state.violate(self.start, "a key is left behind".into(), details);
        }
    }

    /// Checks promise 4: everything is over, and all delays have passed.
    pub(super) fn look_for_leftovers(&self) {
        let mut state = self.state();
        for key in &self.keys {
            for (_, token, _, until) in self.store.held_by(key) {
                let left = |left: &Left| left.left && *left.lease.token() == token && left.lease.keys().contains(key);
                if state.leases.iter().any(left) {
                    continue;
                }
                // An adoption that fails leaves the lock to its lease. So it does if another grant of the token had the
                // lock, and has ended meanwhile.
                let is_of_lease = |grant: &Option<GrantId>| {
                    grant.is_some_and(|grant| state.given_back.contains(&(token.clone(), grant)))
                };
                let grants = self.store.grants_of(key);
                if !grants.is_empty() && grants.iter().all(is_of_lease) {
                    continue;
                }
                let label = state.label(&token);
                let (how, call) = match state.last.get(&(key.clone(), token.clone())) {
                    Some(&(Last::Granted(call) | Last::SetTtl(call))) => (state.how_left(call, &token), Some(call)),
                    _ => ("otherwise".to_owned(), None),
                };
                let details = format!("{key} of {label} for another {:?}; by call {call:?}", until - Instant::now());
                state.violate(self.start, format!("a key is left behind: {how}"), details);
            }
        }
    }

    /// Checks promise 4: the leases that were left have expired too.
    pub(super) fn look_for_anything(&self, lockers: &str) {
        for key in &self.keys {
            if !self.store.held_by(key).is_empty() {
                self.violate("a key outlives its ttl", key.to_string());
            }
        }
        if self.store.subscriptions() > 0 {
            self.violate("a subscription is left behind", String::new());
        }
        if !lockers.is_empty() {
            self.violate("a queue is left behind", lockers.to_owned());
        }
    }

    /// Locks the state, poisoned or not: no code panics while it holds this mutex, except by a bug in this module.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn label(&mut self, token: &Token) -> String {
        let next = self.labels.len();
        self.labels.entry(token.clone()).or_insert_with(|| format!("token {next}")).clone()
    }

    fn peek_label(&self, token: &Token) -> String {
        self.labels.get(token).cloned().unwrap_or_default()
    }

    fn note(&mut self, start: Instant, line: String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.3?} {line}", start.elapsed()));
        }
    }

    fn note_with(&mut self, start: Instant, line: impl FnOnce() -> String) {
        if self.trace.is_some() {
            self.note(start, line());
        }
    }

    fn violate(&mut self, start: Instant, what: String, details: String) {
        let details = format!("after {:?}: {details}", start.elapsed());
        self.note_with(start, || format!("VIOLATION: {what}: {details}"));
        self.violations.push(Violation { what, details });
    }

    fn granted(&mut self, world: &World, call: u64, keys: &[Key], token: &Token, fence: Option<u64>) {
        *self.grants.entry(token.clone()).or_default() += 1;
        for key in keys {
            self.last.insert((key.clone(), token.clone()), Last::Granted(call));
            let Some(fence) = fence else { continue };
            self.first_fence.get_or_insert(fence);
            self.granted.entry(token.clone()).or_default().insert(fence);
            // Promise 3. A grant to a current holder may repeat its number.
            let repeated = self.has(key, token);
            let before = self.fences.get(key).copied();
            let is_repeat = repeated && before.is_some_and(|before| before >= fence);
            if !is_repeat && before.is_some_and(|before| before >= fence) {
                let label = self.label(token);
                self.violate(world.start, "fencing tokens don't grow".into(), format!("{key} by {label}"));
            }
            self.fences.insert(key.clone(), before.map_or(fence, |before| before.max(fence)));
        }
    }

    /// Checks promise 1 for a permit: whoever gets it is one of no more than its own request allows.
    fn admitted(&mut self, world: &World, call: u64, wanted: &Wanted) {
        let Owned { mode: Mode::Permit, token, .. } = &wanted.owned else { return };
        self.limit = self.limit.max(wanted.limit);
        for key in &wanted.owned.keys {
            let others = world.store.held_by(key).into_iter().map(|(_, by, ..)| by).filter(|by| by != token);
            let (nobodys, others): (Vec<_>, Vec<_>) = others.partition(|by| *by == Token::nobody());
            let count = nobodys.len() + others.into_iter().collect::<HashSet<_>>().len();
            if count >= wanted.limit && !self.has(key, token) {
                let details = format!("call {call}: {count} others have one, of {}", wanted.limit);
                self.violate(world.start, "a permit too many".into(), details);
            }
        }
    }

    /// Returns whether a token held the key before the present event.
    fn has(&self, key: &Key, token: &Token) -> bool {
        self.span(key, token).is_some()
    }

    /// Returns the last time for which a token holds the key, if it still did before the present event.
    fn span(&self, key: &Key, token: &Token) -> Option<&Span> {
        let now = Instant::now();
        let spans = self.history.get(key).map(Vec::as_slice).unwrap_or_default();
        spans.iter().rev().find(|span| span.until > now && span.token == *token)
    }

    /// Checks promise 8 for a renewal.
    fn renewed(&mut self, world: &World, call: u64, owned: &Owned, ttl: Duration) {
        let sent = self.calls[call as usize].sent;
        let is_its = |guard: &&Tracked| guard.token == owned.token && guard.grant == owned.grant;
        let its_guard = self.guards.iter().rev().find(is_its).filter(|guard| !guard.has_no_bounds);
        let limit = its_guard.and_then(|guard| Some(guard.limit?.max(guard.stays_until)));
        // The server has no smaller unit.
        if limit.is_some_and(|limit| limit + Duration::from_millis(1) < sent + ttl) {
            self.violate(world.start, "a renewal goes beyond the limit".into(), format!("call {call}"));
        }
    }

    /// Records a release. Some of the keys may still be held, for other grants of the token.
    fn released(&mut self, call: u64, keys: &[Key], token: &Token, ending: Ending, world: &World) {
        let now = Instant::now();
        let explicit = ending == Ending::Lock && self.calls[call as usize].doing.release;
        for key in keys {
            if explicit {
                self.ended.push((key.clone(), token.clone(), now));
                let own = self.calls[call as usize].doing.guard;
                let others =
                    self.guards.iter_mut().enumerate().filter(|(id, _)| Some(*id) != own).map(|(_, guard)| guard);
                let of_it = others.filter(|guard| guard.token == *token && guard.keys.contains(key));
                of_it.for_each(|guard| guard.has_no_bounds = true);
            }
            // Promise 9. A guard that is older than what the token holds now has lost its own lock before.
            let spans = self.history.get(key).map(Vec::as_slice).unwrap_or_default();
            let has_to_stay = |guard: &Tracked| {
                let is_its = guard.token == *token && guard.keys.contains(key);
                let of_it = spans.iter().any(|span| span.until > now && guard.has_had(span) && span.from <= guard.born);
                is_its && of_it && guard.is_to_stay(now)
            };
            let mut at_server = world.store.held_by(key).into_iter().map(|(_, by, ..)| by);
            let is_taken = at_server.any(|by| by == *token || by == Token::nobody());
            if !is_taken && self.guards.iter().any(has_to_stay) {
                let label = self.label(token);
                self.violate(world.start, "a key is freed that has to stay taken".into(), format!("{key} of {label}"));
            }
            let is_gone = world.store.held_by(key).iter().all(|(_, by, ..)| by != token);
            if is_gone && self.has(key, token) {
                self.last.insert((key.clone(), token.clone()), Last::Released(call));
            }
        }
    }

    /// Brings the history up to date.
    fn look(&mut self, world: &World) {
        let now = Instant::now();
        for key in &world.keys {
            let spans = self.history.entry(key.clone()).or_default();
            let mut at_server = world.store.held_by(key);
            for span in spans.iter_mut().filter(|span| span.until > now) {
                let is_it = |(mode, token, grant, _): &(Mode, Token, Option<GrantId>, Instant)| {
                    (*mode, token, *grant) == (span.mode, &span.token, span.grant)
                };
                span.until = match at_server.iter().position(is_it) {
                    Some(place) => at_server.swap_remove(place).3,
                    None => now,
                };
            }
            let begin = |(mode, token, grant, until)| Span { mode, token, grant, from: now, until };
            spans.extend(at_server.into_iter().map(begin));
        }
    }

    /// Returns whether the lock has been held at the server without a gap, as far as was seen.
    fn has_been_there(&self, id: usize) -> bool {
        let guard = &self.guards[id];
        let Tracked { keys, token, sent, born, .. } = guard;
        let now = Instant::now();
        keys.iter().all(|key| {
            let ended = self.ended.iter().any(|(of, by, at)| of == key && by == token && sent <= at);
            let last = self.history.get(key).and_then(|spans| spans.iter().rev().find(|span| guard.has_had(span)));
            !ended && last.is_some_and(|last| last.from <= *born && now < last.until)
        })
    }

    /// Returns why a guard that is held is not held at the server.
    fn why_not_there(
        &self,
        id: usize,
        key: &Key,
        deadline: Instant,
        start: Instant,
        holder: Option<(Token, Instant)>,
    ) -> (String, String) {
        let what = match self.last.get(&(key.clone(), self.guards[id].token.clone())) {
            Some(&Last::Released(call)) => {
                let client = self.calls[call as usize].client;
                let whose = if client == self.guards[id].client { "its own client" } else { "another client" };
                let token = &self.guards[id].token;
                let releasing = self.guards.iter().enumerate().rev().find(|(other, guard)| {
                    *other != id && guard.client == client && guard.token == *token && guard.keys.contains(key)
                });
                let by = match releasing
                    .map(|(_, guard)| guard.loss.or_else(|| guard.hold.upgrade()?.peek().verdict.err()))
                {
                    Some(Some(Loss::Expired)) => "an expired guard",
                    Some(Some(Loss::Released)) => "a dropped guard",
                    Some(_) => "another guard",
                    None => "an attempt",
                };
                format!("a guard is held, its key released in the background for {by} of {whose}")
            }
            Some(&Last::SetTtl(call)) => {
                let own = self.calls[call as usize].doing.guard == Some(id);
                let whose = if own { "its own" } else { "a twin's" };
                format!("a guard is held, its ttl made shorter by {whose} request")
            }
            Some(Last::Granted(_)) => "a guard is held for longer than at the server".to_owned(),
            None => "a guard is held that was never granted".to_owned(),
        };
        let holder = holder.map(|(token, until)| (self.peek_label(&token), until - start));
        let details = format!("guard {id} and {key}, held until {:?}; at the server: {holder:?}", deadline - start);
        (what, details)
    }

    /// Returns how a key came to be left behind by the last call that set its ttl.
    fn how_left(&self, call: u64, token: &Token) -> String {
        let Call { client, sent, ran, fault, .. } = self.calls[call as usize];
        let is_its = |guard: &&Tracked| guard.token == *token && guard.client == client && guard.sent == sent;
        let of_token = self.guards.iter().find(is_its);
        let of_a_set = of_token.is_some_and(|guard| guard.keys.len() > 1);
        let told = of_token.and_then(|guard| guard.loss);
        let late = ran.is_some_and(|ran| ran - sent > Duration::from_millis(500));
        let grants = self.grants.get(token).copied().unwrap_or_default();
        let how = match fault {
            _ if grants > 1 && self.own.contains(token) => "of one request's own token that was granted it again",
            _ if grants > 1 => "of a token that was granted it more than once",
            Fault::Doubled(_) | Fault::Twice(_) => "an attempt that was run twice",
            Fault::RunAfter(_) if late => "an attempt that was run late",
            _ if of_a_set && matches!(told, Some(Loss::Missing | Loss::Taken)) => "one of a set that was lost",
            _ if of_token.is_some() => "one that a guard had",
            _ => "an attempt that nobody undid",
        };
        how.to_owned()
    }
}

/// Counts fencing tokens from the first one, so that a history reads the same each time.
fn relative(text: &str, first: Option<u64>) -> String {
    let number = text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| Some((digits, digits.parse().ok()?)));
    let fence = number.max_by_key(|&(_, number): &(&str, u64)| number).zip(first);
    match fence {
        Some(((digits, number), first)) if number > 1_000_000_000_000_000 => {
            text.replace(digits, &format!("+{}", number.saturating_sub(first)))
        }
        _ => text.to_owned(),
    }
}
