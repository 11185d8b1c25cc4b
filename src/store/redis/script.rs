//! The scripts, how one is run, and what its reply consists of.
//!
//! A script is run by its hash, or sent whole to a server that doesn't know it.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use sha1_smol::Sha1;
use tokio::time::Instant;

use super::driver::Value;
use super::refusal::normalize;
use super::replies::unexpected;
use super::router::{Router, Sent};
use crate::{Error, RedisError, RedisErrorKind};

/// A script, and the hash by which the server knows it.
pub(super) struct Script {
    pub(super) source: Bytes,
    hash: Bytes,
    /// Whether its keys belong to several operations, which could be sent one by one instead.
    is_batch: bool,
}

pub(super) struct Scripts {
    pub(super) acquire: Script,
    pub(super) acquire_one: Script,
    pub(super) acquire_in_line: Script,
    pub(super) enter: Script,
    pub(super) heartbeat: Script,
    pub(super) leave: Script,
    pub(super) renew: Script,
    pub(super) renew_one: Script,
    pub(super) renew_grant: Script,
    pub(super) release: Script,
    pub(super) release_one: Script,
    pub(super) end_grant: Script,
    pub(super) force_release: Script,
    pub(super) linger: Script,
    pub(super) hand_over: Script,
    pub(super) probe: Script,
    pub(super) remaining: Script,
    pub(super) inspect: Script,
    pub(super) many: Script,
    pub(super) vote: Script,
    pub(super) vote_shared: Script,
    pub(super) metadata: Script,
    pub(super) announce: Script,
    pub(super) withdraw: Script,
    pub(super) acquire_shared: Script,
    pub(super) renew_shared: Script,
    pub(super) end_share: Script,
    pub(super) downgrade: Script,
    pub(super) remaining_shared: Script,
    pub(super) holders: Script,
    /// Counts the stamps, from a random number on.
    mark: AtomicU32,
}

