//! Locks that are held at least or at most for a time, on a server. The conformance suite checks them on every store.

use std::time::Duration;

use tenure::{Error, LockRequest, Locker, Loss};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon};
use tokio::time::{Instant, sleep, sleep_until};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What the key of a lock holds that stays taken although nobody holds it.
const NOBODY: &str = "\n\nh";

/// Returns the ttl of the key in ms; -1 if it has none, -2 if it is free.
fn ttl_of(server: &Server, key: &str) -> i64 {
    server.cli(&["PTTL", key]).parse().unwrap()
}

/// Returns what the key holds. The command line can't tell a newline from the end of a reply.
fn holds(server: &Server, key: &str, value: &str) -> bool {
    let is_it = "return redis.call('GET', KEYS[1]) == ARGV[1] and 1 or 0";
    server.cli(&["EVAL", is_it, "1", key, value]) == "1"
}

/// Asserts that the key is nobody's, and frees itself when this much of the least time is left.
fn is_nobodys(server: &Server, key: &str, until: Instant) {
    assert!(holds(server, key, NOBODY), "{key} holds {:?}", server.cli(&["GET", key]));
    let ttl = ttl_of(server, key);
    let left = i64::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap();
    // What the release took is on top of it; and the time to ask for it.
    assert!((left - 50..=left + 2_000).contains(&ttl), "{ttl} ms, {left} ms of them expected");
}

/// Returns a locker that finds nothing by polling within the patience of a test.
async fn patient(server: &Server) -> Locker {
    Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000)).connect(&server.url()).await.unwrap()
}

#[tokio::test]
async fn a_released_key_is_left_to_nobody_and_excludes_other_libraries() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    // Longer than the ttl.
    for least in [ms(20_000), ms(90_000)] {
        for explicit in [true, false] {
            let until = Instant::now() + least;
            let guard = locker.lock("k").hold_at_least(least).await.unwrap();
            assert!(ttl_of(&server, "k") <= 30_000, "if the process died, the key would end with its ttl");
            match explicit {
                true => guard.release().await.unwrap(),
                false => drop(guard),
            }
            eventually("it is released", async || holds(&server, "k", NOBODY).then_some(())).await;
            is_nobodys(&server, "k", until);
            assert_eq!(server.cli(&["SET", "k", "theirs", "NX", "PX", "1000"]), "");
            assert_eq!(locker.inspect("k").await.unwrap(), None);
            assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
            let line = server.cli(&["EXISTS", "{k}:queue", "{k}:grants"]);
            assert_eq!(line, "0");
            server.cli(&["DEL", "k"]);
        }
    }
}

#[tokio::test]
async fn waiters_of_other_processes_get_the_lock_when_the_least_time_is_over() {
    let server = Server::start();
    let (here, there) = (patient(&server).await, patient(&server).await);
    for fair in [false, true] {
        let guard = here.lock("k").hold_at_least(ms(1_500)).await.unwrap();
        let until = Instant::now() + ms(1_500);
        let waiters = [&here, &there, &here, &there].map(|locker| {
            let request = locker.lock("k").fair(fair);
            tokio::spawn(async move {
                let guard = request.await.unwrap();
                let at = Instant::now();
                guard.release().await.unwrap();
                at
            })
        });
        let queue = async || (server.cli(&["ZCARD", "{k}:queue"]).parse::<u32>().unwrap() > 0).then_some(());
        eventually("somebody is in the line", queue).await;
        guard.release().await.unwrap();
        for waiter in waiters {
            let at = soon(waiter).await.unwrap();
            // The server's clock counts in ms, and runs by itself.
            assert!(at + ms(20) >= until, "{:?} too early", until - at);
            assert!(at <= until + ms(2_000), "{:?} too late: the holder's ttl is a minute", at - until);
        }
    }
}

/// The reply to the release is lost: the locker tries again, and finds the key left to nobody.
#[tokio::test]
async fn a_release_whose_reply_was_lost_is_a_release_and_prolongs_nothing() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let locker = Locker::connect(&proxy.url()).await.unwrap();
    let requests: [&dyn Fn() -> LockRequest; 3] =
        [&|| locker.lock("k"), &|| locker.lock("k").token("worker-7".parse().unwrap()), &|| {
            locker.lock_all(["k", "l"])
        }];
    // From now on the server knows the script.
    locker.lock("warm").hold_at_least(ms(1)).await.unwrap().release().await.unwrap();
    for request in requests {
        for explicit in [true, false] {
            let until = Instant::now() + ms(60_000);
            let guard = soon(request().hold_at_least(ms(60_000))).await.unwrap();
            sleep(ms(500)).await;
            let lost = proxy.lost();
            proxy.set(Mode::LoseNext);
            match explicit {
                true => soon(guard.release()).await.unwrap(),
                false => drop(guard),
            }
            eventually("a reply was lost", async || (proxy.lost() > lost).then_some(())).await;
            eventually("it is released", async || holds(&server, "k", NOBODY).then_some(())).await;
            // The second try has the time to do harm.
            sleep(ms(300)).await;
            is_nobodys(&server, "k", until);
            server.cli(&["DEL", "k", "l"]);
        }
    }
}

/// The request arrives when the key is free, or another's, or its token's again.
#[tokio::test]
async fn a_release_that_comes_late_touches_no_successor() {
    for delay in [ms(300), ms(1_500), ms(6_000)] {
        let server = Server::start();
        let proxy = Proxy::start(server.port()).await;
        let locker = Locker::connect(&proxy.url()).await.unwrap();
        let other = Locker::connect(&server.url()).await.unwrap();
        locker.lock("warm").hold_at_least(ms(1)).await.unwrap().release().await.unwrap();
        let guard = locker.lock("k").hold_at_least(ms(400)).await.unwrap();
        proxy.set(Mode::DeliverNextLate(delay));
        let delivered = Instant::now() + delay;
        // By the try that follows, on a new connection.
        soon(guard.release()).await.unwrap();
        let successor = soon(other.lock("k")).await.unwrap();
        sleep_until(delivered + ms(50)).await;
        successor.renew().await.unwrap();
        successor.release().await.unwrap();
        assert_eq!(ttl_of(&server, "k"), -2, "{delay:?}");
    }
}

