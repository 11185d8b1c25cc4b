//! Connections of redis-rs that the caller has opened: what each of them can do, and what it can't.

use std::time::{Duration, Instant};

use tenure::redis::aio::ConnectionManagerConfig;
use tenure::redis::cluster::ClusterClient;
use tenure::redis::{AsyncConnectionConfig, Client};
use tenure::{Error, LockGuard, LockRequest, Locker, Loss, RedisConnection};
use tenure_test_support::{Cluster, Mode, Proxy, Server, eventually, soon, within};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn client(url: String) -> Client {
    Client::open(url).unwrap()
}

/// A manager that tries again soon.
async fn manager(url: String) -> RedisConnection {
    let config = ConnectionManagerConfig::new().set_min_delay(ms(20)).set_max_delay(ms(100));
    client(url).get_connection_manager_with_config(config).await.unwrap().into()
}

#[tokio::test]
async fn a_multiplexed_connection_that_has_broken_is_an_error_and_no_wait() {
    let mut server = Server::start();
    let connection = client(server.url()).get_multiplexed_async_connection().await.unwrap();
    let locker = Locker::with_redis(connection);
    let guard = soon(locker.lock("k")).await.unwrap();
    server.kill();
    server.restart();
    let refused =
        eventually("it is final", async || locker.try_lock("other").await.err().filter(|error| !error.is_transient()));
    let refused = refused.await;
    assert!(refused.to_string().contains("ConnectionManager"), "{refused}");
    // Nor does who waits.
    assert!(!soon(locker.lock("other")).await.unwrap_err().is_transient());
    drop(guard);
    let closing = Instant::now();
    soon(locker.close()).await;
    assert!(closing.elapsed() < ms(5_000), "{:?}", closing.elapsed());
}

#[tokio::test]
async fn a_manager_goes_on_after_a_restart_and_keeps_what_the_server_has_kept() {
    let mut server = Server::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let locker = Locker::builder().command_timeout(ms(500)).with_redis(manager(server.url()).await);
    let guard = soon(locker.lock("k").ttl(ms(6_000)).renew_every(ms(200))).await.unwrap();
    server.kill();
    server.restart();
    let before = guard.deadline();
    eventually("it is renewed again", async || (guard.deadline() > before + ms(2_000)).then_some(())).await;
    let other = soon(locker.lock("other")).await.unwrap();
    assert!(other.fencing_token().is_some());
    soon(other.release()).await.unwrap();
    soon(guard.release()).await.unwrap();
}

#[tokio::test]
async fn an_attempt_whose_reply_was_lost_leaves_nothing_behind_and_meets_itself() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::with_redis(manager(proxy.url()).await);
    soon(soon(locker.lock("warm")).await.unwrap().release()).await.unwrap();
    proxy.set(Mode::LoseNext);
    let unknown = soon(locker.try_lock("once")).await.unwrap_err();
    assert!(unknown.is_transient() && matches!(unknown, Error::Redis(_)), "{unknown}");
    eventually("it is undone", async || (server.cli(&["EXISTS", "once"]) == "0").then_some(())).await;
    proxy.set(Mode::LoseNext);
    let guard = soon(locker.lock("again")).await.unwrap();
    assert_eq!(server.cli(&["GET", "again"]), guard.token().as_str());
    soon(guard.release()).await.unwrap();
    soon(locker.close()).await;
}

#[tokio::test]
async fn a_frozen_server_fails_each_call_in_its_own_time_and_nothing_stays_of_it() {
    let server = Server::start();
    // Its own timeout is longer.
    let config = AsyncConnectionConfig::new().set_response_timeout(Some(ms(60_000)));
    let connection = client(server.url()).get_multiplexed_async_connection_with_config(&config).await.unwrap();
    let locker = Locker::builder().command_timeout(ms(300)).with_redis(connection);
    soon(soon(locker.lock("warm")).await.unwrap().release()).await.unwrap();
    server.freeze();
    let late = within(ms(2_000), locker.try_lock("k")).await.unwrap_err();
    assert!(late.is_transient(), "{late}");
    server.thaw();
    soon(soon(locker.lock("k")).await.unwrap().release()).await.unwrap();
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
async fn replicas_are_asked_only_on_a_connection_that_stays_the_same() {
    let server = Server::start();
    let _replica = server.start_replica();
    let connection = client(server.url()).get_multiplexed_async_connection().await.unwrap();
    let locker = Locker::builder().min_replicas(1).with_redis(connection);
    soon(soon(locker.lock("k")).await.unwrap().release()).await.unwrap();
    let locker = Locker::builder().min_replicas(1).with_redis(manager(server.url()).await);
    let refused = soon(locker.try_lock("k")).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)), "{refused}");
}

