//! Readers on every store, and permits on all that count them.

use std::time::{Duration, Instant};

use tenure::{Error, Lease, LockGuard, LockRequest, Locker, Loss};
use tenure_test_support::eventually;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use super::{decided, has_at_least, ms, token};

/// Asserts that a request that doesn't wait is refused.
async fn is_refused(request: impl Fn() -> LockRequest) {
    let refused = decided(&request).await;
    assert!(matches!(refused, Err(Error::NotObtained { .. })), "{:?}: {refused:?}", request());
}

/// Waits in a task. The request has asked, and waits, when this returns: as far as a moment suffices for that.
async fn waits(request: LockRequest) -> JoinHandle<Result<LockGuard, Error>> {
    let waiter = tokio::spawn(request.into_future());
    sleep(ms(150)).await;
    waiter
}

/// Waits until somebody waits for the key, which holds readers back.
async fn holds_readers_back(locker: &Locker, key: &str) {
    eventually("readers are held back", async || match decided(|| locker.try_read(key)).await {
        Ok(reader) => reader.release().await.map(|()| None).unwrap(),
        Err(refused) => matches!(refused, Error::NotObtained { .. }).then_some(()),
    })
    .await;
}

async fn release_all(guards: impl IntoIterator<Item = LockGuard>) {
    for guard in guards {
        decided(async || guard.renew().await).await.unwrap();
        guard.release().await.unwrap();
    }
}

pub(super) async fn readers_share_a_key_and_exclude_writers(locker: &Locker) {
    let writer = locker.lock("read").await.unwrap();
    is_refused(|| locker.try_read("read")).await;
    let before = writer.fencing_token();
    writer.release().await.unwrap();
    let readers = [
        locker.read("read").await.unwrap(),
        decided(|| locker.try_read("read")).await.unwrap(),
        locker.read("read").wait_at_most(ms(5_000)).await.unwrap(),
        locker.read("read").fair(true).await.unwrap(),
    ];
    assert!(readers.iter().all(|reader| reader.is_held() && reader.fencing_token() > before));
    let last = readers.iter().map(LockGuard::fencing_token).max().unwrap();
    is_refused(|| locker.try_lock("read")).await;
    is_refused(|| locker.obtain("read").token(readers[0].token().clone())).await;
    release_all(readers).await;
    let writer = decided(|| locker.try_lock("read")).await.unwrap();
    assert!(writer.fencing_token() > last);
    writer.release().await.unwrap();
}

pub(super) async fn all_readers_are_listed(locker: &Locker) {
    assert_eq!(decided(|| locker.holders("listed")).await.unwrap(), []);
    let readers = [
        locker.read("listed").ttl(ms(20_000)).metadata("one").await.unwrap(),
        locker.read("listed").ttl(ms(50_000)).metadata("two\nlines").await.unwrap(),
        locker.read("listed").await.unwrap(),
    ];
    let holders = decided(|| locker.holders("listed")).await.unwrap();
    let metadata: Vec<_> = holders.iter().map(|holder| holder.metadata.as_slice()).collect();
    assert_eq!(metadata, [&b"two\nlines"[..], b"", b"one"]);
    assert_eq!((&holders[2].token, holders[2].fencing_token), (readers[0].token(), readers[0].fencing_token()));
    assert!(holders[2].remaining.is_some_and(|left| left <= ms(20_000) && left > ms(10_000)));
    assert_eq!(decided(|| locker.inspect("listed")).await.unwrap().unwrap().metadata, b"two\nlines");
    release_all(readers).await;
    assert_eq!(
        (decided(|| locker.holders("listed")).await.unwrap(), decided(|| locker.inspect("listed")).await.unwrap()),
        (vec![], None)
    );
    let writer = locker.lock("listed").metadata("alone").await.unwrap();
    let holders = decided(|| locker.holders("listed")).await.unwrap();
    assert!(matches!(&holders[..], [alone] if alone.metadata == b"alone" && alone.token == *writer.token()));
    writer.release().await.unwrap();
}

