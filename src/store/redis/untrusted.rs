//! What must be true of anything that a server sends, whoever makes it up: property tests, and the fuzz targets.

use super::driver::{Peer, Value};
use super::refusal::normalize;
use super::replies::{
    Kind, acquired, acquired_in_line, batch, downgraded, handed_over, holders, inspected, is_in_line, metadata,
    refused, remaining, single, verdict, verdict_of_node, vote,
};
use super::router::redirection::elsewhere;
use super::script::{Returned, into_ours};
use super::url::{self, Address};
use crate::store::{Acquired, HandedOver};
use crate::{Error, RedisError, RedisErrorKind};

/// Every reply is a verdict or an error. Only numbers grant a lock.
pub(super) fn any_reply(reply: &Value, number: i64) {
    let is_granted = |acquired: Acquired| matches!(acquired, Acquired::Granted { .. });
    let is_text = matches!(reply, Value::Bytes(_));
    for kind in [Kind::Acquire { is_fenced: false }, Kind::Acquire { is_fenced: true }, Kind::Owned] {
        for returned in [Returned::Code(number & 3), Returned::FencingToken(number)] {
            drop(single(kind, &returned));
            drop(handed_over(&returned));
        }
        for count in 0..6 {
            if let Ok(decisions) = batch([kind].repeat(count).into_iter(), reply) {
                assert_eq!(decisions.len(), count);
                // As usual by number, and the others one by one.
                assert!(matches!(reply, Value::Array(parts) if parts.len() >= 2 && parts.len() <= 2 + 2 * count));
            }
        }
        let by_itself = single(kind, &Returned::Value(reply.clone())).and_then(Result::ok);
        assert!(!(is_text && by_itself.and_then(|decision| decision.acquired().ok()).is_some_and(is_granted)));
    }
    assert!(!(is_text && acquired(reply).is_ok()));
    assert!(!(is_text && acquired_in_line(reply).ok().flatten().is_some_and(is_granted)));
    let is_done = |handed_over: HandedOver| matches!(handed_over, HandedOver::Done { .. });
    assert!(!(is_text && handed_over(&Returned::Value(reply.clone())).is_ok_and(is_done)));
    drop(verdict(Ok(reply.clone())));
    drop(verdict_of_node(Ok(reply.clone())));
    drop(remaining(reply));
    drop(vote(reply));
    drop(downgraded(reply));
    drop(inspected(reply.clone()));
    drop(holders(reply.clone()));
    drop(metadata(reply.clone()));
    // Only a number of its own means that a place is in the line.
    assert!(!is_in_line(reply) || *reply == Value::Integer(1));
}

/// Every refusal is an error that can be shown, without the arguments of the command. Its code decides what comes next.
pub(super) fn any_refusal(text: &str) {
    let error = into_ours(RedisError::new(RedisErrorKind::Unknown, text.to_owned()));
    let shown = format!("{error} {error:?} {:?} {}", error.code(), error.is_transient());
    assert!(!shown.is_empty() && !normalize(text).contains(", with args beginning with"));
    drop(elsewhere(&error, &Address::new("here", 7000)));
    let decided = refused(Kind::Owned, error.clone());
    assert!(decided.is_err() || error.code() == Some("WRONGTYPE"));
    assert!(refused(Kind::Acquire { is_fenced: true }, error).is_err(), "an acquire is never refused by an error");
}

/// Every reason for which a connection failed is an error that can be shown, and has no password in it.
pub(super) fn any_failure(kind: RedisErrorKind, text: &str) {
    const PASSWORD: &str = "opensesame";
    for servers in ["redis://:opensesame@10.0.0.1:6380", "rediss://:opensesame@redis.internal"] {
        let Ok(target) = url::parse(servers) else { continue };
        for text in [text.to_owned(), format!("{text}{PASSWORD}{text}")] {
            let failure = RedisError::new(kind, text);
            let peer = Peer::of(&target);
            let error: Error = peer.unreachable(failure.clone(), None).into();
            let shown = format!("{error} {error:?} {:?} {}", error.code(), error.is_transient());
            assert!(!shown.contains(PASSWORD), "{shown}");
            drop(peer.unanswered(failure));
        }
    }
}

/// The kinds of failures that a client reports of a connection.
pub(super) const FAILURES: [RedisErrorKind; 6] = [
    RedisErrorKind::Io,
    RedisErrorKind::Tls,
    RedisErrorKind::Timeout,
    RedisErrorKind::Protocol,
    RedisErrorKind::Auth,
    RedisErrorKind::Unknown,
];

/// The entrances of the fuzz targets.
#[cfg(fuzzing)]
pub(crate) mod fuzz {
    use super::*;
    use crate::store::redis::script::{Reply, Stamp};

    /// Takes bytes as a reply to a request with the mark 2048000005, and as the part of one that a script has returned.
    pub fn script_reply(mut wire: &[u8]) {
        let Some(reply) = read(&mut wire, 0) else { return };
        any_reply(&reply, reply.as_i64().unwrap_or_default());
        match Reply::read(reply, Stamp::of(2_048_000_005)).and_then(|reply| reply.outcome) {
            Ok(Returned::Code(number) | Returned::FencingToken(number)) => any_reply(&Value::Nil, number),
            Ok(Returned::Value(value)) => any_reply(&value, 0),
            Err(error) => drop(format!("{error} {error:?}")),
        }
    }

    /// Takes bytes as the text of a refusal, and as the reason for which a connection failed.
    pub fn server_error(text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        any_refusal(&text);
        FAILURES.into_iter().for_each(|kind| any_failure(kind, &text));
    }

    /// Reads a reply as a server writes it (RESP), and leaves the rest.
    fn read(wire: &mut &[u8], depth: usize) -> Option<Value> {
        let (line, rest) = wire.split_at_checked(wire.iter().position(|byte| *byte == b'\n')?)?;
        *wire = rest.get(1..)?;
        let (kind, text) = line.trim_ascii_end().split_first()?;
        let number = || std::str::from_utf8(text).ok()?.parse::<i64>().ok();
        match kind {
            b'_' => Some(Value::Nil),
            b':' => number().map(Value::Integer),
            b'+' => Some(Value::Bytes(text.to_vec().into())),
            b'$' => {
                let (bytes, rest) = wire.split_at_checked(usize::try_from(number()?).ok()?)?;
                *wire = rest.strip_prefix(b"\r\n")?;
                Some(Value::Bytes(bytes.to_vec().into()))
            }
            b'*' if depth < 8 => {
                (0..number()?).map(|_| read(wire, depth + 1)).collect::<Option<Vec<_>>>().map(Value::Array)
            }
            _ => None,
        }
    }
}
