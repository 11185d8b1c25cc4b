use std::sync::Arc;

use tenure_test_support::Server;

use super::super::Driver;
use super::*;
use crate::hold::Owned;
use crate::mode::Mode;
use crate::store::{Ending, HandedOver, InLine, Next, Queueing, Store};
use crate::{Key, Token};

const PATIENCE: Duration = Duration::from_secs(10);

async fn store(server: &Server) -> RedisStore {
    RedisStore::connect(Driver::default(), &server.url(), String::new(), PATIENCE, 0).await.unwrap()
}

fn wanted() -> Wanted {
    let owned = Owned {
        keys: [Key::from("k")].into(),
        token: Token::random(),
        own_token: true,
        grant: None,
        mode: Mode::Exclusive,
    };
    let (metadata, ttl, latest) = (Box::default(), PATIENCE, Arc::default());
    let (queueing, since) = (Queueing::Own, Instant::now());
    Wanted { owned, metadata, ttl, fenced: false, queueing, takes_over: false, latest, limit: 0, since }
}

fn own(number: u64) -> LinePlace {
    LinePlace { number, is_shared: false }
}

async fn asks(store: &RedisStore, wanted: &Wanted, number: u64) -> bool {
    let in_line = InLine::At { key: 0, place: own(number), stays: false };
    matches!(Store::acquire(store, wanted, in_line, PATIENCE).await.unwrap(), Acquired::Granted { .. })
}

async fn hands_over(store: &RedisStore, from: &Wanted, to: &Wanted, number: u64) -> HandedOver {
    let next = Next { place: own(number), in_line: true, may_keep: false, tokens: 1 };
    store.hand_over(&from.owned, Ending::Lock, to, &next, PATIENCE).await.unwrap()
}

