//! A program may start before its server does.

use std::time::{Duration, Instant};

use tenure::{Error, Locker, LockerBuilder};
use tenure_test_support::{Cluster, Sentinel, Server, eventually, soon};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn builder() -> LockerBuilder {
    Locker::builder().command_timeout(ms(300))
}

#[tokio::test]
async fn a_server_that_comes_up_is_waited_for() {
    let mut server = Server::start();
    server.kill();
    let url = server.url();
    let connecting = tokio::spawn(async move { builder().wait_for_server(ms(20_000)).connect(&url).await });
    tokio::time::sleep(ms(300)).await;
    assert!(!connecting.is_finished());
    server.restart();
    let locker = soon(connecting).await.unwrap().unwrap();
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn waiting_for_a_server_ends_in_time_with_the_reason() {
    let mut server = Server::start();
    server.kill();
    let began = Instant::now();
    let away = soon(builder().wait_for_server(ms(400)).connect(&server.url())).await.unwrap_err();
    assert!(away.is_transient() && began.elapsed() >= ms(400), "{away} after {:?}", began.elapsed());
    assert!(away.to_string().contains(&server.port().to_string()), "{away}");
}

#[tokio::test]
async fn nobody_waits_for_what_waiting_does_not_help() {
    let server = Server::start_with(&["--requirepass", "right"]);
    let url = format!("redis://:wrong@127.0.0.1:{}", server.port());
    let refused = soon(builder().wait_for_server(ms(3_600_000)).connect(&url)).await.unwrap_err();
    assert_eq!(refused.code(), Some("WRONGPASS"), "{refused}");
    let refused = soon(builder().wait_for_server(ms(3_600_000)).connect("http://nowhere")).await.unwrap_err();
    assert!(matches!(refused, Error::InvalidUrl(_)), "{refused}");
}

#[tokio::test]
async fn a_majority_that_comes_up_is_waited_for() {
    let mut servers = [(); 3].map(|()| Server::start());
    servers.iter_mut().for_each(Server::kill);
    let urls: Vec<_> = servers.iter().map(Server::url).collect();
    let builder = builder().restart_window(Duration::ZERO).wait_for_server(ms(20_000));
    let connecting = tokio::spawn(async move { builder.quorum(urls).await });
    tokio::time::sleep(ms(100)).await;
    servers[0].restart();
    servers[2].restart();
    let locker = soon(connecting).await.unwrap().unwrap();
    soon(locker.lock("k")).await.unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_lazy_locker_is_there_at_once_and_works_once_its_server_does() {
    for isolated in [false, true] {
        let mut server = Server::start();
        server.kill();
        let locker = builder().isolated(isolated).connect_lazily(&server.url()).unwrap();
        let began = Instant::now();
        let away = soon(locker.try_lock("k")).await.unwrap_err();
        assert!(matches!(&away, Error::Redis(_)) && away.is_transient(), "{away}");
        assert!(away.to_string().contains(&server.port().to_string()), "{away}");
        assert!(began.elapsed() < ms(5_000), "{:?}", began.elapsed());
        let waiter = tokio::spawn(locker.lock("k").into_future());
        server.restart();
        soon(waiter).await.unwrap().unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn a_lazy_locker_reports_a_wrong_password_by_each_operation() {
    let server = Server::start_with(&["--requirepass", "right"]);
    let url = format!("redis://:wrong@127.0.0.1:{}", server.port());
    let locker = builder().connect_lazily(&url).unwrap();
    let refused = eventually("it is refused", async || {
        let refused = soon(locker.try_lock("k")).await.unwrap_err();
        refused.to_string().contains("WRONGPASS").then_some(refused)
    });
    assert!(!refused.await.to_string().contains("wrong@"));
    assert!(matches!(builder().connect_lazily("redis://"), Err(Error::InvalidUrl(_))));
}

#[tokio::test]
async fn a_lazy_locker_finds_the_nodes_of_a_cluster_and_the_primary_of_sentinels() {
    let (cluster, watched) = (Cluster::start(), Sentinel::start());
    for url in [cluster.url(), watched.url()] {
        let locker = Locker::builder().connect_lazily(&url).unwrap();
        for key in ["a", "b", "c", "d"] {
            soon(locker.lock(key)).await.unwrap().release().await.unwrap();
        }
    }
}

#[test]
fn a_lazy_locker_needs_a_runtime() {
    assert!(matches!(builder().connect_lazily("redis://127.0.0.1:1"), Err(Error::NoRuntime)));
}

#[tokio::test]
async fn fencing_tokens_are_remembered_for_as_long_as_is_set() {
    let server = Server::start();
    let hour = Locker::builder().fence_ttl(ms(3_600_000)).connect(&server.url()).await.unwrap();
    let remembered = |key: &str| -> u64 { server.cli(&["PTTL", &format!("{{{key}}}:fence")]).parse().unwrap() };
    hour.lock("invoices:12345").await.unwrap().release().await.unwrap();
    assert!((3_500_000..=3_600_000).contains(&remembered("invoices:12345")));
    let usual = Locker::connect(&server.url()).await.unwrap();
    usual.lock("usual").await.unwrap().release().await.unwrap();
    assert!((86_300_000..=86_400_000).contains(&remembered("usual")));
    // For at least twice the ttl of the lock, by each of the ways to it.
    let day = ms(24 * 3_600_000);
    hour.lock("long").ttl(day).await.unwrap().release().await.unwrap();
    hour.lock_all(["set"]).ttl(day).fair(true).await.unwrap().release().await.unwrap();
    hour.lock("token").token("own".parse().unwrap()).ttl(day).await.unwrap().release().await.unwrap();
    for key in ["long", "set", "token"] {
        assert!(remembered(key) > 47 * 3_600_000, "{key}: {}", remembered(key));
    }
    // And for a minute.
    let least = Locker::builder().fence_ttl(Duration::ZERO).connect(&server.url()).await.unwrap();
    least.lock("least").ttl(ms(1_000)).await.unwrap().release().await.unwrap();
    assert!((50_000..=60_000).contains(&remembered("least")), "{}", remembered("least"));
    // A node of a quorum grants numbers that are ahead of its clock by a window.
    let window = Locker::builder().fence_ttl(Duration::ZERO).restart_window(Duration::ZERO);
    let quorum = window.quorum([server.url()]).await.unwrap();
    quorum.lock("voted").ttl(ms(1_000)).await.unwrap().release().await.unwrap();
    assert!((110_000..=120_000).contains(&remembered("voted")), "{}", remembered("voted"));
}
