use std::slice::from_ref;
use std::sync::Arc;

use tenure_test_support::{Server, eventually, soon};

use super::super::Driver;
use super::super::script::Scripts;
use super::*;
use crate::store::{LinePlace, Queueing, Store};
use crate::{Loss, Token};

const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than any test takes, and by more than it takes apart.
const TTL: Duration = Duration::from_secs(1_000);
const TOLERANCE: Duration = Duration::from_secs(200);

async fn store(server: &Server) -> RedisStore {
    RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap()
}

fn wanted(mode: Mode, limit: usize) -> Wanted {
    let (keys, token) = ([Key::from("k")].into(), Token::random());
    let owned = Owned { keys, token, own_token: true, grant: None, mode };
    let (metadata, latest) = (Box::default(), Arc::default());
    let (queueing, since) = (Queueing::Shared, Instant::now());
    Wanted { owned, metadata, ttl: TTL, fenced: true, queueing, takes_over: false, latest, limit, since }
}

fn reader() -> Wanted {
    wanted(Mode::Read, 0)
}

fn writer() -> Wanted {
    wanted(Mode::Exclusive, 0)
}

fn permit(limit: usize) -> Wanted {
    wanted(Mode::Permit, limit)
}

/// The same with another grant.
fn again(wanted: &Wanted) -> Wanted {
    let owned = Owned { grant: Some(GrantId::random()), own_token: false, ..wanted.owned.clone() };
    Wanted { owned, latest: Arc::default(), ..wanted.clone() }
}

fn for_ttl(wanted: Wanted, ttl: Duration) -> Wanted {
    Wanted { ttl, ..wanted }
}

fn at(number: u64, stays: bool) -> InLine {
    InLine::At { key: 0, place: shared_place(number), stays }
}

fn shared_place(number: u64) -> LinePlace {
    LinePlace { number, is_shared: true }
}

async fn asks(store: &RedisStore, wanted: &Wanted, in_line: InLine) -> Acquired {
    Store::acquire(store, wanted, in_line, PATIENCE).await.unwrap()
}

/// Asks by the own place, or without one.
async fn fence(store: &RedisStore, wanted: &Wanted) -> u64 {
    match asks(store, wanted, InLine::No).await {
        Acquired::Granted { fencing_token } => fencing_token.unwrap(),
        held @ Acquired::Held { .. } => panic!("{held:?}"),
    }
}

fn is_granted(acquired: &Acquired) -> bool {
    matches!(acquired, Acquired::Granted { .. })
}

async fn gets(store: &RedisStore, wanted: &Wanted) -> bool {
    is_granted(&asks(store, wanted, InLine::No).await)
}

async fn renews(store: &RedisStore, wanted: &Wanted, ttl: Duration, how: Extending) -> Verdict {
    Store::renew(store, &wanted.owned, ttl, how, PATIENCE).await.unwrap()
}

async fn ends(store: &RedisStore, wanted: &Wanted, ending: Ending) -> Verdict {
    Store::release(store, &wanted.owned, ending, PATIENCE).await.unwrap()
}

async fn left(store: &RedisStore, wanted: &Wanted) -> Option<Duration> {
    Store::remaining(store, &wanted.owned, PATIENCE).await.unwrap()
}

fn is_about(left: Duration, expected: Duration) -> bool {
    left <= expected && left + TOLERANCE > expected
}

fn key_lives(server: &Server, expected: Duration) {
    let left = Duration::from_millis(server.cli(&["PTTL", "k"]).parse().unwrap());
    assert!(is_about(left, expected), "{left:?} instead of {expected:?}");
    assert_all_have_ttls(server);
}

fn assert_all_have_ttls(server: &Server) {
    let all = server.cli(&["KEYS", "*"]);
    for key in all.lines().filter(|key| !key.is_empty()) {
        assert_ne!(server.cli(&["PTTL", key]), "-1", "{key}");
    }
}

/// All but the fencing token.
fn nothing_is_left(server: &Server) {
    assert_eq!(server.cli(&["KEYS", "*"]), "{k}:fence");
}

