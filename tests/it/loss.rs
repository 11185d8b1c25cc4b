//! A guard detects its loss: before the server frees the lock, for the right reason, and never without one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure::{Error, LockGuard, Locker, Loss, WatchDog, WatchEvent};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon, within};
use tokio::time::{Instant, sleep, sleep_until};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test]
async fn a_guard_is_lost_before_a_frozen_server_frees_its_key() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(2_000)).await.unwrap();
    let over = guard.cancellation_token();
    let frees_at = expiry(&server, "k");
    server.freeze();
    let surely_held_until = guard.deadline();
    assert_eq!(within(frees_at - Instant::now(), guard.lost()).await, Loss::Expired);
    let now = Instant::now();
    assert!(!guard.is_held() && over.is_cancelled());
    assert!(now >= surely_held_until, "too early by {:?}", surely_held_until - now);
    server.thaw();
    // A request in flight to the frozen server holds the key no longer than the renewer needs to undo it.
    eventually("the key is free", async || (server.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
}

/// Returns when the server frees the key, by its own clock, which is this machine's.
fn expiry(server: &Server, key: &str) -> Instant {
    let script = "local now = redis.call('TIME') \
        return (now[1] * 1000 + redis.call('PTTL', KEYS[1])) * 1000 + now[2]";
    let expires = UNIX_EPOCH + Duration::from_micros(server.cli(&["EVAL", script, "1", key]).parse().unwrap());
    loop {
        let (now, by_the_wall) = (Instant::now(), SystemTime::now());
        // Both clocks were read at the same moment, without a pause in between.
        if now.elapsed() < ms(1) {
            return now + expires.duration_since(by_the_wall).unwrap();
        }
    }
}

#[tokio::test]
async fn is_held_flips_at_the_deadline_even_when_the_runtime_stands_still() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(300)).await.unwrap();
    let deadline = guard.deadline();
    // There is one thread: while this loop runs, no renewer and no timer runs.
    while Instant::now() < deadline {
        if let Err(loss) = guard.check() {
            assert!(Instant::now() >= deadline, "{loss} before the deadline");
        }
    }
    assert_eq!(guard.check(), Err(Loss::Expired));
    // A later successful renewal does not bring the lock back.
    assert_eq!(soon(guard.lost()).await, Loss::Expired);
}

#[tokio::test]
async fn a_deleted_key_is_missing_at_the_next_renewal() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").renew_every(ms(50)).await.unwrap();
    assert_eq!(server.cli(&["DEL", "k"]), "1");
    assert_eq!(soon(guard.lost()).await, Loss::Missing);
    assert!(matches!(guard.release().await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
}

#[tokio::test]
async fn an_overwritten_key_is_taken_and_left_to_its_new_owner() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").renew_every(ms(50)).await.unwrap();
    assert_eq!(server.cli(&["SET", "k", "another", "PX", "60000"]), "OK");
    assert_eq!(soon(guard.lost()).await, Loss::Taken);
    drop(guard);
    locker.close().await;
    assert_eq!(server.cli(&["GET", "k"]), "another");
    assert!(server.cli(&["PTTL", "k"]).parse::<u64>().unwrap() > 50_000);
}

#[tokio::test]
async fn a_key_of_another_type_is_taken_and_left_alone() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").renew_every(ms(50)).await.unwrap();
    server.cli(&["DEL", "k"]);
    server.cli(&["LPUSH", "k", "item"]);
    assert_eq!(soon(guard.lost()).await, Loss::Taken);
    drop(guard);
    locker.close().await;
    assert_eq!(server.cli(&["LRANGE", "k", "0", "-1"]), "item");
}

