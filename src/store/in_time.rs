//! Each operation of a store ends within its timeout, whatever the server does: a frozen server, and three of them.

#![cfg(any(feature = "fred", feature = "redis"))]

use std::time::Instant as Clock;

use tenure_test_support::{Server, Stalls};
use tokio_util::task::TaskTracker;

use super::quorum::{self, QuorumStore};
use super::redis::{Driver, RedisStore};
use super::*;
use crate::mode::Mode;

const TIMEOUT: Duration = Duration::from_millis(100);
/// Longer than any test, for a call that would never end.
const NEVER: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(60);
const PLACE: LinePlace = LinePlace { number: 1, is_shared: true };

fn owned(mode: Mode, grant: Option<GrantId>) -> Owned {
    let keys = [Key::from("k")].into();
    Owned { keys, token: Token::random(), own_token: grant.is_none(), grant, mode }
}

/// Ends an operation, and fails if that takes longer than it may.
async fn ends_in_time<T: fmt::Debug>(name: &str, store: &dyn Store, call: Answer<'_, T>) {
    let (stalls, began) = (Stalls::watch(), Clock::now());
    let reply = tokio::time::timeout(NEVER, call).await;
    let took = began.elapsed();
    assert!(took <= stalls.added_to(TIMEOUT + GRACE + Duration::from_millis(50)), "{name} took {took:?}: {store:?}");
    let error = reply.unwrap().unwrap_err();
    assert!(matches!(&error, Error::Unsupported(_)) || error.is_transient(), "{name}: {error}");
}

async fn all_end_in_time(store: &dyn Store) {
    for mode in [Mode::Exclusive, Mode::Read, Mode::Permit] {
        for grant in [None, Some(GrantId::random())] {
            let (owned, key) = (owned(mode, grant), Key::from("k"));
            let (wanted, next) =
                (Wanted::at_once(owned.clone(), TTL), Next { place: PLACE, in_line: true, may_keep: true, tokens: 1 });
            let in_line = InLine::At { key: 0, place: PLACE, stays: false };
            ends_in_time("acquire", store, store.acquire(&wanted, InLine::No, TIMEOUT)).await;
            ends_in_time("acquire in line", store, store.acquire(&wanted, in_line, TIMEOUT)).await;
            for how in [Extending::AtLeast, Extending::Exactly] {
                ends_in_time("renew", store, store.renew(&owned, TTL, how, TIMEOUT)).await;
            }
            for ending in [Ending::Lock, Ending::Grant] {
                ends_in_time("release", store, store.release(&owned, ending, TIMEOUT)).await;
                ends_in_time("linger", store, store.linger(&owned, ending, TTL, TIMEOUT)).await;
            }
            ends_in_time("undo", store, store.undo(&owned, &wanted.latest, TIMEOUT)).await;
            ends_in_time("remaining", store, store.remaining(&owned, TIMEOUT)).await;
            // A quorum does neither.
            if store.capabilities().hands_over {
                let call = store.hand_over(&owned, Ending::Lock, &wanted, &next, TIMEOUT);
                ends_in_time("hand over", store, call).await;
                ends_in_time("enter", store, store.enter(&key, PLACE, TIMEOUT)).await;
            }
        }
    }
}

async fn frozen<S: Store>(servers: &[Server], store: S) -> S {
    // The scripts and the clocks are known.
    let wanted = Wanted::at_once(owned(Mode::Exclusive, None), TTL);
    let acquired = store.acquire(&wanted, InLine::No, NEVER).await.unwrap();
    assert!(matches!(acquired, Acquired::Granted { .. }), "{acquired:?}");
    servers.iter().for_each(Server::freeze);
    store
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn every_operation_on_a_frozen_server_ends_in_time() {
    let server = Server::start();
    let store = RedisStore::connect(Driver::default(), &server.url(), String::new(), NEVER, 0).await.unwrap();
    all_end_in_time(&frozen(&[server], store).await).await;
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn every_operation_on_a_frozen_quorum_ends_in_time() {
    let servers = [Server::start(), Server::start(), Server::start()];
    let urls = servers.each_ref().map(Server::url);
    let nodes = quorum::connect(Driver::default(), &urls, "", NEVER, true, TTL).await.unwrap();
    let store = QuorumStore::new(nodes, Duration::ZERO, TaskTracker::new());
    all_end_in_time(&frozen(&servers, store).await).await;
}
