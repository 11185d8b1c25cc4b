//! What holds for all values, shown on many.

#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use tenure::{Error, Lease, Locker, Retry, Token};
use tokio::runtime::{Builder, Runtime};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_lease_survives_its_text(
        key in vec(any::<u8>(), 1..60),
        token in "[^\n]{1,60}",
        millis in any::<u64>(),
    ) {
        let lease = Lease::new(key, token.parse().unwrap(), Duration::from_millis(millis));
        let text = lease.to_string();
        prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b":-._~%".contains(&b)), "{text}");
        prop_assert_eq!(text.parse::<Lease>().unwrap(), lease);
    }

    #[test]
    fn any_text_is_a_lease_or_an_error(text in "(tenure:[0-9]:)?.{0,80}") {
        if let Ok(lease) = text.parse::<Lease>() {
            prop_assert_eq!(lease.to_string().parse::<Lease>().unwrap(), lease);
        }
    }

    #[test]
    fn any_text_is_a_token_or_an_error(text in "(?s).{0,60}") {
        match text.parse::<Token>() {
            Ok(token) => prop_assert_eq!(token.as_str(), text),
            Err(error) => prop_assert!(matches!(error, Error::InvalidToken(_))),
        }
    }

    #[test]
    fn a_ttl_of_any_length_works_or_is_refused(nanos in any::<u64>(), secs in any::<u64>(), short in any::<bool>()) {
        let ttl = if short { Duration::from_nanos(nanos % 1_000_000_000) } else { Duration::new(secs, 0) };
        runtime().block_on(async {
            match Locker::in_memory().lock("k").ttl(ttl).await {
                Ok(guard) => {
                    prop_assert!(guard.ttl() <= ttl && ttl - guard.ttl() < Duration::from_millis(1));
                    prop_assert!(guard.remaining() < ttl && guard.is_held());
                }
                Err(error) => prop_assert!(matches!(error, Error::InvalidTtl(_))),
            }
            Ok(())
        })?;
    }

    #[test]
    fn pauses_stay_within_their_bounds(
        min in any::<u32>(),
        max in any::<u64>(),
        jitter in any::<u64>(),
        limit in 0_usize..200,
    ) {
        let (min, max) = (Duration::from_nanos(min.into()), Duration::from_millis(max));
        let jitter = Duration::from_millis(jitter);
        let pauses: Vec<_> = Retry::exponential(min, max).jitter(jitter).limit(limit).pauses().collect();
        prop_assert_eq!(pauses.len(), limit);
        for pause in pauses {
            prop_assert!(pause >= min.min(max) && pause <= max.saturating_add(jitter));
        }
    }

    #[test]
    fn keys_of_any_bytes_exclude_each_other_and_no_others(one in vec(any::<u8>(), 1..40), other in vec(any::<u8>(), 1..40)) {
        runtime().block_on(async {
            let locker = Locker::in_memory();
            let _guard = locker.lock(one.clone()).await.unwrap();
            prop_assert_eq!(locker.try_lock(other.clone()).await.is_ok(), one != other);
            Ok(())
        })?;
    }
}

#[cfg(feature = "serde")]
#[test]
fn a_lease_survives_a_job_payload() {
    let lease = Lease::new(&b"odd\xff:key"[..], "worker-7".parse().unwrap(), Duration::from_secs(30));
    let payload = serde_json::to_string(&lease).unwrap();
    assert_eq!(payload, r#""tenure:1:30000::worker-7:odd%FF%3Akey""#);
    assert_eq!(serde_json::from_str::<Lease>(&payload).unwrap(), lease);
    assert!(serde_json::from_str::<Lease>(r#""tenure:9:nonsense""#).unwrap_err().to_string().contains("version"));
}
