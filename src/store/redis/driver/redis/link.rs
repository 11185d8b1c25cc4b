//! One connection of ours, from its opening until it breaks. It never reconnects.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Pipeline, ProtocolVersion, PushInfo, RedisConnectionInfo};
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::{Calling, Ended, NodeConnection, Value};
use super::convert;
use super::stream::{CountedStream, Endpoint, Meter};
use super::tls::Tls;
use crate::{RedisError, RedisErrorKind};

/// What a connection says first.
#[derive(Clone, Default)]
pub(super) struct Login {
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: Option<u8>,
    /// The server must be a primary.
    pub(super) is_primary: bool,
}

/// A connection to one server.
pub(super) struct Link {
    connection: MultiplexedConnection,
    meter: Arc<Meter>,
    /// Notified to close the connection.
    close: Notify,
}

/// Whether a call that has failed can have reached the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WasSent {
    No,
    Maybe,
}

impl Link {
    /// Connects and logs in. The second value drives the connection.
    pub(super) async fn open(
        endpoint: &Endpoint,
        tls: &Tls,
        login: &Login,
        limit: Duration,
    ) -> Result<(Arc<Self>, Ended), RedisError> {
        let opening = async {
            let (mut link, mut driver) = Self::connect(endpoint, tls, RedisConnectionInfo::default(), None).await?;
            select! {
                // First what the server has replied, if it closes the connection then.
                biased;
                logged_in = link.log_in(login) => logged_in?,
                () = &mut driver => return Err(link.broken()),
            }
            Ok((Arc::new(link), driver))
        };
        timeout(limit, opening).await.unwrap_or_else(|_| Err(convert::late()))
    }

    /// Connects for subscriptions, with RESP3: `on_push` gets each message. Must not block.
    pub(super) async fn open_for_pushes(
        endpoint: &Endpoint,
        tls: &Tls,
        login: &Login,
        limit: Duration,
        on_push: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> Result<(Arc<Self>, Ended), RedisError> {
        let mut info = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3);
        if let Some(password) = &login.password {
            info = info.set_password(password);
            if let Some(username) = &login.username {
                info = info.set_username(username);
            }
        }
        let on_push = move |push| {
            on_push(push);
            Ok::<(), redis::aio::SendError>(())
        };
        let config = AsyncConnectionConfig::new().set_push_sender(on_push);
        let opening = Self::connect(endpoint, tls, info, Some(config));
        let (link, driver) = timeout(limit, opening).await.unwrap_or_else(|_| Err(convert::late()))?;
        Ok((Arc::new(link), driver))
    }

    async fn connect(
        endpoint: &Endpoint,
        tls: &Tls,
        info: RedisConnectionInfo,
        config: Option<AsyncConnectionConfig>,
    ) -> Result<(Self, Ended), RedisError> {
        let (stream, meter) = CountedStream::connect(endpoint, tls).await?;
        // Each call has its own time. The default of 500 ms would end calls that have more.
        let config = config.unwrap_or_default().set_response_timeout(None).set_pipeline_buffer_size(1024);
        // redis-rs logs in by itself where it is told a password; then a refusal may have neither code nor text.
        let info = info.set_skip_set_lib_name();
        let connected = MultiplexedConnection::new_with_config(&info, stream, config).await;
        let (connection, driver) = connected.map_err(|error| meter.explain(error))?;
        let end = meter.mark_end();
        let driver = async move {
            // Dropped after the driver, also if this is dropped before it is ready.
            let _end = end;
            Pin::from(Box::new(driver) as Box<dyn Future<Output = ()> + Send>).await;
        };
        let link = Self { connection, meter, close: Notify::new() };
        Ok((link, Box::pin(driver)))
    }

    /// Logs in, and makes sure that the server replies, if only with a refusal that is not about the connection. All in
    /// one round trip.
    async fn log_in(&mut self, login: &Login) -> Result<(), RedisError> {
        let mut all = Pipeline::new();
        let mut checks: Vec<fn(redis::Value) -> Result<(), RedisError>> = Vec::new();
        if let Some(password) = &login.password {
            let auth = all.cmd("AUTH");
            match &login.username {
                Some(username) => auth.arg(username).arg(password),
                None => auth.arg(password),
            };
            checks.push(|answer| {
                convert::reply(answer).map(drop).map_err(|mut error| {
                    if !error.is_about_too_many_clients() {
                        error.change_kind(RedisErrorKind::Auth);
                    }
                    error
                })
            });
        }
        if let Some(database @ 1..) = login.database {
            all.cmd("SELECT").arg(database);
            checks.push(|answer| convert::reply(answer).map(drop));
        }
        if login.is_primary {
            all.cmd("ROLE");
            checks.push(is_primary);
        }
        all.cmd("PING");
        checks.push(|answer| match convert::reply(answer) {
            // Then the server closes the connection.
            Err(error) if error.code() == Some("NOAUTH") || error.is_about_too_many_clients() => Err(error),
            _ => Ok(()),
        });
        let answers = self.connection.send_packed_commands(&all, 0, checks.len()).await;
        let answers = answers.map_err(|error| self.meter.explain(error))?;
        checks.into_iter().zip(answers).try_for_each(|(check, answer)| check(answer))
    }

