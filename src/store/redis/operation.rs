//! What is done to one key, written for its own script or for the one that does many; and how the answers read.

use fred::bytes::Bytes;
use fred::error::ErrorKind;
use fred::types::Value;

use super::script::Call;
use crate::{Error, Loss, Token};

/// An operation on one key, as the server knows it.
#[derive(Clone)]
pub(super) struct Operation {
    pub(super) name: Bytes,
    pub(super) token: Token,
    pub(super) what: What,
}

#[derive(Clone)]
pub(super) enum What {
    Release,
    Renew {
        ttl: i64,
        exact: bool,
    },
    Acquire {
        /// What the key shall hold.
        value: Value,
        ttl: i64,
        /// Where a fencing token is wanted: the name of the fence key, and for how long it lives.
        fence: Option<(Bytes, i64)>,
    },
}

/// What the server has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The key held our token, and is released or renewed; or it didn't.
    Owned(Result<(), Loss>),
    /// The fencing token, or 0.
    Granted(i64),
    /// By another, for so many milliseconds; below zero for ever.
    Held(i64),
}

impl Operation {
    /// For `release.lua`, `renew.lua` or `acquire.lua`.
    pub(super) fn alone(&self) -> Call {
        let key = Value::Bytes(self.name.clone());
        let token = Value::from(self.token.as_str());
        match &self.what {
            What::Release => Call::new([key].into_iter(), [token]),
            What::Renew { ttl, exact } => Call::new([key].into_iter(), [token, (*ttl).into(), flag(*exact)]),
            What::Acquire { value, ttl, fence } => {
                let args =
                    |fence_ttl| [token, value.clone(), (*ttl).into(), Value::Integer(1), Value::Integer(fence_ttl)];
                match fence {
                    None => Call::new([key].into_iter(), args(0)),
                    Some((fence, fence_ttl)) => Call::new([key, fence.clone().into()].into_iter(), args(*fence_ttl)),
                }
            }
        }
    }

    /// What the script of this one operation has answered.
    pub(super) fn read(&self, answer: &Value) -> Result<Decision, Error> {
        match (&self.what, answer) {
            (What::Acquire { .. }, Value::Array(parts)) => match &parts[..] {
                [Value::Integer(1), Value::Integer(fence)] => Ok(Decision::Granted(*fence)),
                [Value::Integer(0), Value::Integer(ttl), _] => Ok(Decision::Held(*ttl)),
                _ => Err(unexpected()),
            },
            (What::Release | What::Renew { .. }, Value::Integer(verdict)) => Ok(Decision::Owned(owned(*verdict))),
            _ => Err(unexpected()),
        }
    }

    /// Its place in a call with others.
    pub(super) fn rank(&self) -> usize {
        match &self.what {
            What::Release => 0,
            What::Renew { .. } => 1,
            What::Acquire { fence: Some(_), .. } => 2,
            What::Acquire { fence: None, .. } => 3,
        }
    }

    fn push_args(&self, args: &mut Vec<Value>) {
        let token = || Value::from(self.token.as_str());
        match &self.what {
            What::Release => args.push(token()),
            What::Renew { ttl, exact } => args.extend([token(), (*ttl).into(), flag(*exact)]),
            What::Acquire { value, ttl, .. } => args.extend([value.clone(), (*ttl).into()]),
        }
    }

    /// What `many.lua` has answered for this one; `None` where the operation must go alone.
    fn read_one_of_many(&self, answer: &Value) -> Option<Result<Decision, Error>> {
        match (&self.what, answer) {
            (What::Acquire { .. }, Value::Integer(number @ 0..)) => Some(Ok(Decision::Granted(*number))),
            (What::Acquire { .. }, Value::Integer(-1)) => Some(Ok(Decision::Held(-1))),
            (What::Acquire { .. }, Value::Integer(number)) => Some(Ok(Decision::Held(-2 - number))),
            (_, Value::Integer(verdict)) => Some(Ok(Decision::Owned(owned(*verdict)))),
            (_, Value::String(said)) if **said == *"ALONE" => None,
            (_, Value::String(said)) => Some(self.refused(said)),
            _ => Some(Err(unexpected())),
        }
    }

    fn refused(&self, said: &str) -> Result<Decision, Error> {
        let error = fred::error::Error::new(ErrorKind::Unknown, said.trim_start_matches('-').to_owned());
        self.read_error(error.into())
    }

    /// A refusal that is a verdict.
    pub(super) fn read_error(&self, error: Error) -> Result<Decision, Error> {
        match &self.what {
            // Not a string: surely not our lock.
            What::Release | What::Renew { .. } if error.code() == Some("WRONGTYPE") => {
                Ok(Decision::Owned(Err(Loss::Taken)))
            }
            _ => Err(error),
        }
    }
}

/// For `many.lua`, which wants them in the order of their ranks.
pub(super) fn together(operations: &[Operation]) -> Call {
    let mut counts = [0_i64; 4];
    let mut longest = 0;
    let (mut names, mut fences) = (Vec::with_capacity(operations.len() * 2), Vec::new());
    let mut args = vec![Value::Null; 5];
    args.reserve(operations.len() * 2);
    for operation in operations {
        if let Some(count) = counts.get_mut(operation.rank()) {
            *count += 1;
        }
        names.push(operation.name.clone().into());
        if let What::Acquire { fence: Some((fence, ttl)), .. } = &operation.what {
            fences.push(fence.clone().into());
            longest = longest.max(*ttl);
        }
        operation.push_args(&mut args);
    }
    names.append(&mut fences);
    let head = counts.into_iter().chain([longest]);
    args.iter_mut().zip(head).for_each(|(arg, number)| *arg = number.into());
    Call::new(names.into_iter(), args)
}

/// What `many.lua` has answered; `None` for an operation that must go alone.
pub(super) fn read_together(
    operations: &[Operation],
    answer: &Value,
) -> Result<Vec<Option<Result<Decision, Error>>>, Error> {
    match answer {
        Value::Array(parts) if parts.len() == operations.len() => {
            Ok(operations.iter().zip(parts).map(|(operation, part)| operation.read_one_of_many(part)).collect())
        }
        _ => Err(unexpected()),
    }
}

pub(super) fn owned(verdict: i64) -> Result<(), Loss> {
    match verdict {
        1 => Ok(()),
        0 => Err(Loss::Missing),
        _ => Err(Loss::Taken),
    }
}

pub(super) fn unexpected() -> Error {
    fred::error::Error::new(ErrorKind::Protocol, "the script answered what it never answers").into()
}

fn flag(on: bool) -> Value {
    Value::Integer(on.into())
}
