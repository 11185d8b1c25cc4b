//! Where connections lead to, and how they are opened: also to the primary that Sentinels name.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::super::failure::Peer;
use super::super::{Ended, Value};
use super::convert;
use super::link::{Link, Login};
use super::stream::Endpoint;
use super::tls::Tls;
use crate::store::redis::url::{Address, Servers, Target};
use crate::{RedisError, RedisErrorKind};

pub(super) struct Origin {
    servers: Servers,
    pub(super) tls: Tls,
    pub(super) login: Login,
    /// For error messages.
    pub(super) peer: Peer,
    /// The longest that opening a connection may take.
    pub(super) timeout: Duration,
}

impl Origin {
    /// # Errors
    ///
    /// Says why the TLS library can't be set up.
    pub(super) fn of(target: &Target, timeout: Duration) -> Result<Self, RedisError> {
        let login = Login {
            username: target.username.clone(),
            password: target.password.clone(),
            database: target.database,
            is_primary: matches!(target.servers, Servers::Sentinels { .. }),
        };
        let servers = target.servers.clone();
        Ok(Self { servers, tls: Tls::of(target)?, login, peer: Peer::of(target), timeout })
    }

    /// Opens a connection to the server, or to the primary.
    pub(super) async fn open(&self) -> Result<(Arc<Link>, Ended), RedisError> {
        let opening = async { Link::open(&self.endpoint().await?, &self.tls, &self.login, self.timeout).await };
        timeout(self.timeout, opening).await.unwrap_or_else(|_| Err(convert::late()))
    }

    /// Returns where the server is now. Asks the Sentinels, one after the other, if there are any.
    pub(super) async fn endpoint(&self) -> Result<Endpoint, RedisError> {
        match &self.servers {
            Servers::One(address) => Ok(Endpoint::Tcp(address.clone())),
            #[cfg(unix)]
            Servers::Socket(path) => Ok(Endpoint::Socket(path.clone())),
            #[cfg(not(unix))]
            Servers::Socket(_) => Err(RedisError::new(RedisErrorKind::Config, "this system has no Unix sockets")),
            Servers::Sentinels { hosts, service, username, password } => {
                let login = Login { username: username.clone(), password: password.clone(), ..Login::default() };
                let limit = self.timeout / u32::try_from(hosts.len().max(1)).unwrap_or(u32::MAX);
                let mut failure = None;
                for host in hosts {
                    match self.ask_sentinel(host, service, &login, limit).await {
                        Ok(primary) => return Ok(Endpoint::Tcp(primary)),
                        Err(error) => failure = Some(error),
                    }
                }
                Err(failure.unwrap_or_else(|| RedisError::new(RedisErrorKind::Sentinel, "there are no Sentinels")))
            }
            Servers::Cluster(_) => Err(RedisError::new(RedisErrorKind::Routing, "a cluster has several servers")),
        }
    }

    /// Returns the nodes that the user has named.
    pub(super) fn seeds(&self) -> &[Address] {
        match &self.servers {
            Servers::Cluster(nodes) => nodes,
            Servers::One(address) => std::slice::from_ref(address),
            Servers::Socket(_) | Servers::Sentinels { .. } => &[],
        }
    }

    async fn ask_sentinel(
        &self,
        host: &Address,
        service: &str,
        login: &Login,
        limit: Duration,
    ) -> Result<Address, RedisError> {
        let until = Instant::now() + limit;
        let (link, mut driver) = Link::open(&Endpoint::Tcp(host.clone()), &self.tls, login, limit).await?;
        let args = ["get-master-addr-by-name".into(), Bytes::copy_from_slice(service.as_bytes())];
        let answer = tokio::select! {
            biased;
            answer = link.call("SENTINEL", &args, until) => answer.map_err(|(error, _)| error)?,
            () = &mut driver => return Err(link.broken()),
        };
        let primary = match &answer {
            Value::Array(parts) => match &parts[..] {
                [host, port] => host.to_text().zip(port.as_i64().and_then(|port| u16::try_from(port).ok())),
                _ => None,
            },
            _ => None,
        };
        let unknown = || RedisError::new(RedisErrorKind::Sentinel, format!("the Sentinels don't know `{service}`"));
        primary.map(|(host, port)| Address::new(&host, port)).ok_or_else(unknown)
    }
}
