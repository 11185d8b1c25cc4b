//! Every failure has a specific error, changes nothing, and is waited out if waiting helps.

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use tenure::{Error, LockGuard, Locker};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon, within};
use tokio::time::{sleep, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Asserts that the key is free; all other keys belong to the test.
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
        // fred may ask the server nothing before the first command.
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
    // The connection of redis-cli, each time.
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
    // A request that waits fails as well: waiting changes no permissions.
    let refused = soon(locker.lock("k")).await.unwrap_err();
    assert_eq!(refused.code(), Some("NOPERM"), "{refused}");
    assert!(!refused.is_transient());
    assert_nothing_left(&server);
}

#[tokio::test]
async fn a_server_without_scripts_is_told_by_the_name_of_the_command_and_shows_no_token() {
    for command in ["EVALSHA", "EVAL"] {
        let server = Server::start_with(&["--rename-command", command, ""]);
        let locker = Locker::connect(&server.url()).await.unwrap();
        let refused = soon(locker.lock("k").token("secret".parse().unwrap())).await.unwrap_err();
        assert!(!refused.is_transient());
        let told = format!("{refused} {refused:?}");
        assert!(told.contains("unknown command") && told.contains(command), "{told}");
        assert!(!told.contains("secret") && !told.contains("KEYS") && !told.contains("args"), "{told}");
    }
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
    // The limits of Lua's numbers, and something that is not a number.
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
    // The user has no right to the fence key.
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
    // The waiter doesn't give up.
    assert!(timeout(ms(200), &mut waiter).await.is_err());
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

/// After many a failover, nobody closes the connections to the old primary.
#[tokio::test]
async fn a_replica_is_left_for_the_primary_to_which_its_address_leads_now() {
    // What a replica refuses: to write, or all that needs its primary.
    for settings in [&[][..], &["--replica-serve-stale-data", "no"]] {
        let (mut old, mut new) = (Server::start_with(settings), Server::start_with(settings));
        let proxy = Proxy::start(old.port()).await;
        let locker = Locker::connect(&proxy.url()).await.unwrap();
        soon(locker.lock("k")).await.unwrap().release().await.unwrap();
        for tasks in [1, 64, 1] {
            // It follows nobody.
            old.cli(&["REPLICAOF", "127.0.0.1", "1"]);
            proxy.lead_to(new.port());
            let waits = |n| tokio::spawn(locker.lock(format!("k{n}")).into_future());
            for waiter in (0..tasks).map(waits).collect::<Vec<_>>() {
                let guard = soon(waiter).await.unwrap().unwrap();
                assert_eq!(new.cli(&["GET", &guard.keys()[0].to_string()]), guard.token().as_str());
                guard.release().await.unwrap();
            }
            (old, new) = (new, old);
            new.cli(&["REPLICAOF", "NO", "ONE"]);
        }
    }
}

/// It would be closed for good, and it may serve the rest of the program.
#[cfg(feature = "fred")]
#[tokio::test]
async fn a_client_of_the_callers_that_never_reconnects_stays_with_a_replica() {
    use tenure::fred::prelude::{Builder, ClientLike, Config};

    let server = Server::start();
    let client = Builder::from_config(Config::from_url(&server.url()).unwrap()).build().unwrap();
    client.init().await.unwrap();
    let locker = Locker::new(client.clone());
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
    server.cli(&["REPLICAOF", "127.0.0.1", "1"]);
    for _ in 0..3 {
        assert_eq!(soon(locker.try_lock("k")).await.unwrap_err().code(), Some("READONLY"));
    }
    let _: () = soon(client.ping(None)).await.unwrap();
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

/// The connection for notifications stays with the old primary as well, which publishes nothing any longer.
#[tokio::test]
async fn waiters_are_notified_of_releases_on_the_new_primary() {
    let (old, new) = (Server::start(), Server::start());
    let proxy = Proxy::start(old.port()).await;
    let locker = || Locker::builder().poll_every(Duration::from_secs(60)).local_hand_over(false);
    let here = locker().connect(&proxy.url()).await.unwrap();
    let waits = |key: &'static str| tokio::spawn(here.lock(key).into_future());
    let first = soon(here.lock("k")).await.unwrap();
    let waiter = waits("k");
    eventually("it listens", async || (!old.cli(&["PUBSUB", "CHANNELS"]).is_empty()).then_some(())).await;
    old.cli(&["REPLICAOF", "127.0.0.1", "1"]);
    proxy.lead_to(new.port());
    drop(first);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    let there = locker().connect(&new.url()).await.unwrap();
    let held = soon(there.lock("k")).await.unwrap();
    let waiter = waits("k");
    eventually("it listens there", async || (!new.cli(&["PUBSUB", "CHANNELS"]).is_empty()).then_some(())).await;
    held.release().await.unwrap();
    drop(soon(waiter).await.unwrap().unwrap());
}

/// A renewal is one of a call of many, or has one of its own.
#[tokio::test]
async fn guards_find_the_new_primary_before_they_end() {
    let (old, new) = (Server::start(), Server::start());
    new.cli(&["REPLICAOF", "127.0.0.1", &old.port().to_string()]);
    let proxy = Proxy::start(old.port()).await;
    let locker = Locker::builder().ttl(ms(3_000)).connect(&proxy.url()).await.unwrap();
    let mut guards = Vec::new();
    for n in 0..20 {
        guards.push(soon(locker.lock(format!("k{n}"))).await.unwrap());
    }
    eventually("the replica has them", async || (new.cli(&["EXISTS", "k19"]) == "1").then_some(())).await;
    new.cli(&["REPLICAOF", "NO", "ONE"]);
    old.cli(&["REPLICAOF", "127.0.0.1", &new.port().to_string()]);
    proxy.lead_to(new.port());
    let deadline = guards.iter().map(LockGuard::deadline).max().unwrap();
    eventually("all are renewed", async || guards.iter().all(|guard| guard.deadline() > deadline).then_some(())).await;
    assert!(guards.iter().all(LockGuard::is_held));
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
    // The waiter doesn't give up.
    assert!(timeout(ms(200), &mut waiter).await.is_err());
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_loading_server_refuses_by_name_and_is_waited_out() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    // A server serves its clients after every 2 MB that it loads. Older servers have no setting for that.
    server.cli(&["CONFIG", "SET", "rdbcompression", "no"]);
    let fill = "for i = 1, 30 do redis.call('SET', 'filler:' .. i, string.rep('x', 2 ^ 21)) end";
    server.cli(&["EVAL", fill, "0"]);
    assert_eq!(server.cli(&["SAVE"]), "OK");
    server.kill();
    // Loading takes a tenth of a second for each key.
    server.restart_without_waiting(&["--key-load-delay", "100000"]);
    let named = eventually("LOADING", async || {
        let refused = locker.try_lock("k").await.err();
        refused.filter(|error| error.code() == Some("LOADING"))
    });
    assert!(named.await.is_transient());
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_busy_server_refuses_by_name_and_is_waited_out() {
    let server = Server::start_with(&["--lua-time-limit", "50"]);
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    let mut endless = std::process::Command::new("redis-cli");
    endless.args(["-p", &server.port().to_string(), "EVAL", "while true do end", "0"]);
    let mut endless = endless.stdout(std::process::Stdio::null()).spawn().unwrap();
    let named = eventually("BUSY", async || {
        let refused = locker.try_lock("k").await.err();
        refused.filter(|error| error.code() == Some("BUSY"))
    });
    assert!(named.await.is_transient());
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    // The waiter doesn't give up.
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
            let failed = within(ms(limit + 50), request.wait_at_most(ms(limit))).await.unwrap_err();
            let waited = started.elapsed();
            assert!(matches!(failed, Error::Redis(_)), "{failed}");
            assert!(waited >= ms(limit), "{waited:?} of {limit} ms");
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
    let in_time = soon(locker.try_lock("k").ttl(ms(4_000))).await.unwrap();
    assert!(in_time.remaining() < ms(3_600));
    drop(in_time);
    for request in [locker.try_lock("late").ttl(ms(350)), locker.lock("late").ttl(ms(350))] {
        assert!(matches!(soon(request).await, Err(Error::ValidityExpired)));
    }
    proxy.set(Mode::Pass);
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "late"]), "0");
}

