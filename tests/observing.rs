//! What a lock's life looks like through `tracing`.

#![allow(clippy::unwrap_used, reason = "this is a test")]

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenure::{Locker, Loss};
use tenure_test_support::{Server, eventually};
use tracing_subscriber::fmt::MakeWriter;

/// What was written, for all to read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn every_step_is_told_with_its_key_and_without_its_token() {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false).with_writer(log.clone());
    // One thread runs this test and all its tasks.
    let _told = tracing::subscriber::set_default(subscriber.finish());
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();

    let guard = locker.lock("observed").renew_every(Duration::from_millis(20)).await.unwrap();
    let token = guard.token().as_str().to_owned();
    assert!(locker.try_lock("observed").await.is_err());
    eventually("renewed", async || log.text().contains("renewed").then_some(())).await;
    server.cli(&["DEL", "observed"]);
    assert_eq!(guard.lost().await, Loss::Missing);
    let guard = locker.lock("observed").ttl(Duration::from_millis(600)).await.unwrap();
    server.freeze();
    assert_eq!(guard.lost().await, Loss::Expired);
    eventually("the loss is logged", async || log.text().contains("cause=redis: ").then_some(())).await;
    server.thaw();
    locker.lock("observed").await.unwrap().release().await.unwrap();
    drop(locker.lock("observed").await.unwrap());
    locker.close().await;

    let text = log.text();
    for expected in [
        "tenure.obtain{key=observed ttl=30s}",
        "obtained",
        "waited=",
        "attempts=1",
        "remaining=",
        "held by another",
        "tenure.keep{key=observed}",
        "lost",
        "loss=its key is gone",
        "released",
        "released in the background",
    ] {
        assert!(text.contains(expected), "{expected} in:\n{text}");
    }
    assert!(!text.contains(&token));
}