    /// Has it closed, and its calls fail.
    pub(super) fn give_up(&self) {
        self.meter.ends_by("the connection was of no more use and was given up".into());
        self.close.notify_one();
    }

    /// Waits until it is to be closed.
    pub(super) async fn given_up(&self) {
        self.close.notified().await;
    }

    /// Returns whether nothing will be written on it any more.
    pub(super) fn is_over(&self) -> bool {
        self.meter.has_ended()
    }

    /// Returns why the connection has ended.
    pub(super) fn broken(&self) -> RedisError {
        self.meter.cause().unwrap_or_else(|| RedisError::new(RedisErrorKind::Io, "Connection closed."))
    }

    /// Sends a command once. Dropped, or when its time is over, it may still run, unless redis-rs has not yet taken it.
    ///
    /// A call that fails after the driver has ended, while the system has accepted no byte since the call began, was
    /// not sent. Bytes of other calls in between make it "maybe", which is the safe side. So is a call whose time is
    /// over on a live connection: the driver may hold it in its buffer.
    pub(super) async fn call(
        &self,
        command: &'static str,
        args: &[Bytes],
        until: Instant,
    ) -> Result<Value, (RedisError, WasSent)> {
        let command = convert::command(command, args);
        let before = self.meter.written();
        let mut connection = self.connection.clone();
        // Not a match around the `await`, and what is rare in boxes: the future is allocated for each call.
        let reply = timeout_at(until, connection.send_packed_command(&command)).await;
        match reply {
            Ok(Ok(value)) => convert::reply(value).map_err(|error| (error, WasSent::Maybe)),
            Ok(Err(error)) => Err(Box::pin(self.failed(error, before, until)).await),
            Err(_) => Err((convert::late(), WasSent::Maybe)),
        }
    }

    /// redis-rs takes the commands of a pipeline as one message, so nothing comes in between.
    async fn call_asking(&self, command: &'static str, args: &[Bytes], until: Instant) -> Result<Value, RedisError> {
        let mut both = Pipeline::with_capacity(2);
        both.cmd("ASKING").add_command(convert::command(command, args));
        let before = self.meter.written();
        let mut connection = self.connection.clone();
        match timeout_at(until, connection.send_packed_commands(&both, 0, 2)).await {
            Ok(Ok(answers)) => {
                let mut answers = answers.into_iter().map(convert::reply);
                let (asking, answer) = (answers.next(), answers.next());
                asking.unwrap_or_else(|| Err(convert::late()))?;
                answer.unwrap_or_else(|| Err(convert::late()))
            }
            Ok(Err(error)) => Err(self.failed(error, before, until).await.0),
            Err(_) => Err(convert::late()),
        }
    }

    async fn failed(&self, error: redis::RedisError, before: u64, until: Instant) -> (RedisError, WasSent) {
        if error.is_connection_dropped() {
            self.meter.ends_soon(until).await;
        }
        let was_sent = match self.is_over() && self.meter.written() == before {
            true => WasSent::No,
            false => WasSent::Maybe,
        };
        (self.meter.explain(error), was_sent)
    }

    /// Returns how many bytes the system has accepted.
    #[cfg(test)]
    pub(super) fn written(&self) -> u64 {
        self.meter.written()
    }

    /// Returns a handle for what only redis-rs can do.
    pub(super) fn connection(&self) -> MultiplexedConnection {
        self.connection.clone()
    }
}

/// Refuses a server that is no primary. One that may not be asked is trusted.
fn is_primary(role: redis::Value) -> Result<(), RedisError> {
    match convert::reply(role) {
        Ok(Value::Array(role)) if role.first() != Some(&Value::Bytes(Bytes::from_static(b"master"))) => {
            Err(RedisError::new(RedisErrorKind::Sentinel, "the server that the Sentinels name is not the primary yet"))
        }
        _ => Ok(()),
    }
}

impl NodeConnection for Link {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(async move { self.call(command, &args, until).await.map_err(|(error, _)| error) })
    }

    fn send_asking(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        Box::pin(async move { self.call_asking(command, &args, until).await })
    }
}