const STAMP: &str = include_str!("scripts/stamp.lua");
const OURS_ONE: &str = include_str!("scripts/ours_one.lua");
const OWNER: &str = include_str!("scripts/owner.lua");
const FORGET: &str = include_str!("scripts/forget.lua");
const HELD: &str = include_str!("scripts/held.lua");
const FENCE: &str = include_str!("scripts/fence.lua");
const GRANTS: &str = include_str!("scripts/grants.lua");
const EXTEND: &str = include_str!("scripts/extend.lua");
const LINE: &str = include_str!("scripts/line.lua");
const NOBODY: &str = include_str!("scripts/nobody.lua");
const MARKER: &str = include_str!("scripts/marker.lua");
const SHARES: &str = include_str!("scripts/shares.lua");
const UPTIME: &str = include_str!("scripts/uptime.lua");
const ANNOUNCED: &str = include_str!("scripts/announced.lua");

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            acquire: Script::new(&[OWNER, FENCE, GRANTS, LINE, include_str!("scripts/acquire.lua")]),
            acquire_one: Script::for_one_key(&[include_str!("scripts/acquire_one.lua")]),
            acquire_in_line: Script::new(&[OWNER, FENCE, GRANTS, LINE, include_str!("scripts/acquire_in_line.lua")]),
            enter: Script::after(include_str!("scripts/enter_one.lua"), &[LINE, include_str!("scripts/enter.lua")]),
            heartbeat: Script::new(&[MARKER, LINE, include_str!("scripts/heartbeat.lua")]),
            leave: Script::new(&[MARKER, LINE, include_str!("scripts/leave.lua")]),
            renew: Script::new(&[OWNER, EXTEND, include_str!("scripts/renew.lua")]),
            renew_one: Script::for_one_key(&[OURS_ONE, include_str!("scripts/renew_one.lua")]),
            renew_grant: Script::new(&[OWNER, HELD, GRANTS, EXTEND, UPTIME, include_str!("scripts/renew_grant.lua")]),
            release: Script::new(&[OWNER, FORGET, LINE, include_str!("scripts/release.lua")]),
            release_one: Script::for_one_key(&[
                OURS_ONE,
                include_str!("scripts/release_one.lua"),
                LINE,
                include_str!("scripts/pass_on_one.lua"),
            ]),
            end_grant: Script::new(&[OWNER, FORGET, HELD, GRANTS, NOBODY, LINE, include_str!("scripts/end_grant.lua")]),
            force_release: Script::new(&[MARKER, SHARES, LINE, include_str!("scripts/force_release.lua")]),
            linger: Script::new(&[OWNER, FORGET, HELD, GRANTS, NOBODY, include_str!("scripts/linger.lua")]),
            hand_over: Script::after(
                include_str!("scripts/hand_over_one.lua"),
                &[OWNER, FORGET, HELD, FENCE, GRANTS, LINE, include_str!("scripts/hand_over.lua")],
            ),
            probe: Script::new(&[include_str!("scripts/probe.lua")]),
            remaining: Script::new(&[OWNER, HELD, include_str!("scripts/remaining.lua")]),
            inspect: Script::new(&[MARKER, include_str!("scripts/inspect.lua")]),
            many: Script { is_batch: true, ..Script::whole([STAMP, OWNER, include_str!("scripts/many.lua")].concat()) },
            vote: Script::new(&[OWNER, FENCE, GRANTS, UPTIME, MARKER, include_str!("scripts/vote.lua")]),
            vote_shared: Script::new(&[FENCE, SHARES, ANNOUNCED, UPTIME, include_str!("scripts/vote_shared.lua")]),
            metadata: Script::new(&[SHARES, include_str!("scripts/metadata.lua")]),
            announce: Script::new(&[include_str!("scripts/announce.lua")]),
            withdraw: Script::new(&[include_str!("scripts/withdraw.lua")]),
            acquire_shared: Script::new(&[FENCE, SHARES, LINE, include_str!("scripts/acquire_shared.lua")]),
            renew_shared: Script::after(
                include_str!("scripts/renew_shared_one.lua"),
                &[HELD, SHARES, UPTIME, include_str!("scripts/renew_shared.lua")],
            ),
            end_share: Script::new(&[HELD, MARKER, SHARES, LINE, include_str!("scripts/end_share.lua")]),
            downgrade: Script::new(&[OWNER, HELD, GRANTS, SHARES, LINE, include_str!("scripts/downgrade.lua")]),
            remaining_shared: Script::new(&[HELD, SHARES, include_str!("scripts/remaining_shared.lua")]),
            holders: Script::new(&[MARKER, SHARES, include_str!("scripts/holders.lua")]),
            // Other lockers may use the same connection, and must not use the same marks.
            mark: AtomicU32::new(fastrand::u32(..)),
        }
    }

    /// Returns the stamp of a request that may run until `latest`, in ms by the server's clock. No other recent request
    /// has the same.
    pub(super) fn stamp(&self, latest: u64) -> Stamp {
        let mark = self.mark.fetch_add(1, Ordering::Relaxed);
        Stamp(latest.min(Stamp::LATEST) * Stamp::MARKS + u64::from(mark) % Stamp::MARKS)
    }
}

impl fmt::Debug for Scripts {
    /// Leaves out their sources, which are several pages long.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scripts").finish_non_exhaustive()
    }
}

/// What every request carries besides the arguments of its script, in one number (`stamp.lua`): the time until which it
/// may run, and a mark that distinguishes its reply from those to other requests.
#[derive(Clone, Copy)]
pub(super) struct Stamp(u64);

impl Stamp {
    /// The number of marks that distinguish requests that may run until the same millisecond.
    const MARKS: u64 = 2_048;
    /// Lua's numbers are exact below 2^53. As a time in ms, this is in the year 2109.
    const LATEST: u64 = (1 << 42) - 1;

    /// Returns a stamp with this mark.
    #[cfg(fuzzing)]
    pub(super) fn of(mark: u32) -> Self {
        Self(mark.into())
    }

