//! The scripts, and how one is run: by its hash, or whole where the server doesn't know it.

use std::time::Duration;

use fred::bytes_utils::Str;
use fred::types::Value;
use tokio::time::Instant;

use super::router::{Router, Sent};
use crate::Error;

/// A script and the hash by which the server remembers it.
#[derive(Debug)]
pub(super) struct Script {
    source: Str,
    hash: Str,
    /// Whether its keys belong to several operations, which can be sent one by one instead.
    is_batch: bool,
}

#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) acquire: Script,
    pub(super) acquire_one: Script,
    pub(super) acquire_fair: Script,
    pub(super) attend: Script,
    pub(super) leave: Script,
    pub(super) renew: Script,
    pub(super) release: Script,
    pub(super) hand_over: Script,
    pub(super) remaining: Script,
    pub(super) inspect: Script,
    pub(super) many: Script,
    pub(super) vote: Script,
    pub(super) withdraw: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            acquire: Script::new(include_str!("scripts/acquire.lua")),
            acquire_one: Script::new(include_str!("scripts/acquire_one.lua")),
            acquire_fair: Script::new(include_str!("scripts/acquire_fair.lua")),
            attend: Script::new(include_str!("scripts/attend.lua")),
            leave: Script::new(include_str!("scripts/leave.lua")),
            renew: Script::new(include_str!("scripts/renew.lua")),
            release: Script::new(include_str!("scripts/release.lua")),
            hand_over: Script::new(include_str!("scripts/hand_over.lua")),
            remaining: Script::new(include_str!("scripts/remaining.lua")),
            inspect: Script::new(include_str!("scripts/inspect.lua")),
            many: Script { is_batch: true, ..Script::new(include_str!("scripts/many.lua")) },
            vote: Script::new(include_str!("scripts/vote.lua")),
            withdraw: Script::new(include_str!("scripts/withdraw.lua")),
        }
    }
}

impl Script {
    fn new(source: &'static str) -> Self {
        Self { source: Str::from_static(source), hash: fred::util::sha1_hash(source).into(), is_batch: false }
    }

    /// Runs the script once, within `timeout`. `call` is made anew for each time that it is sent: it is almost always sent
    /// once, and to copy it for that would cost more.
    ///
    /// By its hash; where the server has forgotten it (a restart, a failover, SCRIPT FLUSH) whole, which makes the
    /// server remember it again. NOSCRIPT means that nothing was run, so this is still one run.
    pub(super) async fn run(
        &self,
        router: &Router,
        call: impl Fn() -> Call + Sync,
        timeout: Duration,
    ) -> Result<Value, Error> {
        let until = Instant::now() + timeout;
        match router.send(self.sent(EVALSHA), || call().of(&self.hash), until).await {
            Err(error) if error.code() == Some("NOSCRIPT") => {
                router.send(self.sent(EVAL), || call().of(&self.source), until).await
            }
            answer => answer,
        }
    }

    fn sent(&self, command: &'static str) -> Sent<'_> {
        Sent { command, source: (!self.is_batch).then_some(&self.source) }
    }
}

const EVALSHA: &str = "EVALSHA";
pub(super) const EVAL: &str = "EVAL";

/// What a script is run with.
#[derive(Clone)]
pub(super) struct Call {
    keys: usize,
    /// Room for the script and the number of keys; the keys; the other arguments.
    args: Vec<Value>,
}

impl Call {
    pub(super) fn new(keys: impl ExactSizeIterator<Item = Value>, args: impl IntoIterator<Item = Value>) -> Self {
        let mut call = Self::with_room_for(keys.len() + 5);
        call.keys(keys);
        call.args(args);
        call
    }

    /// So many keys and arguments.
    pub(super) fn with_room_for(parts: usize) -> Self {
        let mut args = Vec::with_capacity(2 + parts);
        args.extend([const { Value::Null }; 2]);
        Self { keys: 0, args }
    }

    /// To be said before the other arguments.
    pub(super) fn keys(&mut self, keys: impl Iterator<Item = Value>) {
        let before = self.args.len();
        self.args.extend(keys);
        self.keys += self.args.len() - before;
    }

    pub(super) fn args(&mut self, args: impl IntoIterator<Item = Value>) {
        self.args.extend(args);
    }

    fn of(mut self, script: &Str) -> Vec<Value> {
        let count = i64::try_from(self.keys).unwrap_or(i64::MAX);
        let head = [Value::String(script.clone()), Value::Integer(count)];
        self.args.iter_mut().zip(head).for_each(|(place, value)| *place = value);
        self.args
    }
}
