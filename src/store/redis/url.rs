//! Parses the URLs of servers, and refuses what they can't mean.
//!
//! Clients take an unknown scheme for that of a plain server without TLS, and ignore what they don't know. This module
//! refuses by name, before anything is sent, what would be ignored. The same URLs work with every client.
//!
//! A password with unescaped reserved characters ends early, and the rest of it ends up elsewhere in the URL. So no
//! part of a URL is shown unless it can't be the rest of a password.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use percent_encoding::percent_decode_str;
use url::Url;

use crate::Error;

/// Parses the URL of a server, or of several that lead to it.
///
/// # Errors
///
/// [`Error::InvalidUrl`], which names the part of the URL that is wrong and never shows a password.
pub(crate) fn parse(text: &str) -> Result<Target, Error> {
    let url = Url::parse(text).map_err(|error| unparsable(text, error))?;
    if url.cannot_be_a_base() {
        return Err(without_scheme(text));
    }
    let scheme = Scheme::of(&url)?;
    check_authority(&url, scheme.kind)?;
    check_leftovers(text, &url, scheme.kind)?;
    check_path(&url, scheme.kind)?;
    check_query(&url, scheme.kind)?;
    if scheme.tls && !cfg!(any(feature = "rustls", feature = "native-tls")) {
        return Err(invalid("a TLS URL needs tenure's feature `rustls` or `native-tls`"));
    }
    let servers = servers_of(&url, scheme.kind)?;
    let credential = |part: &str| -> Result<_, Error> {
        let decoded = percent_decode_str(part).decode_utf8();
        let decoded = decoded.map_err(|_| invalid("the user or the password is not UTF-8"))?;
        Ok((!decoded.is_empty()).then(|| decoded.into_owned()))
    };
    let database = match scheme.kind {
        Kind::Server | Kind::Sentinel => url.path().trim_start_matches('/').parse().ok(),
        // It was checked that it is none but 0.
        Kind::Cluster | Kind::Socket => None,
    };
    Ok(Target {
        servers,
        username: credential(url.username())?,
        password: credential(url.password().unwrap_or_default())?,
        database,
        has_tls: scheme.tls,
    })
}

/// Where a URL leads to. Has no `Debug`, which would show the password; [`Display`](fmt::Display) shows the servers.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) servers: Servers,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) database: Option<u8>,
    pub(crate) has_tls: bool,
}

