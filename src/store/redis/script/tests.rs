use std::sync::Arc;
use std::time::Duration;

use tenure_test_support::Server;

use super::super::batcher::Executor;
use super::super::operation::{Operation, What};
use super::super::replies::integers;
use super::super::server::Server as RedisServer;
use super::super::{Driver, RedisStore, names};
use super::*;
use crate::store::Acquired;

const PATIENCE: Duration = Duration::from_secs(10);

/// Sets the keys as they are described, and deletes the others: `-` for none, `[]` for a list, `z a b` for a sorted set
/// in this order, `h a=1` for a hash.
const SET: &str = "for i, key in ipairs(KEYS) do redis.call('DEL', key) \
    local kind = string.sub(ARGV[i], 1, 2) \
    if ARGV[i] == '[]' then redis.call('RPUSH', key, 'x') \
    elseif kind == 'z ' then local n = 0 \
        for place in string.gmatch(string.sub(ARGV[i], 3), '%S+') do n = n + 1 redis.call('ZADD', key, n, place) end \
    elseif kind == 'h ' then \
        for name, value in string.gmatch(string.sub(ARGV[i], 3), '(%w+)=(%w+)') do \
            redis.call('HSET', key, name, value) end \
    elseif ARGV[i] ~= '-' then redis.call('SET', key, ARGV[i]) end \
    if ARGV[i] ~= '-' then redis.call('PEXPIRE', key, 50000) end end";

/// What the keys hold now, and whether each lives for longer than it was set for.
const LOOK: &str = "local all = {} for i, key in ipairs(KEYS) do \
    local kind = redis.call('TYPE', key).ok \
    local held = kind == 'string' and redis.call('GET', key) \
        or kind == 'zset' and table.concat(redis.call('ZRANGE', key, 0, -1), ' ') \
        or kind == 'hash' and table.concat(redis.call('HGETALL', key), ' ') or kind \
    all[i] = held .. (redis.call('PTTL', key) > 50000 and ' longer' or '') end \
    return table.concat(all, '|')";

/// Runs a script and the long form of it, which lacks the lines that come before, on the same keys. Returns whether
/// the short form decided by those lines.
async fn ends_the_same(
    server: &RedisServer,
    [short, long]: [&Script; 2],
    before: &[&str],
    keys: &[&str],
    args: &[&str],
) -> bool {
    let mut is_short = false;
    let mut ends = Vec::new();
    for script in [long, short] {
        eval(server, SET, before).await;
        let call = || {
            let value = |text: &&str| Bytes::copy_from_slice(text.as_bytes());
            Call::new(keys.iter().map(value), args.iter().map(value))
        };
        let said = match server.run(script, call, |_| {}, PATIENCE).await.unwrap().outcome {
            Ok(Returned::Value(Value::Integer(1))) => "[0, 0]".to_owned(),
            Ok(Returned::Value(answer)) => format!("{:?}", integers(&answer).unwrap()),
            Ok(Returned::Code(code)) => {
                assert_eq!(code, 1);
                is_short = true;
                "[0, 0]".to_owned()
            }
            Ok(Returned::FencingToken(token)) => {
                is_short = true;
                format!("[{token}, 0]")
            }
            Err(error) => error.to_string(),
        };
        let left = eval(server, LOOK, &[]).await;
        ends.push(without_clock(&format!("{said} {left:?}")));
    }
    assert_eq!(ends[0], ends[1], "{before:?}, {args:?}");
    is_short
}

