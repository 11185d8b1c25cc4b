//! No password, token or metadata is in an error, in what `Debug` shows, or in what the crate reports.
//!
//! `tests/run.sh` searches what all tests of this program have reported (`TENURE_LOG`) for `planted`, and for anything
//! that looks like a random token.

use std::fmt::Debug;
use std::time::Duration;

use tenure::{Error, LockGuard, LockRequest, Locker, WatchDog};
use tenure_test_support::{Server, eventually, soon};

const PASSWORD: &str = "planted-password";
const METADATA: &str = "planted-metadata";
const TOKEN: &str = "planted-token";

fn assert_hides(value: &(impl Debug + ?Sized)) {
    let shown = format!("{value:?}");
    // Bytes are shown as numbers.
    for secret in ["planted", "112, 108, 97, 110"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

fn assert_error_hides(error: &Error) {
    assert_hides(error);
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = source {
        assert!(!error.to_string().contains("planted"), "{error}");
        assert_hides(error);
        source = error.source();
    }
}

fn request(locker: &Locker) -> LockRequest {
    let token = TOKEN.parse().unwrap();
    locker.obtain("k").token(token).metadata(METADATA).ttl(Duration::from_millis(900))
}

async fn refused(request: LockRequest) -> Error {
    let error = soon(request).await.unwrap_err();
    assert_error_hides(&error);
    error
}

async fn start() -> (Server, Locker) {
    let server = Server::start_with(&["--requirepass", PASSWORD]);
    let url = format!("redis://:{PASSWORD}@127.0.0.1:{}", server.port());
    let locker = Locker::builder().command_timeout(Duration::from_millis(500)).connect(&url).await.unwrap();
    (server, locker)
}

fn cli(server: &Server, command: &[&str]) -> String {
    server.cli(&[&["-a", PASSWORD], command].concat())
}

#[tokio::test]
async fn what_goes_wrong_with_a_lock_shows_no_secret() {
    let (mut server, locker) = start().await;
    let guard: LockGuard = soon(request(&locker)).await.unwrap();
    assert_hides(&guard);
    refused(locker.try_lock("k").metadata(METADATA)).await;
    cli(&server, &["SET", "k", "planted-by-another"]);
    assert_hides(&guard.lost().await);
    drop(guard);
    refused(request(&locker)).await;
    cli(&server, &["DEL", "k"]);
    cli(&server, &["LPUSH", "k", "planted"]);
    assert_eq!(refused(request(&locker)).await.code(), Some("WRONGTYPE"));
    cli(&server, &["DEL", "k"]);
    for rights in [&["-eval", "-evalsha"][..], &["+eval", "+evalsha", "-set"]] {
        cli(&server, &[&["ACL", "SETUSER", "default"], rights].concat());
        refused(request(&locker)).await;
    }
    cli(&server, &["ACL", "SETUSER", "default", "+set"]);
    let guard = soon(request(&locker)).await.unwrap();
    server.freeze();
    assert_error_hides(&guard.renew().await.unwrap_err());
    assert_hides(&guard.lost().await);
    guard.last_error().inspect(|error| assert_error_hides(error));
    refused(request(&locker)).await;
    server.thaw();
    server.kill();
    refused(request(&locker)).await;
    assert_hides(&locker);
}

#[tokio::test]
async fn what_goes_wrong_with_a_connection_shows_no_secret() {
    let (mut server, locker) = start().await;
    locker.close().await;
    refused(request(&locker)).await;
    for url in [
        format!("redis://:planted-wrong@127.0.0.1:{}", server.port()),
        format!("redis://planted:{PASSWORD}@127.0.0.1:{}", server.port()),
        format!("rediss://:{PASSWORD}@127.0.0.1:{}", server.port()),
        format!("redis://:{PASSWORD}@127.0.0.1:{}?planted={PASSWORD}", server.port()),
        format!("redis-cluster://:{PASSWORD}@127.0.0.1:{}", server.port()),
        format!("redis-sentinel://:{PASSWORD}@127.0.0.1:{}/planted", server.port()),
        format!("http://:{PASSWORD}@127.0.0.1"),
        format!("redis://:{PASSWORD}@planted.invalid"),
    ] {
        let builder = Locker::builder().command_timeout(Duration::from_millis(500));
        assert_hides(&builder);
        match soon(builder.connect(&url)).await {
            // Parts of a URL that are no secret are named.
            Err(error) => assert!(!format!("{error:?}{error}").contains(PASSWORD), "{error:?}"),
            Ok(locker) => assert_hides(&locker),
        }
    }
    server.kill();
    let url = format!("redis://:{PASSWORD}@127.0.0.1:{}", server.port());
    assert_error_hides(&soon(Locker::connect(&url)).await.unwrap_err());
    assert_error_hides(&soon(Locker::quorum([url])).await.unwrap_err());
}

#[tokio::test]
async fn a_watchdog_shows_no_secret() {
    let (server, locker) = start().await;
    let dog = WatchDog::builder(&locker).build();
    let mut events = dog.subscribe();
    dog.watch(soon(request(&locker)).await.unwrap()).unwrap();
    assert_hides(&dog);
    cli(&server, &["DEL", "k"]);
    eventually("the lock is lost", async || (dog.is_empty()).then_some(())).await;
    while let Ok(event) = events.try_recv() {
        assert_hides(&event);
    }
}