/// The servers that a URL names.
#[derive(Clone)]
pub(crate) enum Servers {
    One(Address),
    /// The path of a Unix socket.
    Socket(PathBuf),
    /// Some nodes of a cluster.
    Cluster(Vec<Address>),
    /// Sentinels, which know the primary.
    Sentinels {
        hosts: Vec<Address>,
        service: String,
        username: Option<String>,
        password: Option<String>,
    },
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Address {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
}

impl Address {
    pub(crate) fn new(host: &str, port: u16) -> Self {
        Self { host: host.into(), port }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Display for Target {
    /// Writes what is shown to users: `host:port` or the path of a socket; all of them if there are several.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |servers: &[Address]| {
            let servers: Vec<_> = servers.iter().map(Address::to_string).collect();
            servers.join(", ")
        };
        match &self.servers {
            Servers::One(server) => write!(f, "{server}"),
            Servers::Cluster(nodes) => write!(f, "the cluster at {}", list(nodes)),
            Servers::Sentinels { hosts, service, .. } => write!(f, "`{service}` by the Sentinels at {}", list(hosts)),
            Servers::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

fn servers_of(url: &Url, kind: Kind) -> Result<Servers, Error> {
    let at = |default_port| Address::new(url.host_str().unwrap_or_default(), url.port().unwrap_or(default_port));
    let parameter = |wanted| url.query_pairs().find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned());
    // All of them were checked.
    let nodes = url.query_pairs().filter(|(name, _)| name == NODE).filter_map(|(_, node)| {
        let (host, port) = node.split_once(':')?;
        Some(Address::new(host, port.parse().ok()?))
    });
    Ok(match kind {
        Kind::Server => Servers::One(at(6379)),
        Kind::Socket => Servers::Socket(decoded_path(url)?.into_owned().into()),
        Kind::Cluster => Servers::Cluster(nodes.chain([at(6379)]).collect()),
        Kind::Sentinel => Servers::Sentinels {
            hosts: nodes.chain([at(26_379)]).collect(),
            service: parameter(SENTINEL_SERVICE).unwrap_or_default(),
            username: parameter(SENTINEL_USERNAME),
            password: parameter(SENTINEL_PASSWORD),
        },
    })
}

#[derive(Clone, Copy)]
struct Scheme {
    kind: Kind,
    tls: bool,
}

/// What the URL connects to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Server,
    Cluster,
    Sentinel,
    Socket,
}

impl Scheme {
    fn of(url: &Url) -> Result<Self, Error> {
        let scheme = url.scheme();
        let (base, kind) = match scheme.rsplit_once(['-', '+']) {
            Some((base, "cluster")) if scheme.contains('-') => (base, Kind::Cluster),
            Some((base, "sentinel")) if scheme.contains('-') => (base, Kind::Sentinel),
            Some((base, "unix")) if scheme.contains('+') => (base, Kind::Socket),
            _ => (scheme, Kind::Server),
        };
        match (base, kind) {
            ("redis" | "valkey", kind) => Ok(Self { kind, tls: false }),
            // A socket has no TLS: it would silently be left out.
            ("rediss" | "valkeys", Kind::Server | Kind::Cluster | Kind::Sentinel) => Ok(Self { kind, tls: true }),
            _ => {
                let scheme = shown(scheme);
                Err(invalid(format!(
                    "unknown scheme {scheme}; use redis://, rediss:// (TLS), redis+unix:///path, redis-cluster:// or \
                     redis-sentinel://, or the same with valkey"
                )))
            }
        }
    }
}

fn check_authority(url: &Url, kind: Kind) -> Result<(), Error> {
    let host = url.host_str().unwrap_or_default();
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    match kind {
        Kind::Socket if !host.is_empty() && !has_credentials => {
            return Err(invalid("the path of a socket begins after three slashes: redis+unix:///path/to.sock"));
        }
        Kind::Socket => {}
        Kind::Server | Kind::Cluster | Kind::Sentinel if host.is_empty() => {
            return Err(invalid("it names no host; write redis://host:6379"));
        }
        Kind::Server | Kind::Cluster | Kind::Sentinel => {}
    }
    // A client authenticates only if there is a password, and otherwise ignores the user.
    let is_ignored = url.password().unwrap_or_default().is_empty() && !matches!(url.username(), "" | "default");
    match is_ignored {
        true => {
            Err(invalid("it names a user and no password; write redis://user:password@host or redis://:password@host"))
        }
        false => Ok(()),
    }
}

/// Refuses what may be the rest of a password that ended too early, without showing any of it.
fn check_leftovers(text: &str, url: &Url, kind: Kind) -> Result<(), Error> {
    // Only a URL that begins with its path has no password that could end in the path.
    let begins_with_path = text.split_once("://").is_some_and(|(_, rest)| rest.starts_with('/'));
    let in_path = !(kind == Kind::Socket && begins_with_path) && url.path().contains('@');
    let in_query = url.query().unwrap_or_default().split('&').any(|parameter| {
        let is_credential = parameter.starts_with(SENTINEL_USERNAME) || parameter.starts_with(SENTINEL_PASSWORD);
        !is_credential && parameter.contains('@')
    });
    match in_path || in_query || url.fragment().is_some() {
        true => Err(invalid(
            "there is a `#`, or an `@` behind a `/` or a `?`; in a password write %23 for #, %40 for @, %2F for / and \
             %3F for ?",
        )),
        false => Ok(()),
    }
}

fn check_path(url: &Url, kind: Kind) -> Result<(), Error> {
    let path = url.path();
    let path = path.strip_prefix('/').unwrap_or(path);
    match kind {
        Kind::Socket if path.is_empty() => Err(invalid("it names no socket; write redis+unix:///path/to.sock")),
        Kind::Socket => decoded_path(url).map(drop),
        Kind::Cluster if !matches!(path, "" | "0") => {
            Err(invalid(format!("database {}: a cluster has none but 0", shown(path))))
        }
        Kind::Server | Kind::Sentinel if !path.is_empty() && path.parse::<u8>().is_err() => {
            Err(invalid(format!("database {}: not a number from 0 to 255", shown(path))))
        }
        Kind::Server | Kind::Cluster | Kind::Sentinel => Ok(()),
    }
}

fn check_query(url: &Url, kind: Kind) -> Result<(), Error> {
    let known: &[&str] = match kind {
        Kind::Server | Kind::Socket => &[],
        Kind::Cluster => &[NODE],
        Kind::Sentinel => &[NODE, SENTINEL_SERVICE, SENTINEL_USERNAME, SENTINEL_PASSWORD],
    };
    let (mut after_password, mut has_service) = (false, false);
    for (name, value) in url.query_pairs() {
        match &*name {
            name if !known.contains(&name) => {
                // After a password, the name may be a part of it.
                let name = if after_password { Cow::Borrowed("after the password") } else { shown(name) };
                let hint = match kind {
                    Kind::Server | Kind::Socket => {
                        "a URL like this one takes none; the database goes into the path: redis://host/3"
                    }
                    Kind::Cluster => "a cluster's URL takes `node`",
                    Kind::Sentinel => {
                        "Sentinels' URLs take `sentinelServiceName`, `node`, `sentinelUsername` and `sentinelPassword`"
                    }
                };
                return Err(invalid(format!("unknown parameter {name}; {hint}")));
            }
            NODE => {
                let is_address = value
                    .split_once(':')
                    .is_some_and(|(host, port)| !host.is_empty() && !port.contains(':') && port.parse::<u16>().is_ok());
                if !is_address {
                    let value = if after_password { Cow::Borrowed("after the password") } else { shown(&value) };
                    return Err(invalid(format!("`node` {value}: not `host:port`")));
                }
            }
            SENTINEL_SERVICE => has_service = !value.is_empty(),
            SENTINEL_PASSWORD => after_password = true,
            _ => {}
        }
    }
    match kind == Kind::Sentinel && !has_service {
        true => Err(invalid("`sentinelServiceName` is missing: the name by which the Sentinels know the primary")),
        false => Ok(()),
    }
}

// The names are fred's.
const NODE: &str = "node";
const SENTINEL_SERVICE: &str = "sentinelServiceName";
const SENTINEL_USERNAME: &str = "sentinelUsername";
const SENTINEL_PASSWORD: &str = "sentinelPassword";

fn decoded_path(url: &Url) -> Result<Cow<'_, str>, Error> {
    percent_decode_str(url.path()).decode_utf8().map_err(|_| invalid("the path of the socket is not UTF-8"))
}

fn unparsable(text: &str, error: url::ParseError) -> Error {
    match error {
        url::ParseError::RelativeUrlWithoutBase => without_scheme(text),
        error => invalid(format!(
            "{error}; in a user name or a password `:`, `/`, `?`, `#`, `@`, `%` and the like must be percent-encoded"
        )),
    }
}

fn without_scheme(text: &str) -> Error {
    let text = text.trim();
    let (host, port) = text.rsplit_once(':').unwrap_or((text, "6379"));
    let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    match is_host && port.parse::<u16>().is_ok() {
        true => invalid(format!("`{text}` has no scheme; write redis://{text}")),
        false => invalid("it has no scheme; write redis://host:6379"),
    }
}

/// Returns a part of a URL as it is shown, if it is short and plain. A misplaced part may contain anything.
fn shown(part: &str) -> Cow<'static, str> {
    let is_plain = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+:".contains(&b));
    match is_plain && (1..=40).contains(&part.len()) {
        true => Cow::Owned(format!("`{part}`")),
        false => Cow::Borrowed("(not shown)"),
    }
}

