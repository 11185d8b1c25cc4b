//! Locks on a majority of real servers, some of which freeze, die, forget, or were never there. A program of its own,
//! because each test starts three to five servers, and only a limited number should run at a time.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::time::Duration;

use tenure::{Error, LockGuard, LockRequest, Locker, Loss, NodeError, Token};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon, within};
use tokio::time::Instant;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn start<const N: usize>() -> [Server; N] {
    [(); N].map(|()| Server::start())
}

/// Returns a locker whose nodes vote at once, although they have only just been started. No ttl ends what its test
/// looks for.
async fn locker(servers: &[Server]) -> Locker {
    locker_for(servers, ms(60_000), Duration::ZERO).await
}

async fn locker_for(servers: &[Server], ttl: Duration, window: Duration) -> Locker {
    let builder = Locker::builder().ttl(ttl).restart_window(window);
    builder.quorum(servers.iter().map(Server::url)).await.unwrap()
}

/// Returns how many of the servers have the key.
fn count(servers: &[Server], key: &str) -> usize {
    servers.iter().filter(|server| server.cli(&["EXISTS", key]) == "1").count()
}

async fn is_on(servers: &[Server], key: &str, nodes: usize) {
    eventually("the key is on so many nodes", async || (count(servers, key) == nodes).then_some(())).await;
}

fn node_errors(error: Error) -> Vec<NodeError> {
    match error {
        Error::Quorum { nodes, .. } => nodes,
        other => panic!("no majority was expected to be reached: {other}"),
    }
}

fn address(server: &Server) -> String {
    format!("127.0.0.1:{}", server.port())
}

/// Tries until nodes that were away are back.
async fn lock(locker: &Locker, key: &'static str) -> LockGuard {
    soon(locker.lock(key)).await.unwrap()
}

/// Repeats a call whose outcome is unknown: a node has a small part of the ttl, which may be too little on a busy
/// machine.
async fn decided<R: IntoFuture<Output = Result<T, Error>>, T>(call: impl Fn() -> R) -> Result<T, Error> {
    let again = async || match call().await {
        Err(error) if error.is_transient() => None,
        decided => Some(decided),
    };
    eventually("it is decided", again).await
}

/// Repeats a call until nodes are the reason for its failure, and not the time that it has.
async fn failed_on<T, R: IntoFuture<Output = Result<T, Error>>>(call: impl Fn() -> R) -> Error {
    let again = async || match call().await {
        Err(error @ Error::Quorum { .. }) => Some(error),
        Err(error) => {
            assert!(error.is_transient(), "{error}");
            None
        }
        Ok(_) => panic!("no majority was expected to be reached"),
    };
    eventually("no majority is reached", again).await
}

/// Obtains the lock on all nodes. If a node gets the request so late that its clock has passed the number, or is too
/// slow to vote in its part of the ttl, the lock stays without it, so this tries again.
async fn lock_on_all(servers: &[Server], request: impl Fn() -> LockRequest) -> LockGuard {
    eventually("all have granted it", async || {
        let guard = soon(request()).await.unwrap();
        if !is_soon_on_all(servers).await {
            drop(guard.release().await);
            return None;
        }
        Some(guard)
    })
    .await
}

/// The same beside another guard of the token, which keeps its lock.
async fn lock_on_all_beside(servers: &[Server], request: impl Fn() -> LockRequest) -> LockGuard {
    let is_alone = |server: &Server| {
        let grants = server.cli(&["GET", "{k}:grants"]);
        grants.is_empty() || grants.ends_with("\n-")
    };
    eventually("all have granted it as well", async || {
        let guard = soon(request()).await.unwrap();
        if !is_soon_on_all(servers).await {
            drop(guard);
            eventually("its grant is gone", async || servers.iter().all(is_alone).then_some(())).await;
            return None;
        }
        Some(guard)
    })
    .await
}

/// Returns whether all have the key within a second. A request doesn't wait for the last vote.
async fn is_soon_on_all(servers: &[Server]) -> bool {
    let started = Instant::now();
    while started.elapsed() < ms(1_000) {
        if count(servers, "k") == servers.len() {
            return true;
        }
        tokio::time::sleep(ms(5)).await;
    }
    false
}

#[tokio::test]
async fn one_frozen_node_of_five_slows_nothing() {
    let servers = start::<5>();
    // Each node gets a fiftieth of the ttl, within the limit of the command timeout: each call to the frozen node takes
    // far longer than what is soon.
    let builder = Locker::builder().ttl(ms(3_600_000)).command_timeout(ms(120_000)).restart_window(Duration::ZERO);
    let locker = builder.quorum(servers.iter().map(Server::url)).await.unwrap();
    lock(&locker, "warm").await.release().await.unwrap();
    servers[2].freeze();
    let guard = lock(&locker, "k").await;
    soon(guard.renew()).await.unwrap();
    assert!(soon(guard.server_ttl()).await.unwrap().is_some());
    soon(guard.release()).await.unwrap();
    servers[2].thaw();
    // The frozen node votes when nobody waits for it any longer.
    is_on(&servers, "k", 0).await;
}

#[tokio::test]
async fn two_dead_nodes_of_five_are_done_without() {
    let mut servers = start::<5>();
    let locker = locker(&servers).await;
    // A bare majority could be left with one node.
    let before = lock_on_all(&servers, || locker.lock("k")).await;
    servers[0].kill();
    servers[3].kill();
    decided(|| before.renew()).await.unwrap();
    assert!(matches!(decided(|| locker.try_lock("k")).await, Err(Error::NotObtained { .. })));
    let fence = before.fencing_token();
    before.release().await.unwrap();
    let after = lock(&locker, "k").await;
    assert!(after.fencing_token() > fence);
    after.release().await.unwrap();
}

#[tokio::test]
async fn without_a_majority_a_guard_is_lost_by_its_deadline_and_requests_name_the_nodes() {
    let servers = start::<5>();
    let locker = locker(&servers).await;
    let guard = soon(locker.lock("k").ttl(ms(3_000))).await.unwrap();
    servers[..3].iter().for_each(Server::freeze);
    // Before the servers free the lock.
    assert_eq!(within(ms(3_000), guard.lost()).await, Loss::Expired);
    servers[..3].iter().for_each(Server::thaw);

    let mut frozen: Vec<_> = servers[..3].iter().map(address).collect();
    frozen.sort();
    // Unless another one is slow. Connections on which nothing was heard for long are given up.
    eventually("the frozen nodes are named, and they alone", async || {
        let locker = locker_for(&servers, ms(60_000), Duration::ZERO).await;
        lock(&locker, "warm").await.release().await.unwrap();
        servers[..3].iter().for_each(Server::freeze);
        let refused = soon(locker.obtain("other")).await.unwrap_err();
        servers[..3].iter().for_each(Server::thaw);
        assert!(refused.is_transient(), "{refused}");
        let told = refused.to_string();
        let Error::Quorum { nodes, .. } = refused else { return None };
        let mut named: Vec<_> = nodes.into_iter().map(|node| node.address).collect();
        named.sort();
        (named == frozen && told.contains("3 of 5 nodes needed, 2 granted")).then_some(())
    })
    .await;
    // The grants of the minority are taken back, and so are the late grants of the frozen nodes.
    is_on(&servers, "other", 0).await;
    lock(&locker, "k").await.release().await.unwrap();
}

