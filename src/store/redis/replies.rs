//! What the replies of the scripts mean: each is parsed here, and nowhere else, into the verdicts of the store.

use std::time::Duration;

use bytes::Bytes;

use super::driver::Value;
use super::refusal::normalize;
use super::script::Returned;
use crate::store::node::{HeldBy, Seen, Vote, VoteReply};
use crate::store::{Acquired, Downgraded, HandedOver, Holder, Verdict};
use crate::{Error, Loss, RedisError, RedisErrorKind, Token};

/// What the server has decided about an operation on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Acquire(Acquired),
    /// About a renewal or a release.
    Owned(Verdict),
}

impl Decision {
    pub(super) fn acquired(self) -> Result<Acquired, Error> {
        match self {
            Self::Acquire(acquired) => Ok(acquired),
            Self::Owned(_) => Err(unexpected()),
        }
    }

    pub(super) fn verdict(self) -> Result<Verdict, Error> {
        match self {
            Self::Owned(verdict) => Ok(verdict),
            Self::Acquire(_) => Err(unexpected()),
        }
    }
}

/// The kinds of operations, as far as their replies differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Acquire {
        is_fenced: bool,
    },
    /// A renewal or a release.
    Owned,
}

/// Parses what `acquire_one.lua`, `renew_one.lua` or `release_one.lua` has returned. `None` where the script leaves the
/// operation to another one.
pub(super) fn single(kind: Kind, returned: &Returned) -> Option<Result<Decision, Error>> {
    let decision = match (kind, returned) {
        (_, Returned::Code(3)) => return None,
        (Kind::Acquire { .. }, Returned::Code(1)) => Decision::Acquire(granted(0)),
        (Kind::Acquire { .. }, Returned::FencingToken(token)) => Decision::Acquire(granted(*token)),
        (Kind::Acquire { .. }, Returned::Value(reply)) => return part_of_batch(kind, reply),
        (Kind::Owned, Returned::Code(2)) => Decision::Owned(Verdict::NotOurs(Loss::Taken)),
        (Kind::Owned, Returned::Code(code)) => Decision::Owned(owned(*code)),
        _ => return Some(Err(unexpected())),
    };
    Some(Ok(decision))
}

/// Parses what `many.lua` has returned: a decision about each operation, and `None` where it leaves the operation to
/// another script.
pub(super) fn batch(
    kinds: impl ExactSizeIterator<Item = Kind>,
    reply: &Value,
) -> Result<Vec<Option<Result<Decision, Error>>>, Error> {
    let Value::Array(parts) = reply else { return Err(unexpected()) };
    let [Value::Integer(now), Value::Integer(usual), others @ ..] = &parts[..] else { return Err(unexpected()) };
    let mut found = vec![None; kinds.len()];
    for other in others.chunks(2) {
        let [Value::Integer(place), part] = other else { return Err(unexpected()) };
        let index = usize::try_from(*place).ok().and_then(|place| place.checked_sub(1));
        let place = index.and_then(|index| found.get_mut(index)).filter(|place| place.is_none());
        *place.ok_or_else(unexpected)? = Some(part);
    }
    // Also the number of the others, so that no operation is taken for done that the server doesn't know of.
    if i64::try_from(found.iter().filter(|part| part.is_none()).count()) != Ok(*usual) {
        return Err(unexpected());
    }
    let decision = |(kind, part): (Kind, Option<&Value>)| match part {
        Some(part) => part_of_batch(kind, part),
        None => Some(as_usual(kind, *now)),
    };
    Ok(kinds.zip(found).map(decision).collect())
}

/// Returns the decision about an operation that `many.lua` says nothing about.
fn as_usual(kind: Kind, now: i64) -> Result<Decision, Error> {
    match kind {
        Kind::Acquire { is_fenced: true } if now <= 0 => Err(unexpected()),
        Kind::Acquire { is_fenced: true } => Ok(Decision::Acquire(granted(now))),
        Kind::Acquire { is_fenced: false } => Ok(Decision::Acquire(granted(0))),
        Kind::Owned => Ok(Decision::Owned(Verdict::Done)),
    }
}

fn part_of_batch(kind: Kind, part: &Value) -> Option<Result<Decision, Error>> {
    Some(match (kind, part) {
        (Kind::Acquire { .. }, Value::Integer(number)) => Ok(Decision::Acquire(acquired_or_ttl(*number))),
        (Kind::Owned, Value::Integer(code)) => Ok(Decision::Owned(owned(*code))),
        (_, Value::Bytes(text)) if text == LEFT_TO_ANOTHER => return None,
        (_, Value::Bytes(refusal)) => {
            let refusal = normalize(&String::from_utf8_lossy(refusal)).into_owned();
            refused(kind, RedisError::new(RedisErrorKind::Unknown, refusal).into())
        }
        _ => Err(unexpected()),
    })
}

