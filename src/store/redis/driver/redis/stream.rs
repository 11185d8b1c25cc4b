//! The byte stream under a connection, which counts what the system has accepted.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::convert;
use super::tls::Tls;
use crate::store::redis::url::Address;
use crate::{RedisError, RedisErrorKind};

/// Where a connection leads to.
#[derive(Clone)]
pub(super) enum Endpoint {
    Tcp(Address),
    #[cfg(unix)]
    Socket(std::path::PathBuf),
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A stream of any kind.
pub(super) type AnyStream = Box<dyn Stream>;

/// A stream to a server.
pub(super) struct CountedStream {
    stream: AnyStream,
    meter: Arc<Meter>,
    /// Something was read.
    has_read: bool,
}

/// What is known of a stream from outside.
#[derive(Default)]
pub(super) struct Meter {
    /// How many bytes the system has accepted, before TLS.
    written: AtomicU64,
    /// The driver has ended, so nothing will be written any more.
    has_ended: AtomicBool,
    ended: Notify,
    /// Why the stream has ended.
    cause: OnceLock<RedisError>,
}

impl Meter {
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// Waits for the driver's end, which follows when the first call has failed, until then at the latest.
    pub(super) async fn ends_soon(&self, until: Instant) {
        let ended = self.ended.notified();
        if !self.has_ended() {
            drop(timeout_at(until.min(Instant::now() + ENDING), ended).await);
        }
    }

    pub(super) fn cause(&self) -> Option<RedisError> {
        self.cause.get().cloned()
    }

    /// Returns the error of a call. redis-rs tells only the first call in flight why the stream has ended.
    pub(super) fn explain(&self, error: redis::RedisError) -> RedisError {
        let error = convert::failed(error);
        match error.kind() {
            RedisErrorKind::Io => self.cause().unwrap_or(error),
            _ => error,
        }
    }

    /// Marks the driver as ended when it is dropped, also with its runtime.
    pub(super) fn mark_end(self: &Arc<Self>) -> End {
        End(self.clone())
    }

    pub(super) fn ends_by(&self, cause: String) {
        self.cause.get_or_init(|| RedisError::new(RedisErrorKind::Io, cause));
    }
}

/// How long the driver may take to end after it has failed its calls. It is done in the same step, unless its runtime
/// has ended or stands still.
const ENDING: Duration = Duration::from_millis(50);

/// What a reply begins with, whatever its form.
const FORMS: &[u8] = b"+-:$*_#,(!=%~>|";

/// Returns the error of a peer whose first bytes begin no reply, or which refuses the connection by them.
fn refusal(first: &[u8]) -> Option<RedisError> {
    if !first.first().is_some_and(|form| FORMS.contains(form)) {
        return Some(RedisError::new(RedisErrorKind::Protocol, "it speaks another protocol"));
    }
    let line = first.strip_prefix(b"-")?.split(|&byte| byte == b'\r').next()?;
    let refused = RedisError::new(RedisErrorKind::Unknown, String::from_utf8_lossy(line).into_owned());
    refused.is_about_too_many_clients().then_some(refused)
}

pub(super) struct End(Arc<Meter>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
        self.0.ended.notify_waiters();
    }
}

impl CountedStream {
    /// Connects.
    ///
    /// TCP's own delay of small packets stays on: measured on loopback, `nodelay` gains nothing at one task, and costs
    /// 25 to 42 % of the operations at 16 and more.
    pub(super) async fn connect(endpoint: &Endpoint, tls: &Tls) -> Result<(Self, Arc<Meter>), RedisError> {
        let stream: AnyStream = match endpoint {
            Endpoint::Tcp(Address { host, port }) => {
                // The brackets of an IPv6 address belong to the URL.
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                let stream = TcpStream::connect((host, *port)).await.map_err(convert::io_failed)?;
                tls.wrap(stream, host).await?
            }
            #[cfg(unix)]
            Endpoint::Socket(path) => {
                Box::new(tokio::net::UnixStream::connect(path).await.map_err(convert::io_failed)?)
            }
        };
        let meter = Arc::<Meter>::default();
        Ok((Self { stream, meter: meter.clone(), has_read: false }, meter))
    }
}

impl AsyncRead for CountedStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, into));
        match &read {
            Ok(()) if into.filled().len() == before => {
                self.meter.ends_by("Connection closed.".into());
            }
            Ok(()) if self.has_read => {}
            Ok(()) => {
                self.has_read = true;
                // redis-rs tells nobody if nothing is in flight.
                if let Some(error) = refusal(into.filled().get(before..).unwrap_or_default()) {
                    self.meter.cause.get_or_init(|| error);
                }
            }
            Err(error) => self.meter.ends_by(format!("{error:?}")),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for CountedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, from));
        match &written {
            Ok(count) => {
                self.meter.written.fetch_add(u64::try_from(*count).unwrap_or(u64::MAX), Ordering::Release);
            }
            Err(error) => self.meter.ends_by(format!("{error:?}")),
        }
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
