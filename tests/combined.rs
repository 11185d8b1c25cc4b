//! Operations that share calls on real servers: none pays for another, whatever goes wrong. A program of its own, as
//! its operations take the servers for themselves.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use fred::util::redis_keyslot;
use tenure::{Error, LockGuard, Locker};
use tenure_test_support::{Cluster, Mode, Proxy, Server, eventually, soon, within};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A locker for many operations at once, all of which shall be answered: however long that takes a busy machine.
async fn patient(url: &str) -> Locker {
    Locker::builder().command_timeout(ms(20_000)).connect(url).await.unwrap()
}

/// The scripts that the server has run.
fn script_calls(server: &Server) -> u64 {
    count_scripts(server, "calls=")
}

/// The scripts that it has not run, as it was not to be asked for them.
fn rejected_calls(server: &Server) -> u64 {
    count_scripts(server, "rejected_calls=")
}

fn count_scripts(server: &Server, what: &str) -> u64 {
    let info = server.cli(&["INFO", "commandstats"]);
    let scripts = info.lines().filter_map(|line| line.trim_end().strip_prefix("cmdstat_eval")?.split_once(':'));
    let counts = scripts.flat_map(|(_, counts)| counts.split(','));
    counts.filter_map(|count| count.strip_prefix(what)?.parse::<u64>().ok()).sum()
}

/// Begins all of them before it goes on with any, and then runs each in a task. Returns the results in their order.
///
/// On a runtime of one thread, where no call can end meanwhile, they arrive together however busy the machine is.
async fn together<F>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let mut begun: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let poll_once = |future: &mut Pin<Box<F>>| future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    let first_polls: Vec<_> = begun.iter_mut().map(poll_once).collect();
    let mut tasks = JoinSet::new();
    for (n, (future, first_poll)) in begun.into_iter().zip(first_polls).enumerate() {
        tasks.spawn(async move {
            match first_poll {
                Poll::Ready(output) => (n, output),
                Poll::Pending => (n, future.await),
            }
        });
    }
    let mut outputs = tasks.join_all().await;
    outputs.sort_by_key(|(n, _)| *n);
    outputs.into_iter().map(|(_, output)| output).collect()
}

/// Asks for all of them together. Returns the results in the order of the keys.
async fn try_all(locker: &Locker, keys: impl IntoIterator<Item = String>) -> Vec<(String, Result<LockGuard, Error>)> {
    let requests = keys.into_iter().map(|key| {
        let request = locker.try_lock(key.clone());
        async move { (key, request.await) }
    });
    together(requests).await
}

#[tokio::test]
async fn two_thousand_locks_are_obtained_and_released_by_far_fewer_calls() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    let granted = soon(try_all(&locker, (0..2_000).map(|n| format!("k:{n}")))).await;
    let releases = granted.into_iter().map(|(_, guard)| guard.unwrap().release());
    for released in soon(together(releases)).await {
        released.unwrap();
    }
    let calls = script_calls(&server);
    assert!(calls < 400, "{calls} calls for 4,000 operations");
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"]), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_type_fails_alone() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    server.cli(&["LPUSH", "k:77", "item"]);
    server.cli(&["LPUSH", "{k:99}:fence", "item"]);
    for (key, answer) in soon(try_all(&locker, (0..300).map(|n| format!("k:{n}")))).await {
        match key.as_str() {
            "k:77" | "k:99" => assert_eq!(answer.unwrap_err().code(), Some("WRONGTYPE"), "{key}"),
            _ => answer.unwrap().release().await.unwrap(),
        }
    }
    assert_eq!(server.cli(&["EXISTS", "k:99"]), "0");
}