const MISSING: Verdict = Verdict::NotOurs(Loss::Missing);
const TAKEN: Verdict = Verdict::NotOurs(Loss::Taken);

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn readers_share_a_key_that_excludes_all_others_until_the_last_has_left() {
    let server = Server::start();
    let store = store(&server).await;
    let (one, other) = (reader(), for_ttl(reader(), TTL * 3));
    let first = fence(&store, &one).await;
    key_lives(&server, TTL);
    let second = fence(&store, &other).await;
    assert!(first < second);
    key_lives(&server, TTL * 3);
    for excluded in [writer(), permit(9), again(&writer())] {
        match asks(&store, &excluded, InLine::No).await {
            Acquired::Held { remaining: Some(left), .. } => assert!(is_about(left, TTL * 3)),
            acquired => panic!("{acquired:?}"),
        }
    }
    assert_eq!(server.cli(&["SET", "k", "another", "NX", "PX", "9"]), "");
    // The one that stays longest leaves: the key lives no longer than the other.
    assert_eq!(ends(&store, &other, Ending::Lock).await, Verdict::Done);
    key_lives(&server, TTL);
    assert_eq!(ends(&store, &other, Ending::Lock).await, MISSING);
    assert_eq!(ends(&store, &one, Ending::Grant).await, Verdict::Done);
    nothing_is_left(&server);
    let exclusive = writer();
    assert!(second < fence(&store, &exclusive).await);
    assert!(!gets(&store, &reader()).await);
    assert!(!gets(&store, &wanted(Mode::Permit, 1)).await);
    // Not even by the token that has the lock.
    let same = Owned { mode: Mode::Read, ..exclusive.owned.clone() };
    assert!(!gets(&store, &Wanted { owned: same, ..reader() }).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_renewal_moves_the_time_of_its_own_grant_alone() {
    let server = Server::start();
    let store = store(&server).await;
    let (one, other) = (reader(), reader());
    fence(&store, &one).await;
    fence(&store, &other).await;
    assert_eq!(renews(&store, &one, TTL * 4, Extending::AtLeast).await, Verdict::Done);
    assert_eq!(renews(&store, &one, TTL * 2, Extending::AtLeast).await, Verdict::Done);
    assert!(is_about(left(&store, &one).await.unwrap(), TTL * 4));
    assert!(is_about(left(&store, &other).await.unwrap(), TTL));
    key_lives(&server, TTL * 4);
    assert_eq!(renews(&store, &one, TTL * 2, Extending::Exactly).await, Verdict::Done);
    key_lives(&server, TTL * 2);
    assert_eq!(renews(&store, &one, TTL / 4, Extending::Exactly).await, Verdict::Done);
    key_lives(&server, TTL);
    assert!(left(&store, &one).await.unwrap() <= TTL / 4);
    assert!(is_about(left(&store, &other).await.unwrap(), TTL));
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_share_ends_by_its_own_ttl_whatever_the_others_renew() {
    let server = Server::start();
    let store = store(&server).await;
    let (dies, lives) = (for_ttl(permit(2), Duration::from_millis(300)), permit(2));
    fence(&store, &dies).await;
    fence(&store, &lives).await;
    match asks(&store, &permit(2), InLine::No).await {
        Acquired::Held { remaining: Some(left), .. } => assert!(left <= Duration::from_millis(300), "{left:?}"),
        acquired => panic!("{acquired:?}"),
    }
    let next = permit(2);
    eventually("the permit of the dead comes back", async || {
        renews(&store, &lives, TTL, Extending::AtLeast).await;
        gets(&store, &next).await.then_some(())
    })
    .await;
    assert_eq!(renews(&store, &dies, TTL, Extending::AtLeast).await, MISSING);
    assert_eq!(ends(&store, &dies, Ending::Grant).await, MISSING);
    assert_eq!(left(&store, &dies).await, None);
    assert_eq!(Store::holders(&store, &Key::from("k"), PATIENCE).await.unwrap().len(), 2);
    // Also where nobody has come since, who would have forgotten it.
    let late = for_ttl(permit(3), Duration::from_millis(100));
    fence(&store, &late).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(renews(&store, &late, TTL, Extending::AtLeast).await, MISSING);
    assert_eq!(left(&store, &late).await, None);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn there_are_as_many_permits_as_each_request_says() {
    let server = Server::start();
    let store = store(&server).await;
    let holders = [(); 3].map(|()| permit(3));
    for holder in &holders {
        fence(&store, holder).await;
    }
    assert!(!gets(&store, &permit(3)).await);
    assert!(gets(&store, &permit(4)).await);
    assert!(!gets(&store, &reader()).await);
    for holder in &holders[..2] {
        assert!(!gets(&store, &permit(2)).await);
        ends(&store, holder, Ending::Lock).await;
    }
    assert!(!gets(&store, &permit(2)).await);
    ends(&store, &holders[2], Ending::Lock).await;
    assert!(gets(&store, &permit(2)).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_token_that_comes_again_has_a_grant_of_its_own_and_counts_once() {
    let server = Server::start();
    let store = store(&server).await;
    let one = again(&permit(1));
    let (two, three) = (again(&one), again(&one));
    let token = fence(&store, &one).await;
    // A waiter of another process doesn't keep it out.
    assert!(!is_granted(&asks(&store, &permit(1), at(1, false)).await));
    assert_eq!(fence(&store, &for_ttl(two.clone(), TTL * 3)).await, token);
    assert_eq!(fence(&store, &three).await, token);
    assert!(is_about(left(&store, &one).await.unwrap(), TTL));
    assert!(is_about(left(&store, &two).await.unwrap(), TTL * 3));
    let any = Owned { grant: Some(GrantId::UNKNOWN), ..one.owned.clone() };
    assert!(is_about(Store::remaining(&store, &any, PATIENCE).await.unwrap().unwrap(), TTL * 3));
    key_lives(&server, TTL * 3);
    let all = Store::holders(&store, &Key::from("k"), PATIENCE).await.unwrap();
    assert_eq!(all.iter().map(|holder| holder.fencing_token).collect::<Vec<_>>(), [Some(token)]);
    // The end of one is not the end of the others.
    assert_eq!(ends(&store, &two, Ending::Grant).await, Verdict::Done);
    key_lives(&server, TTL);
    assert_eq!(renews(&store, &two, TTL, Extending::KeepRecord).await, MISSING);
    assert_eq!(renews(&store, &one, TTL, Extending::KeepRecord).await, Verdict::Done);
    assert_eq!(renews(&store, &three, TTL * 2, Extending::KeepRecord).await, Verdict::Done);
    assert!(is_about(left(&store, &one).await.unwrap(), TTL));
    // The end of the share is. The waiter has asked again, as one does that is alive.
    assert!(!is_granted(&asks(&store, &permit(1), at(1, false)).await));
    assert_eq!(ends(&store, &one, Ending::Lock).await, Verdict::Done);
    assert_eq!(renews(&store, &three, TTL, Extending::KeepRecord).await, TAKEN, "it is reserved for the waiter");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_token_has_so_many_grants_and_no_more() {
    let server = Server::start();
    let store = store(&server).await;
    let one = again(&reader());
    for _ in 0..64 {
        fence(&store, &again(&one)).await;
    }
    let refused = Store::acquire(&store, &again(&one), InLine::No, PATIENCE).await.unwrap_err();
    assert!(refused.to_string().contains("64 grants") && !refused.is_transient(), "{refused}");
    assert!(gets(&store, &reader()).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_claim_replaces_a_grant_and_gives_it_back() {
    let server = Server::start();
    let store = store(&server).await;
    let first = reader();
    let (second, third) = (again(&first), again(&first));
    fence(&store, &first).await;
    let claim = Extending::Claim { earlier: None };
    assert_eq!(renews(&store, &second, TTL * 2, claim).await, Verdict::Done);
    assert_eq!(renews(&store, &second, TTL * 2, claim).await, Verdict::Done);
    assert_eq!(renews(&store, &first, TTL, Extending::AtLeast).await, MISSING);
    assert!(is_about(left(&store, &second).await.unwrap(), TTL * 2));
    // What it claims is not there.
    assert_eq!(renews(&store, &third, TTL, claim).await, MISSING);
    let back = Extending::GiveBack { earlier: None };
    assert_eq!(renews(&store, &second, TTL, back).await, Verdict::Done);
    assert_eq!(renews(&store, &second, TTL, back).await, Verdict::Done);
    assert_eq!(renews(&store, &second, TTL, Extending::KeepRecord).await, MISSING);
    assert!(is_about(left(&store, &first).await.unwrap(), TTL * 2));
    assert_eq!(ends(&store, &first, Ending::Grant).await, Verdict::Done);
    assert_eq!(renews(&store, &second, TTL, back).await, MISSING);
    nothing_is_left(&server);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_shares_of_an_earlier_marker_count_for_nothing() {
    let server = Server::start();
    let store = store(&server).await;
    let (lost, next) = (reader(), reader());
    fence(&store, &lost).await;
    server.cli(&["DEL", "k"]);
    assert_eq!(renews(&store, &lost, TTL, Extending::AtLeast).await, MISSING);
    assert_eq!(ends(&store, &lost, Ending::Lock).await, MISSING);
    fence(&store, &next).await;
    assert_eq!(renews(&store, &lost, TTL, Extending::AtLeast).await, MISSING);
    assert_eq!(left(&store, &lost).await, None);
    let tokens = |all: Vec<Holder>| all.into_iter().map(|holder| holder.token).collect::<Vec<_>>();
    let key = Key::from("k");
    assert_eq!(tokens(Store::holders(&store, &key, PATIENCE).await.unwrap()), from_ref(&next.owned.token));
    // Another mode, another lock, another library.
    server.cli(&["DEL", "k"]);
    let holder = permit(1);
    fence(&store, &holder).await;
    assert_eq!(renews(&store, &next, TTL, Extending::AtLeast).await, TAKEN);
    assert_eq!(ends(&store, &next, Ending::Grant).await, TAKEN);
    server.cli(&["SET", "k", "another", "PX", "60000"]);
    assert_eq!(renews(&store, &holder, TTL, Extending::Exactly).await, TAKEN);
    assert_eq!(ends(&store, &holder, Ending::Grant).await, TAKEN);
    server.cli(&["DEL", "k"]);
    server.cli(&["LPUSH", "k", "item"]);
    assert_eq!(renews(&store, &holder, TTL, Extending::AtLeast).await, TAKEN);
    assert_eq!(ends(&store, &holder, Ending::Lock).await, TAKEN);
    assert_eq!(server.cli(&["TYPE", "k"]), "list");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_share_that_lingers_counts_for_nobody_and_no_longer_than_asked() {
    let server = Server::start();
    let store = store(&server).await;
    let (one, other) = (permit(2), again(&permit(2)));
    fence(&store, &one).await;
    fence(&store, &other).await;
    let linger = async |wanted: &Wanted, ending, rest| {
        Store::linger(&store, &wanted.owned, ending, rest, PATIENCE).await.unwrap()
    };
    assert_eq!(linger(&one, Ending::Lock, TTL * 2).await, Verdict::Done);
    key_lives(&server, TTL * 2);
    assert_eq!(linger(&one, Ending::Lock, TTL * 9).await, MISSING);
    key_lives(&server, TTL * 2);
    assert!(!gets(&store, &permit(2)).await);
    assert!(!gets(&store, &one).await, "it owns it no longer");
    assert_eq!(Store::holders(&store, &Key::from("k"), PATIENCE).await.unwrap().len(), 1);
    assert_eq!(Store::inspect(&store, &Key::from("k"), PATIENCE).await.unwrap().unwrap().token, other.owned.token);
    assert_eq!(ends(&store, &other, Ending::Grant).await, Verdict::Done);
    key_lives(&server, TTL * 2);
    assert!(gets(&store, &one).await);
    assert!(!gets(&store, &permit(2)).await);
    ends(&store, &one, Ending::Lock).await;
    assert_eq!(Store::inspect(&store, &Key::from("k"), PATIENCE).await.unwrap(), None);
    assert_eq!(server.cli(&["EXISTS", "k"]), "1", "nobody's share is left");
}

/// A waiter without a place in the line, as in a quorum, has to learn the time, which may be sooner than it knows.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn all_who_wait_are_told_of_a_share_that_lingers() {
    let server = Server::start();
    let store = store(&server).await;
    let mut subscription = Store::subscribe(&store, &"k".into());
    subscription.opened().await;
    subscription.mark();
    for mode in [reader(), permit(1)] {
        fence(&store, &mode).await;
        assert_eq!(Store::linger(&store, &mode.owned, Ending::Lock, TTL / 2, PATIENCE).await.unwrap(), Verdict::Done);
        is_notified(&mut subscription).await;
        server.cli(&["FLUSHALL"]);
    }
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn no_share_is_taken_that_a_writer_waits_for() {
    let server = Server::start();
    let (store, far) = (store(&server).await, store(&server).await);
    let (first, waiting) = (reader(), writer());
    fence(&store, &first).await;
    assert!(!is_granted(&asks(&far, &waiting, at(1, false)).await));
    for in_line in [InLine::No, InLine::Behind, at(1, false), at(1, true)] {
        match asks(&store, &reader(), in_line).await {
            Acquired::Held { remaining: Some(left), .. } => assert!(is_about(left, TTL), "{left:?}"),
            acquired => panic!("{acquired:?}"),
        }
    }
    ends(&store, &first, Ending::Lock).await;
    assert!(!gets(&store, &reader()).await, "it is reserved");
    assert!(is_granted(&asks(&far, &waiting, at(1, false)).await));
    Store::leave(&store, &Key::from("k"), shared_place(1), PATIENCE).await.unwrap();
    ends(&far, &waiting, Ending::Lock).await;
    assert!(gets(&store, &reader()).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_writer_that_waits_and_dies_holds_readers_back_for_two_seconds_at_most() {
    let server = Server::start();
    let (store, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let (first, waiting, next) = (reader(), writer(), reader());
    fence(&store, &first).await;
    let asked = Instant::now();
    assert!(!is_granted(&asks(&far, &waiting, at(1, false)).await));
    // It is behind, and told so.
    assert!(!is_granted(&asks(&store, &next, at(1, false)).await));
    assert!(Store::heartbeat(&store, &key, shared_place(1), PATIENCE).await.unwrap());
    eventually("the heartbeat finds that it may be its turn", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        (!Store::heartbeat(&store, &key, shared_place(1), PATIENCE).await.unwrap()).then_some(())
    })
    .await;
    assert!(is_granted(&asks(&store, &next, at(1, false)).await));
    // That it is no longer is shown on simulated servers: here the machine may be busy.
    let after = asked.elapsed();
    assert!(after > Duration::from_millis(1_400), "{after:?}");
    // Those who don't wait drop the dead as well.
    assert!(gets(&store, &reader()).await);
}

/// Waits for the message that gives the turn to a waiter of this store.
async fn is_notified(subscription: &mut crate::store::notifications::Subscription) {
    soon(subscription.notified()).await;
    subscription.mark();
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_head_of_the_line_is_told_of_all_that_may_open_the_key_to_it() {
    let server = Server::start();
    let (store, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let mut heard = Store::subscribe(&store, &key);
    heard.opened().await;
    heard.mark();
    // A writer that leaves the line.
    let first = reader();
    fence(&far, &first).await;
    assert!(!is_granted(&asks(&far, &writer(), at(1, false)).await));
    let waiting = reader();
    assert!(!is_granted(&asks(&store, &waiting, at(1, false)).await));
    Store::leave(&far, &key, shared_place(1), PATIENCE).await.unwrap();
    is_notified(&mut heard).await;
    assert!(is_granted(&asks(&store, &waiting, at(1, false)).await));
    // The last reader that leaves.
    let exclusive = writer();
    assert!(!is_granted(&asks(&store, &exclusive, at(2, false)).await));
    ends(&far, &first, Ending::Lock).await;
    ends(&far, &waiting, Ending::Lock).await;
    is_notified(&mut heard).await;
    assert!(is_granted(&asks(&store, &exclusive, at(2, false)).await));
    // A reader in the line before it.
    let (one, other) = (reader(), reader());
    assert!(!is_granted(&asks(&far, &one, at(3, false)).await));
    assert!(!is_granted(&asks(&store, &other, at(3, false)).await));
    ends(&store, &exclusive, Ending::Lock).await;
    assert!(is_granted(&asks(&far, &one, at(3, false)).await));
    is_notified(&mut heard).await;
    assert!(is_granted(&asks(&store, &other, at(3, false)).await));
    ends(&far, &one, Ending::Lock).await;
    ends(&far, &other, Ending::Lock).await;
    // A permit that is released.
    let (one, other) = (permit(2), permit(2));
    fence(&far, &one).await;
    fence(&far, &other).await;
    let third = permit(2);
    assert!(!is_granted(&asks(&store, &third, at(4, false)).await));
    ends(&far, &other, Ending::Lock).await;
    is_notified(&mut heard).await;
    assert!(!gets(&far, &permit(2)).await, "it is the turn of the head");
    assert!(is_granted(&asks(&store, &third, at(4, false)).await));
    ends(&far, &one, Ending::Lock).await;
    ends(&far, &third, Ending::Lock).await;
    // A writer that becomes a reader.
    let exclusive = writer();
    fence(&far, &exclusive).await;
    let waiting = reader();
    assert!(!is_granted(&asks(&store, &waiting, at(5, false)).await));
    assert_eq!(Store::downgrade(&far, &exclusive.owned, PATIENCE).await.unwrap(), Downgraded::Done);
    is_notified(&mut heard).await;
    assert!(is_granted(&asks(&store, &waiting, at(5, false)).await));
    assert_eq!(server.cli(&["EXISTS", "{k}:queue", "{k}:alive"]), "0");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_place_that_stays_is_the_head_of_the_line_for_the_next_of_its_process() {
    let server = Server::start();
    let (store, far) = (store(&server).await, store(&server).await);
    // Once it had a reservation, once it found the key shared.
    for is_shared in [false, true] {
        let first = if is_shared { reader() } else { writer() };
        fence(&far, &first).await;
        let (waiting, writes) = (reader(), writer());
        let before = writer();
        if is_shared {
            assert!(!is_granted(&asks(&far, &before, at(9, false)).await));
        }
        assert!(!is_granted(&asks(&store, &waiting, at(1, false)).await));
        assert!(!is_granted(&asks(&far, &writes, at(1, false)).await));
        if is_shared {
            Store::leave(&far, &Key::from("k"), shared_place(9), PATIENCE).await.unwrap();
        } else {
            ends(&far, &first, Ending::Lock).await;
        }
        assert!(is_granted(&asks(&store, &waiting, at(1, true)).await));
        let (second, third, fourth) = (reader(), reader(), reader());
        assert!(is_granted(&asks(&store, &second, at(1, true)).await));
        assert!(is_granted(&asks(&store, &third, at(1, false)).await));
        assert!(!is_granted(&asks(&store, &fourth, at(1, false)).await), "it is the writer's turn");
        assert_all_have_ttls(&server);
        for ended in [&first, &waiting, &second, &third] {
            ends(&store, ended, Ending::Lock).await;
        }
        assert!(is_granted(&asks(&far, &writes, at(1, false)).await));
        ends(&far, &writes, Ending::Lock).await;
        Store::leave(&store, &Key::from("k"), shared_place(1), PATIENCE).await.unwrap();
        nothing_is_left(&server);
    }
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_lock_becomes_a_share_in_one_step_and_keeps_all_it_has() {
    let server = Server::start();
    let (store, key) = (store(&server).await, Key::from("k"));
    let one = Wanted { metadata: b"meta\ndata".as_slice().into(), ..for_ttl(writer(), TTL * 3) };
    let token = fence(&store, &one).await;
    let shared = Wanted { owned: Owned { mode: Mode::Read, ..one.owned.clone() }, ..one.clone() };
    for _ in 0..2 {
        assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::Done);
        key_lives(&server, TTL * 3);
    }
    let holder = Store::inspect(&store, &key, PATIENCE).await.unwrap().unwrap();
    assert_eq!((holder.token, holder.fencing_token), (one.owned.token.clone(), Some(token)));
    assert_eq!(holder.metadata, b"meta\ndata");
    assert_eq!(renews(&store, &one, TTL, Extending::AtLeast).await, TAKEN);
    assert_eq!(renews(&store, &shared, TTL, Extending::AtLeast).await, Verdict::Done);
    assert!(gets(&store, &reader()).await);
    assert!(!gets(&store, &writer()).await);
    server.cli(&["FLUSHALL"]);
    assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::NotOurs(Loss::Missing));
    fence(&store, &writer()).await;
    assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::NotOurs(Loss::Taken));
    server.cli(&["FLUSHALL"]);
    // Another grant relies on it; or has, and wants it to stay taken.
    let one = again(&writer());
    let other = again(&one);
    fence(&store, &one).await;
    fence(&store, &other).await;
    assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::NotNow);
    Store::linger(&store, &other.owned, Ending::Grant, TTL, PATIENCE).await.unwrap();
    assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::NotNow);
    server.cli(&["FLUSHALL"]);
    fence(&store, &one).await;
    assert_eq!(Store::downgrade(&store, &one.owned, PATIENCE).await.unwrap(), Downgraded::Done);
    let shared = Owned { mode: Mode::Read, ..one.owned.clone() };
    assert_eq!(Store::release(&store, &shared, Ending::Grant, PATIENCE).await.unwrap(), Verdict::Done);
    nothing_is_left(&server);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_server_out_of_memory_refuses_new_shares_and_still_renews_and_ends_others() {
    let server = Server::start();
    let store = store(&server).await;
    let (one, other, third) = (reader(), again(&reader()), again(&reader()));
    let twin = again(&other);
    let (exclusive, key) = (writer(), Key::from("w"));
    let exclusive = Wanted { owned: Owned { keys: [key].into(), ..exclusive.owned.clone() }, ..exclusive };
    for holder in [&one, &other, &twin, &third, &exclusive] {
        fence(&store, holder).await;
    }
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let keys = || server.cli(&["DBSIZE"]);
    let before = keys();
    for fenced in [true, false] {
        for holder in [reader(), again(&one)] {
            let refused = Store::acquire(&store, &Wanted { fenced, ..holder }, InLine::No, PATIENCE).await.unwrap_err();
            assert_eq!(refused.code(), Some("OOM"), "{refused}");
        }
        let free = Wanted { owned: Owned { keys: [Key::from("free")].into(), ..reader().owned }, fenced, ..reader() };
        let refused = Store::acquire(&store, &free, InLine::No, PATIENCE).await.unwrap_err();
        assert_eq!(refused.code(), Some("OOM"), "{refused}");
    }
    assert_eq!(keys(), before);
    assert_eq!(server.cli(&["ZCARD", "{k}:holders"]), "3");
    assert_eq!(renews(&store, &one, TTL * 5, Extending::AtLeast).await, Verdict::Done);
    assert_eq!(renews(&store, &other, TTL * 6, Extending::KeepRecord).await, Verdict::Done);
    assert_eq!(renews(&store, &twin, TTL * 2, Extending::Exactly).await, Verdict::Done);
    key_lives(&server, TTL * 6);
    let claims = again(&one);
    assert_eq!(renews(&store, &claims, TTL, Extending::Claim { earlier: None }).await, Verdict::Done);
    assert_eq!(ends(&store, &other, Ending::Grant).await, Verdict::Done);
    key_lives(&server, TTL * 5);
    assert_eq!(Store::linger(&store, &twin.owned, Ending::Grant, TTL * 7, PATIENCE).await.unwrap(), Verdict::Done);
    key_lives(&server, TTL * 7);
    assert_eq!(Store::downgrade(&store, &exclusive.owned, PATIENCE).await.unwrap(), Downgraded::Done);
    assert_eq!(ends(&store, &claims, Ending::Lock).await, Verdict::Done);
    assert_eq!(ends(&store, &third, Ending::Lock).await, Verdict::Done);
    assert_all_have_ttls(&server);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_derived_key_that_holds_something_else_is_named_and_means_no_loss() {
    let server = Server::start();
    let (store, key) = (store(&server).await, Key::from("k"));
    let holder = reader();
    for derived in ["{k}:holders", "{k}:shares"] {
        server.cli(&["FLUSHALL"]);
        fence(&store, &holder).await;
        server.cli(&["SET", derived, "text", "PX", "60000"]);
        let before = server.cli(&["DBSIZE"]);
        let (owned, time) = (&holder.owned, PATIENCE);
        let errors = [
            Store::acquire(&store, &reader(), InLine::No, time).await.map(drop),
            Store::renew(&store, owned, TTL, Extending::AtLeast, time).await.map(drop),
            Store::release(&store, owned, Ending::Lock, time).await.map(drop),
            Store::linger(&store, owned, Ending::Grant, TTL, time).await.map(drop),
            Store::downgrade(&store, owned, time).await.map(drop),
            Store::remaining(&store, owned, time).await.map(drop),
            Store::holders(&store, &key, time).await.map(drop),
            Store::inspect(&store, &key, time).await.map(drop),
        ];
        for error in errors {
            let error = error.unwrap_err();
            assert!(error.to_string().contains(derived), "{error}");
        }
        assert_eq!((server.cli(&["GET", derived]), server.cli(&["DBSIZE"])), ("text".to_owned(), before));
    }
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn all_holders_are_listed_once_however_many_they_are() {
    let server = Server::start();
    let (store, key) = (store(&server).await, Key::from("k"));
    let holders = async || Store::holders(&store, &key, PATIENCE).await.unwrap();
    assert_eq!(holders().await, []);
    let exclusive = Wanted { metadata: b"m".as_slice().into(), ..writer() };
    let token = fence(&store, &exclusive).await;
    let [holder] = <[Holder; 1]>::try_from(holders().await).unwrap();
    assert_eq!((holder.token, holder.fencing_token), (exclusive.owned.token.clone(), Some(token)));
    assert_eq!(holder.metadata, b"m");
    ends(&store, &exclusive, Ending::Lock).await;
    let mut longest = Vec::new();
    for n in 1..=1_000 {
        let wanted = for_ttl(Wanted { metadata: b"m\n\xff\n".as_slice().into(), ..reader() }, TTL + PATIENCE * n);
        fence(&store, &wanted).await;
        longest.insert(0, wanted.owned.token.clone());
    }
    let all = holders().await;
    assert_eq!(all.iter().map(|holder| holder.token.clone()).collect::<Vec<_>>(), longest);
    assert!(all.iter().all(|holder| holder.metadata == b"m\n\xff\n" && holder.fencing_token.is_some()));
    let inspected = Store::inspect(&store, &key, PATIENCE).await.unwrap().unwrap();
    assert_eq!(inspected.token, longest[0]);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_dead_are_removed_a_few_at_a_time_and_never_count() {
    let server = Server::start();
    let store = store(&server).await;
    let keeps = permit(2);
    fence(&store, &keeps).await;
    let add = "for i = 1, 1000 do redis.call('ZADD', KEYS[1], i, 'dead' .. i) \
        redis.call('HSET', KEYS[2], 'dead' .. i, '1\\n-\\n') end";
    server.cli(&["EVAL", add, "2", "{k}:holders", "{k}:shares"]);
    let count = || (server.cli(&["ZCARD", "{k}:holders"]), server.cli(&["HLEN", "{k}:shares"]));
    assert_eq!(Store::holders(&store, &Key::from("k"), PATIENCE).await.unwrap().len(), 1);
    let dead = Owned { token: "dead7".parse().unwrap(), ..keeps.owned.clone() };
    assert_eq!(Store::renew(&store, &dead, TTL, Extending::AtLeast, PATIENCE).await.unwrap(), MISSING);
    let second = permit(2);
    assert!(gets(&store, &second).await);
    let after = 1_002 - 128;
    assert_eq!(count(), (after.to_string(), after.to_string()));
    assert!(!gets(&store, &permit(2)).await);
    // Whoever was dead comes again, and is not removed with the dead.
    ends(&store, &second, Ending::Lock).await;
    let wanted = Wanted { owned: Owned { token: "dead129".parse().unwrap(), ..keeps.owned.clone() }, ..permit(2) };
    assert!(gets(&store, &wanted).await);
    assert_eq!(renews(&store, &wanted, TTL, Extending::AtLeast).await, Verdict::Done);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn nobody_gets_a_permit_while_it_is_not_known_who_has_the_others() {
    let server = Server::start();
    let store = store(&server).await;
    let holder = permit(3);
    fence(&store, &holder).await;
    // Evicted, say.
    server.cli(&["DEL", "{k}:holders"]);
    match asks(&store, &permit(3), InLine::No).await {
        Acquired::Held { remaining: Some(left), .. } => assert!(is_about(left, TTL)),
        acquired => panic!("{acquired:?}"),
    }
    assert_eq!(renews(&store, &holder, TTL, Extending::AtLeast).await, MISSING);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn whoever_may_not_use_the_keys_of_shares_is_told_which_they_are() {
    let server = Server::start();
    let rules = ["resetchannels", "~k", "~{k}:fence", "~{k}:grants", "~{k}:queue", "~{k}:alive", "+@all"];
    assert_eq!(server.cli(&[&["ACL", "SETUSER", "app", "on", ">secret"][..], &rules].concat()), "OK");
    let url = server.url().replace("redis://", "redis://app:secret@");
    let store = RedisStore::connect(Driver::default(), &url, String::new(), PATIENCE, 0).await.unwrap();
    for wanted in [reader(), permit(3)] {
        for in_line in [InLine::No, at(1, false)] {
            let refused = Store::acquire(&store, &wanted, in_line, PATIENCE).await.unwrap_err();
            assert_eq!(refused.code(), Some("NOPERM"), "{refused}");
            assert!(refused.to_string().contains("{k}:holders {k}:shares"), "{refused}");
        }
    }
    // The plain lock needs none of them, nor does the line.
    let lock = writer();
    assert!(is_granted(&asks(&store, &lock, at(2, false)).await));
    assert!(Store::inspect(&store, &Key::from("k"), PATIENCE).await.unwrap().is_some());
    ends(&store, &lock, Ending::Lock).await;
    assert!(store.has_line());
    assert_eq!(server.cli(&["EXISTS", "k"]), "0");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn what_is_refused_in_the_middle_of_a_grant_leaves_nothing_of_it() {
    for forbidden in ["-pexpire", "-hset", "-zadd", "-hget", "-zscore", "-zrange", "-zrangebyscore", "-zcount"] {
        let server = Server::start();
        let user = ["ACL", "SETUSER", "app", "on", ">secret", "resetchannels", "~*", "+@all", forbidden];
        assert_eq!(server.cli(&user), "OK");
        let url = server.url().replace("redis://", "redis://app:secret@");
        let (store, able) = (
            RedisStore::connect(Driver::default(), &url, String::new(), PATIENCE, 0).await.unwrap(),
            store(&server).await,
        );
        for before in [None, Some(permit(3))] {
            let holder = before.inspect(|_| {});
            if let Some(holder) = &holder {
                fence(&able, holder).await;
            }
            let look = || {
                [server.cli(&["GET", "k"]), server.cli(&["ZCARD", "{k}:holders"]), server.cli(&["HLEN", "{k}:shares"])]
            };
            let seen = look();
            match Store::acquire(&store, &permit(3), InLine::No, PATIENCE).await {
                Err(refused) => {
                    assert_eq!(refused.code(), Some("NOPERM"), "{forbidden}: {refused}");
                    assert_eq!(look(), seen, "{forbidden}");
                }
                Ok(_) => assert!(["-zcount", "-zrangebyscore"].contains(&forbidden) && holder.is_none(), "{forbidden}"),
            }
            server.cli(&["FLUSHALL"]);
        }
    }
}

#[test]
#[ignore = "needs a server; tests/internals.rs runs it"]
fn a_request_that_comes_too_late_changes_nothing() {
    let server = Server::start();
    let scripts = Scripts::new();
    let all = [
        &scripts.acquire_shared,
        &scripts.renew_shared,
        &scripts.end_share,
        &scripts.downgrade,
        &scripts.remaining_shared,
        &scripts.holders,
    ];
    for script in all {
        let source = std::str::from_utf8(&script.source).unwrap();
        assert!(server.cli(&["EVAL", source, "1", "k", "2048"]).contains("LATE"));
    }
}
