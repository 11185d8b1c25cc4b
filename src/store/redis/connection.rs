//! The connection to the server: opened with settings that suit locks, watched, and closed with its owner.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, ReconnectError, ReconnectPolicy};
use fred::types::{Builder, ConnectHandle};

use crate::Error;

/// After this many calls in a row without an answer the line itself is in doubt (a firewall that forgot it, a peer that
/// vanished): a new one is opened. fred finds out by itself only where the system tells it.
const SILENT_CALLS: u32 = 2;

pub(super) struct Connection {
    client: Client,
    /// Drives the connection, where it is ours.
    driver: Option<ConnectHandle>,
    silent: AtomicU32,
}

impl Connection {
    /// # Errors
    ///
    /// Whatever keeps the first connection from being made: nothing is retried here.
    pub(super) async fn open(url: &str, timeout: Duration) -> Result<Self, Error> {
        check_tls(url)?;
        let client = Builder::from_config(Config::from_url(url)?)
            .with_connection_config(|config| configure(config, timeout))
            // A second belt: every command brings its own timeout.
            .with_performance_config(|config: &mut PerformanceConfig| config.default_command_timeout = timeout)
            // Without a policy fred never connects again.
            .set_policy(ReconnectPolicy::new_exponential(0, 50, 2_000, 2))
            .build()?;
        let driver = client.init().await?;
        Ok(Self { client, driver: Some(driver), silent: AtomicU32::new(0) })
    }

    pub(super) fn borrowed(client: Client) -> Self {
        Self { client, driver: None, silent: AtomicU32::new(0) }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Passes a call's answer on, and opens a new connection when too many went unanswered. A client that is not ours
    /// is left alone.
    pub(super) async fn watch<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let answer = call.await;
        let unanswered = matches!(&answer, Err(Error::Redis(error)) if *error.kind() == ErrorKind::Timeout);
        if !unanswered {
            self.silent.store(0, Ordering::Relaxed);
        } else if self.silent.fetch_add(1, Ordering::Relaxed) + 1 >= SILENT_CALLS && self.driver.is_some() {
            self.silent.store(0, Ordering::Relaxed);
            self.reopen();
        }
        answer
    }

    /// Asks fred for a new connection. The request is in its queue once this future was polled; its answer, which may
    /// take as long as the server is away, is nobody's business.
    fn reopen(&self) {
        let mut request = Box::pin(self.client.force_reconnection());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if request.as_mut().poll(&mut context).is_ready() {
            tracing::debug!(name: "tenure.reconnect", "the connection could not be asked to reopen");
        }
    }
}

/// rediss:// without a TLS library would go out in the clear, or nowhere.
fn check_tls(url: &str) -> Result<(), Error> {
    let wants_tls = url.starts_with("rediss") || url.starts_with("valkeys");
    if wants_tls && !cfg!(any(feature = "rustls", feature = "native-tls")) {
        let hint = "a TLS URL needs tenure's feature `rustls` or `native-tls`";
        return Err(fred::error::Error::new(ErrorKind::Config, hint).into());
    }
    Ok(())
}

fn configure(config: &mut ConnectionConfig, timeout: Duration) {
    config.connection_timeout = timeout;
    config.internal_command_timeout = timeout;
    // A command whose reply was lost must not run again behind our back.
    config.max_command_attempts = 1;
    // A primary that became a replica: look for the new one. Other refusals pass without a new connection.
    config.reconnect_errors = vec![ReconnectError::ClusterDown, ReconnectError::ReadOnly];
}

impl Drop for Connection {
    /// Ends the task that drives our own connection, and with it the connection.
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            driver.abort();
        }
    }
}

impl fmt::Debug for Connection {
    /// Says nothing of the configuration: fred would print the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.client.id()).field("state", &self.client.state()).finish()
    }
}
