//! What is done to one key, written for its own script or for the one that does many; and how the answers read.

use std::sync::Arc;

use fred::bytes::Bytes;
use fred::error::ErrorKind;
use fred::types::Value;

use super::names;
use super::refusal::normalize;
use super::script::{Call, Said, decimal};
use crate::store::Latest;
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
    Release {
        /// How waiters are notified: `PUBLISH`, or on a cluster `SPUBLISH`.
        publish: &'static str,
    },
    /// In the background, of a grant that has no id.
    EndGrant {
        publish: &'static str,
        /// The name of the record that tells whether there are other grants.
        record: Bytes,
    },
    /// To at least this.
    Renew { ttl: i64 },
    Acquire {
        /// What the key shall hold.
        value: Value,
        ttl: i64,
        /// Where a fencing token is wanted: the name of the fence key, and for how long it lives.
        fence: Option<(Bytes, i64)>,
        latest: Arc<Latest>,
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
    pub(super) fn new(name: Bytes, token: &Token, what: What) -> Box<Self> {
        Box::new(Self { name, token: token.clone(), what })
    }

    /// For `release_one.lua`, `renew_one.lua` or `acquire_one.lua`.
    pub(super) fn alone(&self) -> Call {
        let key = Value::Bytes(self.name.clone());
        let token = || Value::from(self.token.to_text());
        let release = |publish: &'static str| {
            let line = Value::Bytes(names::line_of(&self.name));
            let channel = names::channel_of(&self.name).map(Value::Bytes);
            [token(), Value::from_static_str(publish), line].into_iter().chain(channel)
        };
        match &self.what {
            What::Release { publish } => Call::new([key].into_iter(), release(publish)),
            What::EndGrant { publish, record } => Call::new([key, record.clone().into()].into_iter(), release(publish)),
            What::Renew { ttl } => Call::new([key].into_iter(), [token(), decimal(*ttl)]),
            What::Acquire { value, ttl, fence: None, .. } => {
                Call::new([key].into_iter(), [value.clone(), decimal(*ttl)])
            }
            What::Acquire { value, ttl, fence: Some((fence, fence_ttl)), .. } => {
                let keys = [key, fence.clone().into()];
                Call::new(keys.into_iter(), [value.clone(), decimal(*ttl), decimal(*fence_ttl)])
            }
        }
    }

    /// For `acquire.lua` or `end_grant.lua`: what the script for one key leaves to them.
    pub(super) fn again(&self) -> Call {
        let key = Value::Bytes(self.name.clone());
        let token = || Value::from(self.token.to_text());
        match &self.what {
            What::Acquire { value, ttl, fence, .. } => {
                let args = |fence_ttl: i64| {
                    let ttls = [decimal(*ttl), Value::Integer(1), decimal(fence_ttl)];
                    [token(), value.clone()].into_iter().chain(ttls).chain(["".into(), "".into(), "".into()])
                };
                match fence {
                    None => Call::new([key].into_iter(), args(0)),
                    Some((fence, fence_ttl)) => Call::new([key, fence.clone().into()].into_iter(), args(*fence_ttl)),
                }
            }
            What::EndGrant { publish, record } => {
                let args = [token(), Value::Integer(1), (*publish).into(), NO_ID.into()];
                let keys = [key, names::line_of(&self.name).into(), record.clone().into()];
                Call::new(keys.into_iter(), args.into_iter().chain(channels([&self.name])))
            }
            What::Release { .. } | What::Renew { .. } => self.alone(),
        }
    }

    /// It is about to be sent, and may be run until then.
    pub(super) fn is_sent(&self, until: u64) {
        if let What::Acquire { latest, .. } = &self.what {
            latest.extend(until);
        }
    }

    /// Its place in a call with others.
    pub(super) fn rank(&self) -> usize {
        match &self.what {
            What::Release { .. } => 0,
            What::EndGrant { .. } => 1,
            What::Renew { .. } => 2,
            What::Acquire { fence: Some(_), .. } => 3,
            What::Acquire { fence: None, .. } => 4,
        }
    }

    /// Whether something was decided that a failover must not forget.
    pub(super) fn is_for_replicas(&self, decision: &Decision) -> bool {
        match (&self.what, decision) {
            (What::Release { .. } | What::EndGrant { .. }, _) => false,
            (_, Decision::Granted(_) | Decision::Owned(Ok(()))) => true,
            (_, Decision::Held(_) | Decision::Owned(Err(_))) => false,
        }
    }

    fn push_args(&self, call: &mut Call, decimals: &mut Decimals) {
        let token = || Value::from(self.token.to_text());
        match &self.what {
            What::Release { .. } | What::EndGrant { .. } | What::Renew { .. } => call.args([token()]),
            What::Acquire { value, ttl, .. } => call.args([value.clone(), decimals.get(*ttl)]),
        }
    }

    /// What its own script has said; `None` where it leaves the operation to [another](Self::again).
    pub(super) fn read_alone(&self, said: &Said) -> Option<Result<Decision, Error>> {
        match (&self.what, said) {
            (_, Said::Code(3)) => None,
            (What::Acquire { .. }, Said::Code(1)) => Some(Ok(Decision::Granted(0))),
            (What::Acquire { .. }, Said::FencingToken(token)) => Some(Ok(Decision::Granted(*token))),
            (What::Acquire { .. }, Said::Value(answer)) => self.read(answer),
            (_, Said::Code(2)) => Some(Ok(Decision::Owned(Err(Loss::Taken)))),
            (_, Said::Code(verdict)) => Some(Ok(Decision::Owned(owned(*verdict)))),
            _ => Some(Err(unexpected())),
        }
    }

    /// What `many.lua` has said of this operation; `None` where it says that the operation is not for it.
    pub(super) fn read(&self, answer: &Value) -> Option<Result<Decision, Error>> {
        match (&self.what, answer) {
            (What::Acquire { .. }, Value::Integer(fence @ 0..)) => Some(Ok(Decision::Granted(*fence))),
            (What::Acquire { .. }, Value::Integer(-1)) => Some(Ok(Decision::Held(-1))),
            (What::Acquire { .. }, Value::Integer(number)) => Some(Ok(Decision::Held(-2 - number))),
            (_, Value::Integer(verdict)) => Some(Ok(Decision::Owned(owned(*verdict)))),
            (_, Value::String(said)) if **said == *"ALONE" => None,
            (_, Value::String(said)) => {
                let said = fred::error::Error::new(ErrorKind::Unknown, normalize(said).into_owned());
                Some(self.read_error(said.into()))
            }
            _ => Some(Err(unexpected())),
        }
    }

    /// A refusal that is a verdict.
    pub(super) fn read_error(&self, error: Error) -> Result<Decision, Error> {
        match &self.what {
            // Not a string: surely not our lock.
            What::Release { .. } | What::EndGrant { .. } | What::Renew { .. } if error.code() == Some("WRONGTYPE") => {
                Ok(Decision::Owned(Err(Loss::Taken)))
            }
            _ => Err(error),
        }
    }
}

