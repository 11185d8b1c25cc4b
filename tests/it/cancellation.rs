//! Dropping anything, at any point, leaves nothing behind: no key, no task.

use std::time::Duration;

use tenure::{Error, LockGuard, Locker, Loss};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon};
use tokio::runtime::Handle;
use tokio::time::timeout;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_guards_leave_no_task() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let before = tasks();
    let mut guards = Vec::new();
    for n in 0..10_000 {
        let request = locker.try_lock(format!("k:{n}")).ttl(ms(600_000)).fenced(false);
        // One in ten is renewed soon.
        let request = if n % 10 == 0 { request.renew_every(ms(500)) } else { request };
        guards.push(request.await.unwrap());
    }
    let deadlines: Vec<_> = guards.iter().step_by(10).map(LockGuard::deadline).collect();
    let renewed = || guards.iter().step_by(10).zip(&deadlines).all(|(guard, before)| guard.deadline() > *before);
    eventually("renewals", async || renewed().then_some(())).await;
    // Between renewals, too.
    eventually("one task for all", async || (tasks() == before + 1).then_some(())).await;
    for (n, guard) in guards.into_iter().enumerate() {
        if n % 2 == 0 {
            guard.release().await.unwrap();
        } else {
            drop(guard);
        }
    }
    soon(locker.close()).await;
    eventually("no task is left", async || (tasks() == before).then_some(())).await;
    assert_eq!(server.cli(&["DBSIZE"]), "0");
}

#[tokio::test]
async fn a_locker_that_is_gone_leaves_no_task_and_no_connection() {
    let server = Server::start();
    let before = tasks();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    drop(locker);
    // The guard still has what it needs.
    guard.renew().await.unwrap();
    guard.release().await.unwrap();
    eventually("no task is left", async || (tasks() == before).then_some(())).await;
    eventually("no connection is left", async || {
        let clients = server.cli(&["CLIENT", "LIST"]);
        (clients.lines().filter(|line| !line.contains("cmd=client")).count() == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_attempt_that_the_server_runs_after_it_was_dropped_is_undone() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    server.freeze();
    let dropped = timeout(ms(100), locker.lock("k").into_future()).await;
    assert!(dropped.is_err());
    server.thaw();
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
    // The dropped attempt did run.
    assert_eq!(server.cli(&["EXISTS", "{k}:fence"]), "1");
}

#[tokio::test]
async fn an_attempt_that_comes_late_by_a_connection_that_has_broken_is_undone() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    for n in 0..5 {
        // A locker for each round, so that the next request is this round's attempt, and no follow-up of an earlier
        // one.
        let locker = Locker::connect(&proxy.url()).await.unwrap();
        locker.lock("warm").await.unwrap().release().await.unwrap();
        let key = format!("k:{n}");
        // Longer than fred usually needs to reconnect.
        proxy.set(Mode::DeliverNextLate(ms(110)));
        let unknown = soon(locker.try_lock(key.clone())).await.unwrap_err();
        assert!(unknown.is_transient(), "{unknown}");
        eventually("it came", async || (server.cli(&["EXISTS", &format!("{{{key}}}:fence")]) == "1").then_some(()))
            .await;
        eventually("it is undone", async || (server.cli(&["EXISTS", &key]) == "0").then_some(())).await;
        soon(locker.close()).await;
    }
}

#[tokio::test]
async fn an_attempt_that_timed_out_and_is_run_later_is_undone() {
    let server = Server::start();
    let locker =
        Locker::builder().command_timeout(ms(200)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    server.freeze();
    let failed = soon(locker.try_lock("k").ttl(ms(20_000))).await.unwrap_err();
    assert!(failed.is_transient(), "{failed}");
    server.thaw();
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
async fn an_attempt_that_was_run_in_time_and_answered_too_late_is_undone() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker =
        Locker::builder().command_timeout(ms(300)).wait_for_server(ms(20_000)).connect(&proxy.url()).await.unwrap();
    drop(soon(locker.lock("warm")).await.unwrap());
    proxy.set(Mode::Delay(ms(600)));
    let failed = soon(locker.try_lock("k").ttl(ms(60_000))).await.unwrap_err();
    assert!(failed.is_transient(), "{failed}");
    proxy.set(Mode::Pass);
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
async fn a_dropped_or_failed_attempt_by_a_token_from_elsewhere_takes_the_lock_from_nobody() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    let guard = locker.lock("k").token("mine".parse().unwrap()).await.unwrap();
    for lose in [Mode::LoseNext, Mode::Delay(ms(1_000))] {
        proxy.set(lose);
        let again = locker.try_lock("k").token("mine".parse().unwrap());
        assert!(!timeout(ms(50), again.into_future()).await.is_ok_and(|again| again.is_ok()));
        proxy.set(Mode::Pass);
    }
    guard.renew().await.unwrap();
    assert_eq!(server.cli(&["GET", "k"]), "mine");
    guard.release().await.unwrap();
}

#[tokio::test]
async fn an_attempt_whose_answer_was_lost_meets_itself_and_gets_the_lock() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    for n in 0..5 {
        let key = format!("k:{n}");
        proxy.set(Mode::LoseNext);
        let guard = soon(locker.lock(key.clone())).await.unwrap();
        assert_eq!(proxy.lost(), n + 1);
        assert_eq!(server.cli(&["GET", &key]), guard.token().as_str());
        guard.release().await.unwrap();
    }
    // The undo of the attempts above has ended.
    soon(locker.close()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    locker.lock("warm").await.unwrap().release().await.unwrap();
    // A request that asks only once reports an unknown outcome, and leaves nothing behind.
    proxy.set(Mode::LoseNext);
    let unknown = soon(locker.try_lock("once")).await.unwrap_err();
    assert!(unknown.is_transient() && matches!(unknown, Error::Redis(_)), "{unknown}");
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "once"]), "0");
}

#[tokio::test]
async fn a_dropped_release_still_releases() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let unpolled = locker.lock("unpolled").await.unwrap();
    drop(unpolled.release());
    let polled = locker.lock("polled").await.unwrap();
    let lost = polled.lost();
    server.freeze();
    assert!(timeout(ms(50), polled.release()).await.is_err());
    assert_eq!(lost.await, Loss::Released);
    server.thaw();
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "unpolled", "polled"]), "0");
}

#[tokio::test]
async fn closing_waits_for_releases_ends_waiters_and_refuses_the_rest() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let kept = locker.lock("kept").ttl(ms(2_000)).await.unwrap();
    let waiter = tokio::spawn(locker.lock("kept").into_future());
    tokio::task::yield_now().await;
    for n in 0..100 {
        drop(locker.lock(format!("k:{n}")).await.unwrap());
    }
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"]), "0");
    assert!(matches!(soon(waiter).await.unwrap(), Err(Error::Closed)));
    assert!(matches!(locker.try_lock("k").await, Err(Error::Closed)));
    assert!(matches!(locker.inspect("k").await, Err(Error::Closed)));
    // A held lock stays held.
    let first = kept.deadline();
    eventually("still renewed", async || (kept.deadline() > first + ms(2_000)).then_some(())).await;
    kept.release().await.unwrap();
}

#[tokio::test]
async fn a_cancelled_token_of_the_users_is_no_loss() {
    let locker = Locker::in_memory();
    let guard = locker.lock("k").await.unwrap();
    guard.cancellation_token().cancel();
    assert_eq!(guard.check(), Ok(()));
    assert!(!guard.cancellation_token().is_cancelled());
}
