//! Waiters are notified of releases for as long as they wait, even if the runtime of their subscription, or its
//! connection, breaks.
//!
//! Nobody here checks a lock more often than once a minute without a notification, and no lock expires sooner. So a
//! waiter that gets its lock within the patience of a test has been notified of its release.

use std::thread;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
#[cfg(feature = "fred")]
use fred::types::RespVersion;
use tenure::{LockGuard, Locker, LockerBuilder};
use tenure_test_support::{Cluster, Mode, Proxy, Server, Version, eventually, soon};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Returns a runtime that runs only while `block_on` drives it.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Returns a runtime that runs by itself.
fn running() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn patient() -> LockerBuilder {
    Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000))
}

/// Returns the ids of the connections to the server with a subscription.
fn listening(server: &Server) -> Vec<String> {
    let clients = server.cli(&["CLIENT", "LIST", "TYPE", "pubsub"]);
    clients.lines().filter_map(|client| client.split(' ').next()).map(str::to_owned).collect()
}

/// Waits for a lock that another holds. Returns once that process has a subscription.
async fn wait_and_listen(server: &Server, locker: &Locker, key: &str) -> JoinHandle<LockGuard> {
    let request = locker.lock(key);
    let waiter = tokio::spawn(async move { request.await.unwrap() });
    let channels = |kind| server.cli(&["PUBSUB", kind, key]).lines().any(|channel| channel == key);
    eventually("it listens", async || (channels("CHANNELS") || channels("SHARDCHANNELS")).then_some(())).await;
    waiter
}

/// Asserts that a waiter on this runtime gets the lock when it is released.
async fn a_waiter_hears(locker: &Locker, other: &Locker, key: &str) {
    let held = soon(other.lock(key)).await.unwrap();
    let mut waiter = tokio::spawn(locker.lock(key).into_future());
    // Time enough to subscribe, and to find that the subscription is dead.
    assert!(timeout(ms(2_500), &mut waiter).await.is_err());
    soon(held.release()).await.unwrap();
    // Long before it polls.
    soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
}

/// Runs the first waiter of a locker on this runtime, and gives up.
fn wait_in_vain(on: &Runtime, server: &Server, locker: &Locker, other: &Locker) {
    on.block_on(async {
        let held = soon(other.lock("first")).await.unwrap();
        wait_and_listen(server, locker, "first").await.abort();
        soon(held.release()).await.unwrap();
    });
}

/// The runtime that a locker's connection lives on.
#[derive(Clone, Copy, Debug)]
enum Home {
    Runtime,
    ItsOwn,
    /// The connection is the caller's own, on a runtime of the caller.
    #[cfg(feature = "fred")]
    Client,
}

const HOMES: &[Home] = &[
    Home::Runtime,
    Home::ItsOwn,
    #[cfg(feature = "fred")]
    Home::Client,
];

/// Runs each test on its own thread: they wait most of the time.
fn each(homes: &[Home], test: impl Fn(Home) + Sync) {
    let test = &test;
    thread::scope(|scope| homes.iter().for_each(|&home| drop(scope.spawn(move || test(home)))));
}

async fn connect(server: &Server, home: Home) -> Locker {
    match home {
        Home::Runtime => patient().connect(&server.url()).await.unwrap(),
        Home::ItsOwn => patient().isolated(true).connect(&server.url()).await.unwrap(),
        #[cfg(feature = "fred")]
        Home::Client => patient().client(client(&server.url(), RespVersion::RESP2).await),
    }
}

#[cfg(feature = "fred")]
async fn client(url: &str, version: RespVersion) -> Client {
    use fred::types::Builder as FredBuilder;
    use fred::types::config::{Config, ReconnectPolicy};
    let config = Config { version, ..Config::from_url(url).unwrap() };
    let policy = ReconnectPolicy::new_exponential(0, 50, 2_000, 2);
    let client = FredBuilder::from_config(config).set_policy(policy).build().unwrap();
    client.init().await.unwrap();
    client
}