    /// Returns the mark that the reply repeats.
    fn mark(self) -> i64 {
        i64::try_from(self.0 & u64::from(u32::MAX)).unwrap_or_default()
    }

    /// Returns the time, in us by the server's clock, from which the request may no longer run.
    fn end(self) -> i64 {
        i64::try_from((self.0 / Self::MARKS + 1) * 1_000).unwrap_or_default()
    }
}

impl Script {
    /// Joins the parts of a script, with what all scripts begin and end with.
    fn new(parts: &[&str]) -> Self {
        Self::after("", parts)
    }

    /// Does the same, with lines before everything else that decide the most common case as a script for one key does.
    fn after(first: &str, parts: &[&str]) -> Self {
        let before = [STAMP, first, include_str!("scripts/prologue.lua")];
        Self::whole([&before, parts, &[include_str!("scripts/epilogue.lua")]].concat().concat())
    }

    /// Joins the parts of a script for one key. These run most often.
    fn for_one_key(parts: &[&str]) -> Self {
        Self::whole([STAMP, &parts.concat()].concat())
    }

    fn whole(source: String) -> Self {
        Self { hash: Sha1::from(&source).digest().to_string().into(), source: source.into(), is_batch: false }
    }

    /// Runs the script once, and ends by `until`. `call` builds the call each time that it is sent: it is almost always
    /// sent once, and a copy for other times would cost more.
    ///
    /// Sends its hash. If the server doesn't know it (after a restart, a failover or SCRIPT FLUSH), sends the whole
    /// script, which the server remembers from then on. NOSCRIPT means that nothing has run, so this is still one run.
    pub(super) async fn run(
        &self,
        router: &Router,
        call: impl Fn() -> Call + Sync,
        stamp: Stamp,
        until: Instant,
    ) -> Result<Reply, Error> {
        let answer = match router.send(self.sent(EVALSHA), || call().of(&self.hash, stamp), until).await {
            Err(error) if error.refusal() == Some("NOSCRIPT") => {
                Box::pin(router.send(self.sent(EVAL), || call().of(&self.source, stamp), until)).await
            }
            answer => answer,
        };
        Reply::read(answer?, stamp)
    }

    fn sent(&self, command: &'static str) -> Sent<'_> {
        Sent { command, source: (!self.is_batch).then_some(&self.source) }
    }
}

/// The reply of a script.
pub(super) struct Reply {
    /// The server's clock in ms, if the reply has it.
    pub(super) now: Option<u64>,
    /// What the script returned, or why it failed.
    pub(super) outcome: Result<Returned, Error>,
}

/// What a script returned.
pub(super) enum Returned {
    /// A number that only this script gives a meaning to. From a script for one key, or from lines before another.
    Code(i64),
    /// The fencing token of a lock that it has taken. From the same scripts.
    FencingToken(i64),
    /// From any other script.
    Value(Value),
}

impl Reply {
    /// # Errors
    ///
    /// [`mixed_up`] if this is not the reply to the request with this stamp. The outcome of that request is unknown.
    pub(super) fn read(answer: Value, stamp: Stamp) -> Result<Self, Error> {
        let is_ours = |of: i64| if of == stamp.mark() { Ok(()) } else { Err(mixed_up()) };
        let granted =
            |token: i64| Self { now: u64::try_from(token / 1_000).ok(), outcome: Ok(Returned::FencingToken(token)) };
        let parts = match answer {
            Value::Integer(number @ ..0) => {
                let (early, mark) = (number.unsigned_abs() >> 32, number.unsigned_abs() & u64::from(u32::MAX));
                is_ours(i64::try_from(mark).unwrap_or_default())?;
                return Ok(granted(stamp.end().saturating_sub(i64::try_from(early).unwrap_or(i64::MAX))));
            }
            Value::Integer(number) => {
                is_ours(number >> 2)?;
                return Ok(Self { now: None, outcome: Ok(Returned::Code(number & 3)) });
            }
            Value::Array(parts) => parts,
            _ => return Err(mixed_up()),
        };
        let mut parts = parts.into_iter();
        let (Some(Value::Integer(of)), Some(Value::Integer(number))) = (parts.next(), parts.next()) else {
            return Err(mixed_up());
        };
        is_ours(of)?;
        let outcome = match (parts.next(), parts.next()) {
            (None, _) => return Ok(granted(number)),
            (Some(value), None) => Ok(Returned::Value(value)),
            (_, Some(failure)) => {
                let failure = failure.to_text().unwrap_or_default().into_owned();
                Err(into_ours(RedisError::new(RedisErrorKind::Unknown, failure)))
            }
        };
        // Zero if the script may not ask for the time.
        Ok(Self { now: u64::try_from(number).ok().filter(|now| *now > 0), outcome })
    }

