//! Waiting for a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fred::prelude::{Builder, ClientLike, Config, Value};
use fred::types::CustomCommand;
use tenure::{Error, Key, Locker};
use tenure_test_support::{Cluster, Server, Stalls, Version, eventually, soon};
use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[tokio::test]
async fn a_waiter_finds_the_expiry_of_a_dead_holder() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    for _ in 0..3 {
        // Another library's lock, whose holder has died.
        let (started, stalls) = (Instant::now(), Stalls::watch());
        server.cli(&["SET", "k", "dead", "PX", "1000"]);
        let guard = soon(locker.lock("k")).await.unwrap();
        // `a_dead_holder_is_followed_when_its_ttl_ends` checks this to the millisecond. Here, long before the next
        // poll.
        assert!(started.elapsed() < stalls.added_to(ms(3_000)), "after {:?}", started.elapsed());
        nobody_listens(&locker).await;
        guard.release().await.unwrap();
    }
}

/// Waits until there is no subscription: for a second after a refusal the next waiter may reuse the one that there is.
async fn nobody_listens(locker: &Locker) {
    // Only the `Debug` output shows this.
    let unused = "Subscriber { channels: 0 }";
    eventually("nobody listens", async || format!("{locker:?}").contains(unused).then_some(())).await;
}

#[tokio::test]
async fn a_waiter_survives_the_death_of_its_server() {
    let mut server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    server.cli(&["SET", "k", "another"]);
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    assert!(timeout(ms(100), &mut waiter).await.is_err());
    server.kill();
    assert!(timeout(ms(300), &mut waiter).await.is_err());
    server.restart();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_waiters_are_all_served_one_at_a_time() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let inside = Arc::new(AtomicU32::new(0));
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let (locker, inside) = (locker.clone(), inside.clone());
            tokio::spawn(async move {
                let guard = locker.lock("k").await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                yield_now().await;
                assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                guard.release().await.unwrap();
            })
        })
        .collect();
    for waiter in waiters {
        soon(waiter).await.unwrap();
    }
}

/// Returns a locker that checks a lock only after a notification, or when the holder's ttl ends.
async fn patient(url: &str) -> Locker {
    let builder = Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000));
    // Hundreds of calls at a time take their time on a busy machine.
    builder.command_timeout(ms(20_000)).connect(url).await.unwrap()
}

/// Returns how often the server has run a script, by its hash or by its text.
fn scripts_run(server: &Server) -> u64 {
    let stats = server.cli(&["INFO", "commandstats"]);
    let calls = |command: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")))?;
        line.split(',').next()?.parse::<u64>().ok()
    };
    calls("evalsha").unwrap_or_default() + calls("eval").unwrap_or_default()
}