/// Returns the verdict that a refusal implies, if it implies one.
pub(super) fn refused(kind: Kind, error: Error) -> Result<Decision, Error> {
    match kind {
        // A key that holds no string is surely not our lock.
        Kind::Owned if error.refusal() == Some("WRONGTYPE") => Ok(Decision::Owned(Verdict::NotOurs(Loss::Taken))),
        _ => Err(error),
    }
}

/// Parses what `acquire.lua` has returned.
pub(super) fn acquired(reply: &Value) -> Result<Acquired, Error> {
    match integers(reply)?[..] {
        [1, fence] => Ok(granted(fence)),
        [0, ttl, place] => {
            let place = usize::try_from(place.saturating_sub(1)).unwrap_or_default();
            Ok(Acquired::held(place, from_millis(ttl)))
        }
        _ => Err(unexpected()),
    }
}

/// Parses what `acquire_in_line.lua` has returned. `None` where the key holds the token already: the token is no longer
/// in the line, and `acquire.lua` decides.
pub(super) fn acquired_in_line(reply: &Value) -> Result<Option<Acquired>, Error> {
    match reply {
        Value::Integer(number) => Ok(Some(acquired_or_ttl(*number))),
        Value::Bytes(text) if text == LEFT_TO_ANOTHER => Ok(None),
        _ => Err(unexpected()),
    }
}

/// Parses what `release.lua`, `renew.lua` and the scripts for grants have returned.
pub(super) fn verdict(reply: Result<Value, Error>) -> Result<Verdict, Error> {
    match reply {
        Ok(reply) => Ok(owned(integer(&reply)?)),
        Err(error) => refused(Kind::Owned, error)?.verdict(),
    }
}

/// Parses what `renew_grant.lua` has returned on a node of a quorum.
pub(super) fn verdict_of_node(reply: Result<Value, Error>) -> Result<Verdict, Error> {
    if let Ok(Value::Integer(silent @ ..-1)) = reply {
        let seconds = u64::try_from(-1 - silent).unwrap_or_default();
        return Err(Error::NotVoting { remaining: Duration::from_secs(seconds) });
    }
    verdict(reply)
}

/// Parses what `hand_over.lua` has returned.
pub(super) fn handed_over(returned: &Returned) -> Result<HandedOver, Error> {
    let done = |fence, alone| HandedOver::Done { fencing_token: fencing_token(fence), alone };
    let reply = match returned {
        Returned::Code(1) => return Ok(done(0, false)),
        Returned::FencingToken(fence) => return Ok(done(*fence, false)),
        Returned::Value(reply) => reply,
        Returned::Code(_) => return Err(unexpected()),
    };
    Ok(match integers(reply)?[..] {
        [-1] => HandedOver::NotOurs(Loss::Missing),
        [-2] => HandedOver::NotOurs(Loss::Taken),
        [-3] => HandedOver::NotNow,
        [-4] => HandedOver::PassedBy,
        [fence, alone] => done(fence, alone == 1),
        _ => return Err(unexpected()),
    })
}

/// Parses what `downgrade.lua` has returned.
pub(super) fn downgraded(reply: &Value) -> Result<Downgraded, Error> {
    Ok(match integer(reply)? {
        1 => Downgraded::Done,
        0 => Downgraded::NotOurs(Loss::Missing),
        -1 => Downgraded::NotOurs(Loss::Taken),
        -3 => Downgraded::NotNow,
        _ => return Err(unexpected()),
    })
}

/// Parses what `heartbeat.lua` has returned: whether the place is in the line.
pub(super) fn is_in_line(reply: &Value) -> bool {
    *reply == Value::Integer(1)
}

/// Parses what `remaining.lua` has returned.
pub(super) fn remaining(reply: &Value) -> Result<Option<Duration>, Error> {
    Ok(match integer(reply)? {
        -2 => None,
        // Somebody has removed the ttl; the next renewal sets it again.
        -1 => Some(Duration::MAX),
        ttl => from_millis(ttl),
    })
}

/// What `inspect.lua` has found.
pub(super) enum Inspected {
    Holder(Option<Holder>),
    /// Several may share the key.
    Shared,
}

/// Parses what `inspect.lua` has returned.
pub(super) fn inspected(reply: Value) -> Result<Inspected, Error> {
    match reply {
        Value::Nil => Ok(Inspected::Holder(None)),
        Value::Bytes(text) if text == SHARED => Ok(Inspected::Shared),
        Value::Array(parts) => holder(parts).map(|holder| Inspected::Holder(Some(holder))),
        _ => Err(unexpected()),
    }
}

/// A part of those who hold a key.
#[derive(Default)]
pub(super) struct Holders {
    pub(super) holders: Vec<Holder>,
    /// Where to go on, if there may be more.
    pub(super) next: Option<Bytes>,
}

