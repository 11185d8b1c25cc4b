//! The line of waiters at the server: every waiter is in it, and nobody else.

use std::future::IntoFuture;
use std::time::Duration;

use tenure::{Locker, Token};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Returns a locker that doesn't poll within the time of a test.
async fn patient(url: &str) -> Locker {
    Locker::builder().poll_every(Duration::from_secs(60)).connect(url).await.unwrap()
}

async fn wait_for_places(server: &Server, key: &str, count: usize) {
    let (line, count) = (format!("{{{key}}}:queue"), count.to_string());
    eventually("so many are in line", async || (server.cli(&["ZCARD", &line]) == count).then_some(())).await;
}

#[tokio::test]
async fn one_that_waits_for_several_keys_is_back_in_a_line_that_was_lost() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let guard = there.lock("a").await.unwrap();
    let waiter = tokio::spawn(here.lock_all(["a", "b"]).into_future());
    wait_for_places(&server, "a", 1).await;
    server.cli(&["DEL", "{a}:queue", "{a}:alive"]);
    wait_for_places(&server, "a", 1).await;
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(server.cli(&["EXISTS", "{a}:queue", "{b}:queue"]), "0");
}

/// Fair requests have a queue of their own in their process. One for several keys isn't in it, and has its own turn.
#[tokio::test]
async fn one_that_waits_for_several_keys_gives_its_turn_to_no_fair_request_of_its_process() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    for is_read in [false, true] {
        let request = || if is_read { locker.read("a").fair(true) } else { locker.lock("a").fair(true) };
        let guard = request().await.unwrap();
        let several = tokio::spawn(locker.lock_all(["a", "b"]).into_future());
        wait_for_places(&server, "a", 1).await;
        let fair = [tokio::spawn(request().into_future()), tokio::spawn(request().into_future())];
        wait_for_places(&server, "a", 3).await;
        assert!(!fair.iter().any(|fair| fair.is_finished()), "{is_read}");
        guard.release().await.unwrap();
        soon(several).await.unwrap().unwrap().release().await.unwrap();
        for fair in fair {
            drop(soon(fair).await.unwrap().unwrap());
        }
        eventually("all have left", async || (server.cli(&["EXISTS", "a", "{a}:queue"]) == "0").then_some(())).await;
    }
}

#[tokio::test]
async fn one_that_finds_several_keys_free_is_in_no_line_any_more() {
    let server = Server::start();
    let locker = Locker::builder().poll_every(ms(50)).connect(&server.url()).await.unwrap();
    server.cli(&["SET", "a", "another"]);
    let waiter = tokio::spawn(locker.lock_all(["a", "b"]).into_future());
    wait_for_places(&server, "a", 1).await;
    // Like other libraries, which send no notification.
    server.cli(&["DEL", "a"]);
    let guard = soon(waiter).await.unwrap().unwrap();
    // The line itself would expire after 15 s.
    timeout(ms(5_000), wait_for_places(&server, "a", 0)).await.unwrap();
    guard.release().await.unwrap();
}

#[tokio::test]
async fn one_whose_token_is_not_handed_locks_is_in_line_as_soon_as_it_is_the_first() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let guard = there.lock("k").await.unwrap();
    let first = tokio::spawn(here.lock("k").token(Token::random()).into_future());
    wait_for_places(&server, "k", 1).await;
    let second = tokio::spawn(here.lock("k").token(Token::random()).into_future());
    // Longer than a process remembers that others have the lock.
    sleep(ms(1_200)).await;
    guard.release().await.unwrap();
    let guard = soon(first).await.unwrap().unwrap();
    let other = tokio::spawn(there.lock("k").into_future());
    wait_for_places(&server, "k", 2).await;
    guard.release().await.unwrap();
    soon(second).await.unwrap().unwrap().release().await.unwrap();
    soon(other).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn one_whose_token_holds_the_lock_takes_no_place_from_those_who_wait_with_it() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let token = Token::random();
    let guard = there.lock("k").token(token.clone()).await.unwrap();
    let waiter = tokio::spawn(here.lock("k").into_future());
    wait_for_places(&server, "k", 1).await;
    let twin = soon(here.lock("k").token(token)).await.unwrap();
    assert_eq!(server.cli(&["ZCARD", "{k}:queue"]), "1");
    // The waiter sends heartbeats.
    sleep(ms(2_000)).await;
    drop(twin);
    guard.release().await.unwrap();
    assert!(server.cli(&["GET", "k"]).len() > 1, "it is the turn of the one that waits");
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn one_that_gives_up_while_the_lock_passes_it_by_is_in_no_line() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let [here, there] = [patient(&proxy.url()).await, patient(&server.url()).await];
    let guard = here.lock("k").await.unwrap();
    let first = tokio::spawn(here.lock("k").into_future());
    wait_for_places(&server, "k", 1).await;
    let second = tokio::spawn(here.lock("k").into_future());
    sleep(ms(50)).await;
    guard.release().await.unwrap();
    let guard = soon(first).await.unwrap().unwrap();
    let other = tokio::spawn(there.lock("k").into_future());
    wait_for_places(&server, "k", 1).await;
    // Until this process has had the lock for so long that it is another's turn.
    sleep(ms(200)).await;
    proxy.set(Mode::Delay(ms(200)));
    let release = tokio::spawn(guard.release());
    let guard = soon(other).await.unwrap().unwrap();
    // No process has learned yet that the second one is in the line.
    second.abort();
    soon(release).await.unwrap().unwrap();
    // The line itself would expire after 15 s.
    timeout(ms(5_000), wait_for_places(&server, "k", 0)).await.unwrap();
    guard.release().await.unwrap();
}