#[tokio::test]
async fn fencing_tokens_grow_also_where_the_servers_clock_was_set_back() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    // By an hour, since the last holder.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut last = u64::try_from(now.as_micros()).unwrap() + 3_600_000_000;
    server.cli(&["SET", "{k}:fence", &last.to_string()]);
    let token = "worker-7".parse().unwrap();
    // Each is decided by another script.
    for request in [
        locker.try_lock("k"),
        locker.lock("k").fair(true),
        locker.lock("k").token(token),
        locker.lock_all(["k", "{k}:other"]),
        locker.try_lock("k"),
    ] {
        let guard = soon(request).await.unwrap();
        let fence = guard.fencing_token().unwrap();
        assert!(fence > last, "{fence} after {last}");
        last = fence;
        soon(guard.release()).await.unwrap();
    }
}

#[tokio::test]
async fn a_server_restarted_empty_has_lost_the_lock_but_its_fencing_tokens_grow_on() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").renew_every(ms(100)).await.unwrap();
    server.restart_empty();
    assert_eq!(soon(guard.lost()).await, Loss::Missing);
    let successor = soon(locker.lock("k")).await.unwrap();
    assert!(successor.fencing_token() > guard.fencing_token());
}

#[tokio::test]
async fn a_flush_loses_the_lock_and_fencing_tokens_grow_on() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").renew_every(ms(50)).await.unwrap();
    assert_eq!(server.cli(&["FLUSHALL"]), "OK");
    assert_eq!(soon(guard.lost()).await, Loss::Missing);
    assert!(locker.lock("k").await.unwrap().fencing_token() > guard.fencing_token());
    // The guard's fencing token is not its successor's.
    assert_ne!(locker.inspect("k").await.unwrap().map(|holder| holder.fencing_token), Some(guard.fencing_token()));
}

#[tokio::test]
async fn a_connection_cut_again_and_again_loses_nothing() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(300)).await.unwrap();
    let first = guard.deadline();
    eventually("it is renewed all the same, for seconds", async || {
        server.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        assert_eq!(guard.check(), Ok(()));
        sleep(ms(150)).await;
        (guard.deadline() > first + ms(3_000)).then_some(())
    })
    .await;
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_line_that_has_gone_silent_is_replaced_in_time() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker =
        Locker::builder().command_timeout(ms(250)).wait_for_server(ms(20_000)).connect(&proxy.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(500)).await.unwrap();
    let first = guard.deadline();
    // Requests arrive, replies don't, and there is no error, as behind a firewall that has forgotten the connection.
    proxy.set(Mode::Silence);
    eventually("a renewal by a new connection", async || (guard.deadline() > first + ms(1_000)).then_some(())).await;
    assert_eq!(guard.check(), Ok(()));
}

#[tokio::test]
async fn a_renewal_whose_answer_is_lost_is_no_loss() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(700)).await.unwrap();
    let first = guard.deadline();
    proxy.set(Mode::LoseNext);
    eventually("renewed all the same", async || (guard.deadline() > first).then_some(())).await;
    assert_eq!((guard.check(), proxy.lost()), (Ok(()), 1));
    proxy.set(Mode::LoseNext);
    guard.release().await.unwrap();
    assert_eq!((server.cli(&["EXISTS", "k"]).as_str(), proxy.lost()), ("0", 2));
}

#[tokio::test]
async fn credentials_taken_away_are_a_loss_at_the_deadline_only() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all"]);
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let locker = Locker::builder().command_timeout(ms(500)).wait_for_server(ms(20_000)).connect(&url).await.unwrap();
    let guard = locker.lock("k").ttl(ms(1_000)).await.unwrap();
    server.cli(&["ACL", "SETUSER", "app", "-@all"]);
    let deadline = guard.deadline();
    assert_eq!(soon(guard.lost()).await, Loss::Expired);
    assert!(Instant::now() >= deadline);
}