/// What comes before hand_over.lua decides as that does: every case is decided by both, and leaves the same behind.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_short_way_to_hand_over_ends_where_the_long_one_does() {
    let server = Server::start();
    let store = RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap();
    let server = store.server();
    let long = Script::new(&[OWNER, FORGET, HELD, FENCE, GRANTS, LINE, include_str!("../scripts/hand_over.lua")]);
    let scripts = [&server.scripts.hand_over, &long];
    // Of fencing tokens that are numbers, one is greater than the clock.
    let fences = ["-", "5", "8999999999999999", "9007199254740991", "text", "[]"];
    let helds = ["-", "token", "token\nmetadata", "token-2", "\nplace:s1", "[]"];
    let records = ["-", "token\n-", "token\nid=5", "other\n-", "[]"];
    let alone = |&[held, record, fence]: &[&'static str; 3]| [held, "-", "-", record, fence];
    let few = || product(&["-", "token", "token\nmetadata"], &["-", "token\n-"], &["-", "5", "8999999999999999", "[]"]);
    let mut short_ways = [0, 0];
    // Its process may keep the lock from those in the line.
    for before in product(&helds, &records, &fences).iter().map(alone) {
        for (grant, fenced) in product(&["", "-", "*", "id"], &["0", "1", "17"], &[""])
            .into_iter()
            .map(|[grant, fenced, _]| (grant, fenced))
        {
            let args = hand_over("1", fenced, grant, "0");
            short_ways[0] += u32::from(ends_the_same(server, scripts, &before, &KEYS, &args).await);
        }
    }
    // It goes by the order of the line.
    let lines = ["-", "[]", "z place:s1", "z place:s1 other:s1", "z place:s2 other:s1", "z other:s1 place:s1"];
    let alive = ["-", "[]", "h place=FRESH other=FRESH", "h place=1 other=FRESH", "h place=text"];
    for [line, alive, fenced] in product(&lines, &alive, &["0", "1", "17"]) {
        let alive = alive.replace("FRESH", &(now() + 60_000).to_string());
        for [held, record, fence] in few() {
            for in_line in ["0", "1"] {
                let (before, args) = ([held, line, &alive, record, fence], hand_over("", fenced, "-", in_line));
                short_ways[1] += u32::from(ends_the_same(server, scripts, &before, &KEYS, &args).await);
            }
        }
    }
    assert!(short_ways.iter().all(|&n| n > 0), "{short_ways:?}");
}

fn hand_over<'a>(may_keep: &'a str, fenced: &'a str, grant: &'a str, in_line: &'a str) -> [&'a str; 12] {
    ["token", "next", "90000", "90000", "place:s1", "3000", may_keep, fenced, grant, in_line, "PUBLISH", "k"]
}

/// What comes before enter.lua decides as that does.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_short_way_into_the_line_ends_where_the_long_one_does() {
    let server = Server::start();
    let store = RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap();
    let server = store.server();
    let long = Script::new(&[LINE, include_str!("../scripts/enter.lua")]);
    let lines = ["-", "[]", "z place:s1", "z place:s2 other:s1", "z other:s1 place:s1"];
    let alive = ["-", "[]", "h place=FRESH", "h place=1 other=FRESH", "h place=text", "h other=FRESH"];
    let fresh = (now() + 60_000).to_string();
    let mut short_ways = 0;
    for [line, alive, _] in product(&lines, &alive, &[""]) {
        let before = ["-", line, &alive.replace("FRESH", &fresh), "-", "-"];
        let keys = ["{k}:queue", "{k}:alive"];
        let scripts = [&server.scripts.enter, &long];
        short_ways += u32::from(ends_the_same(server, scripts, &before, &keys, &["place:s1", "3000"]).await);
    }
    assert!(short_ways > 0);
}

/// Returns all combinations.
fn product<'a>(one: &[&'a str], two: &[&'a str], three: &[&'a str]) -> Vec<[&'a str; 3]> {
    let pairs = one.iter().flat_map(|one| two.iter().map(move |two| (*one, *two)));
    pairs.flat_map(|(one, two)| three.iter().map(move |three| [one, two, *three])).collect()
}

/// Returns the time in ms since 1970.
fn now() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis()
}

#[test]
fn replies_are_told_apart_and_belong_to_their_requests() {
    let read = |answer: Value, stamp: Stamp| Reply::read(answer, stamp).map(|reply| (reply.now, reply.outcome));
    let last = Stamp((Stamp::LATEST + 1) * Stamp::MARKS - 1);
    for stamp in [Stamp(0), Stamp(7), Stamp(1 << 32), last] {
        let (mark, other) = (stamp.mark(), stamp.mark() ^ 1);
        for code in 0..4 {
            let (now, said) = read(Value::Integer(mark * 4 + code), stamp).unwrap();
            assert!(now.is_none() && matches!(said, Ok(Returned::Code(it)) if it == code), "{}", stamp.0);
            assert!(read(Value::Integer(other * 4 + code), stamp).is_err_and(|error| is_mixed_up(&error)));
        }
        for early in [1, 999, (1 << 21) - 1] {
            let token = stamp.end() - early;
            let (now, said) = read(Value::Integer(-(early << 32) - mark), stamp).unwrap();
            assert!(matches!(said, Ok(Returned::FencingToken(it)) if it == token), "{} and {early}", stamp.0);
            assert_eq!(now, u64::try_from(token / 1_000).ok());
            assert!(read(Value::Integer(-(early << 32) - other), stamp).is_err_and(|error| is_mixed_up(&error)));
        }
        let array = |mark: i64, token: i64| Value::Array(vec![Value::Integer(mark), Value::Integer(token)]);
        let (now, said) = read(array(mark, 5_000_000), stamp).unwrap();
        assert!(now == Some(5_000) && matches!(said, Ok(Returned::FencingToken(5_000_000))));
        assert!(read(array(other, 5_000_000), stamp).is_err_and(|error| is_mixed_up(&error)));
    }
}

