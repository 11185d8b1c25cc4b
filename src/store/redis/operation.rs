//! Operations on one key, and the arguments that they become: for a script of their own, or for `many.lua`.

use std::sync::Arc;

use bytes::Bytes;

use super::FENCE_TTL;
use super::args::{LEAST, NO_ID, decimal, millis};
use super::names;
use super::replies::{Decision, Kind};
use super::script::Call;
use crate::Token;
use crate::store::{Acquired, ByOthers, Latest, Verdict};

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
        /// The command that notifies waiters: `PUBLISH`, or `SPUBLISH` on a cluster.
        publish: &'static str,
    },
    /// Ends a grant that has no id, in the background.
    EndGrant {
        publish: &'static str,
        /// The name of the record of grants, which shows whether there are others.
        record: Bytes,
    },
    /// Extends the ttl to at least this.
    Renew {
        ttl: i64,
        /// On a node of a quorum, the name of the record of grants: the key may be there for another grant of the token
        /// only. The renewals of one store have all a record, or none.
        record: Option<Bytes>,
    },
    Acquire {
        /// What the key holds while the lock is held.
        value: Bytes,
        ttl: i64,
        /// The name and the ttl of the fence key, if the request wants a fencing token.
        fence: Option<(Bytes, i64)>,
        latest: Arc<Latest>,
    },
}

impl Operation {
    pub(super) fn new(name: Bytes, token: &Token, what: What) -> Box<Self> {
        Box::new(Self { name, token: token.clone(), what })
    }

    /// Returns the call of `release_one.lua`, `renew_one.lua` or `acquire_one.lua`.
    pub(super) fn call(&self) -> Call {
        let key = self.name.clone();
        let token = || self.token.to_bytes();
        let release = |publish: &'static str| {
            let channel = names::channel_of(&self.name);
            // What is usual is left out.
            let line = match publish == "PUBLISH" && channel.is_none() && names::has_no_brace(&self.name) {
                true => None,
                false => Some([publish.into(), names::line_of(&self.name)]),
            };
            [token()].into_iter().chain(line.into_iter().flatten()).chain(channel)
        };
        match &self.what {
            What::Release { publish } => Call::new([key].into_iter(), release(publish)),
            What::EndGrant { publish, record } => Call::new([key, record.clone()].into_iter(), release(publish)),
            What::Renew { ttl, record } => {
                let args = [token(), decimal(*ttl)];
                match record.clone() {
                    None => Call::new([key].into_iter(), args),
                    Some(record) => Call::new([key, record].into_iter(), args),
                }
            }
            What::Acquire { value, ttl, fence: None, .. } => {
                Call::new([key].into_iter(), [value.clone(), decimal(*ttl)])
            }
            What::Acquire { value, ttl, fence: Some((fence, fence_ttl)), .. } => {
                let fence_ttl = Some(*fence_ttl).filter(|ttl| *ttl != millis(FENCE_TTL)).map(decimal);
                let args = [value.clone(), decimal(*ttl)].into_iter().chain(fence_ttl);
                Call::new([key, fence.clone()].into_iter(), args)
            }
        }
    }

    /// Returns the call of `acquire.lua`, `end_grant.lua` or `renew_grant.lua`, to which the script for one key leaves
    /// some cases.
    pub(super) fn full_call(&self) -> Call {
        let key = self.name.clone();
        let token = || self.token.to_bytes();
        match &self.what {
            What::Acquire { value, ttl, fence, .. } => {
                let args = |fence_ttl: i64| {
                    let ttls = [decimal(*ttl), Bytes::from_static(b"1"), decimal(fence_ttl)];
                    [token(), value.clone()].into_iter().chain(ttls).chain([const { Bytes::new() }; 4])
                };
                match fence {
                    None => Call::new([key].into_iter(), args(0)),
                    Some((fence, fence_ttl)) => Call::new([key, fence.clone()].into_iter(), args(*fence_ttl)),
                }
            }
            What::EndGrant { publish, record } => {
                let args = [token(), Bytes::from_static(b"1"), (*publish).into(), NO_ID.into()];
                let keys = [key, names::line_of(&self.name), record.clone()];
                Call::new(keys.into_iter(), args.into_iter().chain(channels([&self.name])))
            }
            What::Renew { ttl, record: Some(record) } => {
                let how = ["1", LEAST, NO_ID, "0", "", "0"].map(Bytes::from);
                Call::new([key, record.clone()].into_iter(), [token(), decimal(*ttl)].into_iter().chain(how))
            }
            What::Release { .. } | What::Renew { record: None, .. } => self.call(),
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match &self.what {
            What::Acquire { fence, .. } => Kind::Acquire { is_fenced: fence.is_some() },
            What::Release { .. } | What::EndGrant { .. } | What::Renew { .. } => Kind::Owned,
        }
    }

    /// Notes that it is about to be sent, and that the server may run it until then.
    pub(super) fn is_sent(&self, until: u64) {
        if let What::Acquire { latest, .. } = &self.what {
            latest.extend(until);
        }
    }

    /// Notes that others than the caller send it from now on, and maybe again, until this is dropped.
    pub(super) fn begin_by_others(&self) -> Option<ByOthers> {
        match &self.what {
            What::Acquire { latest, .. } => Some(latest.clone().begin_by_others()),
            What::Release { .. } | What::EndGrant { .. } | What::Renew { .. } => None,
        }
    }

    /// Returns where it stands in a batch: `many.lua` takes its operations in the order of these ranks.
    pub(super) fn rank(&self) -> usize {
        match &self.what {
            What::Release { .. } => 0,
            What::EndGrant { .. } => 1,
            What::Renew { .. } => 2,
            What::Acquire { fence: Some(_), .. } => 3,
            What::Acquire { fence: None, .. } => 4,
        }
    }

    /// Returns whether the decision is one that a failover must not forget.
    pub(super) fn is_for_replicas(&self, decision: &Decision) -> bool {
        match (&self.what, decision) {
            (What::Release { .. } | What::EndGrant { .. }, _) => false,
            (_, Decision::Acquire(Acquired::Granted { .. }) | Decision::Owned(Verdict::Done)) => true,
            (_, Decision::Acquire(Acquired::Held { .. }) | Decision::Owned(Verdict::NotOurs(_))) => false,
        }
    }

    fn push_args(&self, call: &mut Call, decimals: &mut Decimals) {
        let token = || self.token.to_bytes();
        match &self.what {
            What::Release { .. } | What::EndGrant { .. } | What::Renew { .. } => call.args([token()]),
            What::Acquire { value, ttl, .. } => call.args([value.clone(), decimals.get(*ttl)]),
        }
    }
}

