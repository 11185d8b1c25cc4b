//! Many operations in one call do what the scripts for one do: random batches run once through `many.lua`, and on a
//! second server one by one, in the order that `many.lua` documents.

use std::collections::BTreeMap;
use std::sync::Arc;

use tenure_test_support::{Server as Process, eventually};
use tokio::time::Instant;

use super::batcher::Executor;
use super::driver::Value;
use super::operation::{Operation, What};
use super::replies::Decision;
use super::script::Scripts;
use super::*;
use crate::Token;

/// More than the two servers are apart in what they do, on a busy machine.
const TOLERANCE: i64 = 5_000;
/// Beyond every clock: from here on, fencing tokens are counted.
const COUNTED: i64 = 4_000_000_000_000_000;

const LOCKS: [&str; 3] = ["a", "b", "{t}c"];
/// One is the beginning of another.
const TOKENS: [&str; 3] = ["job-1", "job-10", "x"];
const TTLS: [i64; 4] = [2_000_000, 6_000_000, 6_000_001, 20_000_000];
/// Farther from any of these than a run takes, so that whether a renewal has anything to do does not hang on the
/// milliseconds between the two sides: where it may not do it, that decides between an error and none.
const RENEWED_TTLS: [i64; 4] = [1_000_000, 4_000_000, 10_000_000, 30_000_000];

/// A key's type, what it holds, and its ttl.
type Entry = (String, String, i64);

struct Side {
    process: Process,
    store: RedisStore,
}

impl Side {
    /// For a user who may do anything but these commands.
    async fn start(forbidden: &[&str]) -> Self {
        let process = Process::start();
        let user = ["ACL", "SETUSER", "app", "on", ">secret", "resetchannels", "~*", "+@all"];
        assert_eq!(process.cli(&[&user[..], forbidden].concat()), "OK");
        let url = format!("redis://app:secret@127.0.0.1:{}", process.port());
        let store =
            RedisStore::connect(Driver::default(), &url, String::new(), Duration::from_secs(20), 0).await.unwrap();
        // So that the server's clock is known; it may refuse the look itself.
        drop(store.inspect(&Key::from("a"), PATIENCE).await);
        Self { process, store }
    }

    fn server(&self) -> &Server {
        self.store.server()
    }

    async fn run_one(&self, operation: &<Server as Executor>::Operation) -> Result<Decision, Error> {
        let now = Instant::now();
        self.server().run_one(operation, now, now + PATIENCE).await
    }

    async fn command(&self, name: &'static str, args: &[&str]) -> Value {
        let args = args.iter().map(|arg| Bytes::copy_from_slice(arg.as_bytes())).collect();
        // Refused on both sides, or on neither.
        self.server().connection.send(name, args, Instant::now() + PATIENCE).await.unwrap_or(Value::Nil)
    }

    async fn keyspace(&self) -> BTreeMap<String, Entry> {
        const LOOK: &str = "local all = {} \
            for _, key in ipairs(redis.call('KEYS', '*')) do \
                local kind = redis.call('TYPE', key).ok \
                local held = kind == 'string' and redis.call('GET', key) or '' \
                all[#all + 1] = {key, kind, held, tostring(redis.call('PTTL', key))} \
            end return all";
        let Value::Array(rows) = self.look(LOOK).await else { return BTreeMap::new() };
        let text = |part: &Value| part.to_text().unwrap().into_owned();
        let row = |row: Value| {
            let Value::Array(row) = row else { panic!("a row") };
            let [key, kind, held, ttl] = <[Value; 4]>::try_from(row).unwrap().each_ref().map(text);
            (key, (kind, held, ttl.parse().unwrap()))
        };
        rows.into_iter().map(row).collect()
    }

    /// By one who may do anything.
    async fn look(&self, script: &str) -> Value {
        self.command("AUTH", &["default", ""]).await;
        let seen = self.command("EVAL", &[script, "0"]).await;
        self.command("AUTH", &["app", "secret"]).await;
        seen
    }
}

