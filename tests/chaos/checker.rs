//! Decides from the histories whether the promises were kept.
//!
//! # When a guard is held by its own word
//!
//! A guard is held during one interval: it begins before the request returns, and once a guard is not held, it never is
//! again. So what the guard has said at a few instants bounds that interval. The checker counts only the part of it
//! that is certain:
//!
//! - It begins at the instant read *after* the request had returned: from then on the worker could ask.
//! - It goes on at least until the latest instant that was read *before* a call of `is_held()` that returned true. The
//!   last such call comes just before the worker ends the guard.
//! - If the guard ended as `Expired`, and not by a verdict of the server, it goes on until its last deadline: whoever
//!   had asked before that would have heard that it is held.
//!
//! So there is **no false alarm**. Wherever a worker is frozen, its calls of `is_held()` lie after the instant read
//! before them and before the one read after, and events that are written late change no instant. Two certain parts
//! that overlap have an instant in common at which both guards would have said that they are held.
//!
//! And **no overlap is hidden**, except for what lies outside the certain parts: at the beginning, the time between the
//! grant and the return of the request, in which nobody can ask; at the end nothing for a guard that expired, a few
//! microseconds for one that was released or dropped, and the time between two samples ([`worker`](crate::worker)) for
//! one that died with its process, or was ended by the server (`Taken`, `Missing`). The last can't happen where no
//! server forgets, except through somebody's release, so there it is a violation by itself ([`Violation::Verdict`]).
//!
//! # Fencing tokens
//!
//! - Of two grants of a key, of which one had returned before the other was asked for, the later one has the greater
//!   token, in whatever modes; unless it continues a lease, and has that one's token.
//! - Of two certain parts of exclusive guards that don't overlap, the later one has the greater token, even if both
//!   waited at the same time.
//! - No two holders have the same token. Guards of one holder may.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::history::{Event, GUARDS_PER_WORKER, GuardId, Mode, Nanos};

/// What the checker has to know about a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    /// No server loses what it has granted. A guard of a quorum may be ended by the nodes' reply that no majority has
    /// it, and none can: one node had refused it, and another has forgotten it.
    pub(crate) nobody_forgets: bool,
    /// When the faults had ended.
    pub(crate) calm: Nanos,
    /// How long a waiter may wait from then on.
    pub(crate) patience: Nanos,
    /// The workers that were killed.
    pub(crate) killed: BTreeSet<u64>,
}

/// A promise that was broken.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Violation {
    /// Two holders at the same time, for this long.
    Overlap { key: String, first: GuardId, second: GuardId, at: Nanos, lasts: Nanos },
    /// One permit too many.
    Crowd { key: String, limit: usize, last: GuardId, at: Nanos },
    /// The later grant has no greater token.
    Order { key: String, earlier: GuardId, later: GuardId, tokens: (u64, u64) },
    /// A holder's write was refused.
    RefusedHolder { key: String, guard: GuardId },
    /// The register has accepted a token that is lower than the one before.
    Stale { key: String, tokens: (u64, u64) },
    /// The server has ended a lock that nobody else could have.
    Verdict { guard: GuardId, loss: String },
    /// A request was not answered, or not in time.
    Unserved { guard: GuardId },
    /// Something is left behind.
    Left(String),
    /// A worker has failed, or there is no sense in what it has written.
    Broken(String),
}

impl Violation {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Overlap { .. } => "overlap",
            Self::Crowd { .. } => "too many permits",
            Self::Order { .. } => "tokens don't rise",
            Self::RefusedHolder { .. } => "a holder was refused",
            Self::Stale { .. } => "a stale write was accepted",
            Self::Verdict { .. } => "ended by the server",
            Self::Unserved { .. } => "not served",
            Self::Left(_) => "left behind",
            Self::Broken(_) => "a worker failed",
        }
    }

    /// Returns whether it can happen once a fault has broken what the locks rest on. The tokens of a single server rise
    /// even then, as they follow its clock.
    pub(crate) fn is_expected(&self, is_quorum: bool) -> bool {
        match self {
            Self::Overlap { .. } | Self::Crowd { .. } | Self::RefusedHolder { .. } => true,
            Self::Order { .. } => is_quorum,
            _ => false,
        }
    }

    /// The guards that it is about.
    pub(crate) fn guards(&self) -> Vec<GuardId> {
        match *self {
            Self::Overlap { first, second, .. } => vec![first, second],
            Self::Order { earlier, later, .. } => vec![earlier, later],
            Self::Crowd { last: guard, .. }
            | Self::RefusedHolder { guard, .. }
            | Self::Verdict { guard, .. }
            | Self::Unserved { guard } => vec![guard],
            Self::Stale { .. } | Self::Left(_) | Self::Broken(_) => Vec::new(),
        }
    }
}