#[tokio::test]
async fn one_failed_renewal_is_no_loss() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    // A node that was frozen before its vote would not be renewed.
    let guard = lock_on_all(&servers, || locker.lock("k").renew_every(ms(500))).await;
    servers[0].freeze();
    servers[1].freeze();
    assert_eq!(node_errors(failed_on(|| guard.renew()).await).len(), 2);
    let deadline = guard.deadline();
    servers[0].thaw();
    servers[1].thaw();
    eventually("it is renewed", async || (guard.deadline() > deadline).then_some(())).await;
    assert_eq!(guard.check(), Ok(()));
    is_on(&servers, "k", 3).await;
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_guard_outlives_the_memory_of_a_minority_and_not_that_of_a_majority() {
    let mut servers = start::<3>();
    let locker = locker(&servers).await;
    // A renewal heals a node once it is connected to again.
    let guard = lock_on_all(&servers, || locker.lock("k").renew_every(ms(300))).await;
    servers[0].restart_empty();
    decided(|| guard.renew()).await.unwrap();
    is_on(&servers, "k", 3).await;
    servers[0].restart_empty();
    servers[1].restart_empty();
    eventually("both are connected to again", async || {
        matches!(guard.renew().await, Err(Error::NotHeld { loss: Loss::Missing, .. })).then_some(())
    })
    .await;
    assert_eq!(guard.lost().await, Loss::Missing);
}

#[tokio::test]
async fn a_release_wakes_who_waits_for_a_quorum_also_with_a_node_frozen() {
    let servers = start::<3>();
    let patient = async || {
        let builder = Locker::builder().ttl(ms(30_000)).restart_window(Duration::ZERO).poll_every(ms(60_000));
        builder.quorum(servers.iter().map(Server::url)).await.unwrap()
    };
    let (here, there) = (patient().await, patient().await);
    let mut guard = lock(&here, "k").await;
    for round in 0..20 {
        if round == 10 {
            servers[1].freeze();
        }
        let (next, waits) = if round % 2 == 0 { (&there, "there") } else { (&here, "here") };
        let waiter = tokio::spawn(next.lock("k").into_future());
        // Before the waiter asks, while it subscribes, or when it is notified.
        tokio::time::sleep(ms(fastrand::u64(..30))).await;
        guard.release().await.unwrap();
        guard = soon(waiter).await.unwrap().unwrap_or_else(|error| panic!("{waits}, round {round}: {error}"));
    }
    servers[1].thaw();
    guard.release().await.unwrap();
}

#[tokio::test]
async fn split_votes_resolve() {
    let servers = start::<3>();
    let mut contenders = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let locker = locker(&servers).await;
        contenders.spawn(async move {
            let mut fences = Vec::new();
            for _ in 0..10 {
                let guard = lock(&locker, "k").await;
                fences.extend(guard.fencing_token());
                guard.release().await.unwrap();
            }
            fences
        });
    }
    let mut fences: Vec<u64> = contenders.join_all().await.concat();
    fences.sort_unstable();
    fences.dedup();
    assert_eq!(fences.len(), 50, "no two holders had the same fencing token");
    is_on(&servers, "k", 0).await;
}

#[tokio::test]
async fn split_votes_resolve_where_the_contenders_have_tokens_of_their_users() {
    let servers = start::<3>();
    let mut contenders = tokio::task::JoinSet::new();
    for contender in 0..3 {
        let locker = locker(&servers).await;
        contenders.spawn(async move {
            for _ in 0..5 {
                let token: Token = format!("contender-{contender}").parse().unwrap();
                soon(locker.lock("k").token(token)).await.unwrap().release().await.unwrap();
            }
        });
    }
    contenders.join_all().await;
    is_on(&servers, "k", 0).await;
}

#[tokio::test]
async fn a_failed_attempt_leaves_nothing_on_the_minority() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    // Another holds two of the nodes; the attempt gets the vote of the third.
    for server in &servers[..2] {
        server.cli(&["SET", "k", "another", "PX", "600000"]);
    }
    let try_lock = || locker.try_lock("k");
    let with_token = || try_lock().token("mine".parse().unwrap());
    let requests: [&dyn Fn() -> LockRequest; 2] = [&try_lock, &with_token];
    for request in requests {
        assert!(matches!(decided(request).await, Err(Error::NotObtained { .. })));
        eventually("the third is free", async || (servers[2].cli(&["EXISTS", "k"]) == "0").then_some(())).await;
    }
    assert_eq!(count(&servers[..2], "k"), 2);
}

#[tokio::test]
async fn a_failed_attempt_does_not_take_from_a_twin_what_it_had() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    // A renewal would find out that it is lost, and then its clean-up ends it.
    let twin = || locker.try_lock("k").token("twin".parse().unwrap()).no_renewal();
    let guard = lock_on_all(&servers, twin).await;
    for server in &servers[..2] {
        server.cli(&["SET", "k", "another", "PX", "600000"]);
    }
    assert!(matches!(decided(twin).await, Err(Error::NotObtained { .. })));
    locker.close().await;
    assert_eq!(servers[2].cli(&["GET", "k"]), "twin");
    drop(guard);
}

#[tokio::test]
async fn dropped_attempts_leave_nothing_on_any_node() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    servers[1].freeze();
    servers[2].freeze();
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..100 {
        drop(tokio::time::timeout(Duration::from_micros(rng.u64(..2_000)), locker.lock("k")).await);
    }
    servers[1].thaw();
    servers[2].thaw();
    for _ in 0..100 {
        drop(tokio::time::timeout(Duration::from_micros(rng.u64(..2_000)), locker.lock("k")).await);
    }
    eprintln!("seed {seed}");
    // Before the locker is closed, which shortens what is tried.
    is_on(&servers, "k", 0).await;
    soon(locker.close()).await;
    assert_eq!(count(&servers, "k"), 0);
}

#[tokio::test]
async fn a_release_reaches_a_node_that_was_frozen_for_a_moment() {
    let servers = start::<3>();
    let locker = Locker::builder().restart_window(Duration::ZERO).command_timeout(ms(1_000));
    let locker = locker.quorum(servers.iter().map(Server::url)).await.unwrap();
    let guard = lock_on_all(&servers, || locker.lock("k")).await;
    servers[0].freeze();
    guard.release().await.unwrap();
    let closing = tokio::spawn(async move { locker.close().await });
    // It waits for a few seconds.
    tokio::time::sleep(ms(500)).await;
    assert!(!closing.is_finished(), "closing waits for the frozen node");
    servers[0].thaw();
    soon(closing).await.unwrap();
    assert_eq!(count(&servers, "k"), 0);
}