/// What others do to the keys between batches.
async fn interfere(rng: &mut fastrand::Rng, sides: &[Side; 2], forbidden: &[&str]) {
    let lock = *rng.choice(&LOCKS).unwrap();
    let fence = String::from_utf8(names::fence_of(&Bytes::from(lock)).to_vec()).unwrap();
    let token = *rng.choice(&TOKENS).unwrap();
    let held = [token.to_owned(), format!("{token}\nmeta"), format!("{token}\n"), String::new(), "\n\nr".to_owned()];
    let held = rng.choice(&held).unwrap().as_str();
    let poison = [
        "9007199254740992",
        "9007199254740991",
        "9007199254740990",
        "9007199254740989",
        "8000000000000000",
        "1",
        "-5",
        "0",
        "nonsense",
        "1e300",
        "inf",
        "nan",
        "",
    ];
    let poison = *rng.choice(&poison).unwrap();
    let grants = String::from_utf8(names::grants_of(&Bytes::from(lock)).to_vec()).unwrap();
    let record = format!("{token}\n{}", rng.choice(["-", "a1=20000", "a1=20000,-", "*", "a1=20000,*"]).unwrap());
    let px = rng.choice(TTLS).unwrap().to_string();
    let mut expires = false;
    let command: (&'static str, Vec<&str>) = match rng.u8(..15) {
        0..3 => ("DEL", vec![lock]),
        3 => ("SET", vec![lock, held]),
        4 => ("SET", vec![lock, held, "PX", &px]),
        5 => {
            expires = true;
            ("SET", vec![if rng.bool() { lock } else { &fence }, held, "PX", "1"])
        }
        6 => ("LPUSH", vec![lock, "item"]),
        // Without permission to delete, a lock can't be released again for which there was no fencing token after all.
        7 if forbidden != ["-del"] => ("LPUSH", vec![&fence, "item"]),
        7 | 8 => ("SET", vec![&fence, poison]),
        9 | 10 => ("DEL", vec![&fence]),
        11 | 12 => ("SET", vec![&grants, &record, "PX", &px]),
        13 => ("DEL", vec![&grants]),
        _ => ("PERSIST", vec![lock]),
    };
    for side in sides {
        side.command(command.0, &command.1).await;
    }
    if expires {
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// `on_node`: as on a node of a quorum, where renewals look at the record of grants.
fn operation(rng: &mut fastrand::Rng, on_node: bool) -> Box<Operation> {
    let name = Bytes::from(*rng.choice(&LOCKS).unwrap());
    let token: Token = rng.choice(&TOKENS).unwrap().parse().unwrap();
    let ttl = rng.choice(TTLS).unwrap();
    let what = match rng.u8(..10) {
        0 | 1 => What::Release { publish: "PUBLISH" },
        2 => What::EndGrant { publish: "PUBLISH", record: names::grants_of(&name) },
        3..6 => {
            // Often the same, so that a batch of few has one ttl for all of them.
            let ttl = if rng.bool() { RENEWED_TTLS[1] } else { rng.choice(RENEWED_TTLS).unwrap() };
            What::Renew { ttl, record: on_node.then(|| names::grants_of(&name)) }
        }
        _ => {
            let value = match rng.u8(..3) {
                0 => [token.as_str().as_bytes(), b"\nmeta\n\xff\0"].concat().into(),
                _ => token.to_bytes(),
            };
            let fence = rng.bool().then(|| (names::fence_of(&name), 1_000_000));
            What::Acquire { value, ttl, fence, latest: Arc::default() }
        }
    };
    Operation::new(name, &token, what)
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the same batch on both sides. Returns how many of its operations had to go alone.
async fn compare(batch: &[Box<Operation>], sides: &[Side; 2]) -> usize {
    let [together, one_by_one] = sides;
    let answers = together.server().run_batch(batch, PATIENCE).await.expect("nothing refuses a call as such");
    let mut order: Vec<usize> = (0..batch.len()).collect();
    order.sort_by_key(|&i| answers[i].is_none());
    let alone = answers.iter().filter(|answer| answer.is_none()).count();
    let mut got: Vec<_> = answers.into_iter().collect();
    for i in order {
        if got[i].is_none() {
            got[i] = Some(together.run_one(&batch[i]).await);
        }
        let expected = one_by_one.run_one(&batch[i]).await;
        let (got, expected) = (got[i].take().unwrap(), expected);
        let same = match (&got, &expected) {
            (Ok(Decision::Acquire(a)), Ok(Decision::Acquire(b))) => same_acquired(a, b),
            (Ok(a), Ok(b)) => a == b,
            (Err(a), Err(b)) => a.code().is_some() && a.code() == b.code(),
            _ => false,
        };
        assert!(same, "operation {i}: {got:?} in a batch, {expected:?} by itself");
    }
    let (a, b) = (together.keyspace().await, one_by_one.keyspace().await);
    assert!(a.keys().eq(b.keys()), "{a:?} and {b:?}");
    for ((key, a), b) in a.iter().zip(b.values()) {
        let same_value = a.1 == b.1 || matches!((a.1.parse(), b.1.parse()), (Ok(a), Ok(b)) if same_fence(a, b));
        assert!(a.0 == b.0 && same_value && same_ttl(a.2, b.2), "{key:?}: {a:?} and {b:?}");
    }
    alone
}

fn same_acquired(a: &Acquired, b: &Acquired) -> bool {
    use Acquired::{Granted, Held};
    let fence = |token: &Option<u64>| token.map_or(0, |token| token.try_into().unwrap());
    let ttl = |remaining: &Option<Duration>| remaining.map_or(-1, args::millis);
    match (a, b) {
        (Granted { fencing_token: a }, Granted { fencing_token: b }) => same_fence(fence(a), fence(b)),
        (Held { remaining: a, .. }, Held { remaining: b, .. }) => same_ttl(ttl(a), ttl(b)),
        _ => false,
    }
}

fn same_ttl(a: i64, b: i64) -> bool {
    a == b || (a >= 0 && b >= 0 && (a - b).abs() < TOLERANCE)
}

/// Counted where one is counted; else both are the servers' clocks.
fn same_fence(a: i64, b: i64) -> bool {
    a == b || (a.min(b) > 0 && a.max(b) < COUNTED && (a - b).abs() < TOLERANCE * 1_000)
}

/// That fencing tokens grow on either side, in the order that they were granted.
async fn batches(seed: u64, count: usize, forbidden: &[&str]) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let sides = [Side::start(forbidden).await, Side::start(forbidden).await];
    let (mut operations, mut alone) = (0, 0);
    for n in 0..count {
        for _ in 0..rng.u8(0..3) {
            interfere(&mut rng, &sides, forbidden).await;
        }
        let on_node = rng.bool();
        let most = if n % 50 == 0 { batcher::OPERATIONS } else { 10 };
        let mut batch: Vec<Box<Operation>> = (0..rng.usize(1..=most)).map(|_| operation(&mut rng, on_node)).collect();
        batch.sort_by_key(|operation| operation.rank());
        operations += batch.len();
        alone += compare(&batch, &sides).await;
    }
    // Or there was nothing to compare.
    assert!(alone * 2 < operations, "{alone} of {operations} went alone");
    drop(sides.map(|side| side.process));
}

async fn many_batches(count: usize, forbidden: &'static [&'static str]) {
    let seed = fastrand::u64(..);
    let played = tokio::spawn(batches(seed, count, forbidden)).await;
    assert!(played.is_ok(), "seed {seed}");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_batch_decides_and_leaves_what_its_operations_would_one_by_one() {
    many_batches(2_000, &[]).await;
}

fn of(name: &'static str, what: What) -> Box<Operation> {
    Operation::new(name.into(), &"x".parse().unwrap(), what)
}

fn acquire(name: &'static str, fenced: bool) -> Box<Operation> {
    let fence = fenced.then(|| (names::fence_of(&Bytes::from(name)), 1_000_000));
    let what = What::Acquire { value: "x".into(), ttl: 60_000, fence, latest: Arc::default() };
    of(name, what)
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_lock_for_which_there_is_no_fencing_token_is_not_taken() {
    let side = Side::start(&["-time"]).await;
    let refused = side.run_one(&acquire("a", true)).await.unwrap_err();
    assert!(refused.code().is_some(), "{refused}");
    side.server().run_batch(&[acquire("a", true), acquire("b", true)], PATIENCE).await.unwrap_err();
    assert_eq!(side.process.cli(&["DBSIZE"]), "0");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_server_out_of_memory_refuses_each_acquire_by_name_and_still_renews_and_releases() {
    let side = Side::start(&[]).await;
    let answers = side.server().run_batch(&[acquire("a", true), acquire("b", true)], PATIENCE).await.unwrap();
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Some(Ok(Decision::Acquire(Acquired::Granted { fencing_token: Some(_) }))))),
        "{answers:?}"
    );
    side.command("CONFIG", &["SET", "maxmemory", "1"]).await;
    let answers = side.server().run_batch(&[acquire("c", true), acquire("d", false)], PATIENCE).await.unwrap();
    for answer in answers {
        assert_eq!(answer.unwrap().unwrap_err().code(), Some("OOM"));
    }
    assert_eq!(side.process.cli(&["DBSIZE"]), "4");
    let (renew, release) = (What::Renew { ttl: 90_000, record: None }, What::Release { publish: "PUBLISH" });
    let owned = [of("a", release), of("b", renew)];
    let answers = side.server().run_batch(&owned, PATIENCE).await.unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Some(Ok(Decision::Owned(Verdict::Done))))), "{answers:?}");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_batch_that_a_replica_refuses_gets_a_new_connection() {
    let side = Side::start(&[]).await;
    let connections = || {
        let list = side.process.cli(&["CLIENT", "LIST"]);
        let ours = list.lines().filter(|line| line.contains(" user=app "));
        ours.map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = connections();
    assert_eq!(before.len(), 1);
    side.command("REPLICAOF", &["127.0.0.1", "1"]).await;
    eventually("another connection", async || {
        // Some of these fail as the connection is replaced.
        if let Ok(answers) = side.server().run_batch(&[acquire("a", true), acquire("b", false)], PATIENCE).await {
            assert!(answers.into_iter().flatten().all(|answer| answer.is_err()));
        }
        (connections().len() == 1 && connections() != before).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_batch_needs_no_right_that_its_operations_do_not_need() {
    for forbidden in [&["-mget"], &["-del"], &["-pttl"], &["-pexpire"]] {
        many_batches(100, forbidden).await;
    }
}

#[test]
#[ignore = "needs a server; tests/internals.rs runs it"]
fn each_script_that_renews_sets_at_least_the_ttl_and_shortens_none() {
    let server = Process::start();
    let scripts = Scripts::new();
    let stamp = ["9000000000000000"];
    let renew: [(_, &[&str]); 3] = [
        (&scripts.renew, &["x", "60000"]),
        (&scripts.renew_one, &["x", "60000"]),
        (&scripts.many, &["0", "0", "1", "0", "0", "0", "PUBLISH", "60000", "x"]),
    ];
    for (script, args) in renew {
        let source = std::str::from_utf8(&script.source).unwrap();
        for (before, after) in [(Some("20000"), 60_000), (Some("90000"), 90_000), (None, 60_000)] {
            server.cli(&["SET", "k", "x"]);
            before.map(|ttl| server.cli(&["PEXPIRE", "k", ttl]));
            server.cli(&[&["EVAL", source, "1", "k"], args, &stamp].concat());
            let left: i64 = server.cli(&["PTTL", "k"]).parse().unwrap();
            assert!(same_ttl(left, after), "{left} instead of {after}, {before:?} before");
        }
    }
}
