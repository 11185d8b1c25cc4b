//! What goes wrong has a name, changes nothing, and is waited out where waiting helps.

use std::time::{Duration, Instant};

use tenure::{Error, Locker};
use tenure_test_support::{Mode, Proxy, Server, soon};
use tokio::time::timeout;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The one key in question is free, and what else there is belongs to the test.
fn assert_nothing_left(server: &Server) {
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
async fn a_wrong_password_is_told_at_once_and_never_shown() {
    let server = Server::start_with(&["--requirepass", "right"]);
    let url = format!("redis://:wrong@127.0.0.1:{}", server.port());
    let refused = soon(Locker::connect(&url)).await.unwrap_err();
    assert_eq!(refused.code(), Some("WRONGPASS"), "{refused}");
    assert!(!refused.is_transient());
    assert!(!format!("{refused:?}{refused}").contains("wrong@"));
    let url = format!("redis://:right@127.0.0.1:{}", server.port());
    let locker = Locker::connect(&url).await.unwrap();
    assert!(!format!("{locker:?}").contains("right"));
    let missing = soon(Locker::connect(&server.url())).await;
    let missing = match missing {
        // fred may not ask anything of the server before the first command does.
        Ok(locker) => soon(locker.lock("k")).await.unwrap_err(),
        Err(refused) => refused,
    };
    assert_eq!(missing.code(), Some("NOAUTH"), "{missing}");
}

#[tokio::test]
async fn a_dead_server_is_told_at_once() {
    let mut server = Server::start();
    server.kill();
    let refused = soon(Locker::connect(&server.url())).await.unwrap_err();
    assert!(matches!(&refused, Error::Redis(_)) && refused.is_transient(), "{refused}");
    for url in ["nonsense", "http://", "redis://", "redis-sentinel://127.0.0.1:1"] {
        assert!(matches!(soon(Locker::connect(url)).await, Err(Error::InvalidUrl(_))), "{url}");
    }
}

#[tokio::test]
async fn what_a_url_says_in_vain_is_refused_by_name_and_nothing_is_sent() {
    let server = Server::start();
    let address = format!("127.0.0.1:{}", server.port());
    let sent = || {
        server
            .cli(&["INFO", "stats"])
            .lines()
            .find_map(|l| l.strip_prefix("total_connections_received:").map(String::from))
    };
    let before: u32 = sent().unwrap().trim().parse().unwrap();
    for (url, culprit) in [
        (format!("http://{address}"), "`http`"),
        (format!("reddis://{address}"), "`reddis`"),
        (format!("redis+tls://{address}"), "`redis+tls`"),
        (format!("redis://{address}?db=3"), "`db`"),
        (address, "no scheme"),
    ] {
        let refused = soon(Locker::connect(&url)).await.unwrap_err();
        assert!(matches!(&refused, Error::InvalidUrl(_)) && !refused.is_transient(), "{url}: {refused}");
        assert!(refused.to_string().contains(culprit), "{url}: {refused}");
        let refused = soon(Locker::quorum([&url])).await.unwrap_err();
        assert!(matches!(&refused, Error::InvalidUrl(what) if what.contains(culprit)), "{url}: {refused}");
    }
    // That of redis-cli, each time.
    assert_eq!(sent().unwrap().trim().parse(), Ok(before + 1));
}

#[cfg(not(any(feature = "rustls", feature = "native-tls")))]
#[tokio::test]
async fn a_tls_url_needs_a_tls_feature() {
    let refused = Locker::connect("rediss://127.0.0.1:6379").await.unwrap_err();
    assert!(refused.to_string().contains("feature"), "{refused}");
}

#[tokio::test]
async fn a_user_who_may_not_run_scripts_is_refused_by_name() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-evalsha", "-eval"]);
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let locker = Locker::connect(&url).await.unwrap();
    // Also where it would wait: waiting changes no permissions.
    let refused = soon(locker.lock("k")).await.unwrap_err();
    assert_eq!(refused.code(), Some("NOPERM"), "{refused}");
    assert!(!refused.is_transient());
    assert_nothing_left(&server);
}

#[tokio::test]
async fn the_documented_permissions_suffice() {
    let server = Server::start();
    let commands = ["+eval", "+evalsha", "+get", "+set", "+del", "+pexpire", "+pttl", "+time"];
    let user = ["ACL", "SETUSER", "app", "on", ">secret", "resetchannels", "~app:*", "~{app:*"];
    assert_eq!(server.cli(&[&user[..], &commands[..]].concat()), "OK");
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let locker = Locker::builder().prefix("app:").connect(&url).await.unwrap();
    let guard = soon(locker.lock("k").metadata("m")).await.unwrap();
    guard.refresh().await.unwrap();
    guard.refresh_for(ms(5_000)).await.unwrap();
    guard.server_ttl().await.unwrap();
    locker.inspect("k").await.unwrap();
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_key_of_another_type_is_refused_and_left_alone() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["LPUSH", "k", "item"]);
    let refused = soon(locker.lock("k")).await.unwrap_err();
    assert_eq!(refused.code(), Some("WRONGTYPE"), "{refused}");
    assert_eq!(locker.inspect("k").await.unwrap_err().code(), Some("WRONGTYPE"));
    assert_eq!(server.cli(&["LRANGE", "k", "0", "-1"]), "item");
    assert_eq!(server.cli(&["DBSIZE"]), "1");
}