#[tokio::test]
async fn a_key_that_the_user_may_not_touch_fails_alone_and_costs_the_others_little() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "app", "on", ">secret", "resetchannels", "~app:*", "~{app:*", "+@all"]);
    let url = format!("redis://app:secret@127.0.0.1:{}", server.port());
    let locker = patient(&url).await;
    // The server's clock is known from then on, so that what is sent alone is sent once.
    drop(locker.try_lock("app:first").await.unwrap());
    let keys = (0..500).map(|n| if n == 250 { "other".to_owned() } else { format!("app:{n}") });
    let answers = soon(try_all(&locker, keys)).await;
    let calls = script_calls(&server);
    for (key, answer) in answers {
        match key.as_str() {
            "other" => assert_eq!(answer.unwrap_err().code(), Some("NOPERM")),
            _ => answer.unwrap().release().await.unwrap(),
        }
    }
    assert!(calls < 100, "{calls} calls for 500 operations");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_server_fails_each_by_its_own_timeout_and_works_again_afterwards() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    drop(locker.lock("warm").await.unwrap());
    server.freeze();
    let mut requests = JoinSet::new();
    for n in 0..400 {
        let limit = ms(100 + n * 2);
        let request = locker.lock(format!("k:{n}")).ttl(ms(60_000)).wait_at_most(limit);
        requests.spawn(async move {
            let start = Instant::now();
            (within(limit + ms(200), request).await, start.elapsed(), limit)
        });
    }
    for (answer, waited, limit) in soon(requests.join_all()).await {
        assert!(matches!(answer.unwrap_err(), Error::Redis(_)));
        assert!(waited >= limit, "{waited:?} of {limit:?}");
    }
    server.thaw();
    for (_, answer) in soon(try_all(&locker, (0..400).map(|n| format!("again:{n}")))).await {
        answer.unwrap().release().await.unwrap();
    }
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*') + #redis.call('KEYS', 'again:*')", "0"]), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_forgets_its_scripts_all_the_time_serves_everyone() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    for round in 0..20 {
        let requests = try_all(&locker, (0..300).map(|n| format!("k:{round}:{n}")));
        let flushing = async {
            sleep(Duration::from_micros(fastrand::u64(..3_000))).await;
            assert_eq!(server.cli(&["SCRIPT", "FLUSH"]), "OK");
        };
        let (answers, ()) = soon(async { tokio::join!(requests, flushing) }).await;
        for (_, answer) in answers {
            drop(answer.unwrap());
        }
    }
    soon(locker.close()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarts_meanwhile_serves_everyone_in_the_end() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let mut owners = JoinSet::new();
    for n in 0..200 {
        let locker = locker.clone();
        owners.spawn(async move {
            for round in 0..50 {
                let guard = locker.lock(format!("k:{n}:{round}")).await.unwrap();
                // What the restart has forgotten is not held; what it has answered nothing to may be either.
                match guard.release().await {
                    Ok(()) | Err(Error::NotHeld { .. }) => {}
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
            }
        });
    }
    sleep(ms(50)).await;
    server.restart_empty();
    soon(owners.join_all()).await;
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EVAL", "return #redis.call('KEYS', 'k:*')", "0"]), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_serves_operations_on_all_slots() {
    let cluster = Cluster::start();
    let locker = patient(&cluster.url()).await;
    // Many slots, and many keys of some.
    let keys = (0..1_000).map(|n| if n % 2 == 0 { format!("k:{n}") } else { format!("{{tag:{}}}:{n}", n % 7) });
    for (key, answer) in soon(try_all(&locker, keys)).await {
        answer.unwrap_or_else(|error| panic!("{key}: {error}")).release().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_one_slot_at_a_time_serves_everyone_although_it_is_no_cluster_to_the_client() {
    let cluster = Cluster::start();
    let node = cluster.nodes.first().unwrap();
    let locker = patient(&node.url()).await;
    let mut rejected = Vec::new();
    for round in 0..3 {
        let keys = (0..2_000).map(|n| format!("k:{round}:{n}")).filter(|key| redis_keyslot(key.as_bytes()) <= 5460);
        for (key, answer) in soon(try_all(&locker, keys)).await {
            answer.unwrap_or_else(|error| panic!("{key}: {error}")).release().await.unwrap();
        }
        rejected.push(rejected_calls(node));
    }
    // Said once, and minded from then on.
    assert!(matches!(rejected[..], [first, second, third] if first > 0 && third == second), "{rejected:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_guards_on_a_slow_line_are_all_kept() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    // Renewed as often as with a ttl of ten seconds; the rest is what a busy machine may need for ten thousand
    // requests.
    let builder = Locker::builder().ttl(ms(120_000)).renew_every(ms(3_333));
    let locker = builder.connect(&proxy.url()).await.unwrap();
    proxy.set(Mode::Delay(ms(20)));
    let mut requests = JoinSet::new();
    for n in 0..10_000 {
        requests.spawn(locker.lock(format!("k:{n}")).fenced(false).into_future());
    }
    let guards = timeout(ms(240_000), requests.join_all()).await.expect("all are granted");
    let guards: Vec<LockGuard> = guards.into_iter().map(Result::unwrap).collect();
    let first: Vec<Instant> = guards.iter().map(LockGuard::deadline).collect();
    // All of them are renewed, for ten seconds.
    let all_are_renewed = async {
        while !guards.iter().zip(&first).all(|(guard, first)| guard.deadline() > *first + ms(10_000)) {
            let lost = guards.iter().filter(|guard| !guard.is_held()).count();
            assert_eq!(lost, 0);
            sleep(ms(100)).await;
        }
    };
    timeout(ms(240_000), all_are_renewed).await.expect("all are renewed");
    drop(guards);
    soon(locker.close()).await;
    assert_eq!(server.cli(&["DBSIZE"]), "0");
}

#[tokio::test]
async fn requests_that_were_begun_and_put_aside_hold_up_no_other() {
    let server = Server::start();
    // Calls that are held up end far later than what is soon.
    let locker = Locker::builder().command_timeout(ms(60_000)).connect(&server.url()).await.unwrap();
    let mut aside: Vec<_> = (0..2).map(|n| Box::pin(locker.try_lock(format!("aside:{n}")).into_future())).collect();
    for request in &mut aside {
        assert!(request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let guard = soon(locker.try_lock("k")).await.unwrap();
    soon(guard.release()).await.unwrap();
    for request in aside {
        soon(request).await.unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn an_isolated_locker_renews_while_the_callers_of_its_calls_are_blocked() {
    let server = Server::start();
    let locker = Locker::builder().isolated(true).connect(&server.url()).await.unwrap();
    let guard = locker.lock("kept").ttl(ms(60_000)).renew_every(ms(300)).await.unwrap();
    // More than the calls that may be on their way at a time, so that some are with drivers. The reply to one may come
    // while it is polled, as another thread receives it.
    let mut requests = (0..).map(|n| Box::pin(locker.try_lock(format!("aside:{n}")).into_future()));
    let mut aside = Vec::new();
    while aside.len() < 12 {
        let mut request = requests.next().unwrap();
        if request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            aside.push(request);
        }
    }
    let (first, started) = (guard.deadline(), Instant::now());
    // Nothing else runs on this thread meanwhile.
    while guard.deadline() < first + ms(3_000) {
        assert!(started.elapsed() < ms(20_000), "nothing renews it");
        std::thread::sleep(ms(10));
    }
    assert!(guard.is_held());
    guard.release().await.unwrap();
    drop(aside);
    soon(locker.close()).await;
    eventually("nothing is left", async || {
        let keys = server.cli(&["KEYS", "*"]);
        keys.lines().all(|key| key.ends_with(":fence")).then_some(())
    })
    .await;
}