#[cfg(feature = "fred")]
#[tokio::test]
async fn a_client_that_was_never_initialised_is_an_error_and_no_wait() {
    use tenure::fred::prelude::{Builder, Config};
    let client = Builder::from_config(Config::from_url("redis://127.0.0.1:1").unwrap()).build().unwrap();
    let locker = Locker::builder().command_timeout(ms(200)).client(client);
    let refused = soon(locker.try_lock("k")).await.unwrap_err();
    assert!(matches!(refused, Error::Redis(_)), "{refused}");
}

/// A reply that is garbage says nothing about the lock, and breaks its connection.
#[tokio::test]
async fn garbage_in_the_place_of_a_reply_is_waited_out_and_leaves_nothing_behind() {
    for driver in enabled_drivers() {
        let server = Server::start();
        let proxy = Proxy::start(server.port()).await;
        let builder = Locker::builder().driver(driver).command_timeout(ms(1_000));
        let locker = builder.connect(&proxy.url()).await.unwrap();
        locker.lock("warm").await.unwrap().release().await.unwrap();
        proxy.set(Mode::GarbleNext);
        let unknown = soon(locker.try_lock("once")).await.unwrap_err();
        assert!(unknown.is_transient(), "{driver:?}: {unknown}");
        eventually("it is undone", async || (server.cli(&["EXISTS", "once"]) == "0").then_some(())).await;
        proxy.set(Mode::GarbleNext);
        let guard = soon(locker.lock("waited")).await.unwrap();
        assert_eq!(server.cli(&["GET", "waited"]), guard.token().as_str());
        soon(guard.release()).await.unwrap();
    }
}