/// A place that nobody has any more, because a request with it arrived late, say, or that of one who isn't polled.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_process_that_hands_over_has_no_more_turns_than_it_has_places() {
    let server = Server::start();
    let (near, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let (first, second, third, other) = (wanted(), wanted(), wanted(), wanted());
    assert!(asks(&near, &first, 1).await);
    near.enter(&key, own(2), PATIENCE).await.unwrap();
    assert!(!asks(&far, &other, 1).await);
    let handed_over = hands_over(&near, &first, &second, 3).await;
    assert!(matches!(handed_over, HandedOver::Done { .. }), "the first in line is of this process");
    assert_eq!(hands_over(&near, &second, &third, 4).await, HandedOver::PassedBy);
    assert!(asks(&far, &other, 1).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_process_that_asks_has_no_more_turns_than_it_has_places() {
    let server = Server::start();
    let (near, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let (first, second, third, other) = (wanted(), wanted(), wanted(), wanted());
    assert!(asks(&near, &first, 1).await);
    near.enter(&key, own(2), PATIENCE).await.unwrap();
    assert!(!asks(&far, &other, 1).await);
    // Somebody has to listen: else, the release does not look at the line.
    let mut listening = Store::subscribe(&far, &key);
    listening.opened().await;
    Store::release(&near, &first.owned, Ending::Lock, PATIENCE).await.unwrap();
    assert!(asks(&near, &second, 3).await, "reserved for one of this process");
    Store::release(&near, &second.owned, Ending::Lock, PATIENCE).await.unwrap();
    assert!(!asks(&near, &third, 4).await, "it is the turn of another process");
    assert!(asks(&far, &other, 1).await);
}

/// Its holder has died, say, and its ttl has ended.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_lock_that_nobody_has_released_goes_to_the_head_of_the_line_whoever_asks_first() {
    let server = Server::start();
    let (near, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let (first, other, behind) = (wanted(), wanted(), wanted());
    near.enter(&key, own(1), PATIENCE).await.unwrap();
    let held = Store::acquire(&far, &behind, InLine::Behind, PATIENCE).await.unwrap();
    assert!(matches!(held, Acquired::Held { .. }), "it is the turn of another: {held:?}");
    server.cli(&["DEL", "k"]);
    assert!(asks(&near, &first, 1).await, "its place was reserved");
    near.enter(&key, own(2), PATIENCE).await.unwrap();
    server.cli(&["DEL", "k"]);
    assert!(!asks(&far, &other, 1).await, "it is the turn of another");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_release_gives_the_lock_to_the_head_of_the_line_in_the_same_step() {
    let server = Server::start();
    let (near, far, key) = (store(&server).await, store(&server).await, Key::from("k"));
    let (first, next, passing) = (wanted(), wanted(), wanted());
    assert!(asks(&near, &first, 1).await);
    assert!(!asks(&far, &next, 1).await);
    let mut listening = Store::subscribe(&far, &key);
    listening.opened().await;
    Store::release(&near, &first.owned, Ending::Lock, PATIENCE).await.unwrap();
    assert!(server.cli(&["GET", "k"]).starts_with('\n'), "it is reserved");
    let refused = Store::acquire(&near, &passing, InLine::No, PATIENCE).await.unwrap();
    assert!(matches!(refused, Acquired::Held { .. }), "{refused:?}");
    assert!(asks(&far, &next, 1).await);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn places_of_a_process_that_has_died_cost_the_others_nothing() {
    let server = Server::start();
    let (dead, alive, key) = (store(&server).await, store(&server).await, Key::from("k"));
    for number in 1..=3 {
        dead.enter(&key, own(number), PATIENCE).await.unwrap();
    }
    // It said last that it would be alive until then.
    server.cli(&["HSET", "{k}:alive", &server.cli(&["HKEYS", "{k}:alive"]), "1"]);
    assert!(asks(&alive, &wanted(), 1).await);
    assert_eq!(server.cli(&["EXISTS", "{k}:queue", "{k}:alive"]), "0");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_heartbeat_without_a_place_enters_none() {
    let server = Server::start();
    let (store, key) = (store(&server).await, Key::from("k"));
    assert!(asks(&store, &wanted(), 1).await);
    assert!(!store.heartbeat(&key, own(2), PATIENCE).await.unwrap());
    assert_eq!(server.cli(&["EXISTS", "{k}:queue", "{k}:alive"]), "0");
}

/// Returns a request for these keys.
fn wanted_all<const N: usize>(keys: [&str; N]) -> Wanted {
    let owned = Owned { keys: keys.map(Key::from).into(), ..wanted().owned };
    Wanted { owned, fenced: true, ..wanted() }
}

/// Asks with this place, which is in the line for the `at`th key. Returns which key another holds, if one does.
async fn refused(store: &RedisStore, wanted: &Wanted, at: usize, number: u64) -> Option<usize> {
    let in_line = InLine::At { key: at, place: own(number), stays: false };
    match Store::acquire(store, wanted, in_line, PATIENCE).await.unwrap() {
        Acquired::Granted { .. } => None,
        Acquired::Held { place, .. } => Some(place),
    }
}

/// Enters the line for a free key, and is given it.
async fn has_its_turn(store: &RedisStore, key: &str, number: u64) {
    store.enter(&Key::from(key), own(number), PATIENCE).await.unwrap();
    assert!(!store.heartbeat(&Key::from(key), own(number), PATIENCE).await.unwrap(), "it is its turn");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn of_those_whose_turn_it_is_at_one_key_each_the_first_that_asks_has_all() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    let (first, second) = (wanted_all(["a", "b"]), wanted_all(["b", "a"]));
    has_its_turn(&near, "a", 1).await;
    has_its_turn(&far, "b", 2).await;
    near.enter(&Key::from("b"), own(3), PATIENCE).await.unwrap();
    assert_eq!(refused(&near, &first, 0, 1).await, None);
    // Before it has asked, and also where its process has no other place.
    assert_eq!(server.cli(&["ZCARD", "{b}:queue"]), "2");
    assert_eq!(refused(&far, &second, 0, 2).await, Some(0), "another has it now");
    assert_eq!(server.cli(&["EXISTS", "{a}:queue"]), "0");
    Store::release(&near, &first.owned, Ending::Lock, PATIENCE).await.unwrap();
    assert_eq!(refused(&near, &first, 1, 3).await, Some(1), "the other comes first, as before");
    assert_eq!(refused(&far, &second, 0, 2).await, None);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_turn_at_one_key_is_no_reason_to_take_another_that_is_held_or_a_turn_of_nobody() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    let both = wanted_all(["a", "b"]);
    has_its_turn(&far, "b", 2).await;
    assert_eq!(refused(&near, &both, 0, 1).await, Some(1), "it is no turn of its own");
    has_its_turn(&near, "a", 1).await;
    // What other libraries hold may look like anything.
    for held in ["mine", "\nmine", "\nmine:w1", "\n\nr", "\n\nh"] {
        server.cli(&["SET", "b", held, "PX", "60000"]);
        assert_eq!(refused(&near, &both, 0, 1).await, Some(1), "{held:?}");
    }
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn one_that_waits_for_several_keys_keeps_its_place_while_it_has_to_wait_there() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    let all = wanted_all(["a", "b", "c"]);
    for held in ["a", "b"] {
        server.cli(&["SET", held, "another", "PX", "60000"]);
    }
    assert_eq!([refused(&near, &all, 1, 1).await, refused(&near, &all, 2, 1).await], [Some(1), Some(0)]);
    // And while it is the turn of another, there or elsewhere.
    server.cli(&["DEL", "b"]);
    has_its_turn(&far, "b", 2).await;
    assert_eq!([refused(&near, &all, 0, 1).await, refused(&near, &all, 1, 1).await], [Some(0), Some(1)]);
    assert_eq!(refused(&near, &all, 2, 1).await, Some(0));
}

/// Gives `far`'s turn at one key to a request of `near` for both, which releases them.
async fn loses_its_turn(near: &RedisStore, far: &RedisStore) {
    let both = wanted_all(["a", "b"]);
    has_its_turn(near, "a", 1).await;
    has_its_turn(far, "b", 2).await;
    assert_eq!(refused(near, &both, 0, 1).await, None);
    Store::release(near, &both.owned, Ending::Lock, PATIENCE).await.unwrap();
}

/// Otherwise those who are near the server are always there before one that is far from it.
#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn one_that_has_lost_its_turn_loses_it_no_second_time() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    loses_its_turn(&near, &far).await;
    has_its_turn(&near, "a", 3).await;
    assert_eq!(refused(&near, &wanted_all(["a", "b"]), 0, 3).await, Some(1));
    assert_eq!(refused(&far, &wanted_all(["b"]), 0, 2).await, None);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn one_that_has_lost_its_turn_passes_the_next_on_when_it_leaves() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    loses_its_turn(&near, &far).await;
    far.leave(&Key::from("b"), own(2), PATIENCE).await.unwrap();
    assert_eq!(server.cli(&["EXISTS", "b", "{b}:queue", "{b}:alive"]), "0");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn the_others_in_a_line_keep_their_places_when_a_turn_that_is_almost_over_goes_back_there() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    has_its_turn(&near, "a", 1).await;
    has_its_turn(&far, "b", 2).await;
    near.enter(&Key::from("b"), own(3), PATIENCE).await.unwrap();
    server.cli(&["PEXPIRE", "b", "300"]);
    assert_eq!(refused(&near, &wanted_all(["a", "b"]), 0, 1).await, None);
    let left: u64 = server.cli(&["PTTL", "{b}:queue"]).parse().unwrap();
    assert!(left > 5_000, "{left} ms");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_turn_that_cannot_go_back_leaves_nothing_in_the_line() {
    let server = Server::start();
    let (near, far) = (store(&server).await, store(&server).await);
    has_its_turn(&near, "a", 1).await;
    has_its_turn(&far, "b", 2).await;
    server.cli(&["SET", "{b}:alive", "no hash"]);
    assert_eq!(refused(&near, &wanted_all(["a", "b"]), 0, 1).await, None);
    assert_eq!(server.cli(&["EXISTS", "{b}:queue"]), "0");
}