/// For `many.lua`, which wants them in the order of their ranks.
pub(super) fn together(operations: &[Box<Operation>]) -> Call {
    let mut counts = [0_i64; 5];
    let mut longest = 0;
    let mut how = "PUBLISH";
    let mut renewed = None;
    let mut have_one_ttl = true;
    for operation in operations {
        if let Some(count) = counts.get_mut(operation.rank()) {
            *count += 1;
        }
        match &operation.what {
            What::Acquire { fence: Some((_, ttl)), .. } => longest = longest.max(*ttl),
            What::Release { publish, .. } | What::EndGrant { publish, .. } => how = publish,
            What::Renew { ttl } => have_one_ttl &= *renewed.get_or_insert(*ttl) == *ttl,
            What::Acquire { fence: None, .. } => {}
        }
    }
    let names = operations.iter().map(|operation| &operation.name);
    // In the order of the ranks, as all is: the records, then the fences.
    let others = operations.iter().filter_map(|operation| match &operation.what {
        What::EndGrant { record: name, .. } | What::Acquire { fence: Some((name, _)), .. } => Some(name),
        _ => None,
    });
    let renewed_ttl = renewed.filter(|_| have_one_ttl);
    let mut call = Call::with_room_for(operations.len() * 4 + counts.len() + 3);
    call.keys(names.chain(others).map(|name| Value::Bytes(name.clone())));
    call.args(counts.into_iter().chain([longest]).map(decimal));
    call.args([Value::from_static_str(how), renewed_ttl.map_or_else(|| "".into(), decimal)]);
    let mut decimals = Decimals::default();
    for operation in operations {
        operation.push_args(&mut call, &mut decimals);
        if let (What::Renew { ttl }, None) = (&operation.what, renewed_ttl) {
            call.args([decimals.get(*ttl)]);
        }
    }
    let releases =
        operations.iter().filter(|operation| matches!(operation.what, What::Release { .. } | What::EndGrant { .. }));
    call.args(channels(releases.map(|operation| &operation.name)));
    call
}

/// The last number that was written as text: most operations of a call have the same ttl.
#[derive(Default)]
struct Decimals(Option<(i64, Value)>);

impl Decimals {
    fn get(&mut self, number: i64) -> Value {
        match &self.0 {
            Some((last, text)) if *last == number => text.clone(),
            _ => self.0.insert((number, decimal(number))).1.clone(),
        }
    }
}

/// The channels on which the releases of these keys are published: nothing where they are called as the keys.
pub(super) fn channels<'a>(keys: impl IntoIterator<Item = &'a Bytes, IntoIter: Clone>) -> Vec<Value> {
    let keys = keys.into_iter();
    if keys.clone().all(|key| std::str::from_utf8(key).is_ok()) {
        return Vec::new();
    }
    keys.map(|key| Value::Bytes(names::channel_of(key).unwrap_or_else(|| key.clone()))).collect()
}

/// What `many.lua` has answered; `None` for an operation that must go alone.
pub(super) fn read_together(
    operations: &[Box<Operation>],
    answer: &Value,
) -> Result<Vec<Option<Result<Decision, Error>>>, Error> {
    match answer {
        Value::Array(parts) if parts.len() == operations.len() => {
            Ok(operations.iter().zip(parts).map(|(operation, part)| operation.read(part)).collect())
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

/// What scripts call a grant that has no id.
pub(super) const NO_ID: &str = "-";
