//! Properties of all values, shown on many random ones. A program of its own, as it needs no server.

#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use tenure::{Error, Lease, Locker, LockerBuilder, Loss, Retry, Token, WatchDog};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, timeout};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

/// From nothing to the longest, and the lengths at which arithmetic may end.
fn durations() -> impl Strategy<Value = Duration> {
    prop_oneof![
        1 => Just(Duration::ZERO),
        1 => Just(Duration::from_nanos(1)),
        1 => Just(Duration::MAX),
        1 => any::<Duration>(),
        6 => (0_u64..120_000).prop_map(Duration::from_millis),
        1 => any::<u64>().prop_map(Duration::from_nanos),
        // The monotonic clock counts seconds in an i64.
        1 => (0..10_000_000_u64).prop_map(|less| Duration::from_secs(i64::MAX.unsigned_abs() - less)),
    ]
}

/// The settings that are a length of time, by name.
#[derive(Clone, Debug)]
struct Times {
    ttl: Option<Duration>,
    renew_every: Option<Duration>,
    poll_every: Duration,
    command_timeout: Duration,
    restart_window: Duration,
    drift: Option<(f64, Duration)>,
    wait_at_most: Duration,
    pauses: [Duration; 3],
    changed: [Duration; 3],
}

fn times() -> impl Strategy<Value = Times> {
    use proptest::option::of;
    let drift = of((prop_oneof![4 => 0.0..0.1, 1 => any::<f64>()], durations()));
    let builder = (of(durations()), of(durations()), durations(), durations(), durations(), drift);
    let all = (builder, durations(), [(); 3].map(|()| durations()), [(); 3].map(|()| durations()));
    all.prop_map(|(builder, wait_at_most, pauses, changed)| {
        let (ttl, renew_every, poll_every, command_timeout, restart_window, drift) = builder;
        Times { ttl, renew_every, poll_every, command_timeout, restart_window, drift, wait_at_most, pauses, changed }
    })
}

impl Times {
    fn builder(&self) -> LockerBuilder {
        let builder = Locker::builder().poll_every(self.poll_every).command_timeout(self.command_timeout);
        let builder = builder.restart_window(self.restart_window);
        let builder = self.ttl.into_iter().fold(builder, LockerBuilder::ttl);
        let builder = self.renew_every.into_iter().fold(builder, LockerBuilder::renew_every);
        self.drift.into_iter().fold(builder, |builder, (factor, margin)| builder.drift(factor, margin))
    }
}

/// What a setting that can't work is refused with, or what comes of one that can.
fn is_fair(error: &Error) -> bool {
    matches!(error, Error::InvalidTtl(_) | Error::InvalidRenewal(_) | Error::NotObtained { .. } | Error::NotHeld { .. })
        || matches!(error, Error::Lost(_) | Error::ValidityExpired)
}