fn enabled_drivers() -> Vec<tenure::Driver> {
    let enabled = [(tenure::Driver::Fred, cfg!(feature = "fred")), (tenure::Driver::Redis, cfg!(feature = "redis"))];
    enabled.into_iter().filter_map(|(driver, is_enabled)| is_enabled.then_some(driver)).collect()
}

/// A client library that hands a reply to the wrong caller must not cause a wrong result.
#[tokio::test]
async fn the_reply_to_another_request_is_never_taken_for_an_answer() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::builder().command_timeout(ms(1_000)).connect(&proxy.url()).await.unwrap();
    locker.lock("warm").await.unwrap().release().await.unwrap();
    let other = Locker::connect(&server.url()).await.unwrap();
    let held = other.lock("held").await.unwrap();
    for round in 0..10 {
        proxy.set(Mode::SwallowNext);
        // The first request never gets its own reply, but those of the others, each one too early.
        let inspected = locker.inspect("free");
        let (inspected, asked, free, again) = tokio::join!(
            biased;
            inspected,
            locker.try_lock("held").into_future(),
            locker.try_lock("free").into_future(),
            locker.try_lock("held").into_future(),
        );
        if let Ok(Some(holder)) = inspected {
            // It was asked again, after the request below had been granted.
            assert_ne!(&holder.token, held.token(), "round {round}");
        }
        for refused in [asked, again] {
            let refused = refused.unwrap_err();
            assert!(refused.is_transient() || matches!(refused, Error::NotObtained { .. }), "round {round}: {refused}");
        }
        match free {
            Ok(guard) => assert_eq!(guard.key().to_string(), "free"),
            Err(error) => assert!(error.is_transient(), "round {round}: {error}"),
        }
        // The connection was replaced.
        let guard = soon(locker.lock("free")).await.unwrap();
        assert!(guard.fencing_token() > held.fencing_token());
        guard.release().await.unwrap();
    }
    held.release().await.unwrap();
}

/// Returns an error as a user sees it: its text, and those of its sources.
fn told(error: &Error) -> String {
    let mut told = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        assert!(!told.contains(&error.to_string()), "repeated: {told} / {error}");
        told = format!("{told}: {error}");
        source = error.source();
    }
    told
}

#[tokio::test]
async fn a_connection_error_names_the_server_and_what_to_look_at() {
    let mut dead = Server::start();
    dead.kill();
    let guarded = Server::start_with(&["--requirepass", "right"]);
    let open = Server::start();
    // A service of another kind, and one that closes every connection at once, as a server that requires TLS does.
    let other = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let closing = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port_of = |listener: &tokio::net::TcpListener| listener.local_addr().unwrap().port();
    let (other_port, closing_port, silent_port) = (port_of(&other), port_of(&closing), port_of(&silent));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        }
    });
    tokio::spawn(async move { while closing.accept().await.is_ok() {} });
    for (url, at, about) in [
        (dead.url(), format!("127.0.0.1:{}", dead.port()), "connection refused"),
        ("redis://no.such.host.invalid:7".to_owned(), "no.such.host.invalid:7".to_owned(), "does not resolve"),
        (format!("redis://:wrong@127.0.0.1:{}", guarded.port()), format!("127.0.0.1:{}", guarded.port()), "WRONGPASS"),
        (guarded.url(), format!("127.0.0.1:{}", guarded.port()), "redis://:password@host"),
        (format!("{}/99", open.url()), format!("127.0.0.1:{}", open.port()), "database in the URL"),
        (format!("redis://127.0.0.1:{other_port}"), format!("127.0.0.1:{other_port}"), "no Redis or Valkey server"),
        (format!("redis://127.0.0.1:{closing_port}"), format!("127.0.0.1:{closing_port}"), "rediss://"),
        (format!("redis://127.0.0.1:{silent_port}"), format!("127.0.0.1:{silent_port}"), "in time"),
        ("redis+unix:///no/such/socket".to_owned(), "/no/such/socket".to_owned(), "no socket"),
        (
            format!("redis-cluster://127.0.0.1:{}", open.port()),
            format!("the cluster at 127.0.0.1:{}", open.port()),
            "no cluster",
        ),
        (
            format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=locks", dead.port()),
            format!("`locks` by the Sentinels at 127.0.0.1:{}", dead.port()),
            "entinel",
        ),
        ("localhost".to_owned(), "`localhost`".to_owned(), "redis://localhost"),
    ] {
        let builder = || Locker::builder().command_timeout(ms(1_000));
        let refused = soon(builder().connect(&url)).await.map(drop).unwrap_err();
        let text = told(&refused);
        println!("{url}: {text}");
        assert!(text.contains(&at) && text.contains(about), "{url}: {text}");
        assert!(!text.contains("wrong") && !format!("{refused:?}").contains("wrong"), "{text}");
        assert!(!text.contains("Os {"), "{text}");
        if !url.contains("cluster") && !url.contains("sentinel") && url != "localhost" {
            let text = told(&soon(builder().quorum([&url])).await.map(drop).unwrap_err());
            assert!(text.contains(&at) && text.contains(about), "quorum of {url}: {text}");
        }
    }
}