/// As a number, or as two where the request was more than 2.1 s early.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_fencing_token_is_told_as_the_server_has_it_however_early_the_request_was() {
    let server = Server::start();
    let store = RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap();
    let mut last = 0;
    for timeout in [1_000, 2_000, 2_096, 2_098, 2_100, 60_000, 3_000_000].map(Duration::from_millis) {
        let value = Bytes::from_static(b"token");
        let fence = Some((names::fence_of(&"k".into()), 60_000));
        let what = What::Acquire { value, ttl: 60_000, fence, latest: Arc::default() };
        let acquire = Operation::new("k".into(), &"token".parse().unwrap(), what);
        let now = Instant::now();
        let decision = store.server().run_one(&acquire, now, now + timeout).await.unwrap();
        let Acquired::Granted { fencing_token: Some(token) } = decision.acquired().unwrap() else { panic!("free") };
        assert_eq!(server.cli(&["GET", "{k}:fence"]), token.to_string());
        assert!(token > last, "{token} after {last}");
        last = token;
        server.cli(&["DEL", "k"]);
    }
}

const KEYS: [&str; 5] = ["k", "{k}:queue", "{k}:alive", "{k}:grants", "{k}:fence"];

async fn eval(server: &RedisServer, script: &'static str, args: &[&str]) -> String {
    let count = KEYS.len().to_string();
    let all = [script, &count].into_iter().chain(KEYS).chain(args.iter().copied());
    let all = all.map(|arg| Bytes::copy_from_slice(arg.as_bytes())).collect();
    let reply = server.connection.send(EVAL, all, Instant::now() + PATIENCE).await.unwrap();
    reply.to_text().map(|text| text.into_owned()).unwrap_or_default()
}

/// The two are run one after the other, and may give the time of the server as the fencing token, or as a heartbeat.
fn without_clock(text: &str) -> String {
    let parts = text.split_inclusive(|c: char| !c.is_ascii_digit());
    let is_clock = |number: &str| matches!(number.len(), 13 | 16) && number.starts_with('1');
    let number_of = |part: &str| part.trim_end_matches(|c: char| !c.is_ascii_digit()).to_owned();
    parts.map(|part| if is_clock(&number_of(part)) { "clock ".to_owned() } else { part.to_owned() }).collect()
}

proptest::proptest! {
    /// A client library that mixes up replies, or a server that makes them up.
    #[test]
    fn a_reply_without_the_mark_of_its_request_counts_for_nothing(
        reply in super::super::replies::tests::replies(),
        latest in proptest::prelude::any::<u64>(),
    ) {
        let stamp = Scripts::new().stamp(latest);
        let has_mark = match &reply {
            Value::Integer(number @ ..0) => (number.unsigned_abs() & u64::from(u32::MAX)) as i64 == stamp.mark(),
            Value::Integer(number) => number >> 2 == stamp.mark(),
            Value::Array(parts) => parts.first() == Some(&Value::Integer(stamp.mark())),
            Value::Nil | Value::Bytes(_) => false,
        };
        let read = Reply::read(reply, stamp);
        proptest::prop_assert!(has_mark || read.is_err_and(|error| is_mixed_up(&error)));
    }

    /// And with the mark, whatever follows is read or refused.
    #[test]
    fn a_reply_with_the_mark_of_its_request_may_still_be_anything(
        parts in proptest::collection::vec(super::super::replies::tests::replies(), 0..4),
        latest in proptest::prelude::any::<u64>(),
    ) {
        let stamp = Scripts::new().stamp(latest);
        let reply = Value::Array([Value::Integer(stamp.mark())].into_iter().chain(parts).collect());
        drop(Reply::read(reply, stamp).map(Reply::value));
        let early = i64::try_from(latest >> 34).unwrap_or_default();
        drop(Reply::read(Value::Integer(-(early << 32) - stamp.mark()), stamp));
    }
}
