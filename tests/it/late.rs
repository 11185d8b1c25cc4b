//! Requests that are delivered late, on broken connections: they change nothing, or their effect is undone.

use std::time::{Duration, Instant};

use tenure::{Locker, Token};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Delays in ms, from well within the timeout of a call to beyond it.
const DELAYS: [u64; 6] = [100, 300, 800, 1_900, 2_500, 6_000];
/// A delay far beyond the timeout.
const LONGEST: u64 = 30_000;

struct Late {
    server: Server,
    proxy: Proxy,
    locker: Locker,
    delay: Duration,
    /// When the last late request arrives.
    delivered: tokio::time::Instant,
}

impl Late {
    async fn start(delay: Duration) -> Self {
        let server = Server::start();
        let proxy = Proxy::start(server.port()).await;
        let locker = Locker::builder().ttl(ms(3_600_000)).connect(&proxy.url()).await.unwrap();
        // So that the locker knows the server's clock, and only the next request is late.
        locker.lock("warm").await.unwrap().release().await.unwrap();
        Self { server, proxy, locker, delay, delivered: tokio::time::Instant::now() }
    }

    /// Makes the next request break its connection, and arrive later all the same.
    fn next_is_late(&mut self) {
        self.delivered = tokio::time::Instant::now() + self.delay;
        self.proxy.set(Mode::DeliverNextLate(self.delay));
    }

    /// Asserts that, long after its delivery, the request has left nothing.
    async fn assert_nothing_left(self) {
        sleep_until(self.delivered + ms(50)).await;
        soon(self.locker.close()).await;
        let (server, delay) = (&self.server, self.delay);
        let look = async || (server.cli(&["EXISTS", "k", "l"]) == "0").then_some(());
        eventually(&format!("the key is free, {delay:?} late"), look).await;
    }
}

/// Runs the case for each delay on its own server, all at once.
async fn for_each_delay<F: Future<Output = ()> + Send + 'static>(case: impl Fn(Late) -> F) {
    for_each_of(&DELAYS, case).await;
}

async fn for_each_of<F: Future<Output = ()> + Send + 'static>(delays: &[u64], case: impl Fn(Late) -> F) {
    let mut cases = JoinSet::new();
    for &delay in delays {
        cases.spawn(case(Late::start(ms(delay)).await));
    }
    cases.join_all().await;
}

#[tokio::test]
async fn an_attempt_that_failed_and_comes_late_leaves_nothing_however_late() {
    let delays = [&DELAYS[..], &[LONGEST]].concat();
    for_each_of(&delays, |mut late| async move {
        late.next_is_late();
        soon(late.locker.try_lock("k")).await.unwrap_err();
        late.assert_nothing_left().await;
    })
    .await;
}

#[tokio::test]
async fn an_attempt_that_comes_after_its_request_was_granted_by_another_and_released_leaves_nothing() {
    for_each_delay(|mut late| async move {
        late.next_is_late();
        let guard = soon(late.locker.lock("k")).await.unwrap();
        guard.release().await.unwrap();
        late.assert_nothing_left().await;
    })
    .await;
}

#[tokio::test]
async fn an_attempt_for_several_keys_or_by_a_token_of_ones_own_or_in_line_leaves_nothing_either() {
    for_each_delay(|mut late| async move {
        let requests = [
            late.locker.lock_all(["k", "l"]),
            late.locker.lock("k").token("worker-7".parse().unwrap()),
            late.locker.lock("k").fair(true),
        ];
        for request in requests {
            late.next_is_late();
            drop(soon(request).await.unwrap());
        }
        late.assert_nothing_left().await;
    })
    .await;
}

#[tokio::test]
async fn a_late_attempt_does_not_stand_in_the_way_of_its_successors() {
    let mut late = Late::start(ms(5_000)).await;
    late.next_is_late();
    let guard = soon(late.locker.lock("k")).await.unwrap();
    guard.release().await.unwrap();
    let delivered = Instant::now() + late.delay;
    let other = Locker::connect(&late.server.url()).await.unwrap();
    while Instant::now() < delivered + ms(500) {
        soon(other.lock("k").wait_at_most(ms(1_500))).await.unwrap().release().await.unwrap();
        sleep(ms(20)).await;
    }
    late.assert_nothing_left().await;
}