/// Each node leaves its key to nobody, also one that was frozen during the release. Nothing brings the lock back there,
/// nor to a node that has lost it.
#[tokio::test]
async fn each_node_keeps_the_key_taken_for_its_least_time() {
    let servers = [(); 3].map(|()| Server::start());
    // The key of a node that the release reaches late must still be there.
    let locker = locker_for(&servers, ms(30_000), Duration::ZERO).await;
    let nobodys = |server: &Server| {
        let is_nobodys = "return redis.call('GET', KEYS[1]) == '\\n\\nh' and redis.call('PTTL', KEYS[1]) or -9";
        server.cli(&["EVAL", is_nobodys, "1", "k"]).parse::<i64>().unwrap()
    };
    let asked = Instant::now();
    let guard = soon(locker.lock("k").hold_at_least(ms(60_000))).await.unwrap();
    let obtained = Instant::now();
    // Renewals heal a node that was too slow to vote, or has lost the key.
    let heal = async || {
        eventually("all nodes have it", async || {
            drop(guard.renew().await);
            (count(&servers, "k") == 3).then_some(())
        })
        .await;
    };
    heal().await;
    servers[2].cli(&["DEL", "k"]);
    heal().await;
    servers[0].freeze();
    let released = Instant::now();
    guard.release().await.unwrap();
    servers[0].thaw();
    let all = async || servers.iter().all(|server| nobodys(server) > 0).then_some(());
    eventually("all nodes keep it taken", all).await;
    // What is left counts from when the release arrives.
    let under_way = i64::try_from(released.elapsed().as_millis()).unwrap();
    let left = |since: Instant| i64::try_from((ms(60_000).saturating_sub(since.elapsed())).as_millis()).unwrap();
    for server in &servers {
        let most = left(obtained) + under_way + 2_000;
        let ttl = nobodys(server);
        let least = left(asked);
        assert!((least..most).contains(&ttl), "{ttl} ms, at least {least} ms are left");
    }
    assert!(matches!(decided(|| locker.try_lock("k")).await, Err(Error::NotObtained { .. })));
    // A node that loses it has no vote to give back.
    servers[1].cli(&["DEL", "k"]);
    assert!(matches!(decided(|| locker.try_lock("k")).await, Err(Error::NotObtained { .. })));
}

#[tokio::test]
async fn a_node_that_was_restarted_does_not_vote_and_says_until_when() {
    const WINDOW: Duration = Duration::from_secs(8);
    let mut servers = start::<3>();
    let locker = locker_for(&servers, ms(6_000), WINDOW).await;
    // All nodes have just started.
    let young = eventually("only nodes in their restart window refuse it", async || {
        let refused = failed_on(|| locker.try_lock("k")).await;
        assert!(refused.is_transient(), "{refused}");
        let told = refused.to_string();
        let nodes = node_errors(refused);
        let young = nodes.iter().all(|node| matches!(node.error, Error::NotVoting { .. }));
        young.then_some((told, nodes))
    });
    let (told, nodes) = young.await;
    assert!(told.contains("votes again in"), "{told}");
    assert!(nodes.len() >= 2);
    for node in nodes {
        assert!(matches!(node.error, Error::NotVoting { remaining } if remaining <= ms(9_000)), "{node}");
    }
    // A request that waits goes on through the window.
    let guard = lock_on_all(&servers, || locker.lock("k")).await;
    // Two nodes forget. A lock that is held on the third alone stays exclusive while they don't vote.
    let restarted = Instant::now();
    servers[0].restart_empty();
    servers[1].restart_empty();
    eventually("they are connected to again", async || {
        let refused = failed_on(|| locker.try_lock("k")).await;
        let silent = |node: &NodeError| matches!(node.error, Error::NotVoting { .. });
        (node_errors(refused).iter().filter(|node| silent(node)).count() == 2).then_some(())
    })
    .await;
    let fence = guard.fencing_token();
    let next = lock(&locker, "k").await;
    assert!(restarted.elapsed() >= WINDOW, "{:?}", restarted.elapsed());
    assert!(!guard.is_held() && next.fencing_token() > fence);
}

#[tokio::test]
async fn a_ttl_longer_than_the_restart_window_is_refused() {
    let servers = start::<3>();
    let locker = locker_for(&servers, ms(3_000), ms(6_500)).await;
    // The window is rounded up to 7 s.
    assert!(matches!(locker.lock("k").ttl(ms(7_001)).await, Err(Error::InvalidTtl(_))));
    let guard = soon(locker.lock("k").ttl(ms(7_000))).await.unwrap();
    assert!(matches!(guard.renew_for(ms(7_001)).await, Err(Error::InvalidTtl(_))));
    assert!(guard.is_held());
    guard.release().await.unwrap();
}

#[tokio::test]
async fn fencing_tokens_grow_while_nodes_are_restarted_empty_one_after_the_other() {
    let mut servers = start::<3>();
    let builder = Locker::builder().ttl(ms(1_000)).restart_window(ms(1_000));
    let locker = builder.quorum(servers.iter().map(Server::url)).await.unwrap();
    let mut last = 0;
    for round in 0..6 {
        for _ in 0..3 {
            let guard = lock(&locker, "k").await;
            let fence = guard.fencing_token().unwrap();
            assert!(fence > last, "{fence} after {last}");
            last = fence;
            // It may have expired meanwhile.
            drop(guard.release().await);
        }
        servers[round % 3].restart_empty();
    }
}

