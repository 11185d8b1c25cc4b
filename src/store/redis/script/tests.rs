use std::sync::Arc;
use std::time::Duration;

use tenure_test_support::Server;

use super::super::operation::{Operation, What};
use super::super::replies::integers;
use super::super::server::Server as RedisServer;
use super::super::{Driver, Executor, RedisStore, names};
use super::*;
use crate::store::Acquired;

const PATIENCE: Duration = Duration::from_secs(10);

/// Sets the keys as they are described, and deletes the others: `-` for none, `[]` for a list.
const SET: &str = "for i, key in ipairs(KEYS) do redis.call('DEL', key) \
    if ARGV[i] == '[]' then redis.call('RPUSH', key, 'x') \
    elseif ARGV[i] ~= '-' then redis.call('SET', key, ARGV[i], 'PX', 50000) end end";

/// What the keys hold now, and whether each lives for longer than it was set for.
const LOOK: &str = "local all = {} for i, key in ipairs(KEYS) do \
    local held = redis.pcall('GET', key) \
    all[i] = (held and (held.err or held) or '-') .. (redis.call('PTTL', key) > 50000 and ' longer' or '') end \
    return table.concat(all, '|')";

/// What comes before hand_over.lua decides as that does: every case is decided by both, and leaves the same behind.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_short_way_to_hand_over_ends_where_the_long_one_does() {
    let server = Server::start();
    let store = RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap();
    let server = store.server();
    let parts = &[OWNER, HELD, FENCE, GRANTS, LINE, include_str!("../scripts/hand_over.lua")];
    let long = Script::new(parts);
    let short = &server.scripts.hand_over;
    // Of fencing tokens that are numbers, one is greater than the clock.
    let fences = ["-", "5", "8999999999999999", "9007199254740991", "text", "[]"];
    let helds = ["-", "token", "token\nmetadata", "token-2", "\nplace:s1", "[]"];
    let records = ["-", "token\n-", "token\nid=5", "other\n-", "[]"];
    let cases = helds.into_iter().flat_map(|held| fences.map(|fence| (held, fence)));
    let cases = cases.flat_map(|(held, fence)| records.map(|record| [held, "-", "-", record, fence]));
    let mut short_ways = 0;
    for before in cases {
        for (grant, fenced) in ["", "-", "*", "id"].into_iter().flat_map(|grant| [(grant, "0"), (grant, "1")]) {
            let call = || {
                let args =
                    ["token", "next", "90000", "90000", "place:s1", "3000", "1", fenced, grant, "0", "PUBLISH", "k"];
                Call::new(KEYS.map(Bytes::from).into_iter(), args.map(Bytes::from))
            };
            let mut ends = Vec::new();
            for script in [&long, short] {
                eval(server, SET, &before).await;
                let said = match server.run(script, call, |_| {}, PATIENCE).await.unwrap().outcome {
                    Ok(Returned::Value(answer)) => format!("{:?}", integers(&answer).unwrap()),
                    Ok(Returned::Code(code)) => {
                        assert_eq!(code, 1);
                        short_ways += 1;
                        "[0, 0]".to_owned()
                    }
                    Ok(Returned::FencingToken(token)) => {
                        short_ways += 1;
                        format!("[{token}, 0]")
                    }
                    Err(error) => error.to_string(),
                };
                let left = eval(server, LOOK, &[]).await;
                ends.push(without_clock(&format!("{said} {left:?}")));
            }
            assert_eq!(ends[0], ends[1], "{before:?}, {grant:?}, {fenced}");
        }
    }
    assert!(short_ways > 0);
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
        let decision = store.server().run_one(&acquire, timeout).await.unwrap();
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

/// The two are run one after the other, and may give the time of the server as the fencing token.
fn without_clock(text: &str) -> String {
    let parts = text.split_inclusive(|c: char| !c.is_ascii_digit());
    let is_clock = |number: &str| number.len() == 16 && number.starts_with('1');
    let number_of = |part: &str| part.trim_end_matches(|c: char| !c.is_ascii_digit()).to_owned();
    parts.map(|part| if is_clock(&number_of(part)) { "clock ".to_owned() } else { part.to_owned() }).collect()
}