#[tokio::test]
async fn a_release_wakes_a_waiter_of_another_process() {
    let server = Server::start();
    let (here, there) = (patient(&server.url()).await, patient(&server.url()).await);
    let mut guard = here.lock("k").await.unwrap();
    for _ in 0..20 {
        let waiter = tokio::spawn(there.lock("k").into_future());
        // The waiter is notified whether it has asked by now or not.
        yield_now().await;
        guard.release().await.unwrap();
        guard = soon(waiter).await.unwrap().unwrap();
        // The same when the guard is dropped.
        let waiter = tokio::spawn(here.lock("k").into_future());
        drop(guard);
        guard = soon(waiter).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn no_release_is_missed_while_the_line_for_messages_is_cut_again_and_again() {
    let server = Server::start();
    let (here, there) = (patient(&server.url()).await, patient(&server.url()).await);
    let over = CancellationToken::new();
    let cutting = tokio::spawn({
        let (over, socket) = (over.clone(), server.url());
        async move {
            let client = Config::from_url(&socket).unwrap();
            let client = Builder::from_config(client).build().unwrap();
            client.init().await.unwrap();
            while !over.is_cancelled() {
                let kill = CustomCommand::new_static("CLIENT", None, false);
                let _: Value = client.custom(kill, vec!["KILL", "TYPE", "pubsub"]).await.unwrap();
                sleep(ms(15)).await;
            }
        }
    });
    let turns = |locker: Locker| async move {
        for _ in 0..100 {
            let guard = locker.lock("k").await.unwrap();
            sleep(ms(1)).await;
            guard.release().await.unwrap();
        }
    };
    let both = [tokio::spawn(turns(here)), tokio::spawn(turns(there))];
    for turns in both {
        // A release that is missed costs a minute. Without one, a busy machine takes a while to open so many lines.
        timeout(ms(55_000), turns).await.expect("no release is missed").unwrap();
    }
    over.cancel();
    cutting.await.unwrap();
}

#[tokio::test]
async fn without_messages_waiting_goes_by_time() {
    let server = Server::start();
    server.cli(&["ACL", "SETUSER", "mute", "on", ">pw", "resetchannels", "~*", "+@all"]);
    let locker = Locker::builder()
        .poll_every(ms(100))
        .connect(&server.url().replace("redis://", "redis://mute:pw@"))
        .await
        .unwrap();
    let other = Locker::connect(&server.url().replace("redis://", "redis://mute:pw@")).await.unwrap();
    // Polling finds a release, and the ttl reveals the death of a holder.
    let guard = other.lock("k").await.unwrap();
    let waiter = tokio::spawn(locker.lock("k").into_future());
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    let (started, stalls) = (Instant::now(), Stalls::watch());
    other.lock("k").ttl(ms(1_000)).no_renewal().await.unwrap().into_lease();
    let patient = Locker::builder()
        .poll_every(ms(60_000))
        .connect(&server.url().replace("redis://", "redis://mute:pw@"))
        .await
        .unwrap();
    soon(patient.lock("k")).await.unwrap().release().await.unwrap();
    assert!(started.elapsed() < stalls.added_to(ms(3_000)), "after {:?}", started.elapsed());
}

#[tokio::test]
async fn what_another_library_releases_is_found_by_a_slow_look() {
    let server = Server::start();
    let locker = Locker::builder().poll_every(ms(100)).connect(&server.url()).await.unwrap();
    server.cli(&["SET", "k", "another"]);
    let mut waiter = tokio::spawn(locker.lock("k").into_future());
    assert!(timeout(ms(300), &mut waiter).await.is_err());
    server.cli(&["DEL", "k"]);
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_over_costs_the_server_one_command_whatever_the_number_of_waiters() {
    let server = Server::start();
    let builder = Locker::builder().poll_every(Duration::from_secs(3_600)).local_hand_over(false);
    let locker = builder.connect(&server.url()).await.unwrap();
    let guard = locker.lock("k").await.unwrap();
    let waiters: Vec<_> = (0..500)
        .map(|_| {
            let locker = locker.clone();
            tokio::spawn(async move { locker.lock("k").await.unwrap().release().await.unwrap() })
        })
        .collect();
    eventually("the first has asked twice", async || (scripts_run(&server) >= 3).then_some(())).await;
    let before = scripts_run(&server);
    guard.release().await.unwrap();
    for waiter in waiters {
        soon(waiter).await.unwrap();
    }
    // One in seventeen is offered to other processes, which costs two or three commands.
    let commands = scripts_run(&server) - before;
    assert!((500..=600).contains(&commands), "{commands} for 500 hand-overs");
}

#[tokio::test]
async fn who_waits_in_one_process_is_served_in_order() {
    let server = Server::start();
    for locker in [Locker::in_memory(), patient(&server.url()).await] {
        let guard = locker.lock("k").await.unwrap();
        let (sender, mut order) = unbounded_channel();
        for n in 0..100 {
            let (locker, sender) = (locker.clone(), sender.clone());
            tokio::spawn(async move {
                let guard = locker.lock("k").await.unwrap();
                sender.send((n, guard.fencing_token().unwrap())).unwrap();
            });
            yield_now().await;
        }
        guard.release().await.unwrap();
        let mut last = 0;
        for n in 0..100 {
            let (served, fence) = soon(order.recv()).await.unwrap();
            assert_eq!(served, n);
            assert!(fence > last);
            last = fence;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_with_many_waiters_leaves_the_lock_to_others() {
    let server = Server::start();
    let mut counts = Vec::new();
    let over = CancellationToken::new();
    let mut tasks = Vec::new();
    for waiters in [8, 1] {
        let locker = patient(&server.url()).await;
        let count = Arc::new(AtomicU32::new(0));
        counts.push(count.clone());
        for _ in 0..waiters {
            let (locker, count, over) = (locker.clone(), count.clone(), over.clone());
            tasks.push(tokio::spawn(async move {
                while !over.is_cancelled() {
                    let guard = locker.lock("k").await.unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                    guard.release().await.unwrap();
                }
            }));
        }
    }
    let counts = || counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    eventually("twenty turns of the single one", async || (counts()[1] >= 20).then_some(())).await;
    over.cancel();
    for task in tasks {
        soon(task).await.unwrap();
    }
}

/// Keys with and without hash tags, none of which is UTF-8.
const NO_TEXT: [&[u8]; 6] = [b"\xff", b"n\xc3\xbc\xff", b"{tag}:\xff", b"{t\xffg}:d", b"e\xff}f", b"a{b\xff"];

#[tokio::test]
async fn a_waiter_for_a_key_that_is_no_text_hears_of_every_kind_of_release() {
    let server = Server::start();
    let (here, there) = (patient(&server.url()).await, patient(&server.url()).await);
    for key in NO_TEXT {
        for (kind, own_token) in [(0, true), (1, true), (2, true), (0, false), (1, false)] {
            let request = here.lock_all([key].into_iter().chain((kind == 2).then_some(&b"another"[..])));
            let request = if own_token { request } else { request.token("chosen".parse().unwrap()) };
            let guard = request.await.unwrap();
            let waiter = tokio::spawn(there.lock(key).into_future());
            eventually("it listens", async || (server.cli(&["PUBSUB", "CHANNELS"]).lines().count() == 1).then_some(()))
                .await;
            match kind {
                1 => drop(guard),
                _ => guard.release().await.unwrap(),
            }
            drop(soon(waiter).await.unwrap().unwrap());
        }
        nobody_listens(&there).await;
        // Now the next key's channel is the only one again.
        server.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_for_keys_that_are_no_text_hear_of_releases_that_share_a_call() {
    let server = Server::start();
    let (here, there) = (patient(&server.url()).await, patient(&server.url()).await);
    let key = |n: u32| {
        Key::from([&b"\xff"[..], n.to_string().as_bytes(), if n % 3 == 0 { &b""[..] } else { b"\xfe" }].concat())
    };
    let mut waiters = JoinSet::new();
    let mut guards = Vec::new();
    for n in 0..600 {
        guards.push(here.lock(key(n)).await.unwrap());
        waiters.spawn(there.lock(key(n)).into_future());
    }
    // The channel is one of many whose keys are text.
    for n in 0..600 {
        guards.push(here.lock(format!("text:{n}")).await.unwrap());
    }
    eventually("subscribed", async || (server.cli(&["PUBSUB", "CHANNELS"]).lines().count() == 600).then_some(())).await;
    let mut releases = JoinSet::new();
    guards.into_iter().for_each(|guard| drop(releases.spawn(guard.release())));
    while let Some(released) = releases.join_next().await {
        released.unwrap().unwrap();
    }
    while let Some(waiter) = soon(waiters.join_next()).await {
        waiter.unwrap().unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn a_waiter_on_a_cluster_hears_of_a_release() {
    let cluster = Cluster::start();
    // Redis 6.2 has no sharded pub/sub: there, waiters on a cluster poll.
    let poll_every = if Version::of_this_run().has_redis(7, 0) { ms(60_000) } else { ms(200) };
    let builder = Locker::builder().ttl(ms(60_000)).poll_every(poll_every);
    let here = builder.clone().connect(&cluster.url()).await.unwrap();
    let there = builder.connect(&cluster.url()).await.unwrap();
    let keys = ["a", "b", "c", "{tag}:d", "e}f"].map(Key::from).into_iter().chain(NO_TEXT.map(Key::from));
    for key in keys {
        let guard = here.lock(&key).await.unwrap();
        let waiter = tokio::spawn(there.lock(&key).into_future());
        sleep(ms(20)).await;
        guard.release().await.unwrap();
        soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_waiters_come_and_go() {
    let server = Server::start();
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    // On a busy machine the reply to the release is queued behind the rest of the other replies.
    let builder = Locker::builder().ttl(ms(60_000)).poll_every(ms(60_000)).command_timeout(ms(6_000));
    let locker = builder.connect(&server.url()).await.unwrap();
    let connected = tasks();
    let guard = locker.lock("k").await.unwrap();
    let mut waiters = JoinSet::new();
    for n in 0..100_000 {
        // A quarter of them are on one held key, the others on a thousand keys.
        let key = if n % 4 == 0 { "k".to_owned() } else { format!("k:{}", n % 1_000) };
        let request = locker.lock(key).fenced(false);
        let patience = Duration::from_micros(fastrand::u64(..200_000));
        waiters.spawn(async move { timeout(patience, request).await.is_ok() });
    }
    let served = waiters.join_all().await.into_iter().filter(|served| *served).count();
    assert!(served > 0);
    guard.release().await.unwrap();
    eventually("no key is left", async || {
        let left = server.cli(&["EVAL", "return #redis.call('KEYS', 'k*')", "0"]);
        (left == "0").then_some(())
    })
    .await;
    eventually("no subscription is left", async || (server.cli(&["PUBSUB", "CHANNELS"]).is_empty()).then_some(()))
        .await;
    eventually("no task is left", async || (tasks() <= connected).then_some(())).await;
    drop(locker);
    eventually("no task at all is left", async || (tasks() == before).then_some(())).await;
}

#[tokio::test]
async fn fair_requests_are_served_in_the_order_of_their_arrival_in_whatever_process() {
    let server = Server::start();
    let mut lockers = Vec::new();
    for _ in 0..4 {
        lockers.push(patient(&server.url()).await);
    }
    let guard = lockers[0].lock("k").fair(true).await.unwrap();
    let (sender, mut order) = unbounded_channel();
    for n in 0..40_usize {
        let (locker, sender) = (lockers[n * 7 % 4].clone(), sender.clone());
        tokio::spawn(async move {
            let guard = locker.lock("k").fair(true).await.unwrap();
            sender.send(n).unwrap();
            guard.release().await.unwrap();
        });
        let queued = (n + 1).to_string();
        eventually("it queues", async || (server.cli(&["ZCARD", "{k}:queue"]) == queued).then_some(())).await;
    }
    // A request that doesn't wait does not overtake waiters.
    assert!(matches!(lockers[1].try_lock("k").fair(true).await, Err(Error::NotObtained { .. })));
    guard.release().await.unwrap();
    for n in 0..40 {
        assert_eq!(soon(order.recv()).await.unwrap(), n);
    }
    eventually("nothing is left", async || (server.cli(&["KEYS", "*"]) == "{k}:fence").then_some(())).await;
}

#[tokio::test]
async fn a_dead_fair_waiter_is_skipped_and_a_dropped_one_leaves_nothing() {
    let server = Server::start();
    let locker = patient(&server.url()).await;
    let guard = locker.lock("k").fair(true).await.unwrap();
    // A process that died while it waited.
    server.cli(&["ZADD", "{k}:queue", "1", "dead:w1"]);
    let alive = "local t = redis.call('TIME') return redis.call('HSET', KEYS[1], 'dead', t[1] * 1000 + 1500)";
    server.cli(&["EVAL", alive, "1", "{k}:alive"]);
    let dropped = tokio::spawn(patient(&server.url()).await.lock("k").fair(true).into_future());
    eventually("it queues", async || (server.cli(&["ZCARD", "{k}:queue"]) == "2").then_some(())).await;
    let other = patient(&server.url()).await;
    let waiter = tokio::spawn(other.lock("k").fair(true).into_future());
    eventually("it queues", async || (server.cli(&["ZCARD", "{k}:queue"]) == "3").then_some(())).await;
    dropped.abort();
    let (started, stalls) = (Instant::now(), Stalls::watch());
    guard.release().await.unwrap();
    let guard = soon(waiter).await.unwrap().unwrap();
    assert!(started.elapsed() < stalls.added_to(ms(1_500 + 1_000)), "after {:?}", started.elapsed());
    guard.release().await.unwrap();
    eventually("nothing is left", async || (server.cli(&["KEYS", "*"]) == "{k}:fence").then_some(())).await;
}

#[tokio::test]
async fn fair_waiters_keep_their_places_for_as_long_as_they_wait() {
    let server = Server::start();
    let (here, there) = (patient(&server.url()).await, patient(&server.url()).await);
    let guard = here.lock("k").fair(true).await.unwrap();
    let (sender, mut order) = unbounded_channel();
    for (n, locker) in [&there, &there, &here].into_iter().enumerate() {
        let (request, sender) = (locker.lock("k").fair(true), sender.clone());
        tokio::spawn(async move {
            let guard = request.await.unwrap();
            sender.send(n).unwrap();
            guard.release().await.unwrap();
        });
        let queued = (n + 1).to_string();
        eventually("it queues", async || (server.cli(&["ZCARD", "{k}:queue"]) == queued).then_some(())).await;
    }
    // Twice as long as a waiter without heartbeats keeps its place.
    sleep(ms(3_000)).await;
    guard.release().await.unwrap();
    for n in 0..3 {
        assert_eq!(soon(order.recv()).await.unwrap(), n);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fair_waiters_who_come_at_once_are_all_served_whoever_of_them_is_faster_at_the_server() {
    let server = Server::start();
    let lockers = [patient(&server.url()).await, patient(&server.url()).await];
    for round in 0..20 {
        let mut waiters = JoinSet::new();
        for n in 0..64 {
            let request = lockers[n % 2].lock(format!("k:{round}")).fair(true);
            waiters.spawn(async move {
                let guard = request.await.unwrap();
                let served = Instant::now();
                guard.release().await.unwrap();
                served
            });
        }
        let (started, stalls) = (Instant::now(), Stalls::watch());
        let mut served = soon(waiters.join_all()).await;
        served.push(started);
        served.sort();
        // No waiter was taken for dead, which would hold up the next one by 1.5 s.
        let longest = served.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(longest < stalls.added_to(ms(1_400)), "round {round}: {longest:?}");
    }
}

#[tokio::test]
async fn no_one_is_said_to_hold_a_lock_while_the_server_is_silent() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    // The connection is open, and the server knows the scripts.
    locker.lock("k").await.unwrap().release().await.unwrap();
    server.freeze();
    let first = tokio::spawn(locker.lock("k").into_future());
    yield_now().await;
    for request in [locker.lock("k"), locker.lock("k").fair(true)] {
        let error = request.wait_at_most(ms(300)).await.unwrap_err();
        assert!(matches!(error, Error::Redis(_)), "{error}");
    }
    server.thaw();
    soon(first).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn keys_that_differ_in_their_braces_share_nothing() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let keys = ["k", "{k}", "{k}{}", "{k", "k}"];
    let mut tokens = Vec::new();
    for waited_for in keys {
        let held = locker.lock(waited_for).await.unwrap();
        tokens.extend(held.fencing_token());
        let waiter = tokio::spawn(locker.lock(waited_for).fair(true).into_future());
        eventually("it queues", async || server.cli(&["KEYS", "*:alive*"]).contains(waited_for).then_some(())).await;
        // The other keys are neither held nor waited for.
        for other in keys.into_iter().filter(|key| *key != waited_for) {
            locker.try_lock(other).fair(true).await.unwrap().release().await.unwrap();
        }
        held.release().await.unwrap();
        soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    }
    assert_eq!(server.cli(&["KEYS", "*:fence*"]).lines().count(), keys.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_nobody_waits_for_is_not_refused_after_turns_that_met_signs_of_life() {
    let server = Server::start();
    let lockers = [patient(&server.url()).await, patient(&server.url()).await];
    for _ in 0..6 {
        let mut waiters = JoinSet::new();
        for n in 0..128 {
            let request = lockers[n % 2].lock("k").fair(true);
            // All together take longer than two heartbeats.
            waiters.spawn(async move {
                let guard = request.await.unwrap();
                sleep(ms(8)).await;
                guard.release().await.unwrap();
            });
        }
        soon(waiters.join_all()).await;
        lockers[0].try_lock("k").fair(true).await.unwrap().release().await.unwrap();
        assert_eq!(server.cli(&["KEYS", "*"]), "{k}:fence");
    }
}