pub(super) async fn a_writer_that_waits_holds_readers_back(locker: &Locker) {
    let reader = locker.read("preferred").await.unwrap();
    let writer = waits(locker.lock("preferred")).await;
    holds_readers_back(locker, "preferred").await;
    let behind = [waits(locker.read("preferred")).await, waits(locker.read("preferred")).await];
    assert!(!writer.is_finished() && behind.iter().all(|waiter| !waiter.is_finished()));
    reader.release().await.unwrap();
    let writing = writer.await.unwrap().unwrap();
    sleep(ms(100)).await;
    assert!(behind.iter().all(|waiter| !waiter.is_finished()));
    writing.release().await.unwrap();
    let mut readers = Vec::new();
    for waiter in behind {
        readers.push(waiter.await.unwrap().unwrap());
    }
    release_all(readers).await;
}

/// There is always a reader: each comes again as soon as it has left, and before the others have.
pub(super) async fn a_writer_gets_in_under_a_stream_of_readers_also_with_several_keys(locker: &Locker) {
    let mut readers = JoinSet::new();
    for n in 0..6 {
        let locker = locker.clone();
        readers.spawn(async move {
            sleep(ms(10 * n)).await;
            loop {
                let reader = locker.read("{stream}:a").await.unwrap();
                sleep(ms(60)).await;
                drop(reader);
            }
        });
    }
    let writes: [fn(&Locker) -> LockRequest; 2] =
        [|locker| locker.lock("{stream}:a"), |locker| locker.lock_all(["{stream}:b", "{stream}:a"])];
    for write in writes.into_iter().cycle().take(4) {
        let several = async || (decided(|| locker.holders("{stream}:a")).await.unwrap().len() > 2).then_some(());
        eventually("several read", several).await;
        let writer = write(locker).wait_at_most(ms(20_000)).await.unwrap();
        writer.release().await.unwrap();
    }
    readers.shutdown().await;
    locker.lock_all(["{stream}:a", "{stream}:b"]).await.unwrap().release().await.unwrap();
}

pub(super) async fn a_request_that_gives_up_or_is_dropped_holds_nobody_back(locker: &Locker) {
    let reader = locker.read("given up").await.unwrap();
    let refused = locker.lock("given up").wait_at_most(ms(400)).await.unwrap_err();
    assert!(matches!(refused, Error::NotObtained { .. }) || refused.is_transient(), "{refused}");
    let writer = waits(locker.lock("given up")).await;
    let behind = waits(locker.read("given up")).await;
    writer.abort();
    let second = behind.await.unwrap().unwrap();
    release_all([reader, second]).await;
    let writer = locker.lock("given up").await.unwrap();
    let waiters = [waits(locker.read("given up")).await, waits(locker.read("given up")).await];
    let refused = locker.read("given up").wait_at_most(ms(100)).await.unwrap_err();
    assert!(matches!(refused, Error::NotObtained { .. }) || refused.is_transient(), "{refused}");
    waiters.iter().for_each(JoinHandle::abort);
    writer.release().await.unwrap();
    // What they left is undone in the background.
    locker.lock("given up").await.unwrap().release().await.unwrap();
}

pub(super) async fn a_reader_is_renewed_and_its_ttl_is_its_own(locker: &Locker) {
    let (long, short) = (ms(200_000), ms(5_000));
    let reader = locker.read("own ttl").ttl(short).renew_every(ms(300)).await.unwrap();
    let patient = locker.read("own ttl").ttl(long).await.unwrap();
    assert!(decided(|| reader.server_ttl()).await.unwrap().is_some_and(|left| left <= short));
    let first = reader.deadline();
    eventually("a ttl later", async || (reader.deadline() > first + short).then_some(())).await;
    decided(|| reader.renew_for(ms(60_000))).await.unwrap();
    has_at_least(&reader, ms(30_000)).await;
    decided(|| reader.ensure(ms(20_000))).await.unwrap();
    has_at_least(&reader, ms(30_000)).await;
    decided(|| reader.renew_for(ms(20_000))).await.unwrap();
    assert!(decided(|| reader.server_ttl()).await.unwrap().is_some_and(|left| left <= ms(20_000)));
    has_at_least(&patient, ms(100_000)).await;
    release_all([reader, patient]).await;
}