fn invalid(what: impl Into<Cow<'static, str>>) -> Error {
    Error::InvalidUrl(what.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(url: &str) -> String {
        match parse(url) {
            Err(Error::InvalidUrl(what)) => what.into_owned(),
            other => panic!("{url}: {:?}", other.map(|target| target.to_string())),
        }
    }

    #[test]
    fn an_unknown_scheme_is_refused_by_name() {
        for scheme in
            ["http", "reddis", "redis+tls", "redis+ssl", "rediss+unix", "unix", "rediscluster", "redis+cluster"]
        {
            let said = refused(&format!("{scheme}://127.0.0.1:6379"));
            assert!(said.contains(&format!("unknown scheme `{scheme}`")), "{said}");
        }
    }

    #[test]
    fn a_missing_scheme_is_said_with_what_to_write() {
        for url in ["localhost", "localhost:6379", "127.0.0.1:6379", "redis.internal"] {
            assert_eq!(refused(url), format!("`{url}` has no scheme; write redis://{url}"));
        }
        for url in ["", "user:secret@localhost", "redis:secret", "//host"] {
            assert_eq!(refused(url), "it has no scheme; write redis://host:6379");
        }
    }

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        for (url, name) in [
            ("redis://a?db=3", "db"),
            ("redis+unix:///run/redis.sock?db=3", "db"),
            ("redis://a?node=b:1", "node"),
            ("redis-cluster://a?node=b:1&protocol=resp3", "protocol"),
            ("redis-sentinel://a?sentinelServiceName=x&db=3", "db"),
            ("redis-sentinel://a?sentinelServiceName=x&SentinelPassword=secret", "SentinelPassword"),
        ] {
            let said = refused(url);
            assert!(said.contains(&format!("unknown parameter `{name}`")), "{said}");
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        for (url, part) in [
            ("redis://a/300", "database `300`"),
            ("redis://a/1/2", "database (not shown)"),
            ("redis://a/x", "database `x`"),
            ("redis-cluster://a/3", "database `3`"),
            ("redis://a#3", "`#`"),
            ("redis://user@a", "no password"),
            ("redis+unix://run/redis.sock", "three slashes"),
            ("redis+unix://", "no socket"),
            ("redis-cluster://a?node=b", "`node` `b`"),
            ("redis-sentinel://a:1", "`sentinelServiceName`"),
            ("redis://", "no host"),
            ("redis://a:port", "invalid port number"),
            ("redis:///0", "no host"),
        ] {
            let said = refused(url);
            assert!(said.contains(part), "{url}: {said}");
        }
    }

    #[test]
    fn what_the_docs_name_is_taken() {
        for (url, to) in [
            ("redis://127.0.0.1:6379", "127.0.0.1:6379"),
            ("REDIS://a", "a:6379"),
            (" redis://a\n", "a:6379"),
            ("valkey://user:p%40ss@a:1/2", "a:1"),
            ("redis://:p@ss@a", "a:6379"),
            ("redis://default@a", "a:6379"),
            ("redis://[::1]:7", "[::1]:7"),
            ("redis+unix:///run/a%20b.sock", "/run/a b.sock"),
            ("redis+unix:///run/redis@main.sock", "/run/redis@main.sock"),
            ("valkey+unix://user:secret@x/run/a%40b.sock", "/run/a@b.sock"),
            ("redis-cluster://a:1/0?node=b:2&node=c:3", "the cluster at b:2, c:3, a:1"),
            ("valkey-sentinel://a?sentinelServiceName=x&sentinelPassword=p@ss", "`x` by the Sentinels at a:26379"),
        ] {
            assert_eq!(parse(url).unwrap().to_string(), to, "{url}");
        }
    }

    #[cfg(not(any(feature = "rustls", feature = "native-tls")))]
    #[test]
    fn tls_is_never_left_out() {
        for url in ["rediss://a", "REDISS://a", " rediss://a", "valkeys-cluster://a", "red\niss://a"] {
            let said = refused(url);
            assert!(said.contains("feature"), "{url}: {said}");
        }
    }

    /// Generates pieces of a carelessly written URL.
    fn piece() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("Seekret".to_owned()),
            "[:/?#@&=%+. \\[\\]\\\\]{1,2}",
            "[a-z0-9]{1,3}",
            Just("sentinelPassword=".to_owned()),
            Just("sentinelServiceName=x&".to_owned()),
            Just("node=".to_owned()),
            any::<char>().prop_map(String::from),
        ]
    }

    fn never_shows_a_password(url: &str) -> Result<(), TestCaseError> {
        let said = match parse(url) {
            Ok(target) => target.to_string(),
            Err(error) => format!("{error} {error:?} {:?}", std::error::Error::source(&error)),
        };
        prop_assert!(!said.to_lowercase().contains("seekret"), "{url}: {said}");
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4_000, ..ProptestConfig::default() })]

        #[test]
        fn no_url_panics(url in any::<String>(), pieces in prop::collection::vec(piece(), 0..8)) {
            drop(parse(&url));
            drop(parse(&format!("redis://{}", pieces.concat())));
            drop(parse(&pieces.concat()));
        }

        #[test]
        fn no_password_is_shown(
            scheme in prop::sample::select(vec!["redis", "valkey", "reddis", "redis-cluster", "redis-sentinel",
                "redis+unix"]),
            user in "[a-z]{0,3}",
            before in prop::collection::vec("[:/?#@&=%+.a-z0-9\\[\\]\\\\]{1,2}", 0..4),
            after in prop::collection::vec("[:/?#@&=%+.a-z0-9\\[\\]\\\\]{1,2}", 0..4),
            rest in prop::sample::select(vec![":6379", "/1", "?db=3", "/x", "?node=b", "?sentinelServiceName=x"]),
        ) {
            let (before, after) = (before.concat(), after.concat());
            never_shows_a_password(&format!("{scheme}://{user}:{before}Seekret{after}@host{rest}"))?;
            never_shows_a_password(&format!("{user}:{before}Seekret{after}@host{rest}"))?;
            let query = format!("sentinelServiceName=x&sentinelPassword={before}Seekret{after}");
            never_shows_a_password(&format!("{scheme}://host:1?node=b&{query}"))?;
            never_shows_a_password(&format!("{scheme}://host?db=3&{query}"))?;
            never_shows_a_password(&format!("{scheme}://host?{query}&db=3"))?;
        }
    }
}