#[tokio::test]
async fn a_majority_is_enough_to_start_with_and_the_others_join() {
    let mut servers = start::<3>();
    servers[0].kill();
    let locker = locker(&servers).await;
    let guard = lock(&locker, "k").await;
    servers[0].restart();
    guard.release().await.unwrap();
    eventually("the third is voting", async || {
        let _guard = lock(&locker, "k").await;
        (count(&servers, "k") == 3).then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_a_majority_there_is_no_quorum() {
    let mut servers = start::<3>();
    servers[0].kill();
    servers[2].freeze();
    // Unless the third is too slow as well.
    eventually("the dead and the frozen node are named", async || {
        let builder = Locker::builder().command_timeout(ms(500));
        let failed = soon(builder.quorum(servers.iter().map(Server::url))).await.unwrap_err();
        let told = failed.to_string();
        let named: Vec<_> = node_errors(failed).into_iter().map(|node| node.address).collect();
        let both = named.contains(&address(&servers[0])) && named.contains(&address(&servers[2]));
        (both && told.contains("2 of 3 nodes needed, 1 granted")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nodes_that_make_no_quorum_are_refused() {
    let servers = start::<2>();
    let [one, two] = [servers[0].url(), servers[1].url()];
    for urls in [vec![], vec![&one, &two], vec![&one, &two, &one]] {
        assert!(matches!(Locker::quorum(urls).await, Err(Error::InvalidNodes(_))));
    }
}

#[tokio::test]
async fn a_node_that_refuses_for_good_is_told_and_done_without() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    servers[0].cli(&["LPUSH", "k", "no", "lock"]);
    lock(&locker, "k").await.release().await.unwrap();
    servers[1].cli(&["LPUSH", "k", "no", "lock"]);
    let refused = soon(locker.lock("k")).await.unwrap_err();
    assert!(!refused.is_transient(), "{refused}");
    let nodes = node_errors(refused);
    assert!(nodes.iter().all(|node| node.error.code() == Some("WRONGTYPE")) && nodes.len() == 2, "{nodes:?}");
    is_on(&servers[2..], "k", 0).await;
    assert_eq!(servers[0].cli(&["LLEN", "k"]), "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_released_at_once_is_freed_by_that_release() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    for _ in 0..500 {
        locker.lock("k").await.unwrap().release().await.unwrap();
    }
    soon(locker.close()).await;
    is_on(&servers, "k", 0).await;
}

#[tokio::test]
async fn a_fence_key_that_holds_nonsense_is_that_keys_trouble_alone() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    for server in &servers {
        server.cli(&["SET", "{ahead}:fence", "9000000000000000"]);
        server.cli(&["SET", "{text}:fence", "nonsense"]);
    }
    // Unless nodes are too slow to tell.
    eventually("the number that is ahead is the reason", async || {
        locker.try_lock("ahead").await.unwrap_err().to_string().contains("fencing token").then_some(())
    })
    .await;
    let refused = decided(|| locker.try_lock("text")).await.unwrap_err();
    assert!(refused.to_string().contains("holds no fencing token"), "{refused}");
    lock(&locker, "healthy").await.release().await.unwrap();
    soon(locker.lock("ahead").fenced(false)).await.unwrap().release().await.unwrap();
    is_on(&servers, "ahead", 0).await;
    is_on(&servers, "text", 0).await;
}

#[tokio::test]
async fn a_url_of_a_password_shows_it_in_no_error() {
    let servers = start::<3>();
    let urls = servers.iter().map(|server| format!("redis://:secret@127.0.0.1:{}", server.port()));
    let locker = Locker::builder().command_timeout(ms(500)).quorum(urls).await;
    let shown = format!("{locker:?} {}", locker.as_ref().err().map(ToString::to_string).unwrap_or_default());
    assert!(!shown.contains("secret"), "{shown}");
}

#[tokio::test]
async fn a_lock_that_a_majority_has_lost_is_released_on_the_others() {
    let servers = start::<3>();
    let locker = locker_for(&servers, ms(60_000), Duration::ZERO).await;
    for (end, expected) in [("DEL", Loss::Missing), ("SET", Loss::Taken)] {
        let guard = lock_on_all(&servers, || locker.lock("k")).await;
        for server in &servers[..2] {
            server.cli(if end == "DEL" { &["DEL", "k"] } else { &["SET", "k", "another", "PX", "600000"] });
        }
        assert!(matches!(decided(|| guard.renew()).await, Err(Error::NotHeld { .. })), "{end}");
        assert_eq!(soon(guard.lost()).await, expected);
        drop(guard);
        is_on(&servers[2..], "k", 0).await;
        servers.iter().for_each(|server| drop(server.cli(&["DEL", "k"])));
    }
}

#[tokio::test]
async fn a_dropped_guard_does_not_end_what_its_token_obtains_next() {
    let servers = start::<3>();
    let locker = locker_for(&servers, ms(60_000), Duration::ZERO).await;
    let token = || "worker-7".parse::<Token>().unwrap();
    for round in 0..50 {
        drop(soon(locker.lock("k").token(token())).await.unwrap());
        let guard = soon(locker.lock("k").token(token())).await.unwrap();
        tokio::time::sleep(ms(10)).await;
        assert!(count(&servers, "k") >= 2, "round {round}");
        decided(|| guard.renew()).await.unwrap();
    }
    soon(locker.close()).await;
    is_on(&servers, "k", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_guard_lets_nobody_in_while_its_token_holds_again() {
    let servers = start::<3>();
    let (locker, rival) = (locker(&servers).await, locker(&servers).await);
    let token = || "worker-7".parse::<Token>().unwrap();
    for round in 0..100 {
        drop(soon(locker.lock("k").token(token())).await.unwrap());
        let guard = soon(locker.lock("k").token(token())).await.unwrap();
        let rivals = rival.try_lock("k").await;
        assert!(rivals.is_err() || !guard.is_held(), "round {round}");
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_lease_is_not_taken_up_by_what_a_restarted_node_remembers() {
    let mut servers = start::<3>();
    // Its dump must be loaded before it has expired.
    let (ttl, window) = (ms(12_000), Duration::from_secs(12));
    let locker = locker_for(&servers, ttl, window).await;
    let rival = locker_for(&servers, ttl, window).await;
    let lease = lock_on_all(&servers, || locker.lock("k")).await.into_lease();
    assert_eq!(servers[0].cli(&["SAVE"]), "OK");
    // Released while the third node was away.
    servers[..2].iter().for_each(|server| drop(server.cli(&["DEL", "k"])));
    let guard = lock(&rival, "k").await;
    assert_eq!(count(&servers, "k"), 3);
    servers[0].kill();
    servers[0].restart();
    assert_eq!(servers[0].cli(&["GET", "k"]), *lease.token().as_str(), "it has loaded its dump");
    for _ in 0..20 {
        assert!(locker.ensure(&lease, ms(3_000)).await.is_err());
        assert!(locker.adopt(lease.clone()).await.is_err());
        tokio::time::sleep(ms(50)).await;
    }
    drop(guard);
}

#[tokio::test]
async fn closing_waits_for_what_is_left_of_a_lost_lock() {
    let servers = start::<3>();
    let locker = locker_for(&servers, ms(60_000), Duration::ZERO).await;
    let guard = lock_on_all(&servers, || locker.lock("k")).await;
    servers[..2].iter().for_each(|server| drop(server.cli(&["DEL", "k"])));
    assert!(matches!(decided(|| guard.renew()).await, Err(Error::NotHeld { .. })));
    drop(guard);
    soon(locker.close()).await;
    assert_eq!(count(&servers, "k"), 0);
}

#[tokio::test]
async fn a_refusal_by_a_minority_is_no_refusal_while_another_node_is_away() {
    let mut servers = start::<3>();
    let locker = locker(&servers).await;
    lock(&locker, "warm").await.release().await.unwrap();
    servers[0].cli(&["SET", "k", "stray"]);
    servers[2].kill();
    let dead = address(&servers[2]);
    // Unless the second one is too slow to vote.
    eventually("the dead node is named, and it alone", async || {
        let nodes = node_errors(failed_on(|| locker.try_lock("k")).await);
        nodes.iter().map(|node| &node.address).eq([&dead]).then_some(())
    })
    .await;
    is_on(&servers[1..2], "k", 0).await;
}

/// A node that has replied before and now sends garbage, also to new connections, is away, and not something else than
/// a server: what waits goes on waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_from_most_nodes_is_waited_out() {
    for driver in enabled_drivers() {
        let servers = start::<3>();
        let proxies = [Proxy::start(servers[1].port()).await, Proxy::start(servers[2].port()).await];
        let urls = [servers[0].url(), proxies[0].url(), proxies[1].url()];
        let builder = Locker::builder().driver(driver).restart_window(Duration::ZERO);
        let locker = builder.quorum(&urls).await.unwrap();
        lock(&locker, "warm").await.release().await.unwrap();
        proxies.iter().for_each(|proxy| proxy.set(Mode::Instead(b"\xff\xfe is no reply\r\n")));
        // The first ones break the connections. The next ones are refused because there is none: for 400 ms, so that
        // both drivers have tried to connect again, and have got garbage for that as well.
        for _ in 0..20 {
            let refused = soon(locker.try_lock("k")).await.unwrap_err();
            assert!(refused.is_transient(), "{driver:?}: {refused}");
            tokio::time::sleep(ms(20)).await;
        }
        let waiting = tokio::spawn(locker.lock("waited").into_future());
        // For as long again: an error for good would end it at once.
        tokio::time::sleep(ms(500)).await;
        assert!(!waiting.is_finished(), "{driver:?}: {:?}", waiting.await);
        proxies.iter().for_each(|proxy| proxy.set(Mode::Pass));
        soon(waiting).await.unwrap().unwrap().release().await.unwrap();
    }
}

fn enabled_drivers() -> Vec<tenure::Driver> {
    let enabled = [(tenure::Driver::Fred, cfg!(feature = "fred")), (tenure::Driver::Redis, cfg!(feature = "redis"))];
    enabled.into_iter().filter_map(|(driver, is_enabled)| is_enabled.then_some(driver)).collect()
}

#[tokio::test]
async fn a_lock_lives_as_long_as_a_majority_keeps_it() {
    let servers = start::<3>();
    let locker = locker_for(&servers, ms(120_000), Duration::ZERO).await;
    let guard = lock_on_all(&servers, || locker.lock("k").no_renewal()).await;
    servers[1].cli(&["PEXPIRE", "k", "30000"]);
    // Nobody waits long for a third node that is slow. So: many times in a row, which no chance explains.
    eventually("what the majority keeps is told 50 times in a row", async || {
        for _ in 0..50 {
            let remaining = decided(|| guard.server_ttl()).await.unwrap();
            let holder = decided(|| locker.inspect("k")).await.unwrap().unwrap();
            if remaining < Some(ms(60_000)) || holder.remaining < Some(ms(60_000)) {
                return None;
            }
        }
        Some(())
    })
    .await;
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_free_locks_are_obtained_at_once() {
    let servers = start::<3>();
    let builder = Locker::builder().ttl(ms(6_000_000)).command_timeout(ms(120_000)).restart_window(Duration::ZERO);
    let locker = builder.quorum(servers.iter().map(Server::url)).await.unwrap();
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..6_000 {
        let request = locker.try_lock(format!("k{n}")).no_renewal();
        requests.spawn(async move { request.await.map(LockGuard::into_lease) });
    }
    let failed: Vec<_> = requests.join_all().await.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());
}

#[tokio::test]
async fn closing_does_not_wait_long_for_a_node_that_is_dead() {
    let mut servers = start::<3>();
    let locker = locker(&servers).await;
    let guard = lock_on_all(&servers, || locker.lock("k")).await;
    servers[2].kill();
    decided(|| locker.try_lock("other")).await.unwrap().release().await.unwrap();
    drop(guard);
    // Long before the ttl ends.
    soon(locker.close()).await;
}

#[tokio::test]
async fn a_ttl_longer_than_the_window_is_refused_before_any_lock_is() {
    let servers = start::<3>();
    let builder = Locker::builder().ttl(ms(120_000));
    assert!(matches!(builder.quorum(servers.iter().map(Server::url)).await, Err(Error::InvalidTtl(_))));
}

#[tokio::test]
async fn one_server_by_two_names_makes_no_quorum() {
    let servers = start::<2>();
    let localhost = format!("redis://localhost:{}", servers[0].port());
    for twin in [localhost, servers[0].unix_url()] {
        let urls = [servers[0].url(), twin, servers[1].url()];
        // Unless one of them is too slow to be asked, which is found out later.
        let is_refused =
            async || matches!(Locker::quorum(urls.clone()).await, Err(Error::InvalidNodes(_))).then_some(());
        eventually("it is refused", is_refused).await;
    }
}

#[tokio::test]
async fn one_server_by_two_names_that_comes_late_has_one_vote() {
    let mut servers = start::<2>();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("twin.sock");
    let urls = [servers[0].url(), servers[1].url(), format!("redis+unix://{}", socket.display())];
    let builder = Locker::builder().restart_window(Duration::ZERO);
    let locker = builder.quorum(&urls).await.unwrap();
    let of_first = servers[0].unix_url().trim_start_matches("redis+unix://").to_owned();
    std::os::unix::fs::symlink(of_first, &socket).unwrap();
    servers[1].kill();
    eventually("the two are found to be one", async || {
        let refused = node_errors(failed_on(|| locker.try_lock("k")).await);
        let twin = refused.iter().find(|node| node.address == socket.display().to_string())?;
        twin.error.to_string().contains(&address(&servers[0])).then_some(())
    })
    .await;
    servers[1].restart();
    lock(&locker, "k").await.release().await.unwrap();
}

#[tokio::test]
async fn a_guard_outlives_nodes_that_freeze_or_forget_one_after_another() {
    let mut servers = start::<3>();
    let locker = locker(&servers).await;
    let guard = lock_on_all(&servers, || locker.lock("k").metadata("host-3").renew_every(ms(300))).await;
    let fence = guard.fencing_token();
    for round in 0..6 {
        let server = &mut servers[round % 3];
        match round % 2 {
            0 => {
                // As if it were frozen for longer than the ttl.
                server.cli(&["DEL", "k"]);
                server.freeze();
                tokio::time::sleep(ms(1_000)).await;
                server.thaw();
            }
            _ => server.restart_empty(),
        }
        is_on(&servers, "k", 3).await;
        assert_eq!(guard.check(), Ok(()), "round {round}");
        assert!(servers.iter().all(|server| server.cli(&["GET", "k"]).ends_with("\nhost-3")), "round {round}");
    }
    guard.release().await.unwrap();
    is_on(&servers, "k", 0).await;
    assert!(lock(&locker, "k").await.fencing_token() > fence);
}

#[tokio::test]
async fn a_node_is_healed_once_it_votes_again() {
    let mut servers = start::<3>();
    let (ttl, window) = (ms(6_000), ms(6_000));
    let locker = locker_for(&servers, ttl, window).await;
    let request = || locker.lock("k").token("worker-7".parse().unwrap()).renew_every(ms(300));
    let guard = lock_on_all(&servers, request).await;
    let restarted = Instant::now();
    servers[1].restart_empty();
    is_on(&servers, "k", 3).await;
    assert!(restarted.elapsed() >= window, "{:?}", restarted.elapsed());
    servers[2].restart_empty();
    let restarted = Instant::now();
    // The healed node is needed for that: the last one is silent.
    let is_renewed = async || (guard.deadline() >= restarted + ttl).then_some(());
    eventually("it is renewed by what is left", is_renewed).await;
    assert_eq!(guard.check(), Ok(()));
    // What one grant leaves, and its healing, takes nothing from another grant.
    let again = soon(request()).await.unwrap();
    drop(guard);
    is_on(&servers, "k", 3).await;
    drop(again);
    is_on(&servers, "k", 0).await;
}

/// Returns a guard of the key "k" that the last of three nodes has refused. There the key is free.
async fn lock_without_the_last(servers: &[Server; 3], locker: &Locker, keys: &[&'static str]) -> LockGuard {
    // The nodes know the script by then, and the locker their clocks, so that each request runs it once.
    soon(lock_on_all(servers, || locker.lock("k")).await.release()).await.unwrap();
    is_on(servers, "k", 0).await;
    servers[2].cli(&["SET", "k", "another"]);
    // It remembers all commands, however fast they were.
    servers[2].cli(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
    let guard = soon(locker.lock_all(keys.iter().copied()).no_renewal()).await.unwrap();
    let has_refused =
        async || servers[2].cli(&["SLOWLOG", "GET", "128"]).contains(guard.token().as_str()).then_some(());
    eventually("the last has refused", has_refused).await;
    servers[2].cli(&["DEL", "k"]);
    guard
}

/// A token that one guard made may be used by another, whose nodes are not those of the first.
#[tokio::test]
async fn a_guard_counts_no_node_that_has_only_the_grant_of_another_guard_of_its_token() {
    for (keys, exactly) in [(&["k"][..], false), (&["k"], true), (&["k", "l"], false)] {
        let servers = start::<3>();
        let (locker, twin) = (locker(&servers).await, locker(&servers).await);
        let guard = lock_without_the_last(&servers, &locker, keys).await;
        let request = || twin.lock_all(keys.iter().copied()).no_renewal().token(guard.token().clone());
        let other = lock_on_all_beside(&servers, request).await;
        servers[0].cli(&["SET", "k", "another"]);
        let renewed = if exactly { soon(guard.renew_for(ms(9_000))).await } else { soon(guard.renew()).await };
        assert!(renewed.is_err(), "{keys:?}, exactly: {exactly}");
        drop(other);
        eventually("only its own is left", async || (servers[2].cli(&["EXISTS", "k"]) == "0").then_some(())).await;
    }
}

#[tokio::test]
async fn a_guard_is_healed_where_only_another_guard_of_its_token_had_a_grant() {
    let servers = start::<3>();
    let (locker, twin) = (locker(&servers).await, locker(&servers).await);
    let guard = lock_without_the_last(&servers, &locker, &["k"]).await;
    let request = || twin.lock("k").no_renewal().token(guard.token().clone());
    let other = lock_on_all_beside(&servers, request).await;
    // A node that is slow is healed by one of the next renewals.
    let is_recorded = async || {
        soon(guard.renew()).await.unwrap();
        servers[2].cli(&["GET", "{k}:grants"]).ends_with(",-").then_some(())
    };
    eventually("the node has both grants", is_recorded).await;
    // It counts from now on.
    servers[0].cli(&["SET", "k", "another"]);
    soon(guard.renew()).await.unwrap();
    drop(other);
    let is_ended = async || servers[2].cli(&["GET", "{k}:grants"]).ends_with("\n-").then_some(());
    eventually("the node has one of them", is_ended).await;
    soon(guard.renew()).await.unwrap();
    soon(guard.release()).await.unwrap();
    assert_eq!(servers[2].cli(&["EXISTS", "k"]), "0");
}

/// Those who are refused give back what they got on the node that the holder doesn't have, which notifies all who wait.
#[tokio::test]
async fn waiters_do_not_wake_each_other_while_a_bare_majority_is_held() {
    let servers = start::<3>();
    let lockers = [locker(&servers).await, locker(&servers).await, locker(&servers).await];
    let guard = lock_without_the_last(&servers, &lockers[0], &["k"]).await;
    let waiters =
        lockers.clone().map(|locker| tokio::spawn(async move { locker.lock("k").await.unwrap().release().await }));
    tokio::time::sleep(ms(500)).await;
    let before: u32 = script_runs(&servers).into_iter().sum();
    tokio::time::sleep(ms(2_000)).await;
    let runs = script_runs(&servers).into_iter().sum::<u32>() - before;
    assert!(runs < 100, "{runs} scripts in 2 s");
    soon(guard.release()).await.unwrap();
    for waiter in waiters {
        soon(waiter).await.unwrap().unwrap();
    }
}

/// One whose votes are split has what it gives back itself, and no more, to wake it.
#[tokio::test]
async fn a_waiter_does_not_wake_itself_while_one_node_is_dead_and_one_is_held() {
    let mut servers = start::<3>();
    let locker = locker(&servers).await;
    soon(lock_on_all(&servers, || locker.lock("k")).await.release()).await.unwrap();
    servers[1].cli(&["SET", "k", "another"]);
    servers[2].kill();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    tokio::time::sleep(ms(500)).await;
    let before: u32 = script_runs(&servers[..2]).into_iter().sum();
    tokio::time::sleep(ms(2_000)).await;
    let runs = script_runs(&servers[..2]).into_iter().sum::<u32>() - before;
    assert!(runs < 100, "{runs} scripts in 2 s");
    servers[1].cli(&["DEL", "k"]);
    soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
}

/// A quorum has no line in which they would be the next.
#[tokio::test]
async fn readers_of_another_process_that_wait_are_told_of_a_downgrade() {
    let servers = start::<3>();
    let new = || Locker::builder().poll_every(ms(60_000)).restart_window(Duration::ZERO);
    let urls = || servers.iter().map(Server::url);
    let (here, there) = (new().quorum(urls()).await.unwrap(), new().quorum(urls()).await.unwrap());
    let writer = lock_on_all(&servers, || here.lock("k").ttl(ms(60_000))).await;
    let reading = tokio::spawn(there.read("k").into_future());
    let listens = |server: &Server| server.cli(&["PUBSUB", "NUMSUB", "k"]).ends_with('1');
    eventually("it listens", async || servers.iter().all(listens).then_some(())).await;
    tokio::time::sleep(ms(200)).await;
    let writer = soon(writer.downgrade()).await.unwrap();
    soon(soon(reading).await.unwrap().unwrap().release()).await.unwrap();
    soon(writer.release()).await.unwrap();
}

/// Returns how often each node has run a script.
fn script_runs(servers: &[Server]) -> Vec<u32> {
    let runs = |server: &Server| {
        let stats = server.cli(&["INFO", "commandstats"]);
        let lines = stats.lines().filter(|line| line.starts_with("cmdstat_eval"));
        let calls = lines.filter_map(|line| line.split(['=', ',']).nth(1)?.parse::<u32>().ok());
        calls.sum()
    };
    servers.iter().map(runs).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_each_node_one_call_and_its_release_another() {
    let servers = start::<5>();
    // All of them exist at once in the end.
    let locker = locker_for(&servers, ms(600_000), Duration::ZERO).await;
    for (is_released, calls) in [(false, 200), (true, 400)] {
        soon(locker.lock("warm")).await.unwrap().into_lease();
        tokio::time::sleep(ms(100)).await;
        let before = script_runs(&servers);
        for n in 0..200 {
            let guard = soon(locker.lock(format!("{is_released}{n}")).no_renewal()).await.unwrap();
            // Even if the last votes have not come yet.
            match is_released {
                true => guard.release().await.unwrap(),
                false => drop(guard.into_lease()),
            }
        }
        // No calls are saved: every node has everything that is held, and nothing that was released.
        let (pattern, held) = (format!("{is_released}[0-9]*"), if is_released { 0 } else { 200 });
        for server in &servers {
            eventually("the node has had all its calls", async || {
                (server.cli(&["KEYS", &pattern]).lines().count() == held).then_some(())
            })
            .await;
        }
        tokio::time::sleep(ms(500)).await;
        let runs: Vec<u32> = script_runs(&servers).iter().zip(&before).map(|(after, before)| after - before).collect();
        // One or two more ballots if the machine paused. Releases that wait for a node share a call to it.
        let least = if is_released { calls / 2 } else { calls };
        assert!(runs.iter().all(|runs| (least..=calls + 10).contains(runs)), "{calls}: {runs:?}");
        assert!(runs.iter().filter(|runs| **runs >= calls).count() > servers.len() / 2, "{calls}: {runs:?}");
        servers.iter().for_each(|server| drop(server.cli(&["DEL", "warm"])));
    }
}

/// Returns how many of the servers know this token as that of a reader.
fn count_readers(servers: &[Server], token: &Token) -> usize {
    // What lies beside the key outlives it, and then counts for nothing.
    let is_reader = "local ends = redis.call('GET', 'k') == '\\n\\nr' and redis.call('ZSCORE', '{k}:holders', ARGV[1])
        local now = redis.call('TIME')
        return ends and ends + 0 > now[1] * 1000 + now[2] / 1000 and 1 or 0";
    servers.iter().filter(|server| server.cli(&["EVAL", is_reader, "0", token.as_str()]) == "1").count()
}

/// Waits until all servers know the reader. Its renewals bring it to nodes that have lost it, or were too slow to vote.
async fn is_reader_on_all(servers: &[Server], reader: &LockGuard) {
    let is_so = async || {
        assert_eq!(reader.check(), Ok(()));
        (count_readers(servers, reader.token()) == servers.len()).then_some(())
    };
    eventually("the reader is on all nodes", is_so).await;
}

/// Waits until nothing is left but the fence.
async fn nothing_is_left(servers: &[Server]) {
    let keys = |server: &Server| server.cli(&["KEYS", "*k*"]).replace("{k}:fence", "").trim().to_owned();
    eventually("only the fence is left", async || servers.iter().all(|server| keys(server).is_empty()).then_some(()))
        .await;
}

#[tokio::test]
async fn readers_share_a_quorum_that_a_writer_gets_when_the_last_of_them_has_left() {
    let servers = start::<3>();
    let patient = async || {
        let builder = Locker::builder().ttl(ms(30_000)).restart_window(Duration::ZERO).poll_every(ms(60_000));
        builder.quorum(servers.iter().map(Server::url)).await.unwrap()
    };
    let (here, there, writer) = (patient().await, patient().await, patient().await);
    let before = lock(&writer, "k").await.fencing_token();
    let one = soon(here.read("k")).await.unwrap();
    let other = decided(|| there.try_read("k").metadata("host-3")).await.unwrap();
    assert!(one.fencing_token() > before && other.fencing_token() > before);
    assert!(matches!(decided(|| writer.try_lock("k")).await, Err(Error::NotObtained { .. })));
    let all = decided(|| here.holders("k")).await.unwrap();
    assert_eq!(all.len(), 2);
    let of_other = all.iter().find(|holder| holder.token == *other.token()).unwrap();
    assert_eq!((&*of_other.metadata, of_other.fencing_token), (&b"host-3"[..], other.fencing_token()));
    assert!(decided(|| here.inspect("k")).await.unwrap().is_some());
    let waiter = tokio::spawn(writer.lock("k").into_future());
    let refused = async || matches!(there.try_read("k").await, Err(Error::NotObtained { .. })).then_some(());
    eventually("the writer holds new readers back", refused).await;
    decided(|| one.renew()).await.unwrap();
    one.release().await.unwrap();
    // The waiter doesn't poll. It is notified by the nodes that the last reader leaves.
    other.release().await.unwrap();
    let guard = soon(waiter).await.unwrap().unwrap();
    assert!(guard.fencing_token() > of_other.fencing_token);
    // And so are readers.
    let reader = tokio::spawn(here.read("k").into_future());
    tokio::time::sleep(ms(50)).await;
    guard.release().await.unwrap();
    soon(reader).await.unwrap().unwrap().release().await.unwrap();
    nothing_is_left(&servers).await;
    let refused = here.permit("k", 3).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)), "{refused}");
}

#[tokio::test]
async fn readers_outlive_nodes_that_freeze_or_forget_one_after_another() {
    let mut servers = start::<3>();
    let (here, there) = (locker(&servers).await, locker(&servers).await);
    let one = soon(here.read("k").metadata("host-3").renew_every(ms(300))).await.unwrap();
    let other = soon(there.read("k").token("worker-7".parse().unwrap()).renew_every(ms(300))).await.unwrap();
    for guard in [&one, &other] {
        // Two of them may have granted it. Then the first to freeze would leave it on one.
        is_reader_on_all(&servers, guard).await;
    }
    let record = |server: &Server, token: &Token| server.cli(&["HGET", "{k}:shares", token.as_str()]);
    for round in 0..6 {
        let server = &mut servers[round % 3];
        match round % 2 {
            0 => {
                // As if it were frozen for longer than the ttl.
                server.cli(&["DEL", "k", "{k}:holders", "{k}:shares"]);
                server.freeze();
                tokio::time::sleep(ms(1_000)).await;
                server.thaw();
            }
            _ => server.restart_empty(),
        }
        for guard in [&one, &other] {
            is_reader_on_all(&servers, guard).await;
        }
        assert_eq!((one.check(), other.check()), (Ok(()), Ok(())), "round {round}");
        assert!(servers.iter().all(|server| record(server, one.token()).ends_with("\nhost-3")), "round {round}");
    }
    other.release().await.unwrap();
    one.release().await.unwrap();
    nothing_is_left(&servers).await;
}

#[tokio::test]
async fn a_reader_is_healed_once_a_restarted_node_votes_again_and_not_where_a_writer_is() {
    let mut servers = start::<3>();
    let window = Duration::from_secs(6);
    let locker = locker_for(&servers, ms(6_000), window).await;
    let guard = soon(locker.read("k").renew_every(ms(300))).await.unwrap();
    is_reader_on_all(&servers, &guard).await;
    let restarted = Instant::now();
    servers[1].restart_empty();
    is_reader_on_all(&servers, &guard).await;
    assert!(restarted.elapsed() >= window, "{:?}", restarted.elapsed());
    servers[2].restart_empty();
    servers[2].cli(&["SET", "k", "another", "PX", "600000"]);
    tokio::time::sleep(window + ms(1_500)).await;
    assert_eq!((guard.check(), servers[2].cli(&["GET", "k"]).as_str()), (Ok(()), "another"));
    guard.release().await.unwrap();
    is_on(&servers, "k", 1).await;
}

#[tokio::test]
async fn readers_and_writers_that_contend_never_hold_the_key_together() {
    use std::sync::atomic::{AtomicI32, Ordering};

    let servers = start::<3>();
    let mut lockers = Vec::new();
    for _ in 0..6 {
        lockers.push(locker(&servers).await);
    }
    let mut contenders = tokio::task::JoinSet::new();
    // How many readers hold it; a writer counts as a thousand.
    let held = std::sync::Arc::new(AtomicI32::new(0));
    let most = std::sync::Arc::new(AtomicI32::new(0));
    for (contender, locker) in lockers.into_iter().enumerate() {
        let (held, most) = (held.clone(), most.clone());
        contenders.spawn(async move {
            let mut fences = Vec::new();
            for round in 0..10 {
                let writes = (contender + round) % 6 == 0;
                let guard = soon(if writes { locker.lock("k") } else { locker.read("k") }).await.unwrap();
                let before = held.fetch_add(if writes { 1_000 } else { 1 }, Ordering::SeqCst);
                assert!(if writes { before == 0 } else { before < 1_000 }, "{before}, writes: {writes}");
                most.fetch_max(before + 1, Ordering::SeqCst);
                tokio::time::sleep(ms(fastrand::u64(..10))).await;
                held.fetch_sub(if writes { 1_000 } else { 1 }, Ordering::SeqCst);
                fences.extend(guard.fencing_token());
                guard.release().await.unwrap();
            }
            fences
        });
    }
    let mut fences: Vec<u64> = contenders.join_all().await.concat();
    fences.sort_unstable();
    fences.dedup();
    assert_eq!(fences.len(), 60, "no two had the same fencing token");
    assert!(most.load(Ordering::SeqCst) % 1_000 > 1, "some readers shared it");
    nothing_is_left(&servers).await;
}

#[tokio::test]
async fn a_writer_gets_in_under_a_stream_of_readers_also_with_a_node_frozen() {
    let servers = start::<3>();
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let locker = locker(&servers).await;
        for _ in 0..4 {
            let locker = locker.clone();
            readers.spawn(async move {
                loop {
                    let guard = locker.read("k").await.unwrap();
                    tokio::time::sleep(ms(fastrand::u64(5..50))).await;
                    guard.release().await.unwrap();
                }
            });
        }
    }
    let writer = locker(&servers).await;
    tokio::time::sleep(ms(300)).await;
    for round in 0..10 {
        if round == 5 {
            servers[1].freeze();
        }
        let asked = Instant::now();
        let guard = soon(writer.lock("k")).await.unwrap();
        println!("round {round}: {:?}", asked.elapsed());
        guard.release().await.unwrap();
        tokio::time::sleep(ms(100)).await;
    }
    servers[1].thaw();
    assert!(readers.try_join_next().is_none(), "none has failed");
    readers.shutdown().await;
}

#[tokio::test]
async fn a_lock_of_a_quorum_becomes_a_readers_share_also_with_a_node_frozen() {
    let servers = start::<3>();
    let (locker, rival) = (locker(&servers).await, locker(&servers).await);
    let guard = lock_on_all(&servers, || locker.lock("k").metadata("host-3").renew_every(ms(500))).await;
    servers[2].freeze();
    let (token, fence) = (guard.token().clone(), guard.fencing_token());
    let reader = guard.downgrade().await.unwrap();
    assert_eq!((reader.token(), reader.fencing_token(), reader.metadata()), (&token, fence, &b"host-3"[..]));
    servers[2].thaw();
    is_reader_on_all(&servers, &reader).await;
    assert!(matches!(decided(|| rival.try_lock("k")).await, Err(Error::NotObtained { .. })));
    let beside = decided(|| rival.try_read("k")).await.unwrap();
    assert!(beside.fencing_token() > fence);
    decided(|| reader.renew()).await.unwrap();
    reader.release().await.unwrap();
    beside.release().await.unwrap();
    nothing_is_left(&servers).await;
}

#[tokio::test]
async fn each_node_keeps_a_readers_share_for_its_least_time() {
    let servers = start::<3>();
    let (locker, rival) = (locker(&servers).await, locker(&servers).await);
    let asked = Instant::now();
    let guard = soon(locker.read("long").hold_at_least(ms(60_000))).await.unwrap();
    eventually("all nodes have it", async || {
        // Renewals heal a node that was too slow to vote.
        drop(guard.renew().await);
        (count(&servers, "long") == 3).then_some(())
    })
    .await;
    guard.release().await.unwrap();
    for server in &servers {
        let ttl = server.cli(&["PTTL", "long"]).parse::<i64>().unwrap();
        let least = i64::try_from(ms(60_000).saturating_sub(asked.elapsed()).as_millis()).unwrap();
        assert!(ttl >= least, "{ttl} ms, at least {least} ms are left");
    }
    assert!(matches!(decided(|| rival.try_lock("long")).await, Err(Error::NotObtained { .. })));
    decided(|| rival.try_read("long")).await.unwrap().release().await.unwrap();
    assert!(matches!(decided(|| rival.try_lock("long")).await, Err(Error::NotObtained { .. })));

    let asked = Instant::now();
    soon(locker.read("k").hold_at_least(ms(2_000))).await.unwrap().release().await.unwrap();
    let writer = soon(rival.lock("k")).await.unwrap();
    assert!(asked.elapsed() >= ms(1_990), "{:?}", asked.elapsed());
    writer.release().await.unwrap();
    nothing_is_left(&servers).await;
}

#[tokio::test]
async fn a_readers_share_costs_each_node_one_call_and_its_release_another() {
    let servers = start::<3>();
    let locker = locker(&servers).await;
    soon(locker.read("warm")).await.unwrap().release().await.unwrap();
    tokio::time::sleep(ms(100)).await;
    let before = script_runs(&servers);
    for _ in 0..100 {
        soon(locker.read("k").no_renewal()).await.unwrap().release().await.unwrap();
    }
    nothing_is_left(&servers).await;
    let runs: Vec<u32> = script_runs(&servers).iter().zip(&before).map(|(after, before)| after - before).collect();
    assert!(runs.iter().all(|runs| (100..=210).contains(runs)), "{runs:?}");
}