/// In both directions: the key goes neither before the one that stays longest, nor stays for one that has left.
pub(super) async fn a_key_is_free_when_the_last_reader_has_expired(locker: &Locker) {
    let dies = locker.read("dies").ttl(ms(1_500)).no_renewal().await.unwrap();
    let patient = locker.read("dies").ttl(ms(60_000)).await.unwrap();
    assert_eq!(dies.lost().await, Loss::Expired);
    eventually("one is left", async || (decided(|| locker.holders("dies")).await.unwrap().len() == 1).then_some(()))
        .await;
    decided(|| patient.renew()).await.unwrap();
    is_refused(|| locker.try_lock("dies")).await;
    let asked = Instant::now();
    let expires = locker.read("dies").ttl(ms(1_500)).no_renewal().await.unwrap();
    // Nobody renews it, and nobody releases it.
    expires.into_lease();
    patient.release().await.unwrap();
    locker.lock("dies").await.unwrap().release().await.unwrap();
    assert!(asked.elapsed() >= ms(1_490), "{:?}", asked.elapsed());
}

pub(super) async fn a_token_that_reads_already_is_admitted_and_its_guards_end_one_by_one(locker: &Locker) {
    let request = || locker.read("twins").token(token("me"));
    let one = decided(request).await.unwrap();
    let writer = waits(locker.lock("twins")).await;
    holds_readers_back(locker, "twins").await;
    let two = decided(request).await.unwrap();
    let three = decided(|| locker.try_read("twins").token(token("me"))).await.unwrap();
    assert_eq!([&two, &three].map(LockGuard::fencing_token), [one.fencing_token(); 2]);
    drop(two);
    drop(one);
    // They are released in the background.
    sleep(ms(150)).await;
    assert_eq!(decided(|| locker.holders("twins")).await.unwrap().len(), 1, "a token is listed once");
    decided(|| three.renew()).await.unwrap();
    assert!(!writer.is_finished());
    let four = decided(|| locker.try_read("twins").token(token("me"))).await.unwrap();
    four.release().await.unwrap();
    // An explicit release ends all of the token.
    let writer = writer.await.unwrap().unwrap();
    let lost = decided(|| three.renew()).await.unwrap_err();
    assert!(matches!(lost, Error::NotHeld { loss: Loss::Taken, .. }), "{lost}");
    writer.release().await.unwrap();
}

