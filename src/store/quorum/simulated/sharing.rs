//! Readers and writers on simulated quorums.

use std::collections::BTreeMap;

use tokio::task::JoinSet;

use super::*;
use crate::store::node::ANNOUNCED;

fn reader(token: &str) -> Owned {
    owner(token, Mode::Read)
}

/// Returns on how many nodes the key has a reader with this token.
fn nodes_of(world: &World, token: &Token) -> usize {
    let has = |server: &&Arc<Server>| {
        server.state.lock().unwrap().readers_of(&"k".into()).is_some_and(|readers| readers.has(token))
    };
    world.servers.iter().filter(has).count()
}

fn is_announced(server: &Server) -> bool {
    let state = server.state.lock().unwrap();
    state.writers.get(&"k".into()).is_some_and(|writers| writers.wait_for(None).is_some())
}

#[tokio::test(start_paused = true)]
async fn readers_share_a_key_that_no_writer_gets_until_the_last_has_left() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other, writer] = [(); 3].map(|()| world.client(0, |_| Fault::None));
    let before = writer.lock("k").await.unwrap();
    assert!(matches!(one.try_read("k").await, Err(Error::NotObtained { .. })));
    before.release().await.unwrap();
    let first = one.read("k").await.unwrap();
    let second = other.try_read("k").metadata("of the second").await.unwrap();
    assert!(matches!(writer.try_lock("k").await, Err(Error::NotObtained { .. })));
    assert_eq!(one.holders("k").await.unwrap().len(), 2);
    first.release().await.unwrap();
    assert!(matches!(writer.try_lock("k").await, Err(Error::NotObtained { .. })));
    assert_eq!(one.inspect("k").await.unwrap().unwrap().token, *second.token());
    let fence = second.fencing_token();
    drop(second);
    sleep(ms(1)).await;
    assert!(world.is_free("k"));
    assert!(one.holders("k").await.unwrap().is_empty());
    assert!(writer.try_lock("k").await.unwrap().fencing_token() > fence);
}

