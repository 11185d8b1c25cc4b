//! Whatever a server replies, it is a verdict or an error, and never a panic.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, proptest};
use proptest::{collection, prop_oneof};

use super::*;

/// Numbers at which arithmetic may end, and those that scripts return.
fn numbers() -> impl Strategy<Value = i64> {
    prop_oneof![
        4 => -5_i64..10,
        1 => any::<i64>(),
        1 => Just(i64::MIN),
        1 => (0_i64..3).prop_map(|more| i64::MIN + more),
        1 => (0_i64..3).prop_map(|less| i64::MAX - less),
    ]
}

pub(in super::super) fn replies() -> impl Strategy<Value = Value> {
    let texts = prop_oneof![
        1 => Just(b"ALONE".to_vec()),
        1 => Just(b"WRONGTYPE Operation".to_vec()),
        1 => numbers().prop_map(|number| number.to_string().into_bytes()),
        2 => collection::vec(any::<u8>(), 0..12),
    ];
    let leaf = prop_oneof![
        1 => Just(Value::Nil),
        6 => numbers().prop_map(Value::Integer),
        2 => texts.prop_map(|text| Value::Bytes(text.into())),
    ];
    prop_oneof![
        // As scripts reply.
        1 => collection::vec(numbers().prop_map(Value::Integer), 1..6).prop_map(Value::Array),
        1 => leaf.prop_recursive(3, 24, 6, |inner| collection::vec(inner, 0..6).prop_map(Value::Array)),
    ]
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Acquire), Just(Kind::Owned)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn any_reply_is_a_verdict_or_an_error(reply in replies(), kind in kinds(), number in numbers()) {
        for returned in [Returned::Code(number & 3), Returned::FencingToken(number), Returned::Value(reply.clone())] {
            drop(single(kind, &returned));
            drop(handed_over(&returned));
        }
        for count in 0..6 {
            if let Ok(decisions) = batch([kind].repeat(count).into_iter(), &reply) {
                prop_assert!(decisions.len() == count);
            }
        }
        drop(acquired(&reply));
        drop(acquired_in_line(&reply));
        drop(verdict(Ok(reply.clone())));
        drop(verdict_of_node(Ok(reply.clone())));
        drop(remaining(&reply));
        drop(vote(&reply));
        drop(downgraded(&reply));
        drop(has_ended(&reply));
        drop(inspected(reply.clone()));
        drop(holders(reply.clone()));
        drop(metadata(reply.clone()));
        // Only a number of its own means that a place is in the line.
        prop_assert!(!is_in_line(&reply) || reply == Value::Integer(1));
    }

    #[test]
    fn no_text_is_a_grant(text in collection::vec(any::<u8>(), 0..40)) {
        let reply = Value::Bytes(text.into());
        prop_assert!(acquired(&reply).is_err());
        let is_granted = |acquired: Acquired| matches!(acquired, Acquired::Granted { .. });
        prop_assert!(!acquired_in_line(&reply).ok().flatten().is_some_and(is_granted));
        let by_itself = single(Kind::Acquire, &Returned::Value(reply)).and_then(Result::ok);
        prop_assert!(!by_itself.and_then(|decision| decision.acquired().ok()).is_some_and(is_granted));
    }

    /// The text of a refusal may be anything; it is shown, and its code decides what comes next.
    #[test]
    fn any_refusal_is_an_error_that_can_be_shown(
        text in prop_oneof![any::<String>(), "(ERR |@user_script: ?[0-9]*: -?|-)*[A-Z]{0,12} .{0,20}"],
    ) {
        let normal = normalize(&text).into_owned();
        let error: Error = RedisError::new(RedisErrorKind::Unknown, normal).into();
        let shown = format!("{error} {error:?} {:?} {}", error.code(), error.is_transient());
        prop_assert!(!shown.is_empty());
        let decided = refused(Kind::Owned, error.clone());
        prop_assert!(decided.is_err() || error.code() == Some("WRONGTYPE"));
        prop_assert!(refused(Kind::Acquire, error).is_err(), "an acquire is never refused by an error");
    }
}