/// The guard relies on the lock no longer than the server keeps the key, whenever an exact ttl of unknown outcome is
/// set.
#[tokio::test]
async fn a_shorter_ttl_that_is_set_late_ends_no_guard_that_believes() {
    for_each_delay(|mut late| async move {
        let guard = soon(late.locker.lock("k").ttl(ms(60_000))).await.unwrap();
        late.next_is_late();
        let sent = tokio::time::Instant::now();
        guard.renew_for(ms(4_000)).await.unwrap_err();
        soon(async {
            while guard.renew_for(ms(30_000)).await.is_err() {
                sleep(ms(10)).await;
            }
        })
        .await;
        // By then the server refuses the request, so it no longer limits the guard.
        while sent.elapsed() < late.delay + ms(4_500) {
            let believed = guard.deadline();
            let left = late.server.cli(&["PTTL", "k"]).parse::<i64>().unwrap();
            let kept_until = tokio::time::Instant::now() + ms(u64::try_from(left.max(0)).unwrap());
            assert!(kept_until >= believed, "{left} ms at the server, relied on for {:?}", believed.elapsed());
            sleep(ms(20)).await;
        }
        assert!(guard.is_held());
        guard.ensure(ms(30_000)).await.unwrap();
        assert!(guard.remaining() > ms(25_000), "{:?}", guard.remaining());
        guard.release().await.unwrap();
        late.assert_nothing_left().await;
    })
    .await;
}

/// A request that enters the line arrives when its process has left the line.
#[tokio::test]
async fn a_wait_that_was_dropped_leaves_no_place_in_the_line_however_late() {
    for_each_of(&[800, 1_300], |mut late| async move {
        let other = Locker::connect(&late.server.url()).await.unwrap();
        let guard = other.lock("k").await.unwrap();
        // From now on the server knows the script.
        late.locker.lock("warm").fair(true).await.unwrap().release().await.unwrap();
        late.next_is_late();
        // Dropped, because the server would refuse the requests of one with a limit once the limit has passed.
        timeout(ms(150), late.locker.lock("k").fair(true).into_future()).await.unwrap_err();
        let places = async |count| (late.server.cli(&["ZCARD", "{k}:queue"]) == count).then_some(());
        sleep_until(late.delivered - ms(50)).await;
        places("0").await.unwrap();
        eventually("the late request enters", async || places("1").await).await;
        // Twice the timeout of a call. Nobody else would have checked the line by then.
        sleep_until(late.delivered + ms(5_000)).await;
        places("0").await.unwrap();
        guard.release().await.unwrap();
    })
    .await;
}

/// The heartbeat of a fair waiter arrives when the waiter has had the lock, and has released it.
#[tokio::test]
async fn a_heartbeat_that_comes_after_the_turn_of_its_waiter_leaves_no_place_in_the_line() {
    for_each_of(&[200, 400, 800], |late| async move {
        let holder = Locker::connect(&late.server.url()).await.unwrap();
        let mut heartbeats = 0;
        // On a busy machine, most of them are attempts.
        for _ in 0..32 {
            let held = soon(holder.lock("k")).await.unwrap();
            let waiter = tokio::spawn(late.locker.lock("k").fair(true).into_future());
            let places = async |count| (late.server.cli(&["ZCARD", "{k}:queue"]) == count).then_some(());
            eventually("the waiter is in the line", async || places("1").await).await;
            let lost = late.proxy.lost();
            late.proxy.set(Mode::DeliverNextLate(late.delay));
            eventually("the next request is late", async || (late.proxy.lost() > lost).then_some(())).await;
            let delivered = tokio::time::Instant::now() + late.delay;
            held.release().await.unwrap();
            soon(waiter).await.unwrap().unwrap().release().await.unwrap();
            sleep_until(delivered + ms(50)).await;
            // It may have been an attempt, which is undone somewhat later.
            if is_heartbeat(&late.proxy.late_request()) {
                heartbeats += 1;
                soon(holder.try_lock("k").fair(true)).await.unwrap().release().await.unwrap();
                places("0").await.unwrap();
            }
            eventually("the line is empty", async || places("0").await).await;
            if heartbeats == 2 {
                return;
            }
        }
        assert!(heartbeats > 0, "no heartbeat was late");
    })
    .await;
}