#[tokio::test]
async fn processes_that_came_and_went_are_forgotten_while_others_wait() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    let guard = locker.lock("k").await.unwrap();
    let _waiter = tokio::spawn(locker.lock("k").into_future());
    wait_for_places(&server, "k", 1).await;
    let mut others = JoinSet::new();
    for _ in 0..40 {
        let other = patient(&server.url()).await;
        others.spawn(async move { other.lock("k").wait_at_most(ms(100)).await.is_ok() });
    }
    assert!(others.join_all().await.iter().all(|obtained| !obtained));
    sleep(ms(1_600)).await;
    let last = patient(&server.url()).await;
    assert!(last.lock("k").wait_at_most(ms(100)).await.is_err());
    let count: u32 = server.cli(&["HLEN", "{k}:alive"]).parse().unwrap();
    assert!(count < 20, "{count}");
    guard.release().await.unwrap();
}

#[tokio::test]
async fn closing_takes_back_what_a_runtime_that_is_not_driven_any_more_began_to_take_back() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let (frozen, is_frozen) = std::sync::mpsc::channel();
    let undriven = std::thread::spawn({
        let locker = locker.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let parked = runtime.block_on(async {
                let guard = locker.lock("k").await.unwrap();
                let mut parked = locker.lock("k").into_future();
                assert!(timeout(ms(100), &mut parked).await.is_err());
                guard.release().await.unwrap();
                vec![parked]
            });
            is_frozen.recv().unwrap();
            runtime.block_on(async { sleep(ms(1_000)).await });
            (runtime, parked)
        }
    });
    eventually("it is handed over", async || server.cli(&["PTTL", "k"]).parse::<u32>().ok().filter(|left| *left > 0))
        .await;
    sleep(ms(300)).await;
    server.freeze();
    frozen.send(()).unwrap();
    let (runtime, parked) = tokio::task::spawn_blocking(move || undriven.join().unwrap()).await.unwrap();
    server.thaw();
    timeout(ms(15_000), locker.close()).await.unwrap();
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
    drop(parked);
    std::thread::spawn(move || drop(runtime)).join().unwrap();
}

#[tokio::test]
async fn keys_of_every_shape_have_a_line_and_leave_nothing() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let keys: [&[u8]; 10] = [
        b"k",
        b"a}b",
        b"a}b~",
        b"{job}",
        b"{job}{}",
        b"{user:1}:job",
        b"k:queue",
        b"{k}:queue",
        b"k}:queue~",
        b"\xff\n{}:queue",
    ];
    for key in keys {
        for fair in [false, true] {
            let key = tenure::Key::from(key);
            let guard = here.lock(&key).fair(fair).await.unwrap();
            let waiter = tokio::spawn(there.lock(&key).fair(fair).into_future());
            eventually("it is in line", async || server.cli(&["KEYS", "*:alive*"]).contains(":alive").then_some(()))
                .await;
            guard.release().await.unwrap();
            timeout(ms(5_000), waiter).await.unwrap().unwrap().unwrap().release().await.unwrap();
            // The fence key.
            assert_eq!(server.cli(&["DBSIZE"]), "1", "{key:?}: {}", server.cli(&["KEYS", "*"]));
        }
        server.cli(&["FLUSHALL"]);
    }
}

