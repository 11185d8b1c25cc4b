//! Waiting until replicas have acknowledged a write: `WAIT`, right after it.
//!
//! 1. `WAIT` counts the replicas that have everything that was written on its own connection. On another connection it
//!    may count a replica that lacks the write. So a count is valid only if the connection was the same from before the
//!    write until after the reply, and if there was a write: from Redis 7.2 on, what others wrote doesn't count. So
//!    what obtains or renews a lock always writes it, even as it is.
//! 2. It blocks its connection, and everything that is sent after it. So it waits for a part of the call's time only,
//!    which leaves time to undo what was not replicated. What has had no reply meanwhile is no sign of a dead connection.
//! 3. Refusals and releases wait for no replica.

use std::time::Duration;

use tokio::time::Instant;

use super::args::decimal;
use super::driver::Connection;
use super::replies::unexpected;
use super::script::into_ours;
use crate::Error;

/// A connection on which something is about to be written.
pub(super) struct Writing {
    needed: usize,
    /// How many connections had been made before.
    connections: u64,
}

impl Writing {
    /// Returns `None` if no replica has to acknowledge the write.
    pub(super) fn on(connection: &dyn Connection, needed: usize) -> Option<Self> {
        (needed > 0).then(|| Self { needed, connections: connection.connections_made() })
    }

    /// Waits until enough replicas have acknowledged the write, but no longer than `until`.
    ///
    /// # Errors
    ///
    /// [`Error::NotReplicated`] if too few replicas have, or the connection has changed, and any error of the call. The
    /// primary has the write all the same.
    pub(super) async fn acknowledged(self, connection: &dyn Connection, until: Instant) -> Result<(), Error> {
        let left = until.saturating_duration_since(Instant::now());
        let waits_for = left.mul_f64(SHARE_FOR_WAIT);
        let Ok(millis @ 1..) = i64::try_from(waits_for.as_millis()) else {
            // To the server, zero means to wait for ever.
            return Err(Error::NotReplicated { needed: self.needed, acknowledged: 0 });
        };
        let needed = i64::try_from(self.needed).unwrap_or(i64::MAX);
        let blocked_until = Instant::now() + waits_for;
        connection.blocks(blocked_until);
        let reply = connection.send("WAIT", vec![decimal(needed), decimal(millis)], until).await.map_err(into_ours);
        if !reply.as_ref().is_err_and(Error::is_timeout) {
            connection.no_longer_blocks(blocked_until);
        }
        let reply = reply?;
        let count = reply.as_i64().ok_or_else(unexpected)?;
        let acknowledged = match connection.connections_made() == self.connections {
            true => usize::try_from(count).unwrap_or_default(),
            false => 0,
        };
        match acknowledged >= self.needed {
            true => Ok(()),
            false => Err(Error::NotReplicated { needed: self.needed, acknowledged }),
        }
    }
}

/// The part of a call's time that replicas have (invariant 2).
const SHARE_FOR_WAIT: f64 = 0.8;

/// Returns how long a call may take that waits for replicas: what it obtains is of no use after the ttl.
pub(super) fn within(timeout: Duration, ttl: Duration, needed: usize) -> Duration {
    if needed == 0 { timeout } else { timeout.min(ttl) }
}

#[cfg(test)]
mod tests {
    use tenure_test_support::{Server, eventually, soon};

    use super::super::driver::{self, heard};
    use super::super::url;
    use super::*;
    use crate::Driver;

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn an_answer_on_another_connection_counts_for_nothing() {
        let primary = Server::start();
        let _replica = primary.start_replica();
        let connection = driver::connection_to(&primary.url()).await;
        let until = || Instant::now() + Duration::from_secs(5);
        let same = Writing::on(&*connection, 1).unwrap();
        soon(same.acknowledged(&*connection, until())).await.unwrap();
        let before = Writing::on(&*connection, 1).unwrap();
        connection.replace();
        let again = async || (connection.send("PING", Vec::new(), until()).await.is_ok()).then_some(());
        eventually("it is connected again", again).await;
        let refused = soon(before.acknowledged(&*connection, until())).await.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn what_waits_behind_it_has_no_connection_replaced() {
        let server = Server::start();
        for driver in [Driver::Fred, Driver::Redis] {
            let target = url::parse(&server.url()).unwrap();
            let connection = match driver::open(driver, &target, Duration::from_secs(10)).await {
                Err(Error::Unsupported(_)) => continue,
                opened => opened.unwrap(),
            };
            let made = connection.connections_made();
            let writing = Writing::on(&*connection, 1).unwrap();
            let waits = writing.acknowledged(&*connection, Instant::now() + Duration::from_millis(2_000));
            let behind = async {
                eventually("it waits", async || {
                    server.cli(&["INFO", "clients"]).contains("blocked_clients:1").then_some(())
                })
                .await;
                for _ in 0..3 {
                    let sent = connection.begin(Instant::now()).unwrap();
                    let reply = connection.send("PING", Vec::new(), Instant::now() + Duration::from_millis(300)).await;
                    assert!(heard(&*connection, sent, reply.map_err(Error::from)).unwrap_err().is_timeout());
                }
            };
            let (refused, ()) = tokio::join!(waits, behind);
            let refused = refused.unwrap_err();
            assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
            assert_eq!(connection.connections_made(), made);
        }
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn zero_is_not_for_ever() {
        let server = Server::start();
        let connection = driver::connection_to(&server.url()).await;
        let writing = Writing::on(&*connection, 1).unwrap();
        let refused = soon(writing.acknowledged(&*connection, Instant::now())).await.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
    }
}
