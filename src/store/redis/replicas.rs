//! Waiting until replicas have acknowledged a write: `WAIT`, right after it.
//!
//! 1. `WAIT` counts the replicas that have everything that was written on its own connection. On another connection it
//!    may count a replica that lacks the write. So a count is valid only if the connection was the same from before the
//!    write until after the reply.
//! 2. It blocks its connection, and everything that is sent after it. So it waits for a part of the call's time only,
//!    which leaves time to undo what was not replicated.
//! 3. Refusals and releases wait for no replica.

use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, EventInterface};
use fred::types::config::{Options, Server as Address};
use fred::types::{ClusterHash, CustomCommand, Value};
use tokio::sync::broadcast::Receiver;
use tokio::time::Instant;

use crate::Error;

/// A connection on which something is about to be written.
pub(super) struct Writing {
    needed: usize,
    /// Gets an event before fred sends anything on a new connection.
    reconnected: Receiver<Address>,
}

impl Writing {
    /// Returns `None` if no replica has to acknowledge the write.
    pub(super) fn on(client: &Client, needed: usize) -> Option<Self> {
        (needed > 0).then(|| Self { needed, reconnected: client.reconnect_rx() })
    }

    /// Waits until enough replicas have acknowledged the write, but no longer than `until`.
    ///
    /// # Errors
    ///
    /// [`Error::NotReplicated`] if too few replicas have, or the connection has changed, and any error of the call. The
    /// primary has the write all the same.
    pub(super) async fn acknowledged(self, client: &Client, until: Instant) -> Result<(), Error> {
        let left = until.saturating_duration_since(Instant::now());
        let patience = left.mul_f64(PATIENCE);
        let Ok(millis @ 1..) = i64::try_from(patience.as_millis()) else {
            // To the server, zero means to wait for ever.
            return Err(Error::NotReplicated { needed: self.needed, acknowledged: 0 });
        };
        let options = Options { max_attempts: Some(1), timeout: Some(left), ..Options::default() };
        let command = CustomCommand::new_static("WAIT", ClusterHash::FirstKey, false);
        let needed = i64::try_from(self.needed).unwrap_or(i64::MAX);
        let args = vec![Value::Integer(needed), Value::Integer(millis)];
        let count: i64 = client.with_options(&options).custom(command, args).await?;
        let acknowledged = match self.reconnected.is_empty() {
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
const PATIENCE: f64 = 0.8;

/// Returns how long a call may take that waits for replicas: what it obtains is of no use after the ttl.
pub(super) fn within(timeout: Duration, ttl: Duration, needed: usize) -> Duration {
    if needed == 0 { timeout } else { timeout.min(ttl) }
}

#[cfg(test)]
mod tests {
    use fred::types::Builder;
    use fred::types::config::{Config, ReconnectPolicy};
    use tenure_test_support::{Server, soon};

    use super::*;

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn an_answer_on_another_connection_counts_for_nothing() {
        let primary = Server::start();
        let _replica = primary.start_replica();
        let client = Builder::from_config(Config::from_url(&primary.url()).unwrap())
            .set_policy(ReconnectPolicy::new_constant(0, 50))
            .build()
            .unwrap();
        client.init().await.unwrap();
        let until = || Instant::now() + Duration::from_secs(5);
        let same = Writing::on(&client, 1).unwrap();
        soon(same.acknowledged(&client, until())).await.unwrap();
        let before = Writing::on(&client, 1).unwrap();
        soon(client.force_reconnection()).await.unwrap();
        let refused = soon(before.acknowledged(&client, until())).await.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
    }

    #[tokio::test]
    #[ignore = "needs a server; tests/internals.rs runs it"]
    async fn zero_is_not_for_ever() {
        let server = Server::start();
        let client = Builder::from_config(Config::from_url(&server.url()).unwrap()).build().unwrap();
        client.init().await.unwrap();
        let refused = soon(Writing::on(&client, 1).unwrap().acknowledged(&client, Instant::now())).await.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
    }
}
