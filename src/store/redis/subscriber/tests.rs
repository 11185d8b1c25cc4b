use tenure_test_support::{Mode, Proxy, Server, eventually, soon};
use tokio::time::timeout;

use super::super::driver;
use super::*;

/// On the caller's runtime.
fn subscriber(url: &str) -> Subscriber {
    Subscriber::new(driver::pub_sub_of(url), "process".into(), || 0)
}

fn subscription(server: &Server) -> Vec<String> {
    let clients = server.cli(&["CLIENT", "LIST", "TYPE", "pubsub"]);
    clients.lines().filter_map(|client| client.split(' ').next()).map(str::to_owned).collect()
}

/// Waits until the line is not open.
async fn closed(subscription: &mut Subscription) {
    while subscription.is_open() {
        subscription.notified().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_slow_server_is_doubted_and_its_connection_kept() {
    let server = Server::start();
    let proxy = Proxy::start(server.port()).await;
    let subscriber = subscriber(&proxy.url());
    let mut listening_here = subscriber.subscribe("k".into());
    soon(listening_here.opened()).await;
    assert!(listening_here.is_open());
    let before = subscription(&server);
    // Asked twice and more, it has answered at once.
    assert!(timeout(PING_EVERY * 5 / 2, closed(&mut listening_here)).await.is_err());
    proxy.set(Mode::Delay((DOUBT + TIMEOUT) / 2));
    soon(closed(&mut listening_here)).await;
    soon(listening_here.opened()).await;
    assert!(listening_here.is_open());
    assert_eq!(subscription(&server), before);
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_listener_that_stays_when_all_is_over_starts_nothing() {
    let server = Server::start();
    let subscriber = subscriber(&server.url());
    let mut listening_here = subscriber.subscribe("k".into());
    soon(listening_here.opened()).await;
    let shared = Arc::downgrade(&subscriber.0);
    drop(subscriber);
    let waits_on = async {
        loop {
            listening_here.notified().await;
        }
    };
    assert!(timeout(CHECK_EVERY * 4, waits_on).await.is_err());
    eventually("its connection is closed", async || subscription(&server).is_empty().then_some(())).await;
    drop(listening_here);
    eventually("nothing is left", async || (shared.strong_count() == 0).then_some(())).await;
}

#[test]
#[ignore = "needs a server; tests/internals.rs runs it"]
fn a_task_that_wakes_up_after_another_was_started_changes_nothing() {
    let server = Server::start();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (idle, runs) = (runtime(), runtime());
    let subscriber = subscriber(&server.url());
    let mut listening_here = subscriber.subscribe("k".into());
    assert!(!listening_here.is_open(), "outside of a runtime nobody listens");
    idle.block_on(async {
        listening_here = subscriber.subscribe("k".into());
        soon(listening_here.opened()).await;
    });
    let starts = || subscriber.0.running().starts;
    assert_eq!(starts(), 1);
    runs.block_on(async {
        // Not with a short silence.
        assert!(timeout(STALLED / 2, listening_here.notified()).await.is_err());
        soon(async {
            while starts() == 1 {
                listening_here.notified().await;
            }
        })
        .await;
        soon(listening_here.opened()).await;
        assert!(listening_here.is_open());
        listening_here.mark();
    });
    // The first one ends, and its connection with it.
    idle.block_on(eventually("one is left", async || (subscription(&server).len() == 1).then_some(())));
    assert!(listening_here.is_open());
    runs.block_on(async {
        assert!(timeout(STALLED * 2, listening_here.notified()).await.is_err(), "no news");
        server.cli(&["PUBLISH", "k", ""]);
        soon(listening_here.notified()).await;
    });
    assert_eq!(starts(), 2);
}