#[tokio::test]
async fn of_several_guards_of_one_token_the_last_leaves_the_key_to_nobody() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let request = || locker.lock("k").token("shared".parse().unwrap());
    let until = Instant::now() + ms(60_000);
    let guard = request().hold_at_least(ms(60_000)).await.unwrap();
    let other = request().await.unwrap();
    drop(guard);
    let noted = async || server.cli(&["GET", "{k}:grants"]).contains(",h=").then_some(());
    eventually("the record has the time", noted).await;
    // A shorter ttl doesn't let the key end before.
    other.renew_for(ms(2_000)).await.unwrap();
    assert!(ttl_of(&server, "k") > 50_000);
    // Nor does it go to a waiter of this process.
    let waiter = tokio::spawn(locker.lock("k").wait_at_most(ms(3_000)).into_future());
    let waits = async || server.cli(&["PUBSUB", "NUMSUB", "k"]).ends_with('1').then_some(());
    eventually("it has been refused, and waits", waits).await;
    drop(other);
    eventually("it is released", async || holds(&server, "k", NOBODY).then_some(())).await;
    is_nobodys(&server, "k", until);
    let waited = soon(waiter).await.unwrap();
    assert!(matches!(waited, Err(Error::NotObtained { .. })), "{waited:?}");
    assert!(matches!(locker.try_lock("k").token("shared".parse().unwrap()).await, Err(Error::NotObtained { .. })));
    assert_eq!(server.cli(&["EXISTS", "{k}:grants"]), "0");
    server.cli(&["DEL", "k"]);

    // An explicit release ends the lock for all.
    let guard = request().hold_at_least(ms(60_000)).await.unwrap();
    let other = request().await.unwrap();
    guard.release().await.unwrap();
    assert!(matches!(other.renew().await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
    drop(other);
    sleep(ms(100)).await;
    assert!(holds(&server, "k", NOBODY));
}

/// Such a server refuses to write, and still changes ttls.
#[tokio::test]
async fn a_server_out_of_memory_keeps_the_key_taken_all_the_same() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    for explicit in [true, false] {
        let guard = locker.lock("k").hold_at_least(ms(60_000)).await.unwrap();
        server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
        match explicit {
            true => guard.release().await.unwrap(),
            false => drop(guard),
        }
        let is_longer = async || (ttl_of(&server, "k") > 30_000).then_some(());
        eventually("the key stays taken for longer than its ttl", is_longer).await;
        server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
        assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
        server.cli(&["DEL", "k"]);
    }
}

#[tokio::test]
async fn a_limit_cuts_the_ttl_and_frees_the_key_for_waiters() {
    let server = Server::start();
    let (here, there) = (patient(&server).await, patient(&server).await);
    let sent = Instant::now();
    let guard = here.lock("k").hold_at_most(ms(2_500)).await.unwrap();
    // The limit counts from the request, so it ends no later than this.
    let end = Instant::now() + ms(2_500);
    assert!(ttl_of(&server, "k") <= 2_500);
    // Either may be the first.
    let waiters = [&here, &there].map(|locker| {
        let request = locker.lock("k");
        tokio::spawn(async move { request.await?.release().await })
    });
    // On a busy machine, it may be over.
    drop(guard.ensure(ms(60_000)).await);
    drop(guard.renew_for(ms(60_000)).await);
    assert!(guard.deadline() < end && (ttl_of(&server, "k") <= 2_500 || !guard.is_held()));
    assert_eq!(soon(guard.lost()).await, Loss::LimitReached);
    assert!(Instant::now() >= sent + ms(2_400));
    for waiter in waiters {
        soon(waiter).await.unwrap().unwrap();
    }
}

/// The server hands the lock over to a waiter with a limit, and from one.
#[tokio::test]
async fn a_limit_goes_along_with_no_hand_over() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let first = locker.lock("k").hold_at_most(ms(20_000)).await.unwrap();
    let plain = tokio::spawn(locker.lock("k").into_future());
    sleep(ms(100)).await;
    first.release().await.unwrap();
    let plain = soon(plain).await.unwrap().unwrap();
    assert!(ttl_of(&server, "k") > 20_000 && plain.remaining() > ms(20_000));
    let last = tokio::spawn(locker.lock("k").hold_at_most(ms(1_500)).into_future());
    sleep(ms(100)).await;
    plain.release().await.unwrap();
    let last = soon(last).await.unwrap().unwrap();
    assert!(ttl_of(&server, "k") <= 1_500 && last.remaining() < ms(1_500));
    assert_eq!(soon(last.lost()).await, Loss::LimitReached);
}

/// More guards of one token than the server can tell apart.
#[tokio::test]
async fn the_least_time_of_one_guard_among_very_many_of_its_token_is_kept() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let mine = || locker.lock("k").token("job".parse().unwrap()).ttl(ms(10_000));
    let mut guards = Vec::new();
    for _ in 0..66 {
        guards.push(mine().await.unwrap());
    }
    drop(mine().hold_at_least(ms(60_000)).await.unwrap());
    eventually("the key stays taken", async || (ttl_of(&server, "k") > 50_000).then_some(())).await;
    drop(guards);
    soon(locker.close()).await;
    assert!(ttl_of(&server, "k") > 40_000);
}