/// Returns the call of `many.lua` for operations that are sorted by their ranks.
pub(super) fn batch_call(operations: &[Box<Operation>]) -> Call {
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
            What::Renew { ttl, .. } => have_one_ttl &= *renewed.get_or_insert(*ttl) == *ttl,
            What::Acquire { fence: None, .. } => {}
        }
    }
    let names = operations.iter().map(|operation| &operation.name);
    // In the order of the ranks, as all is: the records, then the fences.
    let others = operations.iter().filter_map(|operation| match &operation.what {
        What::EndGrant { record: name, .. }
        | What::Renew { record: Some(name), .. }
        | What::Acquire { fence: Some((name, _)), .. } => Some(name),
        _ => None,
    });
    let renewed_ttl = renewed.filter(|_| have_one_ttl);
    let mut call = Call::with_room_for(operations.len() * 4 + counts.len() + 3);
    call.keys(names.chain(others).cloned());
    call.args(counts.into_iter().chain([longest]).map(decimal));
    call.args([how.into(), renewed_ttl.map_or_else(|| "".into(), decimal)]);
    let mut decimals = Decimals::default();
    for operation in operations {
        operation.push_args(&mut call, &mut decimals);
        if let (What::Renew { ttl, .. }, None) = (&operation.what, renewed_ttl) {
            call.args([decimals.get(*ttl)]);
        }
    }
    let releases =
        operations.iter().filter(|operation| matches!(operation.what, What::Release { .. } | What::EndGrant { .. }));
    call.args(channels(releases.map(|operation| &operation.name)));
    call
}

/// The last number that was converted to text: most operations of a call have the same ttl.
#[derive(Default)]
struct Decimals(Option<(i64, Bytes)>);

impl Decimals {
    fn get(&mut self, number: i64) -> Bytes {
        match &self.0 {
            Some((last, text)) if *last == number => text.clone(),
            _ => self.0.insert((number, decimal(number))).1.clone(),
        }
    }
}

/// Returns the channels on which the releases of these keys are published, or nothing if they have the names of the
/// keys.
pub(super) fn channels<'a>(keys: impl IntoIterator<Item = &'a Bytes, IntoIter: Clone>) -> Vec<Bytes> {
    let keys = keys.into_iter();
    if keys.clone().all(|key| std::str::from_utf8(key).is_ok()) {
        return Vec::new();
    }
    keys.map(|key| names::channel_of(key).unwrap_or_else(|| key.clone())).collect()
}