#[test]
fn waiters_hear_of_releases_when_the_runtime_of_the_first_waiter_stands_still() {
    each(HOMES, |home| {
        let (server, main, idle) = (Server::start(), running(), runtime());
        let (locker, other) = main.block_on(async { (connect(&server, home).await, patient_on(&server).await) });
        wait_in_vain(&idle, &server, &locker, &other);
        main.block_on(a_waiter_hears(&locker, &other, "k"));
        drop(idle);
        main.block_on(a_waiter_hears(&locker, &other, "k"));
    });
}

#[test]
fn who_waits_alone_hears_of_a_release_after_the_runtime_that_listened_has_ended() {
    each(HOMES, |home| {
        let (server, main, ends) = (Server::start(), running(), running());
        let other = main.block_on(patient_on(&server));
        let locker = match home {
            Home::Runtime => ends.block_on(connect(&server, home)),
            _ => main.block_on(connect(&server, home)),
        };
        wait_in_vain(&ends, &server, &locker, &other);
        let held = main.block_on(other.lock("waits").into_future()).unwrap();
        let waiter = main.block_on(wait_and_listen(&server, &locker, "waits"));
        drop(ends);
        main.block_on(async {
            // Time enough for the waiter to find that out.
            sleep(ms(2_500)).await;
            soon(held.release()).await.unwrap();
            soon(soon(waiter).await.unwrap().release()).await.unwrap();
            a_waiter_hears(&locker, &other, "k").await;
            // There is still only one connection with a subscription.
            assert_eq!(listening(&server).len(), 1, "{home:?}");
        });
    });
}

#[test]
fn who_waits_for_long_hears_of_a_release_after_the_runtime_that_listened_has_stood_still() {
    let homes = HOMES.iter().copied().filter(|home| !matches!(home, Home::ItsOwn));
    each(&homes.collect::<Vec<_>>(), |home| {
        let (server, main, idle) = (Server::start(), running(), runtime());
        let other = main.block_on(patient_on(&server));
        // The locker connects and subscribes there; with a client of one's own, the connection itself goes on.
        let locker = match home {
            #[cfg(feature = "fred")]
            Home::Client => main.block_on(connect(&server, home)),
            _ => idle.block_on(connect(&server, home)),
        };
        let held = main.block_on(other.lock("waits").into_future()).unwrap();
        wait_in_vain(&idle, &server, &locker, &other);
        main.block_on(async {
            let waiter = tokio::spawn(locker.lock("waits").into_future());
            sleep(ms(4_000)).await;
            held.release().await.unwrap();
            soon(waiter).await.unwrap().unwrap().release().await.unwrap();
        });
    });
}

#[cfg(feature = "fred")]
#[test]
fn listening_moves_on_as_often_as_it_has_to() {
    let (server, main) = (Server::start(), running());
    let (locker, other) = main.block_on(async { (connect(&server, Home::Client).await, patient_on(&server).await) });
    let mut idle = Vec::new();
    for round in 0..3 {
        let runtime = runtime();
        wait_in_vain(&runtime, &server, &locker, &other);
        runtime.block_on(a_waiter_hears(&locker, &other, &format!("k:{round}")));
        idle.push(runtime);
    }
    main.block_on(a_waiter_hears(&locker, &other, "k"));
    // Runtimes that run again disturb nobody.
    for runtime in &idle {
        runtime.block_on(async { sleep(ms(50)).await });
    }
    main.block_on(async {
        a_waiter_hears(&locker, &other, "k").await;
        eventually("one is left", async || (listening(&server).len() == 1).then_some(())).await;
    });
}

async fn patient_on(server: &Server) -> Locker {
    patient().connect(&server.url()).await.unwrap()
}

