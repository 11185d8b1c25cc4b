//! One contract that every store keeps.

mod sharing;

use std::slice;
use std::time::{Duration, Instant};

use tenure::testing::EmbeddedServer;
use tenure::{Error, Lease, LockGuard, LockRequest, Locker, Loss, Retry, Token};
use tenure_test_support::{Cluster, Sentinel, Server, Version, eventually, soon};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn token(text: &str) -> Token {
    text.parse().unwrap()
}

#[tokio::test]
async fn the_embedded_store_conforms() {
    all(&Locker::in_memory()).await;
}

#[tokio::test]
async fn an_embedded_server_conforms() {
    all(&Locker::builder().in_memory_with(&EmbeddedServer::new())).await;
}

#[tokio::test]
async fn an_isolated_embedded_store_conforms() {
    all(&Locker::builder().isolated(true).in_memory()).await;
}

#[tokio::test]
async fn a_server_conforms() {
    let server = Server::start();
    all(&Locker::connect(&server.url()).await.unwrap()).await;
}

#[tokio::test]
async fn a_server_by_its_unix_socket_conforms() {
    let server = Server::start();
    all(&Locker::connect(&server.unix_url()).await.unwrap()).await;
}

#[tokio::test]
async fn an_isolated_locker_with_a_prefix_conforms() {
    let server = Server::start();
    all(&Locker::builder().isolated(true).prefix("app:").connect(&server.url()).await.unwrap()).await;
    let astray = "local n = 0 for _, key in ipairs(redis.call('KEYS', '*')) do
        if not string.find(key, 'app:', 1, true) then n = n + 1 end end return n";
    assert_eq!(server.cli(&["EVAL", astray, "0"]), "0");
}

#[cfg(feature = "fred")]
#[tokio::test]
async fn a_client_of_the_users_own_conforms() {
    use tenure::fred::prelude::{Builder, ClientLike, Config, ReconnectPolicy};
    let server = Server::start();
    // fred's defaults, except for the policy: three attempts, no timeout.
    let client = Builder::from_config(Config::from_url(&server.url()).unwrap())
        .set_policy(ReconnectPolicy::new_constant(0, 50))
        .build()
        .unwrap();
    client.init().await.unwrap();
    all(&Locker::new(client)).await;
}

