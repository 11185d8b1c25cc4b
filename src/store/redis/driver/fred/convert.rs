//! Our types in fred's words, and fred's in ours.

use fred::error::{Error, ErrorKind};
use fred::types::Value as FredValue;
use fred::types::config::{ClusterDiscoveryPolicy, Config, Server, ServerConfig};

use super::super::Value;
use crate::store::redis::url::{Address, Servers, Target};
use crate::{RedisError, RedisErrorKind};

/// Returns fred's configuration.
///
/// # Errors
///
/// Says why the TLS library can't be set up.
pub(super) fn config_of(target: &Target) -> Result<Config, RedisError> {
    // fred chooses the library.
    let tls = match target.has_tls {
        true => Config::from_url("rediss://host").map_err(|error| {
            let text = format!("can't set up TLS: {}", error.details());
            RedisError::from(error).with_text(text)
        })?,
        false => Config::default(),
    };
    let server = match &target.servers {
        Servers::One(address) => ServerConfig::Centralized { server: server_at(address) },
        Servers::Socket(path) => ServerConfig::Unix { path: path.clone() },
        Servers::Cluster(nodes) => ServerConfig::Clustered {
            hosts: nodes.iter().map(server_at).collect(),
            policy: ClusterDiscoveryPolicy::default(),
        },
        Servers::Sentinels { hosts, service, username, password } => ServerConfig::Sentinel {
            hosts: hosts.iter().map(server_at).collect(),
            service_name: service.clone(),
            username: username.clone(),
            password: password.clone(),
        },
    };
    let (username, password) = (target.username.clone(), target.password.clone());
    Ok(Config { server, username, password, database: target.database, ..tls })
}

/// Returns where a client of the caller's connects to.
pub(super) fn target_of(config: &Config) -> Target {
    let all = |servers: &[Server]| servers.iter().map(address_of).collect();
    let servers = match &config.server {
        ServerConfig::Centralized { server } => Servers::One(address_of(server)),
        ServerConfig::Unix { path } => Servers::Socket(path.clone()),
        ServerConfig::Clustered { hosts, .. } => Servers::Cluster(all(hosts)),
        ServerConfig::Sentinel { hosts, service_name, username, password } => Servers::Sentinels {
            hosts: all(hosts),
            service: service_name.clone(),
            username: username.clone(),
            password: password.clone(),
        },
    };
    Target {
        servers,
        username: config.username.clone(),
        password: config.password.clone(),
        database: config.database,
        has_tls: config.uses_tls(),
    }
}

pub(super) fn server_at(address: &Address) -> Server {
    Server::new(&*address.host, address.port)
}

pub(super) fn address_of(server: &Server) -> Address {
    Address::new(&server.host, server.port)
}

impl From<FredValue> for Value {
    fn from(value: FredValue) -> Self {
        match value {
            FredValue::Integer(number) => Self::Integer(number),
            FredValue::String(text) => Self::Bytes(text.into_inner()),
            FredValue::Bytes(bytes) => Self::Bytes(bytes),
            FredValue::Array(parts) => Self::Array(parts.into_iter().map(Self::from).collect()),
            FredValue::Null => Self::Nil,
            FredValue::Boolean(is_true) => Self::Integer(is_true.into()),
            FredValue::Double(number) => Self::Bytes(number.to_string().into()),
            FredValue::Queued => Self::Bytes("QUEUED".into()),
            FredValue::Map(map) => {
                let pairs = map.inner().into_iter().flat_map(|(key, value)| [FredValue::from(key), value]);
                Self::Array(pairs.map(Self::from).collect())
            }
        }
    }
}

impl From<Error> for RedisError {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            // Of a client whose `init` was never called. Waiting doesn't help.
            ErrorKind::Unknown if error.details() == NOT_INITIALIZED => RedisErrorKind::Config,
            // Of a node for which the cluster is down, as for each that has just started.
            ErrorKind::Protocol if error.details() == CLUSTER_DOWN => RedisErrorKind::Cluster,
            // fred's kind of some refusals.
            ErrorKind::InvalidCommand | ErrorKind::InvalidArgument if has_code(&error) => RedisErrorKind::Unknown,
            ErrorKind::Config | ErrorKind::InvalidCommand | ErrorKind::InvalidArgument | ErrorKind::Url => {
                RedisErrorKind::Config
            }
            ErrorKind::Auth => RedisErrorKind::Auth,
            ErrorKind::Routing => RedisErrorKind::Routing,
            ErrorKind::IO => RedisErrorKind::Io,
            ErrorKind::Protocol | ErrorKind::NotFound => RedisErrorKind::Protocol,
            ErrorKind::Canceled => RedisErrorKind::Canceled,
            ErrorKind::Unknown => RedisErrorKind::Unknown,
            ErrorKind::Timeout => RedisErrorKind::Timeout,
            ErrorKind::Cluster => RedisErrorKind::Cluster,
            ErrorKind::Parse => RedisErrorKind::Parse,
            ErrorKind::Sentinel => RedisErrorKind::Sentinel,
            ErrorKind::Backpressure => RedisErrorKind::Backpressure,
            // This kind exists with fred's TLS features only, which another crate may have enabled.
            #[allow(unreachable_patterns, reason = "not with these features")]
            kind if kind.to_str() == "TLS Error" => RedisErrorKind::Tls,
            #[allow(unreachable_patterns, reason = "not with these features")]
            _ => RedisErrorKind::Unknown,
        };
        Self::new(kind, error.details().to_owned()).with_source(error)
    }
}

fn has_code(error: &Error) -> bool {
    RedisError::new(RedisErrorKind::Unknown, error.details().to_owned()).code().is_some()
}

/// fred's error for a node that is asked when it takes the cluster for down.
const CLUSTER_DOWN: &str = "Invalid or missing cluster state.";

/// fred's error for a client whose `init` was never called.
pub(super) const NOT_INITIALIZED: &str = "Client is not initialized.";

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        Self::Redis(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_was_never_started_is_not_waited_for() {
        let said = |details: &'static str| crate::Error::from(Error::new(ErrorKind::Unknown, details));
        assert!(!said(NOT_INITIALIZED).is_transient());
        assert!(said("Whatever else.").is_transient());
    }

    #[test]
    fn a_cluster_that_is_down_is_waited_for() {
        assert!(crate::Error::from(Error::new(ErrorKind::Protocol, CLUSTER_DOWN)).is_transient());
        assert!(!crate::Error::from(Error::new(ErrorKind::Protocol, "Whatever else.")).is_transient());
    }

    #[test]
    fn a_client_of_the_callers_leads_where_its_url_does() {
        for url in [
            "redis://user:secret@a:1/2",
            "redis+unix:///run/redis.sock",
            "redis-cluster://a:1?node=b:2",
            "redis-sentinel://a?sentinelServiceName=x&sentinelUsername=u&sentinelPassword=p&node=b:1",
        ] {
            let (ours, theirs) = (crate::store::redis::url::parse(url).unwrap(), Config::from_url(url).unwrap());
            assert_eq!(config_of(&ours).unwrap(), theirs, "{url}");
            assert_eq!(config_of(&target_of(&theirs)).unwrap(), theirs, "{url}");
        }
    }
}