#[tokio::test]
async fn a_fence_key_that_cannot_be_used_leaves_no_lock() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~k", "+@all"]);
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["LPUSH", "{k}:fence", "item"]);
    assert_eq!(soon(locker.lock("k")).await.unwrap_err().code(), Some("WRONGTYPE"));
    assert_nothing_left(&server);
    // Where the numbers of Lua end, and what is none.
    for poison in ["9007199254740991", "9223372036854775807", "1e300", "nonsense"] {
        server.cli(&["DEL", "{k}:fence"]);
        server.cli(&["SET", "{k}:fence", poison]);
        let refused = soon(locker.lock("k")).await.unwrap_err();
        assert_eq!(refused.code(), Some("ERR"), "{refused}");
        assert!(refused.to_string().contains("fencing token"), "{refused}");
        assert_nothing_left(&server);
    }
    server.cli(&["SET", "{k}:fence", "9007199254740989"]);
    let last = soon(locker.lock("k")).await.unwrap();
    assert_eq!(last.fencing_token(), Some(9_007_199_254_740_990));
    assert_eq!(server.cli(&["GET", "{k}:fence"]), "9007199254740990");
    last.release().await.unwrap();
    // No right to the fence key.
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let confined = Locker::connect(&url).await.unwrap();
    assert_eq!(soon(confined.lock("k")).await.unwrap_err().code(), Some("NOPERM"));
    assert_nothing_left(&server);
    soon(confined.lock("k").fenced(false)).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_replica_refuses_by_name_and_is_waited_out() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    server.cli(&["REPLICAOF", "127.0.0.1", "1"]);
    let refused = soon(locker.try_lock("k")).await.unwrap_err();
    assert_eq!(refused.code(), Some("READONLY"), "{refused}");
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    // It doesn't give up.
    assert!(timeout(ms(200), &mut waiter).await.is_err());
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_server_out_of_memory_refuses_by_name_and_is_waited_out() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let refused = soon(locker.try_lock("k")).await.unwrap_err();
    assert_eq!(refused.code(), Some("OOM"), "{refused}");
    assert_nothing_left(&server);
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    // It doesn't give up.
    assert!(timeout(ms(200), &mut waiter).await.is_err());
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_loading_server_refuses_by_name_and_is_waited_out() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["DEBUG", "POPULATE", "30000"]);
    server.cli(&["EVAL", "for i = 1, 30000 do redis.call('SET', 'filler:' .. i, i) end", "0"]);
    assert_eq!(server.cli(&["SAVE"]), "OK");
    server.kill();
    // About three seconds, looking at clients all the time.
    server.restart_without_waiting(&["--key-load-delay", "100", "--loading-process-events-interval-bytes", "1024"]);
    let named = tenure_test_support::eventually("LOADING", async || {
        let refused = locker.try_lock("k").await.err();
        refused.filter(|error| error.code() == Some("LOADING"))
    });
    assert!(named.await.is_transient());
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_busy_server_refuses_by_name_and_is_waited_out() {
    let server = Server::start_with(&["--busy-reply-threshold", "50"]);
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    let mut endless = std::process::Command::new("redis-cli");
    endless.args(["-p", &server.port().to_string(), "EVAL", "while true do end", "0"]);
    let mut endless = endless.stdout(std::process::Stdio::null()).spawn().unwrap();
    let named = tenure_test_support::eventually("BUSY", async || {
        let refused = locker.try_lock("k").await.err();
        refused.filter(|error| error.code() == Some("BUSY"))
    });
    assert!(named.await.is_transient());
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    // It doesn't give up.
    assert!(timeout(ms(200), &mut waiter).await.is_err());
    assert_eq!(server.cli(&["SCRIPT", "KILL"]), "OK");
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    endless.wait().unwrap();
}

#[tokio::test]
async fn a_hung_server_is_waited_for_no_longer_than_said() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    server.freeze();
    for limit in [0, 1, 100, 700] {
        for request in [locker.lock("k"), locker.try_lock("k"), locker.obtain("k")] {
            let started = Instant::now();
            let failed = request.wait_at_most(ms(limit)).await.unwrap_err();
            let waited = started.elapsed();
            assert!(matches!(failed, Error::Redis(_)), "{failed}");
            assert!(waited >= ms(limit) && waited <= ms(limit + 50), "{waited:?} of {limit} ms");
        }
    }
}

#[tokio::test]
async fn a_grant_that_comes_too_late_is_refused_and_released() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    proxy.set(Mode::Delay(ms(400)));
    let in_time = soon(locker.try_lock("k").ttl(ms(800))).await.unwrap();
    assert!(in_time.remaining() < ms(400));
    drop(in_time);
    for request in [locker.try_lock("late").ttl(ms(350)), locker.lock("late").ttl(ms(350))] {
        assert!(matches!(soon(request).await, Err(Error::ValidityExpired)));
    }
    proxy.set(Mode::Pass);
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "late"]), "0");
}

#[tokio::test]
async fn a_client_that_was_never_initialised_is_an_error_and_no_wait() {
    use tenure::fred::prelude::{Builder, Config};
    let client = Builder::from_config(Config::from_url("redis://127.0.0.1:1").unwrap()).build().unwrap();
    let locker = Locker::builder().command_timeout(ms(200)).client(client);
    let refused = soon(locker.try_lock("k")).await.unwrap_err();
    assert!(matches!(refused, Error::Redis(_)), "{refused}");
}