/// Uses every setting once. What waits is given up on after a while.
async fn use_all(times: &Times) -> Vec<Error> {
    const PATIENCE: Duration = Duration::from_millis(300);
    let locker = times.builder().in_memory();
    let mut errors = Vec::new();
    let mut note = |error: Option<Error>| errors.extend(error);
    let [a, b, c] = times.pauses;
    match locker.lock("k").await {
        Ok(guard) => {
            for retry in [Retry::linear(a), Retry::exponential(a, b), Retry::linear(b).jitter(c)] {
                let request = locker.obtain("k").retry(retry.max_retries(9)).wait_at_most(times.wait_at_most);
                note(timeout(PATIENCE, request.into_future()).await.ok().and_then(Result::err));
            }
            let waiter = locker.lock("k").wait_at_most(times.wait_at_most);
            note(timeout(PATIENCE, waiter.into_future()).await.ok().and_then(Result::err));
            let [exact, longer, ensured] = times.changed;
            note(guard.renew().await.err());
            note(guard.renew_for(exact).await.err());
            note(timeout(PATIENCE, guard.lost()).await.ok().map(Error::Lost));
            note(guard.ensure(longer).await.err());
            note(guard.server_ttl().await.err());
            let lease = guard.into_lease();
            note(locker.ensure(&lease, ensured).await.err());
            note(locker.adopt(lease).await.err());
        }
        Err(error) => note(Some(error)),
    }
    let [ttl, renew_every, other] = times.changed;
    let request = locker.lock("other").ttl(ttl).renew_every(renew_every);
    note(timeout(PATIENCE, request.into_future()).await.ok().and_then(Result::err));
    let dog = WatchDog::builder(&locker).renew_every(other).build();
    let lease = || Lease::new("watched", Token::random(), ttl);
    note(dog.watch_lease(lease()).obtain_when_free(true).await.err());
    note(timeout(PATIENCE, dog.release("watched")).await.ok().and_then(Result::err));
    note(dog.watch_lease(lease()).renew_every(renew_every).obtain_when_free(true).await.err());
    tokio::time::sleep(PATIENCE).await;
    drop(dog.shutdown().await);
    errors
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
    fn any_text_is_a_lease_or_an_error(
        text in prop_oneof![
            "(tenure:[0-9]:)?.{0,80}",
            "tenure:[12]:(read:|permit:)?[0-9]{1,20}:[0-9]{0,20}(~-|~[0-9a-f]{0,17})?(:[a-z%0-9A-F]{0,6}){0,4}",
        ],
    ) {
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
    fn bounds_of_any_length_hold_or_are_refused(
        ttl in (4_u64..100_000).prop_map(Duration::from_millis),
        least in durations(),
        most in durations(),
        work in (0_u64..20_000).prop_map(Duration::from_millis),
    ) {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        runtime().block_on(async {
            let (locker, start) = (Locker::in_memory(), Instant::now());
            let guard = match locker.lock("k").ttl(ttl).hold_at_least(least).hold_at_most(most).await {
                Ok(guard) => guard,
                Err(error) => {
                    let is_refused = matches!(error, Error::InvalidHold(_));
                    prop_assert!(is_refused && (most < Duration::from_millis(4) || least > 365 * DAY), "{error}");
                    return Ok(());
                }
            };
            prop_assert!(guard.is_held() && guard.deadline() - start <= most);
            let lost = timeout(work, guard.lost()).await;
            prop_assert!(guard.deadline() - start <= most);
            if let Ok(loss) = lost {
                prop_assert_eq!(loss, Loss::LimitReached);
                // By the allowance for drift: of a part of the ttl, or of all.
                prop_assert!(start.elapsed() + ttl / 100 + Duration::from_millis(4) >= most.min(work), "{most:?}");
            }
            drop(guard);
            tokio::task::yield_now().await;
            // What is left of the time, unless that is over. A timer has a millisecond more.
            let rest = least.saturating_sub(start.elapsed());
            let next = timeout(rest.min(DAY) + Duration::from_millis(20), locker.lock("k").into_future()).await;
            prop_assert_eq!(next.is_ok(), rest < DAY);
            prop_assert!(start.elapsed() >= least.min(DAY));
            Ok(())
        })?;
    }

    #[test]
    fn a_setting_of_any_length_works_or_is_refused(times in times()) {
        let errors = runtime().block_on(use_all(&times));
        prop_assert!(errors.iter().all(is_fair), "{errors:?}");
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
        let pauses: Vec<_> = Retry::exponential(min, max).jitter(jitter).max_retries(limit).pauses().collect();
        prop_assert_eq!(pauses.len(), limit);
        for pause in pauses {
            prop_assert!(pause >= min.min(max) && pause <= max.saturating_add(jitter));
        }
    }

    #[test]
    fn keys_of_any_bytes_exclude_each_other_and_no_others(
        one in vec(any::<u8>(), 1..40),
        other in vec(any::<u8>(), 1..40),
    ) {
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
    let of_reader: Lease = "tenure:2:read:30000:7~-:worker-7:k".parse().unwrap();
    let payload = serde_json::to_string(&of_reader).unwrap();
    assert_eq!(serde_json::from_str::<Lease>(&payload).unwrap(), of_reader);
    assert!(serde_json::from_str::<Lease>(r#""tenure:9:nonsense""#).unwrap_err().to_string().contains("version"));
}