    /// Returns the value that a script returned which is not for one key only.
    pub(super) fn value(self) -> Result<Value, Error> {
        match self.outcome? {
            Returned::Value(value) => Ok(value),
            Returned::Code(_) | Returned::FencingToken(_) => Err(unexpected()),
        }
    }
}

/// The error for a client that has handed us the reply to another request.
fn mixed_up() -> Error {
    // Treated as a broken connection: the outcome is unknown, and another connection may work.
    RedisError::new(RedisErrorKind::Io, MIXED_UP).into()
}

const MIXED_UP: &str = "the connection handed out the reply to another request; it is replaced";

/// Returns whether the connection can no longer be trusted.
pub(super) fn is_mixed_up(error: &Error) -> bool {
    matches!(error, Error::Redis(error) if error.details() == MIXED_UP)
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.hash))
    }
}

const EVALSHA: &str = "EVALSHA";
pub(super) const EVAL: &str = "EVAL";

/// The keys and arguments that a script is run with.
#[derive(Clone)]
pub(super) struct Call {
    keys: usize,
    /// Two places for the script and the number of keys, then the keys, then the other arguments.
    args: Vec<Bytes>,
}

impl Call {
    pub(super) fn new(keys: impl ExactSizeIterator<Item = Bytes>, args: impl IntoIterator<Item = Bytes>) -> Self {
        let mut call = Self::with_room_for(keys.len() + 5);
        call.keys(keys);
        call.args(args);
        call
    }

    /// Allocates for so many keys and arguments.
    pub(super) fn with_room_for(parts: usize) -> Self {
        let mut args = Vec::with_capacity(4 + parts);
        args.extend([const { Bytes::new() }; 2]);
        Self { keys: 0, args }
    }

    /// Adds keys. Must be called before any other argument is added.
    pub(super) fn keys(&mut self, keys: impl Iterator<Item = Bytes>) {
        let before = self.args.len();
        self.args.extend(keys);
        self.keys += self.args.len() - before;
    }

    pub(super) fn args(&mut self, args: impl IntoIterator<Item = Bytes>) {
        self.args.extend(args);
    }

    fn of(mut self, script: &Bytes, stamp: Stamp) -> Vec<Bytes> {
        self.args.push(stamp.0.to_string().into());
        let count = match self.keys {
            1 => Bytes::from_static(b"1"),
            2 => Bytes::from_static(b"2"),
            others => others.to_string().into(),
        };
        let head = [script.clone(), count];
        self.args.iter_mut().zip(head).for_each(|(place, value)| *place = value);
        self.args
    }
}

/// Returns the error of a command, with the server's refusal as Redis 7 would write it.
pub(super) fn into_ours(error: RedisError) -> Error {
    let details = error.details();
    if details.starts_with("CROSSSLOT") {
        return Error::CrossSlot;
    }
    match normalize(details) {
        refusal if refusal == details => error.into(),
        // The client's error has the arguments in its text, and the token is one of them.
        refusal => {
            let refusal = refusal.into_owned();
            error.without_source().with_text(refusal).into()
        }
    }
}