/// How a guard ends whose lease is left for somebody else.
pub(crate) const LEFT: &str = "handed over";

/// What the histories contain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) attempts: u64,
    pub(crate) grants: u64,
    pub(crate) failures: BTreeMap<String, u64>,
    pub(crate) renewals: u64,
    /// By how the guards ended.
    pub(crate) ends: BTreeMap<String, u64>,
    /// Grants of a key whose last holder had expired or died, or had left a lease that nobody took in time.
    pub(crate) after_expiry: u64,
    /// Of these, requests that had waited for that.
    pub(crate) waited_for_expiry: u64,
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    pub(crate) longest_wait: Nanos,
    pub(crate) violations: Vec<Violation>,
}

/// What became of one request and its guard.
#[derive(Clone, Debug)]
struct Guard {
    id: GuardId,
    mode: Mode,
    holder: String,
    keys: Vec<String>,
    patient: bool,
    attempted: Nanos,
    /// The request has returned, in whatever way.
    answered: Option<Nanos>,
    failed: bool,
    fence: Option<u64>,
    /// The end of the certain part, which begins at `answered`.
    until: Nanos,
    deadline: Nanos,
    loss: Option<String>,
    /// Ended by its worker.
    ended: bool,
    /// As a lease for somebody else.
    is_left: bool,
    writes: Vec<(Nanos, Nanos, String, bool)>,
}

impl Guard {
    /// Returns the part of the time for which the guard was surely held, unless it is empty.
    fn certain(&self) -> Option<(Nanos, Nanos)> {
        let from = self.fence.and(self.answered)?;
        (from < self.until).then_some((from, self.until))
    }

    /// Returns whether its lock must have expired if another was granted at this instant: nobody has released it.
    fn has_expired_by(&self, at: Nanos) -> bool {
        match (&self.loss, self.ended) {
            (Some(loss), _) => loss == "Expired",
            (None, true) => self.is_left && self.deadline <= at,
            // It died with its process.
            (None, false) => true,
        }
    }
}

/// Checks the events of all workers, each in the order in which it has written them, and the tokens that the register
/// has accepted for each key, in order.
pub(crate) fn check(events: impl IntoIterator<Item = Event>, accepted: &[(String, u64)], run: &Run) -> Report {
    let mut report = Report::default();
    let guards = collect(events, &mut report);
    let mut by_key: BTreeMap<&str, Vec<&Guard>> = BTreeMap::new();
    for guard in guards.values() {
        check_end(guard, run, &mut report);
        for key in &guard.keys {
            by_key.entry(key).or_default().push(guard);
        }
    }
    for (key, guards) in &by_key {
        check_overlaps(key, guards, &mut report);
        check_permits(key, guards, &mut report);
        check_tokens(key, guards, &mut report);
        check_order_of_exclusive(key, guards, &mut report);
    }
    check_register(accepted, &mut report);
    check_writes(&guards, &mut report);
    report
}