#[tokio::test]
async fn waiters_are_notified_where_a_client_subscribes_for_them_also_after_an_interruption() {
    let server = Server::start();
    let connection = manager(server.url()).await.subscribing_by(client(server.url()));
    let patient = || Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000));
    let (here, there) = (patient().with_redis(connection), patient().connect(&server.url()).await.unwrap());
    for round in 0..2 {
        let held = soon(there.lock("k")).await.unwrap();
        let waiter = tokio::spawn(here.lock("k").into_future());
        let subscribed = || server.cli(&["PUBSUB", "NUMSUB", "k"]).lines().any(|line| line == "1");
        eventually("it listens", async || subscribed().then_some(())).await;
        if round == 1 {
            server.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
            eventually("it listens again", async || subscribed().then_some(())).await;
        }
        soon(held.release()).await.unwrap();
        soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
    }
}

/// A cluster behind proxies, and a client that sends what it got no reply to again.
struct Resending {
    cluster: Cluster,
    proxies: Vec<Proxy>,
    locker: Locker,
}

impl Resending {
    async fn start() -> Self {
        let cluster = Cluster::start();
        let proxies = cluster.announce_proxies().await;
        let nodes = cluster.nodes.iter().map(Server::url).collect::<Vec<_>>();
        let client = ClusterClient::builder(nodes).response_timeout(ms(5_000)).build().unwrap();
        let connection = client.get_async_connection().await.unwrap();
        // Nothing is renewed. A waiter enters the line with its second attempt, as it can't listen.
        let builder = Locker::builder().ttl(ms(600_000)).poll_every(ms(100)).command_timeout(ms(5_000));
        let locker = builder.local_hand_over(false).with_redis(connection);
        Self { cluster, proxies, locker }
    }

    fn node(&self, key: &str) -> &Server {
        &self.cluster.nodes[self.cluster.place_of(key)]
    }

    /// Loses the reply to a request with the guard's token, after so many others.
    fn lose_reply(&self, guard: &LockGuard, before: u32) {
        self.proxies[self.cluster.place_of("k")].lose_reply_to(guard.token().as_str(), before);
    }

    fn lost(&self) -> u64 {
        self.proxies.iter().map(Proxy::lost).sum()
    }
}

#[tokio::test]
async fn a_release_that_the_client_of_a_cluster_sends_twice_is_one() {
    let resending = Resending::start().await;
    let locker = &resending.locker;
    let requests: [fn(&Locker) -> LockRequest; 5] = [
        |locker| locker.lock("k"),
        |locker| locker.lock("k").token("worker-7".parse().unwrap()),
        |locker| locker.lock_all(["k", "{k}l"]),
        |locker| locker.lock("k").hold_at_least(ms(300)),
        |locker| locker.read("k"),
    ];
    for (n, request) in requests.into_iter().enumerate() {
        // The server knows the scripts after this.
        soon(soon(request(locker)).await.unwrap().release()).await.unwrap();
        for before in 0..2 {
            let guard = soon(request(locker)).await.unwrap();
            let lost = resending.lost();
            resending.lose_reply(&guard, before);
            let released = soon(guard.release()).await;
            assert!(released.is_ok(), "request {n}, reply {before}: {released:?}");
            assert!(resending.lost() > lost, "request {n}, reply {before}: no reply was lost");
        }
        // One that is lost is reported.
        let guard = soon(request(locker)).await.unwrap();
        resending.node("k").cli(&["DEL", "k"]);
        let error = soon(guard.release()).await.unwrap_err();
        assert!(matches!(error, Error::NotHeld { loss: Loss::Missing, .. }), "request {n}: {error}");
    }
    let refused = soon(locker.force_release("k")).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)), "{refused}");
}

#[tokio::test]
async fn a_hand_over_that_the_client_of_a_cluster_sends_twice_is_one_and_leaves_nothing() {
    let resending = Resending::start().await;
    let (locker, node) = (&resending.locker, resending.node("k"));
    for round in 0..5 {
        let guard = soon(locker.lock("k")).await.unwrap();
        let mut waiter = Box::pin(locker.lock("k").into_future());
        let stands_in_line =
            eventually("it stands in line", async || (node.cli(&["ZCARD", "{k}:queue"]) == "1").then_some(()));
        tokio::select! {
            obtained = &mut waiter => panic!("two holders: {obtained:?}"),
            () = stands_in_line => {}
        }
        // The first round makes the scripts known to the server.
        if round > 0 {
            resending.lose_reply(&guard, (round - 1) % 2);
        }
        // Nobody polls the waiter meanwhile.
        let released = soon(guard.release()).await;
        assert!(released.is_ok(), "round {round}: {released:?}");
        if round <= 2 {
            soon(soon(waiter).await.unwrap().release()).await.unwrap();
        }
        // Otherwise the waiter leaves before it has learned of its lock.
    }
    soon(locker.close()).await;
    eventually("nothing is left", async || (node.cli(&["EXISTS", "k", "{k}:queue"]) == "0").then_some(())).await;
}