#[tokio::test]
async fn those_whose_locker_is_closed_are_in_line_no_more() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let other = patient(&server.url()).await;
    let guard = here.lock("k").await.unwrap();
    let closed: Vec<_> = [false, true, true].map(|fair| tokio::spawn(there.lock("k").fair(fair).into_future())).into();
    wait_for_places(&server, "k", 3).await;
    let several = tokio::spawn(there.lock_all(["k", "l"]).into_future());
    wait_for_places(&server, "k", 4).await;
    let waiter = tokio::spawn(other.lock("k").into_future());
    wait_for_places(&server, "k", 5).await;
    soon(there.close()).await;
    // The waiter for several keys leaves as soon as it runs.
    let left: u32 = server.cli(&["ZCARD", "{k}:queue"]).parse().unwrap();
    assert!(left <= 2, "{left}");
    timeout(ms(1_000), wait_for_places(&server, "k", 1)).await.unwrap();
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    for waiter in closed.into_iter().chain([several]) {
        assert!(matches!(soon(waiter).await.unwrap(), Err(tenure::Error::Closed)));
    }
    assert_eq!(server.cli(&["KEYS", "*"]), "{k}:fence");
}

#[tokio::test]
async fn a_server_that_is_full_or_holds_something_else_in_place_of_a_line_still_releases() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    for key in ["{k}:queue", "{k}:alive"] {
        let guard = here.lock("k").await.unwrap();
        let waiter = tokio::spawn(there.lock("k").into_future());
        wait_for_places(&server, "k", 1).await;
        server.cli(&["DEL", "{k}:queue", "{k}:alive"]);
        server.cli(&["SET", key, "something else"]);
        guard.release().await.unwrap();
        let refused = soon(waiter).await.unwrap().unwrap_err();
        assert_eq!(refused.code(), Some("WRONGTYPE"), "{refused}");
        server.cli(&["DEL", key]);
        eventually("it is free", async || (server.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
    }
    let guard = here.lock("k").await.unwrap();
    let waiter = tokio::spawn(there.lock("k").into_future());
    wait_for_places(&server, "k", 1).await;
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    guard.release().await.unwrap();
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    timeout(ms(5_000), waiter).await.unwrap().unwrap().unwrap().release().await.unwrap();
}

/// The heads of two lines are given one key each, and each wants the other's as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_wait_for_the_same_keys_in_different_lines_are_all_served() {
    let server = Server::start();
    let mut lockers = Vec::new();
    for _ in 0..4 {
        lockers.push(patient(&server.url()).await);
    }
    let (one, other) = (lockers[0].lock("a").await.unwrap(), lockers[1].lock("b").await.unwrap());
    let mut waiters = JoinSet::new();
    for waiter in 0..32 {
        let keys = if waiter % 2 == 0 { ["a", "b"] } else { ["b", "a"] };
        let waiting = lockers[waiter / 2 % 4].lock_all(keys).into_future();
        waiters.spawn(async move { waiting.await.unwrap().release().await.unwrap() });
    }
    wait_for_places(&server, "a", 16).await;
    wait_for_places(&server, "b", 16).await;
    let (one, other) = tokio::join!(one.release(), other.release());
    one.and(other).unwrap();
    soon(waiters.join_all()).await;
}

/// Each is given the key that is released, can't use it, and passes it on.
#[tokio::test]
async fn those_who_wait_for_several_keys_meet_in_the_line_for_the_one_that_is_held() {
    let server = Server::start();
    let [here, there] = [patient(&server.url()).await, patient(&server.url()).await];
    let (one, other) = (here.lock("a").await.unwrap(), there.lock("b").await.unwrap());
    let mut waiters = JoinSet::new();
    for waiter in 0..16 {
        let keys = if waiter % 2 == 0 { ["a", "b"] } else { ["b", "a"] };
        let waiting = if waiter < 8 { &here } else { &there }.lock_all(keys).into_future();
        waiters.spawn(async move { waiting.await.unwrap().release().await.unwrap() });
    }
    wait_for_places(&server, "a", 8).await;
    wait_for_places(&server, "b", 8).await;
    one.release().await.unwrap();
    wait_for_places(&server, "b", 16).await;
    wait_for_places(&server, "a", 0).await;
    eventually("it is free", async || (server.cli(&["EXISTS", "a"]) == "0").then_some(())).await;
    other.release().await.unwrap();
    soon(waiters.join_all()).await;
}
