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
    Wanted { owned, metadata, ttl, fenced: false, queueing: Queueing::Own, takes_over: false, latest, limit: 0 }
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