fn collect(events: impl IntoIterator<Item = Event>, report: &mut Report) -> HashMap<GuardId, Guard> {
    let mut guards = HashMap::new();
    for event in events {
        if let Event::Attempt { at, guard: id, mode, holder, keys, patient } = event {
            report.attempts += 1;
            let guard = Guard {
                id,
                mode,
                holder,
                keys,
                patient,
                attempted: at,
                answered: None,
                failed: false,
                fence: None,
                until: 0,
                deadline: 0,
                loss: None,
                ended: false,
                is_left: false,
                writes: Vec::new(),
            };
            guards.insert(id, guard);
            continue;
        }
        let Some(guard) = guards.get_mut(&event.guard()) else {
            report.violations.push(Violation::Broken(format!("without a request: {event:?}")));
            continue;
        };
        match event {
            Event::Attempt { .. } => {}
            Event::Granted { at, fence, .. } => {
                report.grants += 1;
                (guard.answered, guard.fence) = (Some(at), Some(fence));
            }
            Event::Failed { at, reason, .. } => {
                (guard.answered, guard.failed) = (Some(at), true);
                *report.failures.entry(reason).or_default() += 1;
            }
            Event::Held { before, deadline, .. } => {
                report.renewals += u64::from(guard.deadline != 0 && deadline > guard.deadline);
                (guard.until, guard.deadline) = (guard.until.max(before), deadline);
            }
            // The worker had ended it already, and so it claims nothing.
            Event::Lost { .. } if guard.ended => {}
            Event::Lost { loss, deadline, .. } => {
                if loss == "Expired" {
                    guard.until = guard.until.max(deadline);
                    guard.deadline = deadline;
                }
                *report.ends.entry(loss.clone()).or_default() += 1;
                guard.loss = Some(loss);
            }
            Event::Ending { how, .. } => {
                guard.ended = true;
                guard.is_left = how == LEFT;
                *report.ends.entry(how).or_default() += 1;
            }
            Event::Ended { .. } => {}
            Event::Wrote { before, after, key, accepted, .. } => guard.writes.push((before, after, key, accepted)),
        }
    }
    guards
}

/// Every request is answered, and no server ends a lock.
fn check_end(guard: &Guard, run: &Run, report: &mut Report) {
    let killed = run.killed.contains(&(guard.id / GUARDS_PER_WORKER));
    let waited = guard.answered.map(|answered| answered.saturating_sub(guard.attempted.max(run.calm)));
    if guard.fence.is_some() {
        report.longest_wait = report.longest_wait.max(waited.unwrap_or_default());
    }
    match waited {
        None if !killed => report.violations.push(Violation::Unserved { guard: guard.id }),
        Some(waited) if guard.patient && (guard.failed || waited > run.patience) => {
            report.violations.push(Violation::Unserved { guard: guard.id });
        }
        _ => {}
    }
    if let Some(loss) = guard.loss.as_ref().filter(|loss| run.nobody_forgets && *loss != "Expired") {
        report.violations.push(Violation::Verdict { guard: guard.id, loss: loss.clone() });
    }
}

/// Returns those with a certain part, in the order in which these begin.
fn by_beginning<'a>(guards: &[&'a Guard]) -> Vec<(Nanos, Nanos, &'a Guard)> {
    let certain = |guard: &&'a Guard| guard.certain().map(|(from, until)| (from, until, *guard));
    let mut parts: Vec<_> = guards.iter().filter_map(certain).collect();
    parts.sort_unstable_by_key(|&(from, until, _)| (from, until));
    parts
}

fn check_overlaps(key: &str, guards: &[&Guard], report: &mut Report) {
    // Those that may reach into a later one.
    let mut before: Vec<(Nanos, &Guard)> = Vec::new();
    for (from, until, second) in by_beginning(guards) {
        before.retain(|&(until, _)| from < until);
        for &(ends, first) in &before {
            if first.holder != second.holder && !first.mode.admits(second.mode) {
                let (first, second, lasts) = (first.id, second.id, ends.min(until) - from);
                let key = key.to_owned();
                report.violations.push(Violation::Overlap { key, first, second, at: from, lasts });
            }
        }
        before.push((until, second));
    }
}

fn check_permits(key: &str, guards: &[&Guard], report: &mut Report) {
    let mut inside: Vec<(Nanos, &str)> = Vec::new();
    for (from, until, guard) in by_beginning(guards) {
        let Mode::Permit { limit } = guard.mode else { continue };
        inside.retain(|&(until, _)| from < until);
        inside.push((until, &guard.holder));
        let holders: BTreeSet<&str> = inside.iter().map(|&(_, holder)| holder).collect();
        if holders.len() > limit {
            report.violations.push(Violation::Crowd { key: key.to_owned(), limit, last: guard.id, at: from });
        }
    }
}

