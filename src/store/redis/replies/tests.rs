//! Whatever a server replies, it is a verdict or an error, and never a panic.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, proptest};
use proptest::sample::select;
use proptest::{collection, prop_oneof};

use super::*;
use crate::store::redis::untrusted;

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

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn any_reply_is_a_verdict_or_an_error(reply in replies(), number in numbers()) {
        untrusted::any_reply(&reply, number);
    }

    #[test]
    fn no_text_is_a_grant(text in collection::vec(any::<u8>(), 0..40)) {
        untrusted::any_reply(&Value::Bytes(text.into()), 0);
    }

    /// The text of a refusal may be anything; it is shown, and its code decides what comes next.
    #[test]
    fn any_refusal_is_an_error_that_can_be_shown(
        text in prop_oneof![
            any::<String>(),
            "(ERR |@user_script: ?[0-9]*: -?|-)*[A-Z]{0,12} .{0,20}",
            "(MOVED|ASK) [0-9]{0,6} .{0,12}:[0-9]{0,6}",
        ],
    ) {
        untrusted::any_refusal(&text);
    }

    #[test]
    fn any_failure_of_a_connection_is_an_error_without_a_password(
        kind in select(&untrusted::FAILURES),
        text in prop_oneof![
            any::<String>(),
            "(Custom \\{ )?(kind: [A-Z][a-z]{0,9}|message: \".{0,9}\"?|error: \"?[A-Za-z(]{0,20}|\
             AlertReceived\\(.{0,9}){0,3}",
        ],
    ) {
        untrusted::any_failure(kind, &text);
    }
}