#[tokio::test]
async fn a_call_that_cannot_be_made_names_the_server_and_why() {
    let mut server = Server::start();
    let at = format!("127.0.0.1:{}", server.port());
    let locker = Locker::builder().command_timeout(ms(1_000)).connect(&server.url()).await.unwrap();
    let guard = locker.lock("held").ttl(ms(60_000)).await.unwrap();
    server.freeze();
    let text = told(&soon(guard.renew()).await.unwrap_err());
    assert!(text.contains(&format!("{at} did not answer in time")), "{text}");
    server.thaw();
    server.kill();
    eventually("refused", async || {
        let text = told(&soon(locker.try_lock("k")).await.unwrap_err());
        assert!(text.contains(&at), "{text}");
        text.contains("connection refused").then_some(())
    })
    .await;
    // All requests that wait for one call, and not only the one that sends it.
    let many: Vec<_> = (0..20).map(|n| tokio::spawn(locker.try_lock(format!("k:{n}")).into_future())).collect();
    for one in many {
        let text = told(&soon(one).await.unwrap().unwrap_err());
        assert!(text.contains(&at), "{text}");
    }
}

#[tokio::test]
async fn what_was_never_sent_is_not_waited_for_in_the_end() {
    let mut server = Server::start();
    for pause in [0, 20, 500] {
        for at_once in [1, 20] {
            let locker = Locker::builder().command_timeout(ms(600)).connect(&server.url()).await.unwrap();
            soon(locker.lock("warm")).await.unwrap().release().await.unwrap();
            server.kill();
            sleep(ms(pause)).await;
            let many: Vec<_> = (0..at_once)
                .map(|n| tokio::spawn(locker.try_lock(format!("k:{n}")).ttl(ms(30_000)).into_future()))
                .collect();
            for one in many {
                let refused = soon(one).await.unwrap().unwrap_err();
                assert!(refused.is_transient(), "{refused}");
                // Right after the kill a request may have been written into a connection that nobody reads.
                assert!(
                    pause < 20 || refused.to_string().contains("nothing was sent"),
                    "{pause}, {at_once}: {refused}"
                );
            }
            let closing = Instant::now();
            if pause >= 20 {
                soon(locker.close()).await;
                assert!(closing.elapsed() < ms(1_000), "{pause}, {at_once}: {:?}", closing.elapsed());
            } else {
                drop(timeout(ms(100), locker.close()).await);
            }
            server.restart();
        }
    }
}

#[tokio::test]
async fn what_was_never_sent_to_a_quorum_is_not_waited_for_in_the_end() {
    let mut servers = [0; 3].map(|_| Server::start());
    let builder = Locker::builder().command_timeout(ms(600)).restart_window(Duration::ZERO);
    let urls = [0, 1, 2].map(|n: usize| servers[n].url());
    let locker = builder.quorum(urls).await.unwrap();
    soon(locker.lock("warm")).await.unwrap().release().await.unwrap();
    // By now the calls to the slow node have ended.
    sleep(ms(700)).await;
    servers.iter_mut().for_each(Server::kill);
    sleep(ms(500)).await;
    let refused = soon(locker.try_lock("k").ttl(ms(60_000))).await.unwrap_err();
    assert!(matches!(&refused, Error::Quorum { granted: 0, .. }), "{refused}");
    // A failed majority is enough for a decision.
    assert!(refused.to_string().matches("connection refused by 127.0.0.1:").count() >= 2, "{refused}");
    let closing = Instant::now();
    soon(locker.close()).await;
    assert!(closing.elapsed() < ms(1_000), "{:?}", closing.elapsed());
}

