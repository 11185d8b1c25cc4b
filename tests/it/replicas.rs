//! Locks that count only once replicas have them.

use std::future::IntoFuture;
use std::iter;
use std::time::Duration;

use tenure::{Error, Lease, Locker, LockerBuilder, Loss, Retry};
use tenure_test_support::{Cluster, Mode, Proxy, Server, eventually, soon, within};
use tokio::sync::mpsc;
use tokio::time::Instant;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn start() -> (Server, Server) {
    let primary = Server::start();
    let replica = primary.start_replica();
    (primary, replica)
}

fn builder() -> LockerBuilder {
    Locker::builder().min_replicas(1).ttl(ms(2_000)).command_timeout(ms(500)).wait_for_server(ms(20_000))
}

/// For calls that a busy machine shall answer.
fn patient() -> LockerBuilder {
    builder().ttl(ms(30_000)).command_timeout(ms(20_000))
}

#[tokio::test]
async fn what_is_held_is_on_the_replica() {
    let (primary, replica) = start();
    let locker = patient().connect(&primary.url()).await.unwrap();
    let requests = [locker.lock("k"), locker.lock("k").token("mine".parse().unwrap()), locker.lock_all(["k", "l"])];
    for request in requests {
        let guard = soon(request).await.unwrap();
        let fence = guard.fencing_token().unwrap().to_string();
        assert_eq!(replica.cli(&["MGET", "k", "{k}:fence"]), format!("{}\n{fence}", guard.token().as_str()));
        guard.renew_for(ms(60_000)).await.unwrap();
        assert!(replica.cli(&["PTTL", "k"]).parse::<u64>().unwrap() > 40_000);
        guard.release().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_shared_is_on_the_replica() {
    let (primary, replica) = start();
    let locker = patient().connect(&primary.url()).await.unwrap();
    for request in [locker.read("k"), locker.read("k").token("mine".parse().unwrap()), locker.permit("l", 2)] {
        let guard = soon(request).await.unwrap();
        let (key, token) = (guard.key().to_string(), guard.token().as_str().to_owned());
        let holders = format!("{{{key}}}:holders");
        assert_eq!(replica.cli(&["ZRANGE", &holders, "0", "-1"]), token);
        guard.renew_for(ms(60_000)).await.unwrap();
        guard.renew().await.unwrap();
        assert!(replica.cli(&["PTTL", &key]).parse::<u64>().unwrap() > 40_000);
        guard.release().await.unwrap();
    }
    let locker = builder().ttl(ms(60_000)).connect(&primary.url()).await.unwrap();
    let reader = soon(locker.read("k")).await.unwrap();
    replica.freeze();
    // Unless the server is too slow to say so.
    eventually("it is not replicated", async || {
        let refused = locker.try_read("k").await.unwrap_err();
        assert!(refused.is_transient(), "{refused}");
        matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }).then_some(())
    })
    .await;
    let refused = reader.renew().await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    // Releases wait for nobody.
    reader.release().await.unwrap();
    eventually("nobody reads", async || (primary.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
}

#[tokio::test]
async fn what_is_obtained_and_renewed_in_one_call_is_on_the_replica() {
    let (primary, replica) = start();
    let locker = patient().connect(&primary.url()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..100 {
        let request = locker.lock(format!("k:{task}"));
        tasks.spawn(async move {
            let guard = request.await.unwrap();
            guard.renew_for(ms(60_000)).await.unwrap();
            guard
        });
    }
    let guards = soon(tasks.join_all()).await;
    for guard in &guards {
        assert!(replica.cli(&["PTTL", &guard.key().to_string()]).parse::<u64>().unwrap() > 40_000);
    }
}

#[tokio::test]
async fn without_the_replica_a_request_says_how_many_acknowledged_and_leaves_nothing() {
    let (primary, replica) = start();
    let locker = builder().connect(&primary.url()).await.unwrap();
    replica.freeze();
    for keys in [&["k"][..], &["k", "l"]] {
        // Unless the server is too slow to say so, or to undo the attempt before.
        eventually("it is not replicated", async || {
            let request = locker.obtain_all(keys.iter().copied()).ttl(ms(60_000));
            let refused = within(ms(1_500), request).await.unwrap_err();
            assert!(refused.is_transient() || matches!(refused, Error::NotObtained { .. }), "{refused}");
            matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }).then_some(())
        })
        .await;
        eventually("released", async || (primary.cli(&["EXISTS", "k", "l"]) == "0").then_some(())).await;
    }
    // A waiting request goes on until the replica is back.
    let waiting = tokio::spawn(locker.lock("k").into_future());
    tokio::time::sleep(ms(600)).await;
    assert!(!waiting.is_finished());
    replica.thaw();
    soon(waiting).await.unwrap().unwrap().release().await.unwrap();
}

/// What was not replicated is released. That release may be run late, and must not end what the next attempt gets.
#[tokio::test]
async fn what_takes_an_attempt_back_takes_nothing_from_the_next() {
    let (primary, replica) = start();
    let proxy = Proxy::start(primary.port()).await;
    let (tell, mut has_failed) = mpsc::unbounded_channel();
    let retry = Retry::from_iter(move || {
        let tell = tell.clone();
        iter::from_fn(move || tell.send(()).ok().map(|()| ms(1)))
    });
    let builder = builder().ttl(ms(60_000)).command_timeout(ms(2_500)).retry(retry);
    let locker = builder.connect(&proxy.url()).await.unwrap();
    // The connection is open, and the server knows the scripts.
    soon(locker.obtain("k")).await.unwrap().release().await.unwrap();
    for token in [None, Some("mine")] {
        let request = locker.obtain("k").no_renewal();
        let request = match token {
            Some(token) => request.token(token.parse().unwrap()),
            None => request,
        };
        replica.freeze();
        let obtaining = tokio::spawn(request.into_future());
        let is_there = async || (primary.cli(&["EXISTS", "k"]) == "1").then_some(());
        eventually("replicas are waited for", is_there).await;
        // The next request is the release.
        proxy.set(Mode::DeliverNextLate(ms(300)));
        soon(has_failed.recv()).await.unwrap();
        replica.thaw();
        let guard = soon(obtaining).await.unwrap().unwrap();
        tokio::time::sleep(ms(500)).await;
        assert!(guard.server_ttl().await.unwrap().is_some(), "{token:?}");
        guard.release().await.unwrap();
        proxy.set(Mode::Pass);
    }
}

#[tokio::test]
async fn one_replica_of_two_is_enough_for_one_and_not_for_two() {
    let (primary, frozen) = start();
    let _other = primary.start_replica();
    frozen.freeze();
    let one = builder().connect(&primary.url()).await.unwrap();
    soon(one.lock("k")).await.unwrap().release().await.unwrap();
    let both = builder().min_replicas(2).connect(&primary.url()).await.unwrap();
    // On a busy machine the other replica may be late, too.
    eventually("one acknowledges in time", async || {
        let refused = both.try_lock("k").await.unwrap_err();
        // What the attempt before has left may not be undone yet.
        assert!(refused.is_transient() || matches!(refused, Error::NotObtained { .. }), "{refused}");
        matches!(refused, Error::NotReplicated { needed: 2, acknowledged: 1 }).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_guard_whose_replica_is_cut_off_is_lost_by_its_deadline_and_not_before() {
    let (primary, replica) = start();
    let locker = builder().connect(&primary.url()).await.unwrap();
    let ttl = ms(6_000);
    let guard = locker.lock("k").ttl(ttl).await.unwrap();
    replica.freeze();
    eventually("a renewal fails", async || {
        match guard.renew().await {
            Ok(()) => panic!("renewed without the replica"),
            Err(Error::NotReplicated { needed: 1, acknowledged: 0 }) => Some(()),
            // The call waits behind the renewals of the renewer.
            Err(error) => error.is_transient().then_some(()),
        }
    })
    .await;
    let deadline = guard.deadline();
    assert_eq!(guard.check(), Ok(()), "not before");
    assert_eq!(within(ttl, guard.lost()).await, Loss::Expired);
    assert_eq!(guard.deadline(), deadline, "no renewal counted");
    assert!(Instant::now() >= deadline);
    replica.thaw();
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

/// From Redis 7.2 on, `WAIT` counts the replicas that have the last write of its own connection, whatever others have
/// written since.
#[tokio::test]
async fn a_renewal_that_finds_a_longer_ttl_counts_only_if_the_replica_has_that() {
    let (primary, replica) = start();
    let locker = builder().connect(&primary.url()).await.unwrap();
    let guard = locker.lock("k").no_renewal().await.unwrap();
    let lease = Lease::new("k", guard.token().clone(), ms(60_000));
    let other = Locker::connect(&primary.url()).await.unwrap();
    replica.freeze();
    soon(other.ensure(&lease, ms(60_000))).await.unwrap();
    let deadline = guard.deadline();
    let refused = soon(guard.renew()).await.unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
    assert_eq!(guard.deadline(), deadline);
    replica.thaw();
}

#[tokio::test]
async fn replicas_are_waited_for_no_longer_than_a_lock_would_be_of_use() {
    let (primary, replica) = start();
    let locker = builder().command_timeout(ms(60_000)).connect(&primary.url()).await.unwrap();
    replica.freeze();
    let refused = within(ms(1_000), locker.try_lock("k").ttl(ms(400))).await.unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
    // The connection is no longer blocked, long before the command's own timeout. On a busy machine, WAIT may have been
    // given up with its connection, and a first request with it.
    eventually("an answer", async || matches!(locker.inspect("k").await, Ok(None)).then_some(())).await;
}

#[tokio::test]
async fn a_lock_of_another_is_refused_without_waiting_for_replicas() {
    let (primary, replica) = start();
    let builder = builder().ttl(ms(600_000)).command_timeout(ms(60_000));
    let locker = builder.connect(&primary.url()).await.unwrap();
    primary.cli(&["SET", "k", "another", "PX", "600000"]);
    replica.freeze();
    assert!(matches!(soon(locker.try_lock("k")).await, Err(Error::NotObtained { .. })));
}

#[tokio::test]
async fn where_replicas_cannot_be_counted_they_cannot_be_asked_for() {
    let cluster = Cluster::start();
    let refused = builder().connect(&cluster.url()).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)) && !refused.is_transient(), "{refused}");
    let nodes = ["redis://127.0.0.1:1"; 1];
    assert!(matches!(builder().quorum(nodes).await, Err(Error::Unsupported(_))));
    builder().in_memory().lock("k").await.unwrap().release().await.unwrap();
}

/// The write was made, whatever the outcome of `WAIT`.
#[tokio::test]
async fn where_the_server_refuses_to_say_who_acknowledged_the_lock_is_given_back() {
    let (primary, replica) = start();
    primary.cli(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-wait"]);
    let url = format!("redis://app:secret@127.0.0.1:{}", primary.port());
    let locker = builder().connect(&url).await.unwrap();
    let requests =
        [locker.obtain("k"), locker.obtain("k").token("mine".parse().unwrap()), locker.obtain_all(["k", "l"])];
    for request in requests {
        let refused = soon(request.ttl(ms(60_000))).await.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
        eventually("released", async || (primary.cli(&["EXISTS", "k", "l"]) == "0").then_some(())).await;
    }
    drop(replica);
}

#[tokio::test]
async fn a_lock_whose_primary_is_demoted_while_replicas_are_waited_for_is_given_back() {
    let (primary, replica) = start();
    let locker = Locker::builder().min_replicas(1).command_timeout(ms(5_000)).connect(&primary.url()).await.unwrap();
    replica.freeze();
    let asked = tokio::spawn(locker.obtain("k").ttl(ms(60_000)).into_future());
    eventually("it waits", async || primary.cli(&["INFO", "clients"]).contains("blocked_clients:1").then_some(()))
        .await;
    primary.cli(&["REPLICAOF", "127.0.0.1", "1"]);
    let refused = soon(asked).await.unwrap().unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
    primary.cli(&["REPLICAOF", "NO", "ONE"]);
    eventually("released", async || (primary.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
}