/// Silences all present connections while a waiter is subscribed and messages keep coming.
async fn silence(server: &Server, proxies: &[Proxy], locker: &Locker, other: &Locker, own: Option<&Client>) {
    let held = soon(other.lock("k")).await.unwrap();
    let waiter = wait_and_listen(server, locker, "k").await;
    let before = listening(server);
    // The connection is kept as long as the server replies.
    sleep(ms(2_500)).await;
    let after = listening(server);
    assert!(before.iter().all(|id| after.contains(id)), "{before:?}, then {after:?}");
    let before = after;
    proxies.iter().for_each(|proxy| proxy.set(Mode::Silence));
    if let Some(client) = own {
        // The caller replaces the connection of a client of its own.
        soon(client.force_reconnection()).await.unwrap();
    }
    eventually("another listens", async || {
        // Messages keep coming for the key.
        server.cli(&["PUBLISH", "k", ""]);
        server.cli(&["SPUBLISH", "k", ""]);
        listening(server).iter().any(|id| !before.contains(id)).then_some(())
    })
    .await;
    assert!(!waiter.is_finished());
    // Released in the background: the command connections may first have to be found silent.
    drop(held);
    soon(soon(waiter).await.unwrap().release()).await.unwrap();
    a_waiter_hears(locker, other, "k").await;
    eventually("the silent one is closed", async || {
        (!listening(server).iter().any(|id| before.contains(id))).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_falls_silent_while_its_key_is_hot_is_replaced() {
    let server = Server::start();
    let other = patient_on(&server).await;
    let proxies = [Proxy::start(server.port()).await];
    let locker = patient().connect(&proxies[0].url()).await.unwrap();
    silence(&server, &proxies, &locker, &other, None).await;
    #[cfg(feature = "fred")]
    for version in [RespVersion::RESP2, RespVersion::RESP3] {
        let client = client(&proxies[0].url(), version).await;
        silence(&server, &proxies, &patient().client(client.clone()), &other, Some(&client)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_cluster_a_connection_that_falls_silent_while_its_key_is_hot_is_replaced() {
    // Before Redis 7, waiters on a cluster get no notifications.
    if !Version::of_this_run().has_redis(7, 0) {
        return;
    }
    let cluster = Cluster::start();
    let proxies = cluster.announce_proxies().await;
    let locker = patient().connect(&cluster.url()).await.unwrap();
    let other = patient().connect(&cluster.url()).await.unwrap();
    let place = cluster.place_of("k");
    silence(&cluster.nodes[place], &proxies[place..=place], &locker, &other, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_for_a_key_whose_slot_has_moved_listen_on_its_new_node() {
    // Before Redis 7, waiters on a cluster get no notifications.
    if !Version::of_this_run().has_redis(7, 0) {
        return;
    }
    let cluster = Cluster::start();
    let locker = patient().connect(&cluster.url()).await.unwrap();
    let other = patient().connect(&cluster.url()).await.unwrap();
    let held = soon(other.lock("k")).await.unwrap();
    let (from, waiter) =
        (cluster.place_of("k"), wait_and_listen(&cluster.nodes[cluster.place_of("k")], &locker, "k").await);
    let to = (from + 1) % 3;
    cluster.migrate("k", from, to, || {});
    eventually("it listens there", async || {
        cluster.nodes[to].cli(&["PUBSUB", "SHARDCHANNELS", "k"]).lines().any(|channel| channel == "k").then_some(())
    })
    .await;
    soon(held.release()).await.unwrap();
    soon(soon(waiter).await.unwrap().release()).await.unwrap();
}

#[tokio::test]
async fn the_connection_is_closed_when_nobody_listens_any_more_although_messages_come() {
    let server = Server::start();
    let (locker, other) = (patient_on(&server).await, patient_on(&server).await);
    let held = other.lock("k").await.unwrap();
    let waiter = wait_and_listen(&server, &locker, "k").await;
    held.release().await.unwrap();
    soon(waiter).await.unwrap().release().await.unwrap();
    eventually("it is closed", async || {
        // The connection is still subscribed to the channel.
        server.cli(&["PUBLISH", "k", ""]);
        listening(&server).is_empty().then_some(())
    })
    .await;
    // It is opened again.
    a_waiter_hears(&locker, &other, "k").await;
}