pub(super) async fn a_reader_whose_share_is_gone_is_lost(locker: &Locker) {
    let request = || locker.read("gone reader").token(token("me"));
    let one = decided(request).await.unwrap();
    let other = locker.read("gone reader").await.unwrap();
    decided(request).await.unwrap().release().await.unwrap();
    // Others read on.
    assert!(matches!(decided(|| one.renew()).await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    assert_eq!(one.lost().await, Loss::Missing);
    assert_eq!(decided(|| one.server_ttl()).await.unwrap(), None);
    decided(|| other.renew()).await.unwrap();
    let two = decided(request).await.unwrap();
    release_all([other]).await;
    decided(request).await.unwrap().release().await.unwrap();
    assert!(matches!(two.release().await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    locker.lock("gone reader").await.unwrap().release().await.unwrap();
}

pub(super) async fn a_dropped_reader_is_released(locker: &Locker) {
    let (reader, other) = (locker.read("dropped reader").await.unwrap(), locker.read("dropped reader").await.unwrap());
    let writer = waits(locker.lock("dropped reader")).await;
    drop(reader);
    sleep(ms(100)).await;
    assert!(!writer.is_finished());
    drop(other);
    writer.await.unwrap().unwrap().release().await.unwrap();
}

pub(super) async fn the_lease_of_a_reader_is_taken_up_again(locker: &Locker) {
    let guard = locker.read("read lease").ttl(ms(5_000)).await.unwrap();
    let other = locker.read("read lease").await.unwrap();
    let fence = guard.fencing_token();
    let text = guard.into_lease().to_string();
    let lease: Lease = text.parse().unwrap();
    decided(|| locker.ensure(&lease, ms(10_000))).await.unwrap();
    let adopted = decided(|| locker.adopt(lease.clone())).await.unwrap();
    assert_eq!((adopted.fencing_token(), adopted.ttl()), (fence, ms(5_000)));
    decided(|| adopted.renew()).await.unwrap();
    has_at_least(&adopted, ms(6_000)).await;
    is_refused(|| locker.try_lock("read lease")).await;
    assert_eq!(decided(|| locker.holders("read lease")).await.unwrap().len(), 2);
    release_all([adopted]).await;
    for gone in
        [decided(|| locker.ensure(&lease, ms(10_000))).await, decided(|| locker.adopt(lease.clone())).await.map(drop)]
    {
        assert!(matches!(gone, Err(Error::NotHeld { loss: Loss::Missing, .. })), "{gone:?}");
    }
    release_all([other]).await;
    locker.lock("read lease").await.unwrap().release().await.unwrap();
    // A lease of a lock is no reader's, and the other way round.
    let reader = locker.read("read lease").await.unwrap();
    let as_lock = Lease::new("read lease", reader.token().clone(), ms(5_000));
    let taken = decided(|| locker.adopt(as_lock.clone())).await;
    assert!(matches!(taken, Err(Error::NotHeld { loss: Loss::Taken, .. })), "{taken:?}");
    release_all([reader]).await;
}

pub(super) async fn the_bounds_of_a_reader_are_kept(locker: &Locker) {
    tokio::join!(a_share_stays_taken(locker), a_limit_ends_a_reader(locker));
}

async fn a_share_stays_taken(locker: &Locker) {
    for explicit in [true, false] {
        let asked = Instant::now();
        let guard = locker.read("read least").ttl(ms(30_000)).hold_at_least(ms(2_000)).await.unwrap();
        match explicit {
            true => guard.release().await.unwrap(),
            false => drop(guard),
        }
        eventually("nobody reads", async || {
            decided(|| locker.inspect("read least")).await.unwrap().is_none().then_some(())
        })
        .await;
        let refused = decided(|| locker.try_lock("read least")).await;
        assert!(refused.is_err() || asked.elapsed() >= ms(1_990));
        release_all([locker.read("read least").await.unwrap()]).await;
        let next = locker.lock("read least").await.unwrap();
        assert!(asked.elapsed() >= ms(1_990), "{:?}", asked.elapsed());
        next.release().await.unwrap();
    }
}

async fn a_limit_ends_a_reader(locker: &Locker) {
    let far = locker.read("read limit").hold_at_most(ms(60_000)).await.unwrap();
    decided(|| far.ensure(ms(600_000))).await.unwrap();
    assert!(decided(|| far.server_ttl()).await.unwrap().unwrap() <= ms(60_000));
    let guard = locker.read("read limit").hold_at_most(ms(1_500)).await.unwrap();
    let other = locker.read("read limit").await.unwrap();
    // On a busy machine, it may be over.
    drop(guard.ensure(ms(60_000)).await);
    assert_eq!(guard.lost().await, Loss::LimitReached);
    decided(|| other.renew()).await.unwrap();
    release_all([far, other]).await;
    locker.lock("read limit").await.unwrap().release().await.unwrap();
}

pub(super) async fn a_writer_becomes_a_reader_in_one_step(locker: &Locker) {
    for named in [false, true] {
        let request = locker.lock("down").metadata("m").ttl(ms(60_000));
        let writer = match named {
            true => request.token(token("me")).await.unwrap(),
            false => request.await.unwrap(),
        };
        let waiting = waits(locker.read("down")).await;
        let (fence, secret, deadline, lost) =
            (writer.fencing_token(), writer.token().clone(), writer.deadline(), writer.lost());
        let reader = writer.downgrade().await.unwrap();
        assert_eq!(lost.await, Loss::Released);
        let second = waiting.await.unwrap().unwrap();
        assert_eq!((reader.fencing_token(), reader.token(), reader.metadata()), (fence, &secret, &b"m"[..]));
        assert_eq!(reader.deadline(), deadline);
        has_at_least(&reader, ms(40_000)).await;
        let holder = decided(|| locker.inspect("down")).await.unwrap().unwrap();
        assert_eq!((holder.token, holder.metadata, holder.fencing_token), (secret, b"m".to_vec(), fence));
        is_refused(|| locker.try_lock("down")).await;
        decided(|| reader.renew()).await.unwrap();
        release_all([second]).await;
        is_refused(|| locker.try_lock("down")).await;
        let writer = waits(locker.lock("down")).await;
        match named {
            true => reader.release().await.unwrap(),
            false => drop(reader),
        }
        writer.await.unwrap().unwrap().release().await.unwrap();
    }
}

pub(super) async fn a_writer_that_waits_is_not_passed_by_a_downgrade(locker: &Locker) {
    let writer = locker.lock("down behind").await.unwrap();
    let other = waits(locker.lock("down behind")).await;
    let behind = waits(locker.read("down behind")).await;
    let reader = writer.downgrade().await.unwrap();
    holds_readers_back(locker, "down behind").await;
    assert!(!other.is_finished() && !behind.is_finished());
    reader.release().await.unwrap();
    other.await.unwrap().unwrap().release().await.unwrap();
    behind.await.unwrap().unwrap().release().await.unwrap();
}

pub(super) async fn a_lock_that_others_rely_on_is_not_downgraded(locker: &Locker) {
    let request = || locker.obtain("down twins").token(token("twin"));
    let one = decided(request).await.unwrap();
    let other = decided(request).await.unwrap();
    let refused = decided(async || decided(request).await?.downgrade().await).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(reason) if reason.contains("same token")), "{refused}");
    decided(|| one.renew()).await.unwrap();
    decided(|| other.renew()).await.unwrap();
    is_refused(|| locker.try_read("down twins")).await;
    one.release().await.unwrap();
    let lost = other.downgrade().await.unwrap_err();
    assert!(matches!(lost, Error::NotHeld { loss: Loss::Missing, .. }), "{lost}");
    let set = decided(|| locker.obtain_all(["{down}:a", "{down}:b"])).await.unwrap();
    assert!(matches!(set.downgrade().await, Err(Error::Unsupported(reason)) if reason.contains("several keys")));
}

pub(super) async fn a_permit_of_a_quorum_is_refused_with_the_reason(locker: &Locker) {
    for request in [locker.permit("licences", 2), locker.try_permit("licences", 2)] {
        let refused = request.await.unwrap_err();
        assert!(matches!(refused, Error::Unsupported(reason) if reason.contains("majorities")), "{refused}");
    }
    assert!(matches!(locker.permit("licences", 0).await, Err(Error::InvalidLimit(_))));
}

pub(super) async fn no_more_hold_a_permit_than_the_limit_says(locker: &Locker) {
    let request = || locker.permit("licences", 3);
    let guards = [request().await.unwrap(), request().await.unwrap(), request().fair(true).await.unwrap()];
    assert_eq!(decided(|| locker.holders("licences")).await.unwrap().len(), 3);
    for other in
        [&|| locker.try_permit("licences", 3), &|| locker.try_read("licences"), &|| locker.try_lock("licences")]
            as [&dyn Fn() -> LockRequest; 3]
    {
        is_refused(other).await;
    }
    let waiters = [waits(request()).await, waits(request()).await];
    assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
    let [one, two, three] = guards;
    one.release().await.unwrap();
    drop(two);
    let mut permits = vec![three];
    for waiter in waiters {
        permits.push(waiter.await.unwrap().unwrap());
    }
    is_refused(|| locker.try_permit("licences", 3)).await;
    // Each caller brings its own limit.
    permits.push(decided(|| locker.try_permit("licences", 4)).await.unwrap());
    is_refused(|| locker.try_permit("licences", 2)).await;
    let patient = waits(locker.permit("licences", 2)).await;
    for _ in 0..2 {
        permits.pop().unwrap().release().await.unwrap();
    }
    sleep(ms(100)).await;
    assert!(!patient.is_finished(), "two still hold one");
    permits.pop().unwrap().release().await.unwrap();
    permits.push(patient.await.unwrap().unwrap());
    let fences: Vec<_> = permits.iter().map(LockGuard::fencing_token).collect();
    assert!(fences[0] < fences[1], "{fences:?}");
    release_all(permits).await;
    locker.lock("licences").await.unwrap().release().await.unwrap();
}

pub(super) async fn a_limit_of_no_permits_is_refused(locker: &Locker) {
    for request in [locker.permit("none", 0), locker.try_permit("none", 0)] {
        let refused = request.await.unwrap_err();
        assert!(matches!(refused, Error::InvalidLimit(_)) && refused.to_string().contains("limit"), "{refused}");
    }
    assert_eq!(decided(|| locker.holders("none")).await.unwrap(), []);
}

pub(super) async fn the_permit_of_a_dead_holder_comes_back(locker: &Locker) {
    let asked = Instant::now();
    let dead = locker.permit("dead", 2).ttl(ms(1_500)).no_renewal().await.unwrap();
    let alive = locker.permit("dead", 2).ttl(ms(60_000)).await.unwrap();
    dead.into_lease();
    let next = locker.permit("dead", 2).await.unwrap();
    assert!(asked.elapsed() >= ms(1_490), "{:?}", asked.elapsed());
    release_all([alive, next]).await;
}

pub(super) async fn a_token_counts_once(locker: &Locker) {
    let request = || locker.try_permit("once", 2).token(token("me"));
    let guards = [decided(request).await.unwrap(), decided(request).await.unwrap(), decided(request).await.unwrap()];
    assert!(guards.iter().all(|guard| guard.fencing_token() == guards[0].fencing_token()));
    let other = decided(|| locker.try_permit("once", 2)).await.unwrap();
    is_refused(|| locker.try_permit("once", 2)).await;
    let [one, two, three] = guards;
    drop(one);
    drop(two);
    sleep(ms(150)).await;
    assert_eq!(decided(|| locker.holders("once")).await.unwrap().len(), 2);
    is_refused(|| locker.try_permit("once", 2)).await;
    decided(|| three.renew()).await.unwrap();
    let again = decided(request).await.unwrap();
    three.release().await.unwrap();
    assert!(matches!(decided(|| again.renew()).await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    let third = decided(|| locker.try_permit("once", 2)).await.unwrap();
    release_all([other, third]).await;
}

pub(super) async fn a_permit_that_lingers_still_counts(locker: &Locker) {
    let asked = Instant::now();
    let guard = locker.permit("lingers", 1).ttl(ms(30_000)).hold_at_least(ms(1_500)).await.unwrap();
    guard.release().await.unwrap();
    assert_eq!(decided(|| locker.holders("lingers")).await.unwrap(), []);
    let next = locker.permit("lingers", 1).await.unwrap();
    assert!(asked.elapsed() >= ms(1_490), "{:?}", asked.elapsed());
    release_all([next]).await;
}

pub(super) async fn the_lease_of_a_permit_is_taken_up_again(locker: &Locker) {
    let text = locker.permit("permit lease", 1).ttl(ms(5_000)).await.unwrap().into_lease().to_string();
    is_refused(|| locker.try_permit("permit lease", 1)).await;
    let adopted = decided(|| locker.adopt(text.parse().unwrap())).await.unwrap();
    decided(|| adopted.renew()).await.unwrap();
    assert!(matches!(adopted.downgrade().await, Err(Error::Unsupported(_))));
    let next = locker.permit("permit lease", 1).await.unwrap();
    release_all([next]).await;
}

pub(super) async fn many_that_share_end_with_nothing_left(locker: &Locker) {
    let kinds: [fn(&Locker) -> LockRequest; 3] =
        [|locker| locker.read("many"), |locker| locker.read("many"), |locker| locker.lock("many")];
    let tasks = (0..12).map(|n| {
        let locker = locker.clone();
        tokio::spawn(async move {
            for turn in 0..4 {
                let guard = kinds[(n + turn) % kinds.len()](&locker).await.unwrap();
                decided(|| guard.renew()).await.unwrap();
                drop(guard);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    eventually("nobody is left", async || decided(|| locker.holders("many")).await.unwrap().is_empty().then_some(()))
        .await;
    locker.lock("many").wait_at_most(Duration::from_secs(5)).await.unwrap().release().await.unwrap();
}