#[tokio::test]
async fn what_may_have_been_sent_is_undone() {
    let mut server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let connect = async || {
        let locker =
            Locker::builder().command_timeout(ms(400)).wait_for_server(ms(20_000)).connect(&proxy.url()).await.unwrap();
        soon(locker.lock("warm")).await.unwrap().release().await.unwrap();
        locker
    };
    for round in 0..5 {
        // A locker and key for each round, as the undo of an earlier attempt repeats until that attempt can't run any
        // longer.
        let (locker, key) = (connect().await, format!("k:{round}"));
        proxy.set(Mode::LoseNext);
        let unknown = soon(locker.try_lock(key.as_str()).ttl(ms(60_000))).await.unwrap_err();
        assert!(!unknown.to_string().contains("nothing was sent"), "{unknown}");
        soon(locker.close()).await;
        assert_eq!(server.cli(&["EXISTS", &key]), "0");
    }
    let locker = connect().await;
    // The server is away when the request begins, and back before its end: the request was sent, and its reply is lost.
    server.kill();
    sleep(ms(200)).await;
    let waits = tokio::spawn(locker.try_lock("late").ttl(ms(60_000)).into_future());
    sleep(ms(20)).await;
    server.restart();
    server.freeze();
    let unknown = soon(waits).await.unwrap().unwrap_err();
    println!("{unknown}");
    server.thaw();
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "late"]), "0");
}

#[tokio::test]
async fn closing_can_be_limited_and_says_what_it_had_to_leave() {
    let server = Server::start();
    let locker =
        Locker::builder().command_timeout(ms(200)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    let [a, b] = [locker.lock("a").await.unwrap(), locker.lock("b").await.unwrap()];
    server.freeze();
    drop((a, b));
    let closing = Instant::now();
    assert_eq!(soon(locker.close_within(ms(300))).await, 2);
    assert!(closing.elapsed() >= ms(300), "{:?}", closing.elapsed());
    assert!(matches!(locker.try_lock("k").await, Err(Error::Closed)));
    // The releases go on.
    server.thaw();
    assert_eq!(soon(locker.close_within(Duration::MAX)).await, 0);
    assert_eq!(server.cli(&["EXISTS", "a", "b"]), "0");
    assert_eq!(soon(locker.close_within(Duration::ZERO)).await, 0);
}

/// fred closes the connection at such a refusal, and hands it to everything in flight, whether that was run or not.
#[cfg(feature = "fred")]
#[tokio::test]
async fn what_a_clients_other_command_is_refused_with_says_nothing_about_a_request() {
    use tenure::fred::interfaces::ClientLike;
    use tenure::fred::types::config::{Config, ReconnectError, ReconnectPolicy};
    use tenure::fred::types::{Builder, ClusterHash, CustomCommand};
    let server = Server::start();
    server.cli(&["SET", "text", "a"]);
    let client = Builder::from_config(Config::from_url(&server.url()).unwrap())
        .with_connection_config(|config| config.reconnect_errors = vec![ReconnectError::Custom("WRONGTYPE")])
        .set_policy(ReconnectPolicy::new_constant(0, 10))
        .build()
        .unwrap();
    client.init().await.unwrap();
    let locker = Locker::builder().ttl(ms(3_600_000)).client(client.clone());
    locker.lock("warm").await.unwrap().release().await.unwrap();
    let reader = locker.read("shared").await.unwrap();
    // All are sent before the server looks at any of them.
    server.freeze();
    let push = CustomCommand::new_static("LPUSH", ClusterHash::FirstKey, false);
    let push = client.custom::<(), _>(push, vec!["text", "b"]);
    let thaw = async {
        sleep(ms(100)).await;
        server.thaw();
    };
    let (refused, attempt, renewal, ()) = tokio::join!(push, locker.try_lock("k").into_future(), reader.renew(), thaw);
    assert!(refused.unwrap_err().details().starts_with("WRONGTYPE"));
    assert!(!matches!(renewal, Err(Error::Lost(_))), "{renewal:?}");
    assert_eq!(reader.check(), Ok(()));
    reader.release().await.unwrap();
    if let Ok(guard) = attempt {
        guard.release().await.unwrap();
    }
    soon(locker.close()).await;
    assert_nothing_left(&server);
}