/// Tokens rise from a grant that had returned to one that was asked for later, and are of one holder each.
fn check_tokens(key: &str, guards: &[&Guard], report: &mut Report) {
    let mut owners: HashMap<u64, &Guard> = HashMap::new();
    let mut grants: Vec<(Nanos, Nanos, u64, &Guard)> = Vec::new();
    for guard in guards {
        let (Some(answered), Some(fence)) = (guard.answered, guard.fence) else { continue };
        grants.push((guard.attempted, answered, fence, guard));
        let owner = owners.entry(fence).or_insert(guard);
        if owner.holder != guard.holder {
            report.violations.push(order(key, owner, guard));
        }
    }
    let mut returned = grants.clone();
    returned.sort_unstable_by_key(|&(_, answered, ..)| answered);
    grants.sort_unstable_by_key(|&(attempted, ..)| attempted);
    let mut returned = returned.into_iter().peekable();
    let mut highest: Option<(u64, &Guard)> = None;
    let mut seen: HashSet<(&str, u64)> = HashSet::new();
    for (attempted, _, fence, later) in grants {
        while let Some((.., earlier_fence, earlier)) = returned.next_if(|&(_, answered, ..)| answered <= attempted) {
            if highest.is_none_or(|(highest, _)| highest < earlier_fence) {
                highest = Some((earlier_fence, earlier));
            }
        }
        // Whoever continues a lease has its token, and others may have shared the key with it since.
        let is_continued = !seen.insert((&later.holder, fence));
        if let Some((_, earlier)) = highest.filter(|&(highest, _)| highest > fence && !is_continued) {
            report.violations.push(order(key, earlier, later));
        }
    }
}

/// Tokens rise in the order in which exclusive guards of different holders were held, also of those that have waited at
/// the same time. The server may grant a lock to two requests of one holder at once, and either may hear of it first.
fn check_order_of_exclusive(key: &str, guards: &[&Guard], report: &mut Report) {
    // Of the two holders that were last, the guard that ended last.
    let mut last: Vec<(Nanos, &Guard)> = Vec::new();
    for (from, until, guard) in by_beginning(guards) {
        if guard.mode != Mode::Exclusive {
            continue;
        }
        if let Some((_, earlier)) =
            last.iter().rfind(|(ended, earlier)| *ended <= from && earlier.holder != guard.holder)
        {
            if guard.fence < earlier.fence {
                report.violations.push(order(key, earlier, guard));
            }
        }
        if let Some((_, earlier)) = last.last().filter(|(ended, _)| *ended <= from) {
            if earlier.holder != guard.holder && earlier.has_expired_by(from) {
                report.after_expiry += 1;
                report.waited_for_expiry += u64::from(guard.attempted < earlier.deadline);
            }
        }
        match last.iter_mut().find(|(_, earlier)| earlier.holder == guard.holder) {
            // Guards of one holder overlap.
            Some(own) if until <= own.0 => {}
            Some(own) => *own = (until, guard),
            None => last.push((until, guard)),
        }
        last.sort_by_key(|(ended, _)| *ended);
        last.drain(..last.len().saturating_sub(2));
    }
}

fn order(key: &str, earlier: &Guard, later: &Guard) -> Violation {
    let tokens = (earlier.fence.unwrap_or_default(), later.fence.unwrap_or_default());
    Violation::Order { key: key.to_owned(), earlier: earlier.id, later: later.id, tokens }
}

fn check_register(accepted: &[(String, u64)], report: &mut Report) {
    let mut last: HashMap<&str, u64> = HashMap::new();
    for (key, token) in accepted {
        if let Some(before) = last.insert(key, *token).filter(|before| before > token) {
            report.violations.push(Violation::Stale { key: key.clone(), tokens: (before, *token) });
        }
    }
}

/// Whoever is surely held from before its write until after is not refused. Unless another guard of the same holder has
/// a greater token: nodes of a quorum that vote for both at the same time may give each a number of its own.
fn check_writes(guards: &HashMap<GuardId, Guard>, report: &mut Report) {
    let mut by_holder: HashMap<&str, Vec<&Guard>> = HashMap::new();
    for guard in guards.values() {
        by_holder.entry(&guard.holder).or_default().push(guard);
    }
    for guard in guards.values() {
        for (before, after, key, accepted) in &guard.writes {
            report.accepted += u64::from(*accepted);
            report.refused += u64::from(!accepted);
            if *accepted || guard.certain().is_none_or(|(from, until)| *before < from || until < *after) {
                continue;
            }
            let is_greater = |other: &&Guard| {
                other.fence > guard.fence && other.keys.contains(key) && other.answered.is_some_and(|at| at <= *after)
            };
            if !by_holder[guard.holder.as_str()].iter().any(is_greater) {
                report.violations.push(Violation::RefusedHolder { key: key.clone(), guard: guard.id });
            }
        }
    }
}
