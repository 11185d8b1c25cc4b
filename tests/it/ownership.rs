//! Several guards with one token: what one leaves in the background never ends a lock that another relies on. And a
//! request that fails half way leaves nothing behind.

use std::time::Duration;

use tenure::{Error, Lease, Locker, Loss, Token};
use tenure_test_support::{Server, eventually, soon};
use tokio::time::sleep;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn token() -> Token {
    "worker-7".parse().unwrap()
}

async fn start() -> (Server, Locker, Locker) {
    let server = Server::start();
    let here = Locker::connect(&server.url()).await.unwrap();
    let there = Locker::connect(&server.url()).await.unwrap();
    (server, here, there)
}

/// Asserts that the key becomes free. Closes the lockers first, so that no request is in flight.
async fn assert_freed(server: &Server, lockers: [&Locker; 2]) {
    for locker in lockers {
        soon(locker.close()).await;
    }
    eventually("no key but the fence is left", async || (server.cli(&["KEYS", "*"]) == "{k}:fence").then_some(()))
        .await;
}

#[tokio::test]
async fn a_guard_that_expires_does_not_end_what_its_token_obtained_later() {
    let (server, here, there) = start().await;
    for second in [&here, &there] {
        let first = here.obtain("k").token(token()).ttl(ms(500)).no_renewal().await.unwrap();
        let second = second.obtain("k").token(token()).ttl(ms(60_000)).await.unwrap();
        soon(first.lost()).await;
        drop(first);
        sleep(ms(300)).await;
        assert!(second.is_held() && there.try_lock("k").await.is_err());
        assert_eq!(server.cli(&["GET", "k"]), token().as_str());
        second.release().await.unwrap();
    }
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn a_process_that_wakes_after_its_ttl_does_not_end_what_its_successor_obtained_by_the_same_token() {
    let (server, here, there) = start().await;
    let stale = here.obtain("k").token(token()).ttl(ms(400)).no_renewal().await.unwrap();
    // Nothing of the first process runs until its ttl has ended: this thread is its runtime.
    std::thread::sleep(ms(450));
    let successor = soon(there.obtain("k").token(token()).ttl(ms(60_000))).await.unwrap();
    drop(stale);
    soon(here.close()).await;
    assert!(successor.is_held());
    assert_eq!(server.cli(&["GET", "k"]), token().as_str());
    drop(successor);
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn a_dropped_guard_does_not_end_what_its_token_obtains_next() {
    let (server, here, there) = start().await;
    for _ in 0..50 {
        let first = here.obtain("k").token(token()).await.unwrap();
        drop(first);
        let second = here.obtain("k").token(token()).await.unwrap();
        sleep(ms(5)).await;
        assert_eq!(server.cli(&["GET", "k"]), token().as_str());
        second.renew().await.unwrap();
    }
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn a_guard_by_a_random_token_does_not_end_what_another_obtained_by_that_token() {
    let (server, here, there) = start().await;
    let first = here.lock("k").await.unwrap();
    let twin = there.obtain("k").token(first.token().clone()).await.unwrap();
    drop(first);
    soon(here.close()).await;
    twin.renew().await.unwrap();
    assert_eq!(server.cli(&["GET", "k"]), twin.token().as_str());
    drop(twin);
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn of_several_guards_by_one_token_the_last_to_go_frees_the_key_in_whatever_order() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let (server, here, there) = start().await;
        let mut guards = Vec::new();
        for locker in [&here, &there, &here] {
            guards.push(Some(locker.obtain("k").token(token()).await.unwrap()));
        }
        for (n, i) in order.into_iter().enumerate() {
            drop(guards[i].take());
            if n < 2 {
                sleep(ms(50)).await;
                assert_eq!(server.cli(&["GET", "k"]), token().as_str(), "{order:?}");
            }
        }
        assert_freed(&server, [&here, &there]).await;
    }
}

#[tokio::test]
async fn an_explicit_release_ends_the_lock_for_all_who_hold_it_by_its_token() {
    let (server, here, there) = start().await;
    let first = here.obtain("k").token(token()).await.unwrap();
    let twin = there.obtain("k").token(token()).await.unwrap();
    twin.release().await.unwrap();
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
    assert!(matches!(first.renew().await, Err(Error::NotHeld { .. })));
    drop(first);
    assert_freed(&server, [&here, &there]).await;
}

/// With the key, the server has lost which guards rely on it.
#[tokio::test]
async fn a_guard_that_is_renewed_where_its_key_was_lost_and_taken_again_by_its_token_is_not_ended_by_the_other() {
    for lose in [&["DEL", "k"][..], &["FLUSHALL"]] {
        let (server, here, there) = start().await;
        let first = here.obtain("k").token(token()).no_renewal().await.unwrap();
        server.cli(lose);
        let second = there.obtain("k").token(token()).await.unwrap();
        first.renew().await.unwrap();
        drop(second);
        soon(there.close()).await;
        assert!(first.is_held());
        let rival = Locker::connect(&server.url()).await.unwrap();
        rival.try_lock("k").await.unwrap_err();
        drop(first);
        assert_freed(&server, [&here, &rival]).await;
    }
}

/// The same, where the token is that of a guard which made it: nothing at the server tells its grant from none.
#[tokio::test]
async fn a_guard_whose_token_was_used_again_is_renewed_by_no_key_that_is_there_for_the_other_alone() {
    let (server, here, there) = start().await;
    let embedded = Locker::in_memory();
    for (here, there) in [(&here, &there), (&embedded, &embedded)] {
        let first = here.lock("k").no_renewal().await.unwrap();
        let token = first.token().clone();
        there.obtain("k").token(token.clone()).await.unwrap().release().await.unwrap();
        let second = there.obtain("k").token(token).await.unwrap();
        let told = first.renew().await.unwrap_err();
        assert!(matches!(told, Error::NotHeld { loss: Loss::Missing, .. }), "{told}");
        assert!(!first.is_held());
        second.renew().await.unwrap();
        drop((first, second));
        eventually("it is free", async || there.try_lock("k").await.ok()).await.release().await.unwrap();
    }
    assert_freed(&server, [&here, &there]).await;
}

/// The record would stay for a day.
#[tokio::test]
async fn a_guard_that_finds_its_lock_gone_or_taken_leaves_no_record_of_its_grant() {
    let (server, here, there) = start().await;
    let no_record = async || (server.cli(&["EXISTS", "{k}:grants"]) == "0").then_some(());
    let lost: [&[&str]; 2] = [&["DEL", "k"], &["SET", "k", "another", "PX", "60000"]];
    for (lose, is_released) in [(lost[0], false), (lost[0], true), (lost[1], false), (lost[1], true)] {
        let guard = here.obtain("k").token(token()).await.unwrap();
        assert!(no_record().await.is_none());
        server.cli(lose);
        let told = if is_released {
            guard.release().await
        } else {
            let told = guard.renew().await;
            drop(guard);
            told
        };
        assert!(matches!(told, Err(Error::NotHeld { .. })), "{lose:?}");
        eventually(&format!("no record is left: {lose:?}, {is_released}"), no_record).await;
        server.cli(&["DEL", "k"]);
    }
    // The holder that the token was made for releases the lock without a look at the record.
    let first = here.lock("k").await.unwrap();
    let twin = there.obtain("k").token(first.token().clone()).await.unwrap();
    first.release().await.unwrap();
    assert!(twin.renew().await.is_err());
    drop(twin);
    // A waiter is given a lock that has gone.
    let guard = here.obtain("k").token(token()).await.unwrap();
    let waiter = tokio::spawn(here.lock("k").into_future());
    eventually("it waits", async || (server.cli(&["ZCARD", "{k}:queue"]) == "1").then_some(())).await;
    server.cli(&["DEL", "k"]);
    assert!(guard.release().await.is_err());
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn a_key_that_is_taken_with_one_that_lives_longer_has_the_ttl_of_its_own_guard() {
    let (server, here, there) = start().await;
    let first = here.obtain("k").token(token()).ttl(ms(60_000)).await.unwrap();
    let both = there.lock_all(["l", "k"]).token(token()).ttl(ms(2_000)).await.unwrap();
    let ttl_of = |key| server.cli(&["PTTL", key]).parse::<i64>().unwrap();
    assert!(ttl_of("l") <= 2_000 && ttl_of("k") > 50_000);
    drop((first, both));
    soon(here.close()).await;
    soon(there.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k", "l"]), "0");
}

#[tokio::test]
async fn a_twin_that_shortens_the_ttl_ends_no_other_guard() {
    let (server, here, there) = start().await;
    let first = here.obtain("k").token(token()).ttl(ms(30_000)).await.unwrap();
    let twin = there.obtain("k").token(token()).await.unwrap();
    twin.renew_for(ms(200)).await.unwrap();
    assert!(server.cli(&["PTTL", "k"]).parse::<i64>().unwrap() > 25_000);
    drop(twin);
    soon(there.close()).await;
    // Once it is alone again, it may shorten the ttl.
    first.renew_for(ms(5_000)).await.unwrap();
    assert!(server.cli(&["PTTL", "k"]).parse::<i64>().unwrap() <= 5_000);
    assert!(first.is_held());
    drop(first);
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn a_lease_that_is_adopted_is_released_by_its_guard_and_by_no_other() {
    let (server, here, there) = start().await;
    let lease = here.lock("k").await.unwrap().into_lease();
    let copy: Lease = lease.to_string().parse().unwrap();
    assert_eq!(copy, lease);
    let first = there.adopt(lease).await.unwrap();
    let second = here.adopt(copy).await.unwrap();
    drop(first);
    sleep(ms(100)).await;
    assert_eq!(server.cli(&["GET", "k"]), second.token().as_str());
    // A lease that is passed on is still one grant.
    let third = there.adopt(second.into_lease().to_string().parse().unwrap()).await.unwrap();
    drop(third);
    assert_freed(&server, [&here, &there]).await;
}

#[tokio::test]
async fn when_one_of_several_keys_is_gone_the_others_are_released() {
    let (server, here, _) = start().await;
    for end in ["DEL", "LPUSH"] {
        let guard = here.lock_all(["a", "b", "c"]).ttl(ms(60_000)).await.unwrap();
        server.cli(&["DEL", "b"]);
        if end == "LPUSH" {
            server.cli(&["LPUSH", "b", "item"]);
        }
        assert!(matches!(guard.renew().await, Err(Error::NotHeld { .. })), "{end}");
        soon(guard.lost()).await;
        drop(guard);
        eventually("the others are free", async || (server.cli(&["EXISTS", "a", "c"]) == "0").then_some(())).await;
        server.cli(&["DEL", "b"]);
    }
    // An explicit release detects the loss itself.
    let guard = here.lock_all(["a", "b", "c"]).ttl(ms(60_000)).await.unwrap();
    server.cli(&["DEL", "b"]);
    server.cli(&["LPUSH", "b", "item"]);
    assert!(matches!(guard.release().await, Err(Error::NotHeld { .. })));
    assert_eq!(server.cli(&["EXISTS", "a", "c"]), "0");
    assert_eq!(server.cli(&["TYPE", "b"]), "list");
}

#[tokio::test]
async fn a_key_of_ours_with_a_wrong_type_is_named_and_nothing_is_taken() {
    let (server, here, _) = start().await;
    for (poisoned, fair) in [
        ("{k}:alive", true),
        ("{k}:queue", true),
        ("{k}:fence", true),
        ("{k}:fence", false),
        ("{k}:grants", true),
        ("{k}:grants", false),
    ] {
        let poison: &[&str] = if poisoned.ends_with("alive") || poisoned.ends_with("queue") {
            &["SET", poisoned, "x"]
        } else {
            &["LPUSH", poisoned, "x"]
        };
        server.cli(poison);
        let mut request = here.try_lock("k").fair(fair);
        if poisoned.ends_with("grants") {
            request = request.token(token());
        }
        let refused = soon(request).await.unwrap_err();
        let code = if poisoned.ends_with("grants") { "ERR" } else { "WRONGTYPE" };
        assert_eq!(refused.code(), Some(code), "{poisoned}: {refused}");
        assert!(refused.to_string().contains(poisoned), "{poisoned}: {refused}");
        assert_eq!(server.cli(&["EXISTS", "k"]), "0", "{poisoned}");
        server.cli(&["FLUSHALL"]);
    }
}

/// A dead holder keeps the key for its own ttl, not for the ttl of a later guard with the same token.
#[tokio::test]
async fn a_holder_that_died_keeps_the_key_for_its_own_ttl_at_most() {
    let (server, here, there) = start().await;
    // Nobody is left to release the lock.
    let dead = here.obtain("k").token(token()).ttl(ms(1_500)).no_renewal().await.unwrap();
    std::mem::forget(dead);
    let guard = there.obtain("k").token(token()).ttl(ms(600_000)).await.unwrap();
    guard.ensure(ms(900_000)).await.unwrap();
    drop(guard);
    soon(there.close()).await;
    let left = server.cli(&["PTTL", "k"]).parse::<i64>().unwrap();
    assert!(left <= 1_500, "{left} ms");
}

#[tokio::test]
async fn a_holder_that_lives_is_not_cut_short_by_the_end_of_one_with_a_longer_ttl() {
    let (server, here, _) = start().await;
    let short = here.obtain("k").token(token()).ttl(ms(1_500)).await.unwrap();
    let end_another = async || {
        let there = Locker::connect(&server.url()).await.unwrap();
        drop(there.obtain("k").token(token()).ttl(ms(600_000)).await.unwrap());
        soon(there.close()).await;
    };
    end_another().await;
    for _ in 0..25 {
        sleep(ms(100)).await;
        assert!(short.is_held());
        assert_eq!(server.cli(&["GET", "k"]), token().as_str());
    }
    // A guard that was promised a longer ttl keeps it.
    short.ensure(ms(300_000)).await.unwrap();
    end_another().await;
    assert!(server.cli(&["PTTL", "k"]).parse::<i64>().unwrap() > 250_000);
    short.release().await.unwrap();
}

/// A lease that was created from a token doesn't know which grant holds the lock: that may be a live guard.
#[tokio::test]
async fn a_lease_made_by_hand_ends_no_guard_that_it_was_not_made_from() {
    let (server, here, there) = start().await;
    let guard = here.lock("k").ttl(ms(30_000)).await.unwrap();
    let lease = Lease::new("k", guard.token().clone(), ms(30_000));
    let adopted = there.adopt(lease.to_string().parse().unwrap()).await.unwrap();
    adopted.renew_for(ms(200)).await.unwrap();
    assert!(server.cli(&["PTTL", "k"]).parse::<i64>().unwrap() > 25_000);
    drop(adopted);
    soon(there.close()).await;
    guard.renew().await.unwrap();
    let there = Locker::connect(&server.url()).await.unwrap();
    there.adopt(lease).await.unwrap().release().await.unwrap();
    assert_eq!(server.cli(&["EXISTS", "k"]), "0", "an explicit release ends it");
}

#[tokio::test]
async fn a_record_that_holds_something_else_is_named_and_never_taken_for_a_loss() {
    let (server, here, _) = start().await;
    let guard = here.lock_all(["a", "b", "c"]).ttl(ms(60_000)).await.unwrap();
    server.cli(&["LPUSH", "{b}:grants", "x"]);
    let refused = guard.renew_for(ms(50_000)).await.unwrap_err();
    assert!(refused.to_string().contains("{b}:grants"), "{refused}");
    assert!(guard.is_held());
    drop(guard);
    soon(here.close()).await;
    assert_eq!(server.cli(&["EXISTS", "a", "c"]), "0");
}

/// A refusal to report the holder differs from the report that another holds the lock.
#[tokio::test]
async fn a_right_that_was_taken_away_is_no_loss() {
    let server = Server::start();
    let user = ["ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all"];
    server.cli(&user);
    let locker = Locker::connect(&server.url().replace("redis://", "redis://app:secret@")).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    server.cli(&[&user[..], &["-get"]].concat());
    for refused in [guard.renew().await.unwrap_err(), guard.server_ttl().await.unwrap_err()] {
        assert_eq!(refused.code(), Some("NOPERM"), "{refused}");
    }
    assert!(guard.is_held());
    server.cli(&user);
    guard.release().await.unwrap();
}