/// Only a heartbeat has three keys: the lock, its line, and the hash of processes that are alive.
fn is_heartbeat(request: &[u8]) -> bool {
    let keys = b"\r\n$1\r\n3\r\n$1\r\nk\r\n$9\r\n{k}:queue\r\n$9\r\n{k}:alive\r\n";
    request.windows(keys.len()).any(|part| part == keys)
}

/// It asks with its place. What tells the server that it has left goes by the connection that is cut then.
#[tokio::test]
async fn a_request_that_was_dropped_while_it_asked_leaves_no_place_in_the_line_however_late() {
    for_each_of(&[300, 800], |late| async move {
        let other = Locker::connect(&late.server.url()).await.unwrap();
        let guard = other.lock("k").await.unwrap();
        // From now on the server knows the script.
        late.locker.lock("warm").fair(true).await.unwrap().release().await.unwrap();
        let delivered = tokio::time::Instant::now() + late.delay;
        late.proxy.set(Mode::DeliverNextLateAndCut { cut: ms(100), delay: late.delay });
        timeout(ms(20), late.locker.lock("k").fair(true).into_future()).await.unwrap_err();
        let places = async |count| (late.server.cli(&["ZCARD", "{k}:queue"]) == count).then_some(());
        sleep_until(delivered - ms(50)).await;
        places("0").await.unwrap();
        eventually("the late request enters", async || places("1").await).await;
        // Twice the timeout of a call. Nobody else would have checked the line by then.
        sleep_until(delivered + ms(5_000)).await;
        places("0").await.unwrap();
        guard.release().await.unwrap();
    })
    .await;
}

/// It would record that the guard relies on the lock, which another guard has by the same token.
#[tokio::test]
async fn a_renewal_that_comes_after_the_end_of_its_guard_keeps_no_lock_that_its_token_has_again() {
    for is_dropped in [true, false] {
        for_each_of(&[300, 800, 1_900], move |mut late| async move {
            let other = Locker::connect(&late.server.url()).await.unwrap();
            let request =
                |locker: &Locker| locker.lock("k").token("worker-7".parse().unwrap()).ttl(ms(60_000)).no_renewal();
            let first = soon(request(&late.locker)).await.unwrap();
            // From now on the server knows the script.
            first.renew().await.unwrap();
            late.next_is_late();
            soon(first.renew()).await.unwrap_err();
            match is_dropped {
                true => drop(first),
                false => soon(first.release()).await.unwrap(),
            }
            eventually("it is released", async || (late.server.cli(&["EXISTS", "k"]) == "0").then_some(())).await;
            let second = soon(request(&other)).await.unwrap();
            sleep_until(late.delivered + ms(50)).await;
            drop(second);
            soon(other.close()).await;
            late.assert_nothing_left().await;
        })
        .await;
    }
}

/// An explicit release ends the lock for all of its token; but once it has returned, for nobody any more.
#[tokio::test]
async fn a_release_that_comes_late_ends_nothing_that_its_token_has_obtained_since() {
    // Of a random token, others may know as soon as it was read.
    for token in [None, Some("worker-7")] {
        for_each_of(&[100, 300, 800, 1_900], move |late| comes_back(late, token)).await;
    }
}

async fn comes_back(mut late: Late, token: Option<&'static str>) {
    let request = |token: Option<Token>| {
        let request = late.locker.lock("k").no_renewal();
        match token {
            Some(token) => request.token(token),
            None => request,
        }
    };
    // From then on the server knows the scripts.
    for _ in 0..2 {
        let warm = soon(request(token.map(|token| token.parse().unwrap()))).await.unwrap();
        drop(warm.token().clone());
        warm.release().await.unwrap();
    }
    let guard = soon(request(token.map(|token| token.parse().unwrap()))).await.unwrap();
    let token = guard.token().clone();
    late.proxy.set(Mode::DeliverNextLate(late.delay));
    late.delivered = tokio::time::Instant::now() + late.delay;
    // Whether it is known or not what has become of it.
    drop(soon(guard.release()).await);
    let again = soon(request(Some(token))).await.unwrap();
    sleep_until(late.delivered + ms(100)).await;
    assert!(again.server_ttl().await.unwrap().is_some(), "{:?} late", late.delay);
    again.release().await.unwrap();
    late.assert_nothing_left().await;
}