#[tokio::test(start_paused = true)]
async fn the_longest_of_several_readers_is_found_though_no_node_knows_them_all() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let lockers: Vec<Locker> = (0..3)
        .map(|away| world.client(0, move |place| if place == away { Fault::Refused } else { Fault::None }))
        .collect();
    let mut readers = Vec::new();
    for (locker, ttl) in lockers.iter().zip([4_000, 9_000, 7_000]) {
        readers.push(locker.read("k").ttl(ms(ttl)).no_renewal().await.unwrap());
        sleep(ms(10)).await;
    }
    let all = world.client(0, |_| Fault::None);
    let holder = all.inspect("k").await.unwrap().unwrap();
    assert_eq!((&holder.token, holder.fencing_token), (readers[1].token(), readers[1].fencing_token()));
    let tokens: Vec<Token> = all.holders("k").await.unwrap().into_iter().map(|holder| holder.token).collect();
    assert_eq!(tokens, [1, 2, 0].map(|reader| readers[reader].token().clone()));
    let stray = Wanted { ttl: ms(60_000), ..wanted(reader("stray")) };
    world.servers[0].vote(&stray, &unnumbered());
    assert_eq!(all.inspect("k").await.unwrap().unwrap().token, holder.token, "and not one that no majority has");
    // Of each of two readers, a node that doesn't reply may be the second of two.
    let refused = lockers[0].holders("k").await.unwrap_err();
    assert!(matches!(refused, Error::Quorum { .. }), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_quorum_has_no_permits_and_says_why() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let refused = world.client(0, |_| Fault::None).permit("k", 3).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)) && refused.to_string().contains("majorit"), "{refused}");
    assert_eq!(world.votes(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_healed_beside_others_and_alone_and_never_over_a_writer() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let (first, second) = (one.read("k").no_renewal().await.unwrap(), other.read("k").no_renewal().await.unwrap());
    world.servers[2].forget();
    first.renew().await.unwrap();
    sleep(ms(1)).await;
    assert_eq!((nodes_of(&world, first.token()), nodes_of(&world, second.token())), (3, 2), "alone there");
    second.renew().await.unwrap();
    sleep(ms(1)).await;
    assert_eq!(nodes_of(&world, second.token()), 3, "beside the other");
    world.servers[1].forget();
    let writer = Owned { mode: Mode::Exclusive, ..reader("writer") };
    world.servers[1].vote(&wanted(writer.clone()), &unnumbered());
    for _ in 0..3 {
        first.renew().await.unwrap();
        sleep(ms(10)).await;
    }
    assert_eq!(world.servers[1].inspect(&"k".into()).unwrap().token, writer.token);
    assert_eq!((first.check(), nodes_of(&world, first.token())), (Ok(()), 2));
    drop((first, second));
    sleep(ms(1)).await;
    world.servers[1].release(&writer, Ending::Lock);
    assert!(world.is_free("k"));
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_healed_while_a_writer_waits() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let first = one.read("k").no_renewal().await.unwrap();
    let waiter = tokio::spawn(other.lock("k").into_future());
    sleep(ms(100)).await;
    world.servers[2].forget();
    sleep(ms(600)).await;
    assert!(world.servers.iter().all(|server| is_announced(server)), "also where it was forgotten");
    first.renew().await.unwrap();
    sleep(ms(1)).await;
    assert_eq!(nodes_of(&world, first.token()), 3);
    first.release().await.unwrap();
    drop(waiter.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_reader_outlives_nodes_that_forget_one_after_another() {
    let world = World::new(&[0; 3], ms(3_000));
    sleep(ms(3_000)).await;
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let (first, second) = (one.read("k").await.unwrap(), other.read("k").await.unwrap());
    for round in 0..9 {
        world.servers[round % 3].forget();
        sleep(ms(2_900)).await;
        assert!(world.servers[round % 3].is_free("k"), "it doesn't vote yet");
        sleep(ms(1_100)).await;
        assert_eq!((first.check(), second.check()), (Ok(()), Ok(())), "round {round}");
        assert_eq!((nodes_of(&world, first.token()), nodes_of(&world, second.token())), (3, 3), "round {round}");
    }
    first.release().await.unwrap();
    second.release().await.unwrap();
    assert!(world.is_free("k"));
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_reader_is_not_taken_up_by_nodes_that_were_restarted_lately() {
    let world = World::new(&[0; 3], ms(3_000));
    sleep(ms(3_000)).await;
    let locker = world.client(0, |_| Fault::None);
    let lease = locker.read("k").await.unwrap().into_lease();
    let adopted = locker.adopt(lease).await.unwrap();
    assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
    let (token, lease) = (adopted.token().clone(), adopted.into_lease());
    for server in &world.servers[..2] {
        server.forget();
        server.state.lock().unwrap().readers.entry("k".into()).or_default().add(
            &token,
            None,
            Instant::now() + ms(9_000),
            None,
        );
    }
    let refused = locker.adopt(lease).await.unwrap_err();
    assert!(matches!(refused, Error::Quorum { .. }), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn what_a_reader_is_granted_after_its_release_is_taken_back_and_others_stay() {
    for token in [None, Some("worker-7")] {
        for fault in [Fault::RunAfter(ms(100)), Fault::AnsweredAfter(ms(100)), Fault::AnswerLost, Fault::Twice(ms(100))]
        {
            let world = World::new(&[0; 3], Duration::ZERO);
            let calls = Arc::new(AtomicU32::new(0));
            let locker = world.client(0, move |place| {
                let is_vote = place == 2 && calls.fetch_add(1, Ordering::Relaxed) == 0;
                if is_vote { fault } else { Fault::None }
            });
            let other = world.client(0, |_| Fault::None).read("k").ttl(ms(60_000)).await.unwrap();
            let request = locker.read("k").no_renewal();
            let request = match token {
                Some(token) => request.token(token.parse().unwrap()),
                None => request,
            };
            let guard = request.await.unwrap();
            let token = guard.token().clone();
            drop(guard);
            locker.close().await;
            sleep(ms(500)).await;
            assert_eq!(nodes_of(&world, &token), 0, "{fault:?} {token:?}");
            assert_eq!(nodes_of(&world, other.token()), 3);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_healed_after_the_release_of_a_reader_is_taken_back() {
    for fault in [Fault::RunAfter(ms(100)), Fault::AnsweredAfter(ms(100)), Fault::AnswerLost] {
        let world = World::new(&[0; 3], Duration::ZERO);
        let calls = Arc::new(AtomicU32::new(0));
        // The calls are the node's vote, the renewal, the healing, and the release.
        let locker = world.client(0, move |place| {
            let is_healing = place == 2 && calls.fetch_add(1, Ordering::Relaxed) == 2;
            if is_healing { fault } else { Fault::None }
        });
        let guard = locker.read("k").no_renewal().await.unwrap();
        world.servers[2].forget();
        guard.renew().await.unwrap();
        sleep(ms(1)).await;
        drop(guard);
        locker.close().await;
        sleep(ms(500)).await;
        assert!(world.is_free("k"), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_reads_twice_has_one_fencing_token_and_passes_the_writers_that_wait() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let request = || one.try_read("k").no_renewal().token("worker-7".parse().unwrap());
    let first = request().await.unwrap();
    let between = other.read("k").no_renewal().await.unwrap();
    let waiter = tokio::spawn(other.lock("k").into_future());
    sleep(ms(100)).await;
    assert!(matches!(one.try_read("k").await, Err(Error::NotObtained { .. })), "a writer waits");
    let second = request().await.unwrap();
    assert_eq!(first.fencing_token(), second.fencing_token());
    assert!(between.fencing_token() > second.fencing_token());
    let fence = between.fencing_token();
    drop(first);
    sleep(ms(1)).await;
    second.renew().await.unwrap();
    drop((second, between));
    assert!(waiter.await.unwrap().unwrap().fencing_token() > fence);
}

#[tokio::test(start_paused = true)]
async fn a_writer_gets_in_under_a_stream_of_readers_and_readers_go_on_after_it() {
    let world = World::new(&[0; 5], Duration::ZERO);
    let last = Arc::new(Mutex::new(Instant::now()));
    let mut readers = JoinSet::new();
    for number in 0..16 {
        let (locker, last) = (world.client(0, |_| Fault::None), last.clone());
        readers.spawn(async move {
            sleep(ms(10 * number)).await;
            loop {
                let guard = locker.read("k").await.unwrap();
                *last.lock().unwrap() = Instant::now();
                sleep(ms(200)).await;
                guard.release().await.unwrap();
            }
        });
    }
    sleep(ms(1_000)).await;
    let writer = world.client(0, |_| Fault::None);
    for _ in 0..5 {
        let asked = Instant::now();
        let guard = timeout(ms(3_000), writer.lock("k").ttl(ms(5_000))).await.expect("it gets in").unwrap();
        // No simulated node notifies, so it looks every second or so. What it waits for are the readers that were
        // there.
        assert!(*last.lock().unwrap() < asked + ms(300), "readers have passed it");
        sleep(ms(500)).await;
        guard.release().await.unwrap();
        sleep(ms(2_500)).await;
        assert!(last.lock().unwrap().elapsed() < ms(300), "readers go on");
    }
    readers.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_dies_holds_readers_back_for_two_seconds_and_one_that_leaves_not_at_all() {
    for dies in [false, true] {
        let world = World::new(&[0; 3], Duration::ZERO);
        let is_dead = Arc::new(AtomicU32::new(0));
        let writer = world.client(0, {
            let is_dead = is_dead.clone();
            move |_| if is_dead.load(Ordering::Relaxed) > 0 { Fault::Lost } else { Fault::None }
        });
        let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
        let _reader = one.read("k").ttl(ms(60_000)).await.unwrap();
        let waiter = tokio::spawn(writer.lock("k").into_future());
        sleep(ms(5_000)).await;
        assert!(matches!(other.try_read("k").await, Err(Error::NotObtained { .. })));
        is_dead.store(u32::from(dies), Ordering::Relaxed);
        let died = Instant::now();
        waiter.abort();
        assert!(waiter.await.is_err());
        let patience = if dies { ms(2_000) } else { ms(1) };
        if !dies {
            sleep(ms(1)).await;
        }
        while other.try_read("k").await.is_err() {
            assert!(died.elapsed() < patience, "after {:?}", died.elapsed());
            sleep(ms(10)).await;
        }
        if dies {
            // It was announced no longer ago than a heartbeat, and than what is not repeated.
            assert!(died.elapsed() >= ANNOUNCED - ms(750), "{:?}", died.elapsed());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_behind_a_writer_of_its_process_that_gave_up_does_not_wait_for_that() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let _reader = one.read("k").ttl(ms(60_000)).await.unwrap();
    let writer = tokio::spawn(other.lock("k").wait_at_most(ms(3_000)).into_future());
    sleep(ms(100)).await;
    let reader = tokio::spawn(other.read("k").into_future());
    let started = Instant::now();
    assert!(writer.await.unwrap().is_err());
    drop(reader.await.unwrap().unwrap());
    assert!(started.elapsed() < ms(4_300), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_finds_no_readers_announces_nothing() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let guard = one.lock("k").await.unwrap();
    let waiter = tokio::spawn(other.lock("k").into_future());
    sleep(ms(5_000)).await;
    assert!(!world.servers.iter().any(|server| is_announced(server)));
    drop(guard);
    drop(waiter.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_lock_becomes_a_readers_share_on_every_node_and_no_writer_gets_in_between() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let calls = Arc::new(AtomicU32::new(0));
    // The calls are the node's vote and the downgrade.
    let locker = world.client(0, move |place| {
        let is_downgrade = place == 2 && calls.fetch_add(1, Ordering::Relaxed) == 1;
        if is_downgrade { Fault::Refused } else { Fault::None }
    });
    let [other, rival] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let guard = locker.lock("k").await.unwrap();
    let (token, fence, deadline) = (guard.token().clone(), guard.fencing_token(), guard.deadline());
    let reader = guard.downgrade().await.unwrap();
    assert_eq!((reader.token(), reader.fencing_token(), reader.deadline()), (&token, fence, deadline));
    assert!(matches!(rival.try_lock("k").await, Err(Error::NotObtained { .. })));
    let beside = other.read("k").await.unwrap();
    assert!(beside.fencing_token() > fence);
    sleep(ms(3_000)).await;
    assert_eq!((reader.check(), nodes_of(&world, &token)), (Ok(()), 3), "the one that failed was asked again");
    assert!(matches!(rival.try_lock("k").await, Err(Error::NotObtained { .. })));
    reader.release().await.unwrap();
    beside.release().await.unwrap();
    assert!(world.is_free("k"));
}

#[tokio::test(start_paused = true)]
async fn a_downgrade_that_fails_leaves_nothing_on_any_node() {
    // How the downgrade ends on each node, and whether the guard becomes a reader.
    let cases: [([Fault; 3], bool); 4] = [
        ([Fault::None, Fault::Refused, Fault::Refused], false),
        ([Fault::AnswerLost, Fault::AnswerLost, Fault::Refused], false),
        ([Fault::AnswerLost; 3], false),
        ([Fault::None, Fault::None, Fault::AnswerLost], true),
    ];
    for (faults, is_done) in cases {
        let world = World::new(&[0; 3], Duration::ZERO);
        let is_asked = Arc::new(AtomicU32::new(0));
        let locker = world.client(0, {
            let is_asked = is_asked.clone();
            move |place| if is_asked.load(Ordering::Relaxed) > 0 { faults[place] } else { Fault::None }
        });
        let guard = locker.lock("k").ttl(ms(60_000)).no_renewal().await.unwrap();
        is_asked.store(1, Ordering::Relaxed);
        let downgraded = guard.downgrade().await;
        is_asked.store(0, Ordering::Relaxed);
        assert_eq!(downgraded.is_ok(), is_done, "{faults:?}");
        drop(downgraded);
        sleep(ms(2_000)).await;
        assert!(world.is_free("k"), "{faults:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_a_node_knows_as_a_writer_is_released_there() {
    // The node misses the downgrade, or also the release.
    for missed in [1, 2] {
        let world = World::new(&[0; 3], Duration::ZERO);
        let calls = Arc::new(AtomicU32::new(0));
        let locker = world.client(0, move |place| {
            let is_missed = place == 2 && (1..=missed).contains(&calls.fetch_add(1, Ordering::Relaxed));
            if is_missed { Fault::Lost } else { Fault::None }
        });
        let reader = locker.lock("k").ttl(ms(60_000)).no_renewal().await.unwrap().downgrade().await.unwrap();
        assert_eq!(nodes_of(&world, reader.token()), 2);
        reader.release().await.unwrap();
        locker.close().await;
        assert!(world.is_free("k"), "{missed} missed");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_another_guard_of_its_token_relies_on_is_not_downgraded() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, other] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    let request = |locker: &Locker| locker.lock("k").no_renewal().token("worker-7".parse().unwrap());
    let (guard, twin) = (request(&one).await.unwrap(), request(&other).await.unwrap());
    // A node that knows nothing of the twin turns the lock into a share.
    world.servers[2].state.lock().unwrap().grants.insert("k".into(), Vec::new());
    let refused = guard.downgrade().await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(_)), "{refused}");
    sleep(ms(10)).await;
    assert_eq!(twin.check(), Ok(()));
    assert!(matches!(one.try_read("k").await, Err(Error::NotObtained { .. })), "no majority has readers");
    twin.renew().await.unwrap();
    twin.release().await.unwrap();
    sleep(ms(1)).await;
    assert!(world.is_free("k"));
}

#[tokio::test(start_paused = true)]
async fn each_node_keeps_a_readers_share_for_its_least_time() {
    let world = World::new(&[0; 3], Duration::ZERO);
    let [one, rival] = [(); 2].map(|()| world.client(0, |_| Fault::None));
    one.read("k").hold_at_least(ms(1_000)).await.unwrap().release().await.unwrap();
    assert!(matches!(rival.try_lock("k").await, Err(Error::NotObtained { .. })));
    rival.try_read("k").await.unwrap().release().await.unwrap();
    assert!(one.holders("k").await.unwrap().is_empty(), "nobody");
    sleep(ms(999)).await;
    assert!(matches!(rival.try_lock("k").await, Err(Error::NotObtained { .. })));
    sleep(ms(1)).await;
    drop(rival.try_lock("k").await.unwrap());
}

/// Lets 16 readers of as many clients ask within 10 ms, whose calls take up to 10 ms to each node, and whose clocks are
/// wrong by up to `skew`. Returns how many needed how many ballots, and how many failed.
async fn readers_at_once(seed: u64, skew: i64) -> (BTreeMap<u32, u32>, u32) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let world = World::new(&[0, 5 * SECOND / 1_000, -5 * SECOND / 1_000], ms(60_000));
    sleep(ms(60_000)).await;
    let mut clients = Vec::new();
    for client in 0..16 {
        let (calls, lines) = (Arc::new(AtomicU32::new(0)), Mutex::new(rng.fork()));
        let locker = world.client(rng.i64(-skew..=skew), {
            let calls = calls.clone();
            move |place| {
                calls.fetch_add(u32::from(place == 0), Ordering::Relaxed);
                Fault::RunAfter(ms(lines.lock().unwrap().u64(1..10)))
            }
        });
        // It knows the clocks of the nodes.
        locker.lock(format!("of client {client}")).await.unwrap().into_lease();
        clients.push((locker, calls, ms(rng.u64(..10))));
    }
    sleep(ms(1_000)).await;
    let mut readers = JoinSet::new();
    for (locker, calls, wait) in clients {
        readers.spawn(async move {
            sleep(wait).await;
            calls.store(0, Ordering::Relaxed);
            let guard = locker.try_read("k").await;
            (calls.load(Ordering::Relaxed), guard)
        });
    }
    let (mut ballots, mut failed, mut fences) = (BTreeMap::new(), 0, HashSet::new());
    for (asked, guard) in readers.join_all().await {
        match guard {
            Ok(guard) => {
                *ballots.entry(asked).or_default() += 1;
                assert!(fences.insert(guard.fencing_token()), "each has a number of its own");
            }
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                failed += 1;
            }
        }
    }
    (ballots, failed)
}

#[test]
fn readers_that_ask_at_once_do_not_outbid_each_other() {
    for skew in [0, SECOND / 50, HOUR] {
        let (mut all, mut failures) = (BTreeMap::new(), 0);
        for seed in 0..20 {
            let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            fastrand::seed(seed);
            let (ballots, failed) = runtime.block_on(readers_at_once(seed, skew));
            ballots.into_iter().for_each(|(asked, count)| *all.entry(asked).or_insert(0) += count);
            failures += failed;
        }
        println!("clocks wrong by up to {skew} us: {all:?}, {failures} failed");
        let (count, sum) = all.iter().fold((0, 0), |(count, sum), (asked, many)| (count + many, sum + asked * many));
        assert_eq!(failures, 0, "{all:?}");
        // As good as at random: what arrives first is not what was numbered first.
        assert!(sum < count * 4, "{all:?}");
    }
}

/// Whether it writes, its fencing token, and whether it is held.
type Noted = (bool, u64, Arc<Hold>);

/// Readers and writers, whose clocks are wrong by up to an hour, on nodes that are restarted now and then, some by
/// tokens of their users. Returns how often somebody held the key who must not have, and how often it was obtained by
/// readers beside others, and by writers.
async fn history_of_readers(seed: u64, window: Duration) -> (u32, u32, u32) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let skews = [(); 3].map(|()| rng.i64(-SECOND / 2..SECOND / 2));
    let world = World::new(&skews, window);
    sleep(window).await;
    let held: Arc<Mutex<Vec<Noted>>> = Arc::default();
    let counts: Arc<[AtomicU32; 3]> = Arc::default();
    let mut clients = JoinSet::new();
    for client in 0..5 {
        let lines = Mutex::new(rng.fork());
        let locker = world.client(rng.i64(-HOUR..HOUR), move |_| {
            let mut rng = lines.lock().unwrap();
            if rng.u8(..10) < 8 { Fault::None } else { rng.choice(FAULTS).unwrap()(&mut rng) }
        });
        let (held, counts, mut rng) = (held.clone(), counts.clone(), rng.fork());
        clients.spawn(async move {
            for _ in 0..6 {
                let reads = client < 2 || rng.bool();
                let request = if reads { locker.read("k") } else { locker.lock("k") };
                let request = match client {
                    0 => request.token("worker-7".parse().unwrap()),
                    _ => request,
                };
                let Ok(mut guard) = request.wait_at_most(ms(rng.u64(..8_000))).await else { continue };
                let note = |guard: &LockGuard, writes: bool, is_new: bool| {
                    if !guard.is_held() {
                        return;
                    }
                    let mut held = held.lock().unwrap();
                    let fence = guard.fencing_token().unwrap();
                    let others: Vec<_> = held.iter().filter(|(.., other)| other.check().is_ok()).collect();
                    let is_beside = others.iter().any(|(other_writes, ..)| writes || *other_writes);
                    // A writer's number is above all before it, and a reader's above those of all writers.
                    let falls = |(other_writes, other, _): &&Noted| (writes || *other_writes) && *other >= fence;
                    let falls = is_new && held.iter().any(|other| falls(&other));
                    counts[0].fetch_add(u32::from(is_beside || falls), Ordering::Relaxed);
                    counts[1].fetch_add(u32::from(!writes && !others.is_empty()), Ordering::Relaxed);
                    counts[2].fetch_add(u32::from(writes), Ordering::Relaxed);
                    held.push((writes, fence, guard.hold()));
                };
                note(&guard, !reads, client > 0);
                drop(timeout(ms(rng.u64(..4_000)), guard.lost()).await);
                if !reads && rng.bool() {
                    let Ok(reader) = guard.downgrade().await else { continue };
                    guard = reader;
                    note(&guard, false, false);
                    drop(timeout(ms(rng.u64(..4_000)), guard.lost()).await);
                }
                match rng.u8(..3) {
                    0 => drop(guard),
                    1 => drop(guard.release().await),
                    _ => drop(timeout(ms(rng.u64(..300)), guard.release()).await),
                }
            }
        });
    }
    let restarts = async {
        loop {
            sleep(ms(rng.u64(500..4_500))).await;
            let server = rng.choice(&world.servers).unwrap();
            match rng.u8(..4) {
                0 => server.forget(),
                1 => server.reload(),
                _ => server.save(),
            }
        }
    };
    tokio::select! {
        _ = clients.join_all() => {}
        () = restarts => {}
    }
    let count = |at: usize| counts[at].load(Ordering::Relaxed);
    (count(0), count(1), count(2))
}

fn histories_of_readers(window: Duration) -> (u32, u32, u32) {
    let mut sums = (0, 0, 0);
    for seed in 0..seeds() {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        fastrand::seed(seed);
        let (wrong, beside, writers) = runtime.block_on(history_of_readers(seed, window));
        if wrong > 0 && !window.is_zero() {
            panic!("a writer beside others, or a fencing token that does not grow; seed {seed}");
        }
        sums = (sums.0 + wrong, sums.1 + beside, sums.2 + writers);
    }
    sums
}

#[test]
fn no_history_has_a_writer_beside_others_or_its_fencing_token_out_of_order() {
    let (_, beside, writers) = histories_of_readers(ms(3_000));
    // Otherwise the histories have shown nothing.
    assert!(beside > 100 && writers > 100, "{beside} beside others, {writers} writers");
}

#[test]
fn without_the_restart_window_some_history_has_a_writer_beside_others() {
    let (wrong, ..) = histories_of_readers(Duration::ZERO);
    assert!(wrong > 2, "only {wrong}");
}

/// Readers and writers on nodes whose calls are late but never lost, and that forget everything now and then. Returns
/// whether a node keeps a key after all have ended, or a reader was lost although no majority had forgotten it.
async fn leaves_a_share(seed: u64) -> bool {
    let mut rng = fastrand::Rng::with_seed(seed);
    let world = World::new(&[0; 3], Duration::ZERO);
    let lines = Mutex::new(rng.fork());
    let locker = world.client(0, move |_| {
        let mut rng = lines.lock().unwrap();
        match rng.u8(..10) {
            0 => Fault::RunAfter(ms(rng.u64(..150))),
            1 => Fault::AnsweredAfter(ms(rng.u64(..150))),
            _ => Fault::None,
        }
    });
    let mut tasks = JoinSet::new();
    for token in [Some("worker-7"), Some("worker-7"), None, None] {
        let (locker, mut rng) = (locker.clone(), rng.fork());
        tasks.spawn(async move {
            for _ in 0..10 {
                let writes = token.is_none() && rng.bool();
                let request = if writes { locker.lock("k") } else { locker.read("k") };
                let request = match token {
                    Some(token) => request.token(token.parse().unwrap()),
                    None => request,
                };
                let patience = ms(rng.u64(..400));
                if let Ok(Ok(mut guard)) = timeout(patience, request.ttl(ms(60_000)).no_renewal()).await {
                    for _ in 0..rng.u8(..3) {
                        let patience = ms(rng.u64(..200));
                        match rng.u8(..3) {
                            0 => sleep(patience).await,
                            1 => drop(timeout(patience, guard.renew()).await),
                            _ => drop(timeout(patience, guard.renew_for(ms(10_000 + rng.u64(..20_000)))).await),
                        }
                    }
                    if writes && rng.bool() {
                        let Ok(Ok(reader)) = timeout(patience, guard.downgrade()).await else { continue };
                        guard = reader;
                        drop(timeout(patience, guard.renew()).await);
                    }
                    match rng.u8(..4) {
                        0 => drop(guard.release().await),
                        1 => drop(timeout(patience, guard.release()).await),
                        _ => drop(guard),
                    }
                }
                sleep(ms(rng.u64(..100))).await;
            }
        });
    }
    let forgetting = async {
        loop {
            sleep(ms(rng.u64(..500))).await;
            rng.choice(&world.servers).unwrap().forget();
        }
    };
    tokio::select! {
        _ = tasks.join_all() => {}
        () = forgetting => {}
    }
    locker.close().await;
    sleep(ms(1_000)).await;
    !world.servers.iter().all(|server| server.is_free("k"))
}

#[test]
fn no_history_leaves_a_share_on_a_node() {
    for seed in 0..3 * seeds() {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        fastrand::seed(seed);
        assert!(!runtime.block_on(leaves_a_share(seed)), "seed {seed}");
    }
}