#[tokio::test]
async fn a_paused_server_is_survived_within_the_ttl() {
    let server = Server::start();
    let locker =
        Locker::builder().command_timeout(ms(300)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    for mode in ["ALL", "WRITE"] {
        let guard = locker.lock("k").ttl(ms(60_000)).renew_every(ms(1_000)).await.unwrap();
        server.cli(&["CLIENT", "PAUSE", "1500", mode]);
        let first = guard.deadline();
        eventually("renewed after the pause", async || (guard.deadline() > first).then_some(())).await;
        assert_eq!(guard.check(), Ok(()));
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_server_out_of_memory_still_renews_and_releases() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let request = |key: &str| locker.lock(key).ttl(ms(60_000)).renew_every(ms(300));
    let guard = request("k").await.unwrap();
    // Tokens that are used again have records, which are written anew.
    let of_a_user = || request("job").token("worker-7".parse().unwrap());
    let (one, other) = (of_a_user().await.unwrap(), of_a_user().await.unwrap());
    let adopted = locker.adopt(request("lease").await.unwrap().into_lease()).await.unwrap();
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let is_renewed = async |guard: &LockGuard| {
        let first = guard.deadline();
        eventually("renewed", async || (guard.deadline() > first + ms(2_000)).then_some(())).await;
    };
    for guard in [&guard, &one, &other] {
        is_renewed(guard).await;
    }
    adopted.renew().await.unwrap();
    drop(other);
    one.renew_for(ms(30_000)).await.unwrap();
    eventually("the grant has ended", async || (!server.cli(&["GET", "{job}:grants"]).contains(',')).then_some(()))
        .await;
    for guard in [guard, one, adopted] {
        let key = guard.key().to_string();
        guard.release().await.unwrap();
        assert_eq!(server.cli(&["EXISTS", &key]), "0");
    }
}

#[tokio::test]
async fn scripts_flushed_again_and_again_disturb_nobody() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    for _ in 0..20 {
        server.cli(&["SCRIPT", "FLUSH"]);
        let guard = locker.try_lock("k").await.unwrap();
        server.cli(&["SCRIPT", "FLUSH"]);
        guard.renew().await.unwrap();
        server.cli(&["SCRIPT", "FLUSH"]);
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn an_expiry_says_that_the_server_has_taken_the_rights_away() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all"]);
    let locker = Locker::connect(&format!("redis://app:secret@127.0.0.1:{}", server.port())).await.unwrap();
    let dog = WatchDog::builder(&locker).build();
    let mut events = dog.subscribe();
    let guard = locker.lock("k").ttl(ms(3_000)).await.unwrap();
    dog.watch(locker.lock("watched").ttl(ms(3_000)).await.unwrap()).unwrap();
    server.cli(&["ACL", "SETUSER", "app", "resetpass", ">other"]);
    server.cli(&["CLIENT", "KILL", "USER", "app"]);
    assert_eq!(soon(guard.lost()).await, Loss::Expired);
    let error = eventually("the last renewal has ended", async || guard.last_error()).await;
    assert_eq!(error.code(), Some("WRONGPASS"), "{error}");
    let cause = soon(async {
        loop {
            if let WatchEvent::Lost { loss: Loss::Expired, cause, .. } = events.recv().await.unwrap() {
                return cause;
            }
        }
    });
    let cause = cause.await.unwrap();
    assert_eq!(cause.code(), Some("WRONGPASS"), "{cause}");
}

/// A call may take 10 s; these locks have less time left.
#[tokio::test]
async fn a_line_that_has_gone_silent_is_replaced_before_a_lock_of_a_short_ttl_is_lost() {
    let server = Server::start();
    let mut locks = tokio::task::JoinSet::new();
    for ttl in [6_000, 8_000, 10_000] {
        let proxy = Proxy::start(server.port()).await;
        let locker = Locker::builder().command_timeout(ms(10_000)).connect(&proxy.url()).await.unwrap();
        let guard = locker.lock(format!("k:{ttl}")).ttl(ms(ttl)).await.unwrap();
        let start = Instant::now();
        proxy.set(Mode::Silence);
        locks.spawn(async move {
            sleep_until(start + ms(ttl * 3 / 2)).await;
            assert_eq!(guard.check(), Ok(()), "{ttl} ms");
            guard.release().await.unwrap();
            drop(proxy);
        });
    }
    locks.join_all().await;
}
