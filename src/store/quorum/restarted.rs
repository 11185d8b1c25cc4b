//! Real servers that come back with less than they knew, and clients whose clocks are wrong.

use std::sync::Arc;
use std::time::Duration;

use tenure_test_support::{Server, eventually, soon};
use tokio_util::task::TaskTracker;

use super::QuorumStore;
use super::clocks::since_1970;
use crate::Locker;
use crate::store::node::Node;
use crate::store::redis::{Driver, RedisStore, url};

const WINDOW: Duration = Duration::from_secs(5);

/// A client whose clock is wrong by so many microseconds.
async fn client(servers: &[Server], skew: i64) -> Locker {
    let mut nodes = Vec::new();
    for server in servers {
        let target = url::parse(&server.url()).unwrap();
        let node = RedisStore::open_lazily(Driver::default(), &target, String::new(), Duration::from_secs(1)).unwrap();
        node.ready(Duration::from_secs(20)).await.unwrap();
        nodes.push((server.url(), Arc::new(node) as Arc<dyn Node>));
    }
    let releases = TaskTracker::new();
    let clock = move || since_1970().saturating_add_signed(skew);
    let store = QuorumStore::with_clock(nodes, WINDOW, releases.clone(), clock);
    Locker::builder().ttl(Duration::from_secs(2)).build_with(Box::new(store), None, releases)
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn fencing_tokens_grow_where_a_majority_comes_back_with_an_old_dump() {
    let mut servers = [(); 3].map(|()| Server::start());
    let locker = client(&servers, 0).await;
    let first_fence = eventually("all have granted it", async || {
        let first = soon(locker.lock("k")).await.unwrap();
        let fence = first.fencing_token().unwrap();
        drop(first.release().await);
        // Also the one that was not waited for; it may have been too slow to vote.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let remember = |server: &Server| server.cli(&["GET", "{k}:fence"]) == fence.to_string();
        servers.iter().all(remember).then_some(fence)
    })
    .await;
    let fence = Some(first_fence.to_string());
    for server in &servers {
        assert_eq!(server.cli(&["SAVE"]), "OK");
    }
    let ahead = client(&servers, 2_500_000).await;
    let before = soon(ahead.lock("k")).await.unwrap();
    assert!(before.fencing_token() > Some(first_fence + 2_000_000));
    for server in &mut servers {
        server.kill();
        server.restart();
        assert_eq!(Some(server.cli(&["GET", "{k}:fence"])), fence, "it has found its dump");
    }
    drop(eventually("they vote again", async || ahead.lock("other").await.ok()).await);
    // Its proposal is above what they have found, below what they have forgotten: the restart window has passed, and
    // little more.
    let behind = client(&servers, -5_000_000).await;
    let after = soon(behind.lock("k")).await.unwrap();
    assert!(after.fencing_token() > before.fencing_token(), "{:?}", after.fencing_token());
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn a_token_that_comes_back_is_told_no_number_that_its_nodes_found_on_disk() {
    let mut servers = [(); 3].map(|()| Server::start());
    let locker = client(&servers, 0).await;
    let again = || locker.lock("k").ttl(WINDOW).token("worker-7".parse().unwrap());
    // A node that was too slow to vote doesn't have it.
    let everywhere = async || {
        eventually("all have granted it", async || {
            let guard = soon(again()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            let has = |server: &Server| server.cli(&["GET", "k"]) == "worker-7";
            if !servers.iter().all(has) {
                drop(guard.release().await);
                return None;
            }
            Some(guard)
        })
        .await
    };
    drop(eventually("they vote", async || locker.lock("other").await.ok()).await);
    let first = everywhere().await;
    for server in &servers {
        assert_eq!(server.cli(&["SAVE"]), "OK");
    }
    first.release().await.unwrap();
    let between = soon(locker.lock("k")).await.unwrap();
    let fence = between.fencing_token();
    between.release().await.unwrap();
    // Renewals of this one keep alive what the nodes find.
    let kept = everywhere().await;
    for server in &mut servers[..2] {
        server.kill();
        server.restart();
        assert_eq!(server.cli(&["GET", "k"]), "worker-7", "it has found its dump");
    }
    drop(eventually("they vote again", async || locker.lock("other").await.ok()).await);
    assert_eq!(kept.check(), Ok(()));
    let after = soon(again()).await.unwrap();
    assert!(after.fencing_token() > fence, "{:?} after {fence:?}", after.fencing_token());
}