/// Checks a connection of redis-rs that the caller has opened. Without subscriptions, waiters poll.
#[cfg(feature = "redis")]
async fn conforms(connection: impl Into<tenure::RedisConnection>) {
    all(&Locker::builder().poll_every(ms(100)).with_redis(connection)).await;
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn a_connection_of_the_users_own_conforms() {
    use tenure::redis::Client;
    let server = Server::start();
    let client = Client::open(server.url()).unwrap();
    conforms(client.get_multiplexed_async_connection().await.unwrap()).await;
    server.cli(&["FLUSHALL"]);
    let manager = client.get_connection_manager().await.unwrap();
    conforms(manager.clone()).await;
    server.cli(&["FLUSHALL"]);
    let subscribing = tenure::RedisConnection::from(manager).subscribing_by(client);
    all(&Locker::builder().poll_every(ms(60_000)).with_redis(subscribing)).await;
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn a_connection_of_the_users_own_to_a_cluster_conforms() {
    use tenure::redis::cluster::ClusterClient;
    let cluster = Cluster::start();
    let nodes = cluster.nodes.iter().map(Server::url).collect::<Vec<_>>();
    let client = ClusterClient::builder(nodes).response_timeout(ms(2_000)).build().unwrap();
    conforms(client.get_async_connection().await.unwrap()).await;
}

#[tokio::test]
async fn a_cluster_conforms() {
    let cluster = Cluster::start();
    // Before Redis 7, waiters on a cluster get no notifications.
    let poll_every = if Version::of_this_run().has_redis(7, 0) { ms(1_000) } else { ms(100) };
    let locker = Locker::builder().poll_every(poll_every).connect(&cluster.url()).await.unwrap();
    all(&locker).await;
    let astray = soon(locker.lock_all(["a", "b"])).await.unwrap_err();
    assert!(matches!(astray, Error::CrossSlot) && astray.to_string().contains("hash tag"), "{astray}");
}

#[tokio::test]
async fn a_server_under_sentinels_conforms() {
    let watched = Sentinel::start();
    all(&Locker::connect(&watched.url()).await.unwrap()).await;
}

/// Returns a quorum of servers that have just started, and that forget nothing meanwhile.
async fn quorum(servers: &[Server]) -> Locker {
    Locker::builder().restart_window(Duration::ZERO).quorum(servers.iter().map(Server::url)).await.unwrap()
}

#[tokio::test]
async fn a_quorum_of_three_conforms() {
    let servers = [(); 3].map(|()| Server::start());
    all_of_a_quorum(&quorum(&servers).await).await;
}

#[tokio::test]
async fn a_quorum_of_five_two_of_which_are_gone_conforms() {
    let mut servers = [(); 5].map(|()| Server::start());
    servers[1].kill();
    let locker = quorum(&servers).await;
    servers[4].kill();
    all_of_a_quorum(&locker).await;
}

#[tokio::test]
async fn a_quorum_of_one_conforms() {
    all_of_a_quorum(&quorum(&[Server::start()]).await).await;
}

/// Repeats a call whose outcome is unknown: a node of a quorum has a fraction of a second, too little on a busy
/// machine.
async fn decided<R: IntoFuture<Output = Result<T, Error>>, T>(call: impl Fn() -> R) -> Result<T, Error> {
    loop {
        match call().await {
            Err(error) if error.is_transient() => eprintln!("again: {error}"),
            decided => return decided,
        }
    }
}

/// Asserts that a majority has the ttl: the nodes that reply first, or those that follow if one of them was too slow.
async fn has_at_least(guard: &LockGuard, least: Duration) {
    let look = async || decided(|| guard.server_ttl()).await.unwrap().is_some_and(|ttl| ttl > least).then_some(());
    eventually("the servers have the ttl", look).await;
}

/// Runs cases, one after the other.
macro_rules! run {
    ($locker:expr; $($case:path),* $(,)?) => {
        $(
            eprintln!("case: {}", stringify!($case));
            soon(async { $case($locker).await }).await;
        )*
    };
}

/// Runs every case, each on its own keys.
async fn all(locker: &Locker) {
    all_but_permits(locker).await;
    run!(
        locker;
        sharing::no_more_hold_a_permit_than_the_limit_says,
        sharing::a_limit_of_no_permits_is_refused,
        sharing::the_permit_of_a_dead_holder_comes_back,
        sharing::a_token_counts_once,
        sharing::a_permit_that_lingers_still_counts,
        sharing::the_lease_of_a_permit_is_taken_up_again,
    );
}

async fn all_of_a_quorum(locker: &Locker) {
    all_but_permits(locker).await;
    run!(locker; sharing::a_permit_of_a_quorum_is_refused_with_the_reason);
}

async fn all_but_permits(locker: &Locker) {
    run!(
        locker;
        a_lock_excludes_all_others_until_it_is_released,
        a_token_obtains_its_lock_again_and_keeps_its_fencing_token,
        a_token_is_compared_whole,
        fencing_tokens_grow_from_holder_to_holder,
        an_unfenced_lock_has_no_fencing_token,
        a_token_that_wants_a_fencing_token_later_has_its_own,
        the_holder_can_be_inspected,
        keys_and_metadata_may_be_any_bytes,
        a_ttl_can_be_shortened_and_lengthened,
        ensure_only_ever_lengthens,
        renewal_carries_a_lock_past_its_ttl,
        without_renewal_a_lock_expires_and_says_so,
        a_lock_released_by_its_twin_is_missing_or_taken,
        a_waiter_gets_the_lock_when_it_is_released,
        waiting_ends_when_it_is_said_to,
        a_strategy_counts_its_attempts,
        a_dropped_guard_releases,
        nonsense_is_refused_and_changes_nothing,
        a_scope_releases_and_answers,
        a_set_is_taken_whole_or_not_at_all,
        a_set_is_lost_as_one,
        sets_that_overlap_in_opposite_order_never_block_each_other,
        a_lease_keeps_the_lock_and_is_taken_up_again,
        a_lease_that_is_gone_is_not_taken_up,
        ensuring_a_lease_only_ever_lengthens,
        bounds_are_kept,
        bounds_that_cannot_work_are_refused,
        a_lock_is_ended_whoever_holds_it,
        only_the_lock_of_the_holders_that_are_named_is_ended,
        locks_are_listed_and_nothing_else,
        sharing::readers_share_a_key_and_exclude_writers,
        sharing::all_readers_are_listed,
        sharing::a_writer_that_waits_holds_readers_back,
        sharing::a_writer_gets_in_under_a_stream_of_readers_also_with_several_keys,
        sharing::a_request_that_gives_up_or_is_dropped_holds_nobody_back,
        sharing::a_reader_is_renewed_and_its_ttl_is_its_own,
        sharing::a_key_is_free_when_the_last_reader_has_expired,
        sharing::a_token_that_reads_already_is_admitted_and_its_guards_end_one_by_one,
        sharing::a_reader_whose_share_is_gone_is_lost,
        sharing::a_dropped_reader_is_released,
        sharing::the_lease_of_a_reader_is_taken_up_again,
        sharing::the_bounds_of_a_reader_are_kept,
        sharing::a_writer_becomes_a_reader_in_one_step,
        sharing::a_writer_that_waits_is_not_passed_by_a_downgrade,
        sharing::a_lock_that_others_rely_on_is_not_downgraded,
        sharing::many_that_share_end_with_nothing_left,
    );
}

async fn a_lock_excludes_all_others_until_it_is_released(locker: &Locker) {
    let guard = locker.lock("exclusive").await.unwrap();
    assert!(guard.is_held());
    for _ in 0..3 {
        let refused = decided(|| locker.try_lock("exclusive")).await.unwrap_err();
        assert!(
            matches!(&refused, Error::NotObtained { key, attempts: 1, .. } if *key == "exclusive".into()),
            "{refused}"
        );
    }
    guard.release().await.unwrap();
    decided(|| locker.try_lock("exclusive")).await.unwrap().release().await.unwrap();
}

async fn a_token_obtains_its_lock_again_and_keeps_its_fencing_token(locker: &Locker) {
    let first = decided(|| locker.obtain("again").token(token("me")).metadata("one")).await.unwrap();
    let second = decided(|| locker.obtain("again").token(token("me")).metadata("two").ttl(ms(9_000))).await.unwrap();
    assert_eq!(first.fencing_token(), second.fencing_token());
    assert_eq!(decided(|| locker.inspect("again")).await.unwrap().unwrap().metadata, b"two");
    // The ttl is not shortened: the first guard relies on its 30 seconds.
    has_at_least(&second, ms(20_000)).await;
    second.release().await.unwrap();
}

async fn a_token_is_compared_whole(locker: &Locker) {
    let ten = decided(|| locker.obtain("whole").token(token("job-10"))).await.unwrap();
    for other in ["job-1", "job-100", "job-11"] {
        let refused = decided(|| locker.obtain("whole").token(token(other)).metadata("0")).await;
        assert!(matches!(refused, Err(Error::NotObtained { .. })), "{other}");
    }
    ten.release().await.unwrap();
}

async fn fencing_tokens_grow_from_holder_to_holder(locker: &Locker) {
    let mut last = 0;
    for _ in 0..20 {
        let guard = locker.lock("fence").await.unwrap();
        let fence = guard.fencing_token().unwrap();
        assert!(fence > last, "{fence} after {last}");
        last = fence;
        guard.release().await.unwrap();
    }
}

async fn an_unfenced_lock_has_no_fencing_token(locker: &Locker) {
    let guard = locker.lock("unfenced").fenced(false).await.unwrap();
    assert_eq!(guard.fencing_token(), None);
    guard.release().await.unwrap();
}

async fn a_token_that_wants_a_fencing_token_later_has_its_own(locker: &Locker) {
    let guard = locker.lock("later").await.unwrap();
    let before = guard.fencing_token();
    guard.release().await.unwrap();
    let without = decided(|| locker.obtain("later").token(token("me")).fenced(false)).await.unwrap();
    assert_eq!(without.fencing_token(), None);
    let with = decided(|| locker.obtain("later").token(token("me"))).await.unwrap();
    assert!(with.fencing_token() > before);
    with.release().await.unwrap();
}

async fn the_holder_can_be_inspected(locker: &Locker) {
    assert_eq!(decided(|| locker.inspect("seen")).await.unwrap(), None);
    let guard = locker.lock("seen").metadata("host-3").ttl(ms(5_000)).await.unwrap();
    let holder = decided(|| locker.inspect("seen")).await.unwrap().unwrap();
    assert_eq!(holder.token, *guard.token());
    assert_eq!(holder.metadata, b"host-3");
    assert_eq!(holder.fencing_token, guard.fencing_token());
    assert!(holder.remaining.is_some_and(|left| left <= ms(5_000) && left > ms(1_000)));
    guard.release().await.unwrap();
    assert_eq!(decided(|| locker.inspect("seen")).await.unwrap(), None);
}

async fn keys_and_metadata_may_be_any_bytes(locker: &Locker) {
    let bytes: Vec<u8> = (0..=255).collect();
    for key in [&bytes[..], b"a}b", b"{}x", b"{{a}}", b"\n", b"\0", "schlüssel:🔑".as_bytes(), b"{tag}rest"] {
        let guard = locker.lock(key).metadata(bytes.clone()).await.unwrap();
        let holder = decided(|| locker.inspect(key)).await.unwrap().unwrap();
        assert_eq!((holder.metadata, &holder.token), (bytes.clone(), guard.token()), "{key:?}");
        assert!(matches!(decided(|| locker.try_lock(key)).await, Err(Error::NotObtained { .. })));
        guard.release().await.unwrap();
    }
}

async fn a_ttl_can_be_shortened_and_lengthened(locker: &Locker) {
    let guard = locker.lock("renew").ttl(ms(60_000)).await.unwrap();
    decided(|| guard.renew_for(ms(20_000))).await.unwrap();
    assert!(guard.remaining() < ms(20_000) && guard.ttl() == ms(20_000));
    assert!(decided(|| guard.server_ttl()).await.unwrap().unwrap() <= ms(20_000));
    decided(|| guard.renew_for(ms(60_000))).await.unwrap();
    assert!(guard.remaining() > ms(30_000) && guard.ttl() == ms(60_000));
    has_at_least(&guard, ms(30_000)).await;
    decided(|| guard.renew()).await.unwrap();
    assert!(matches!(decided(|| guard.renew_for(Duration::ZERO)).await, Err(Error::InvalidTtl(_))));
    assert!(guard.is_held());
    guard.release().await.unwrap();
}

async fn ensure_only_ever_lengthens(locker: &Locker) {
    let guard = locker.lock("ensure").ttl(ms(60_000)).await.unwrap();
    decided(|| guard.ensure(ms(1_000))).await.unwrap();
    assert!(guard.remaining() > ms(30_000));
    has_at_least(&guard, ms(30_000)).await;
    decided(|| guard.ensure(ms(200_000))).await.unwrap();
    assert!(guard.remaining() > ms(100_000));
    has_at_least(&guard, ms(100_000)).await;
    guard.release().await.unwrap();
}

async fn renewal_carries_a_lock_past_its_ttl(locker: &Locker) {
    let guard = locker.lock("renewed").ttl(ms(5_000)).renew_every(ms(300)).await.unwrap();
    let first = guard.deadline();
    eventually("a ttl later", async || (guard.deadline() > first + ms(5_000)).then_some(())).await;
    assert_eq!(guard.check(), Ok(()));
    assert!(matches!(decided(|| locker.try_lock("renewed")).await, Err(Error::NotObtained { .. })));
    guard.release().await.unwrap();
}

async fn without_renewal_a_lock_expires_and_says_so(locker: &Locker) {
    let guard = locker.lock("expiring").ttl(ms(600)).no_renewal().await.unwrap();
    let deadline = guard.deadline();
    assert_eq!(guard.lost().await, Loss::Expired);
    assert!(tokio::time::Instant::now() >= deadline);
    assert_eq!((guard.is_held(), guard.remaining()), (false, Duration::ZERO));
    assert!(guard.cancellation_token().is_cancelled());
    let refused = decided(|| guard.renew()).await.unwrap_err();
    assert!(matches!(refused, Error::NotHeld { loss: Loss::Expired, .. }), "{refused}");
    assert!(matches!(guard.release().await, Err(Error::NotHeld { loss: Loss::Expired, .. })));
    locker.lock("expiring").await.unwrap().release().await.unwrap();
}

async fn a_lock_released_by_its_twin_is_missing_or_taken(locker: &Locker) {
    let twins = |key: &'static str| async move {
        let one = decided(|| locker.obtain(key).token(token("twin"))).await.unwrap();
        let other = decided(|| locker.obtain(key).token(token("twin"))).await.unwrap();
        other.release().await.unwrap();
        one
    };
    let missing = twins("missing").await;
    assert!(matches!(decided(|| missing.renew()).await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    assert_eq!(missing.lost().await, Loss::Missing);
    assert_eq!(decided(|| missing.server_ttl()).await.unwrap(), None);

    let taken = twins("taken").await;
    let successor = decided(|| locker.try_lock("taken")).await.unwrap();
    assert!(matches!(decided(|| taken.renew()).await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    assert!(matches!(taken.release().await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    decided(|| successor.renew()).await.unwrap();
    let released = twins("released").await;
    assert!(matches!(released.release().await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
}

async fn a_waiter_gets_the_lock_when_it_is_released(locker: &Locker) {
    let guard = locker.lock("handed").await.unwrap();
    let waiter = tokio::spawn(locker.lock("handed").into_future());
    tokio::task::yield_now().await;
    let first = guard.fencing_token();
    guard.release().await.unwrap();
    let successor = waiter.await.unwrap().unwrap();
    assert!(successor.fencing_token() > first);
    successor.release().await.unwrap();
}

async fn waiting_ends_when_it_is_said_to(locker: &Locker) {
    let guard = locker.lock("patience").await.unwrap();
    let requests: [&dyn Fn() -> LockRequest; 3] =
        [&|| locker.lock("patience"), &|| locker.obtain("patience"), &|| locker.try_lock("patience")];
    for request in requests {
        // On a busy machine, the time for the second attempt, and for the last, may be too short.
        eventually("it is refused after more than one attempt", async || {
            let started = Instant::now();
            let refused = request().wait_at_most(ms(600)).await.unwrap_err();
            let waited = started.elapsed();
            // The simulation checks this to the millisecond; here the machine may be busy.
            assert!(waited >= ms(600) && waited < ms(5_000), "{waited:?}");
            assert!(matches!(&refused, Error::NotObtained { .. }) || refused.is_transient(), "{refused}");
            matches!(refused, Error::NotObtained { attempts: 2.., .. }).then_some(())
        })
        .await;
    }
    guard.release().await.unwrap();
    // A limit far beyond the range of the clock is no limit.
    locker.lock("patience").wait_at_most(Duration::MAX).await.unwrap().release().await.unwrap();
    // One short attempt. If the machine is too busy for a reply in time, its outcome is unknown.
    let guard = eventually("it is granted", async || {
        let attempt = locker.lock("patience").wait_at_most(Duration::ZERO).await;
        attempt.map_err(|error| assert!(error.is_transient(), "{error}")).ok()
    });
    guard.await.release().await.unwrap();
}

async fn a_strategy_counts_its_attempts(locker: &Locker) {
    let guard = locker.lock("strategy").await.unwrap();
    for (retry, expected) in
        [(Retry::none(), 1), (Retry::linear(ms(2)).max_retries(3), 4), (Retry::from_iter([ms(1); 6]), 7)]
    {
        let refused = decided(|| locker.obtain("strategy").retry(retry.clone())).await.unwrap_err();
        assert!(matches!(refused, Error::NotObtained { attempts, .. } if attempts == expected), "{refused}");
    }
    guard.release().await.unwrap();
}

async fn a_dropped_guard_releases(locker: &Locker) {
    let guard = locker.lock("dropped").await.unwrap();
    let lost = guard.lost();
    drop(guard);
    assert_eq!(lost.await, Loss::Released);
    locker.lock("dropped").wait_at_most(ms(5_000)).await.unwrap().release().await.unwrap();
}

async fn nonsense_is_refused_and_changes_nothing(locker: &Locker) {
    assert!(matches!(locker.lock("").await, Err(Error::InvalidKey(_))));
    assert!(matches!(locker.inspect("").await, Err(Error::InvalidKey(_))));
    for ttl in [Duration::ZERO, Duration::from_nanos(1), ms(2), Duration::from_secs(366 * 24 * 3600), Duration::MAX] {
        assert!(matches!(locker.lock("nonsense").ttl(ttl).await, Err(Error::InvalidTtl(_))), "{ttl:?}");
    }
    for every in [Duration::ZERO, ms(1_000), Duration::MAX] {
        let refused = locker.lock("nonsense").ttl(ms(1_000)).renew_every(every).await;
        assert!(matches!(refused, Err(Error::InvalidRenewal(_))), "{every:?}");
    }
    assert_eq!(decided(|| locker.inspect("nonsense")).await.unwrap(), None);
}

async fn a_scope_releases_and_answers(locker: &Locker) {
    let answer = locker.scope("scope", async |guard| guard.key().clone()).await.unwrap();
    assert_eq!(answer, "scope".into());
    let lost = locker.scope("scope", async |guard| {
        let twin = decided(|| locker.obtain("scope").token(guard.token().clone())).await.unwrap();
        twin.release().await.unwrap();
        drop(decided(|| guard.renew()).await);
        std::future::pending::<()>().await;
    });
    assert!(matches!(lost.await, Err(Error::Lost(Loss::Missing))));
    assert_eq!(decided(|| locker.inspect("scope")).await.unwrap(), None);
}

async fn a_set_is_taken_whole_or_not_at_all(locker: &Locker) {
    let guard = decided(|| locker.obtain_all(["{set}:a", "{set}:b", "{set}:c"]).metadata("set")).await.unwrap();
    assert_eq!(guard.keys().len(), 3);
    for key in guard.keys() {
        let holder = decided(|| locker.inspect(key)).await.unwrap().unwrap();
        assert_eq!((&holder.token, holder.fencing_token), (guard.token(), guard.fencing_token()));
    }
    assert!(decided(|| guard.server_ttl()).await.unwrap().is_some());
    let refused = decided(|| locker.obtain_all(["{set}:x", "{set}:b", "{set}:y"])).await.unwrap_err();
    assert!(matches!(&refused, Error::NotObtained { key, .. } if *key == "{set}:b".into()), "{refused}");
    assert_eq!(decided(|| locker.inspect("{set}:x")).await.unwrap(), None);
    assert_eq!(decided(|| locker.inspect("{set}:y")).await.unwrap(), None);
    let fence = guard.fencing_token();
    guard.release().await.unwrap();
    let next = locker.lock("{set}:c").await.unwrap();
    assert!(next.fencing_token() > fence);
    next.release().await.unwrap();
    let none: [&str; 0] = [];
    assert!(matches!(locker.lock_all(none).await, Err(Error::InvalidKey(_))));
    assert!(matches!(locker.lock_all(["{set}:a", "{set}:b", "{set}:a"]).await, Err(Error::InvalidKey(_))));
}

async fn a_set_is_lost_as_one(locker: &Locker) {
    let set = locker.lock_all(["{one}:a", "{one}:b"]).await.unwrap();
    let twin = decided(|| locker.obtain("{one}:b").token(set.token().clone())).await.unwrap();
    twin.release().await.unwrap();
    let other = decided(|| locker.try_lock("{one}:b")).await.unwrap();
    assert_eq!(decided(|| set.server_ttl()).await.unwrap(), None);
    assert!(matches!(decided(|| set.renew()).await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    assert_eq!(set.lost().await, Loss::Taken);
    other.release().await.unwrap();
}

async fn sets_that_overlap_in_opposite_order_never_block_each_other(locker: &Locker) {
    let tasks = [["{ab}:a", "{ab}:b"], ["{ab}:b", "{ab}:a"]].map(|keys| {
        let locker = locker.clone();
        tokio::spawn(async move {
            for _ in 0..10 {
                locker.lock_all(keys).await.unwrap().release().await.unwrap();
            }
        })
    });
    for task in tasks {
        task.await.unwrap();
    }
}

async fn a_lease_keeps_the_lock_and_is_taken_up_again(locker: &Locker) {
    let guard = locker.lock_all(["{lease}:a", "{lease}:b"]).ttl(ms(5_000)).await.unwrap();
    let (fence, lost) = (guard.fencing_token(), guard.lost());
    let text = guard.into_lease().to_string();
    assert_eq!(lost.await, Loss::Released);
    assert!(matches!(decided(|| locker.try_lock("{lease}:b")).await, Err(Error::NotObtained { .. })));
    let adopted = decided(|| locker.adopt(text.parse().unwrap())).await.unwrap();
    assert_eq!((adopted.fencing_token(), adopted.ttl(), adopted.keys().len()), (fence, ms(5_000), 2));
    assert!(adopted.remaining() > ms(4_000));
    adopted.release().await.unwrap();
    assert_eq!(decided(|| locker.inspect("{lease}:a")).await.unwrap(), None);
}

async fn a_lease_that_is_gone_is_not_taken_up(locker: &Locker) {
    let lease = Lease::new("gone", token("me"), ms(5_000));
    let refused = decided(|| locker.adopt(lease.clone())).await.unwrap_err();
    assert!(matches!(refused, Error::NotHeld { loss: Loss::Missing, .. }), "{refused}");
    let other = locker.lock("gone").await.unwrap();
    assert!(matches!(decided(|| locker.adopt(lease.clone())).await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    assert!(matches!(
        decided(|| locker.ensure(&lease, ms(5_000))).await,
        Err(Error::NotHeld { loss: Loss::Taken, .. })
    ));
    decided(|| other.renew()).await.unwrap();
    other.release().await.unwrap();
    for nonsense in [Lease::new("", token("me"), ms(5_000)), Lease::new("gone", token("me"), Duration::ZERO)] {
        assert!(matches!(
            decided(|| locker.adopt(nonsense.clone())).await,
            Err(Error::InvalidKey(_) | Error::InvalidTtl(_))
        ));
    }
}

async fn ensuring_a_lease_only_ever_lengthens(locker: &Locker) {
    let guard = decided(|| locker.obtain("ensured").token(token("me")).ttl(ms(10_000)).no_renewal()).await.unwrap();
    let lease = Lease::new("ensured", token("me"), ms(10_000));
    decided(|| locker.ensure(&lease, ms(1_000))).await.unwrap();
    has_at_least(&guard, ms(8_000)).await;
    decided(|| locker.ensure(&lease, ms(90_000))).await.unwrap();
    has_at_least(&guard, ms(80_000)).await;
    guard.release().await.unwrap();
}

/// All at once, as each of them waits for a time to pass.
async fn bounds_are_kept(locker: &Locker) {
    tokio::join!(
        a_key_stays_taken_for_its_least_time(locker, "least", ms(30_000), true),
        a_key_stays_taken_for_its_least_time(locker, "least of a drop", ms(30_000), false),
        a_key_stays_taken_for_its_least_time(locker, "longer than the ttl", ms(2_000), true),
        a_key_stays_taken_for_its_least_time(locker, "longer than the ttl of a drop", ms(2_000), false),
        a_set_stays_taken_for_its_least_time(locker),
        of_several_guards_the_last_leaves_the_key_to_nobody(locker),
        a_limit_ends_a_lock_and_no_request_prolongs_it(locker),
        after_the_limit_the_least_time_goes_on(locker),
    );
}

async fn a_key_stays_taken_for_its_least_time(locker: &Locker, key: &str, ttl: Duration, explicit: bool) {
    let asked = Instant::now();
    let guard = locker.lock(key).ttl(ttl).hold_at_least(ms(4_000)).await.unwrap();
    let twin = guard.token().clone();
    match explicit {
        true => guard.release().await.unwrap(),
        false => drop(guard),
    }
    eventually("nobody holds it", async || decided(|| locker.inspect(key)).await.unwrap().is_none().then_some(()))
        .await;
    for request in
        [&|| locker.try_lock(key), &|| locker.try_lock(key).token(twin.clone())] as [&dyn Fn() -> LockRequest; 2]
    {
        let refused = decided(request).await;
        // On a busy machine, it may be over.
        assert!(refused.is_err() || asked.elapsed() >= ms(3_990), "{key}");
    }
    let next = locker.lock(key).await.unwrap();
    assert!(asked.elapsed() >= ms(3_990), "{:?}", asked.elapsed());
    next.release().await.unwrap();
}

async fn a_set_stays_taken_for_its_least_time(locker: &Locker) {
    let asked = Instant::now();
    let guard = locker.lock_all(["{least}:a", "{least}:b"]).hold_at_least(ms(1_500)).await.unwrap();
    guard.release().await.unwrap();
    for key in ["{least}:a", "{least}:b"] {
        let refused = decided(|| locker.try_lock(key)).await;
        assert!(refused.is_err() || asked.elapsed() >= ms(1_490), "{key}");
    }
    let next = locker.lock_all(["{least}:b", "{least}:a"]).await.unwrap();
    assert!(asked.elapsed() >= ms(1_490), "{:?}", asked.elapsed());
    next.release().await.unwrap();
}

async fn of_several_guards_the_last_leaves_the_key_to_nobody(locker: &Locker) {
    let request = || locker.obtain("twins that stay").token(token("twin"));
    let asked = Instant::now();
    let guard = decided(|| request().hold_at_least(ms(2_500))).await.unwrap();
    let other = decided(request).await.unwrap();
    drop(guard);
    decided(|| other.renew()).await.unwrap();
    drop(other);
    let next = locker.lock("twins that stay").await.unwrap();
    assert!(asked.elapsed() >= ms(2_490), "{:?}", asked.elapsed());
    next.release().await.unwrap();
}

async fn a_limit_ends_a_lock_and_no_request_prolongs_it(locker: &Locker) {
    let sent = tokio::time::Instant::now();
    let guard = locker.lock("far limit").hold_at_most(ms(60_000)).await.unwrap();
    // Waiting doesn't count, so the limit may be later.
    assert!(guard.deadline() > sent && guard.remaining() < ms(60_000));
    let limit = tokio::time::Instant::now() + ms(60_000);
    decided(|| guard.ensure(ms(600_000))).await.unwrap();
    decided(|| guard.renew_for(ms(600_000))).await.unwrap();
    decided(|| guard.renew()).await.unwrap();
    assert!(guard.deadline() < limit);
    assert!(decided(|| guard.server_ttl()).await.unwrap().unwrap() <= ms(60_000));
    guard.release().await.unwrap();

    let guard = locker.lock("limit").hold_at_most(ms(2_000)).await.unwrap();
    let limit = tokio::time::Instant::now() + ms(2_000);
    // On a busy machine, it may be over.
    drop(guard.ensure(ms(60_000)).await);
    assert!(guard.deadline() < limit);
    assert_eq!(guard.lost().await, Loss::LimitReached);
    assert!(matches!(guard.release().await, Err(Error::NotHeld { loss: Loss::LimitReached, .. })));
    // Long before what was asked for.
    locker.lock("limit").await.unwrap().release().await.unwrap();
}

async fn after_the_limit_the_least_time_goes_on(locker: &Locker) {
    let asked = Instant::now();
    let guard = locker.lock("both").hold_at_most(ms(1_000)).hold_at_least(ms(2_500)).await.unwrap();
    assert_eq!(guard.lost().await, Loss::LimitReached);
    let next = locker.lock("both").await.unwrap();
    assert!(asked.elapsed() >= ms(2_490), "{:?}", asked.elapsed());
    next.release().await.unwrap();
}

async fn bounds_that_cannot_work_are_refused(locker: &Locker) {
    for limit in [Duration::ZERO, ms(3)] {
        let refused = locker.lock("bounds").hold_at_most(limit).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidHold(_)) && refused.to_string().contains("hold_at_most"), "{refused}");
    }
    for least in [Duration::from_secs(366 * 24 * 3600), Duration::MAX] {
        let refused = locker.lock("bounds").hold_at_least(least).await.unwrap_err();
        assert!(matches!(refused, Error::InvalidHold(_)) && refused.to_string().contains("hold_at_least"), "{refused}");
    }
    let guard = locker.lock("bounds").hold_at_least(Duration::ZERO).hold_at_most(Duration::MAX).await.unwrap();
    guard.release().await.unwrap();
    assert_eq!(decided(|| locker.inspect("bounds")).await.unwrap(), None);
}

async fn a_lock_is_ended_whoever_holds_it(locker: &Locker) {
    match locker.force_release("forced").await {
        // A connection of the user's own to a cluster.
        Err(Error::Unsupported(_)) => return,
        none => assert!(!none.unwrap()),
    }
    // On a busy machine nodes of a quorum may be too late to say that they have ended it. Then it is not ended again:
    // that would end the next one.
    let is_ended = async |guard: &LockGuard| {
        match locker.force_release("forced").await {
            Err(error) if error.is_transient() => {}
            ended => return ended.unwrap(),
        }
        eventually("it is ended, or was", async || match decided(|| guard.server_ttl()).await.unwrap() {
            Some(_) => locker.force_release("forced").await.is_ok_and(|ended| ended).then_some(true),
            None => Some(true),
        })
        .await
    };
    let is_lost = async |guard: &LockGuard| {
        assert!(matches!(decided(|| guard.renew()).await, Err(Error::NotHeld { .. })));
        guard.lost().await
    };
    let request = || locker.lock("forced").ttl(ms(60_000)).no_renewal();
    // A lock that only its own token could have ended, with a waiter behind it.
    let held = request().await.unwrap();
    let waiter = tokio::spawn(locker.lock("forced").into_future());
    tokio::time::sleep(ms(50)).await;
    // The waiter may get its turn, and the lock, from the first call.
    assert!(is_ended(&held).await);
    let next = waiter.await.unwrap().unwrap();
    assert!(next.fencing_token() > held.fencing_token());
    assert_eq!(is_lost(&held).await, Loss::Taken);
    next.release().await.unwrap();
    // One that two guards rely on.
    let (one, other) = (request().token(token("twin")).await.unwrap(), request().token(token("twin")).await.unwrap());
    assert!(is_ended(&one).await);
    assert_eq!((is_lost(&one).await, is_lost(&other).await), (Loss::Missing, Loss::Missing));
    // One that is left to nobody, after which a new holder is the only one.
    locker.lock("forced").token(token("twin")).hold_at_least(ms(60_000)).await.unwrap().release().await.unwrap();
    assert!(matches!(decided(|| locker.try_lock("forced")).await, Err(Error::NotObtained { .. })));
    match locker.force_release("forced").await {
        Err(error) if error.is_transient() => drop(decided(|| locker.force_release("forced")).await.unwrap()),
        ended => assert!(ended.unwrap()),
    }
    let alone = locker.lock("forced").token(token("twin")).await.unwrap();
    drop(alone);
    eventually("its drop frees the key", async || {
        decided(|| locker.inspect("forced")).await.unwrap().is_none().then_some(())
    })
    .await;
    assert!(!decided(|| locker.force_release("forced")).await.unwrap());
    // Those who share the key, and after whom a writer is alone.
    let read = || locker.read("forced").ttl(ms(60_000)).no_renewal();
    let readers = [read().await.unwrap(), read().await.unwrap()];
    assert!(is_ended(&readers[1]).await);
    let writer = locker.lock("forced").await.unwrap();
    for reader in &readers {
        assert_eq!(is_lost(reader).await, Loss::Taken);
    }
    writer.release().await.unwrap();
    assert!(matches!(locker.force_release("").await, Err(Error::InvalidKey(_))));
}

async fn only_the_lock_of_the_holders_that_are_named_is_ended(locker: &Locker) {
    if let Err(Error::Unsupported(_)) = locker.force_release_of("named", &[]).await {
        return;
    }
    let of = async |tokens: &[Token]| decided(|| locker.force_release_of("named", tokens)).await.unwrap();
    // On a busy machine nodes of a quorum may be too late to say that they have ended it.
    let ends = async |tokens: &[Token]| match locker.force_release_of("named", tokens).await {
        Err(error) if error.is_transient() => {
            of(tokens).await || decided(|| locker.inspect("named")).await.unwrap().is_none()
        }
        ended => ended.unwrap(),
    };
    let (earlier, others) = (token("earlier"), [token("job-1"), token("job-100")]);
    assert!(!of(&[]).await && !of(slice::from_ref(&earlier)).await);
    let held = locker.lock("named").token(token("job-10")).metadata("host-3").await.unwrap();
    assert!(!of(&[]).await && !of(&others).await && !of(slice::from_ref(&earlier)).await);
    decided(|| held.renew()).await.unwrap();
    assert!(ends(&[earlier.clone(), held.token().clone()]).await);
    assert!(matches!(decided(|| held.renew()).await, Err(Error::NotHeld { .. })));
    // All of those who share it, or none.
    let readers = [locker.read("named").await.unwrap(), locker.read("named").await.unwrap()];
    let tokens = readers.each_ref().map(|reader| reader.token().clone());
    assert!(!of(&tokens[..1]).await);
    decided(|| readers[1].renew()).await.unwrap();
    assert!(ends(&tokens).await);
    assert!(matches!(decided(|| readers[1].renew()).await, Err(Error::NotHeld { .. })));
    // One that is left to nobody is anybody's to end.
    locker.lock("named").hold_at_least(ms(60_000)).await.unwrap().release().await.unwrap();
    assert!(ends(&[]).await);
    locker.lock("named").await.unwrap().release().await.unwrap();
    let reader = locker.read("named").hold_at_least(ms(60_000)).await.unwrap();
    let still = [locker.read("named").await.unwrap()];
    reader.release().await.unwrap();
    assert!(!of(&[]).await && ends(&[still[0].token().clone()]).await);
    locker.lock("named").await.unwrap().release().await.unwrap();
}

async fn locks_are_listed_and_nothing_else(locker: &Locker) {
    let prefix = "list[*]:";
    let keys = |locks: Vec<(tenure::Key, tenure::Holder)>| -> Vec<String> {
        locks.into_iter().map(|(key, _)| key.to_string()).collect()
    };
    match locker.list(prefix, 100).await {
        // A connection of the user's own to a cluster.
        Err(Error::Unsupported(_)) => return,
        none => assert!(none.unwrap().is_empty()),
    }
    let name = |rest: &str| format!("{prefix}{rest}");
    let plain = locker.lock(name("b")).metadata("host-3").await.unwrap();
    let chosen = decided(|| locker.obtain(name("{c}")).token(token("mine"))).await.unwrap();
    let unfenced = locker.lock(name("a")).fenced(false).await.unwrap();
    // Its record of grants, and its fence key, are no locks.
    let twin = decided(|| locker.obtain(name("{c}")).token(token("mine"))).await.unwrap();
    let elsewhere = locker.lock("list:elsewhere").await.unwrap();
    let found = locker.list(prefix, 100).await.unwrap();
    assert_eq!(found[1].1.metadata, b"host-3");
    assert_eq!(found[1].1.fencing_token, plain.fencing_token());
    assert_eq!(keys(found), ["a", "b", "{c}"].map(name));
    assert_eq!(keys(locker.list(prefix, 2).await.unwrap()), ["a", "b"].map(name));
    plain.release().await.unwrap();
    unfenced.release().await.unwrap();
    assert_eq!(keys(locker.list(prefix, 100).await.unwrap()), [name("{c}")]);
    twin.release().await.unwrap();
    drop(chosen);
    elsewhere.release().await.unwrap();
}