/// Parses what `holders.lua` has returned.
pub(super) fn holders(reply: Value) -> Result<Holders, Error> {
    let parts = match reply {
        Value::Nil => return Ok(Holders::default()),
        Value::Array(parts) => parts,
        _ => return Err(unexpected()),
    };
    match <[Value; 2]>::try_from(parts) {
        Ok([Value::Bytes(next), Value::Array(shares)]) => {
            let holders = shares.into_iter().map(share).collect::<Result<_, _>>()?;
            Ok(Holders { holders, next: (next != "0").then_some(next) })
        }
        Ok(_) => Err(unexpected()),
        Err(parts) => Ok(Holders { holders: vec![holder(parts)?], next: None }),
    }
}

/// Parses one of those who share a key.
fn share(parts: Value) -> Result<Holder, Error> {
    let Value::Array(parts) = parts else { return Err(unexpected()) };
    let Ok([Value::Bytes(token), ttl, fence, Value::Bytes(metadata)]) = <[Value; 4]>::try_from(parts) else {
        return Err(unexpected());
    };
    Ok(Holder {
        token: Token::from_server(&token),
        metadata: metadata.to_vec(),
        remaining: from_millis(integer(&ttl)?),
        fencing_token: fencing_token(integer(&fence)?),
    })
}

fn holder(parts: Vec<Value>) -> Result<Holder, Error> {
    let Ok([Value::Bytes(held), ttl, fence]) = <[Value; 3]>::try_from(parts) else { return Err(unexpected()) };
    let mut parts = held.splitn(2, |&b| b == b'\n');
    let (token, metadata) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    Ok(Holder {
        // What other libraries store there may be no text at all.
        token: Token::from_server(token),
        metadata: metadata.to_vec(),
        remaining: from_millis(integer(&ttl)?),
        fencing_token: fence.to_text().and_then(|fence| fence.parse().ok()),
    })
}

/// Parses what `vote.lua` has returned.
pub(super) fn vote(reply: &Value) -> Result<VoteReply, Error> {
    let integers = integers(reply)?;
    let [kind, now, last, rest @ ..] = &integers[..] else { return Err(unexpected()) };
    let number = |integer: i64| u64::try_from(integer).map_err(|_| unexpected());
    let vote = match (kind, rest) {
        (1, &[0]) => Vote::Granted { number: None },
        (1, &[granted]) => Vote::Granted { number: Some(number(granted)?) },
        (0, &[ttl, place, by]) => {
            let by = if by == 1 { HeldBy::Readers } else { HeldBy::Another };
            Vote::Held {
                place: usize::try_from(place.saturating_sub(1)).unwrap_or_default(),
                remaining: from_millis(ttl),
                by,
            }
        }
        (2, []) => Vote::Behind,
        (3, []) => Vote::Ahead,
        (4, &[seconds]) => Vote::Silent { remaining: Duration::from_secs(number(seconds)?) },
        _ => return Err(unexpected()),
    };
    Ok(VoteReply { vote, seen: Seen { now: number(*now)?, last: number(*last)? } })
}

/// Parses what `metadata.lua` has returned.
pub(super) fn metadata(reply: Value) -> Result<Option<Box<[u8]>>, Error> {
    match reply {
        Value::Nil => Ok(None),
        Value::Bytes(metadata) => Ok(Some(metadata.to_vec().into())),
        _ => Err(unexpected()),
    }
}

pub(super) fn unexpected() -> Error {
    RedisError::new(RedisErrorKind::Protocol, "the script answered what it never answers").into()
}

/// What a script returns of an operation that another script has to decide.
const LEFT_TO_ANOTHER: &str = "ALONE";

/// What `inspect.lua` returns of a key that several may share.
const SHARED: &str = "SHARED";

/// One number for an acquire of one key: the fencing token, or 0; held by another, -1 without a ttl, and -2 - ttl with
/// one.
fn acquired_or_ttl(number: i64) -> Acquired {
    match number {
        0.. => granted(number),
        -1 => Acquired::held(0, None),
        held => Acquired::held(0, from_millis(-2 - held)),
    }
}

fn granted(fence: i64) -> Acquired {
    Acquired::Granted { fencing_token: fencing_token(fence) }
}

/// 0 stands for none.
fn fencing_token(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

fn owned(code: i64) -> Verdict {
    match code {
        1 => Verdict::Done,
        0 => Verdict::NotOurs(Loss::Missing),
        _ => Verdict::NotOurs(Loss::Taken),
    }
}

fn integer(reply: &Value) -> Result<i64, Error> {
    reply.as_i64().ok_or_else(unexpected)
}

pub(super) fn integers(reply: &Value) -> Result<Vec<i64>, Error> {
    match reply {
        Value::Array(parts) => parts.iter().map(integer).collect(),
        _ => Err(unexpected()),
    }
}

/// A ttl below zero stands for none.
fn from_millis(ttl: i64) -> Option<Duration> {
    u64::try_from(ttl).ok().map(Duration::from_millis)
}

#[cfg(test)]
pub(super) mod tests;
