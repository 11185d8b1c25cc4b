//! Explains why a connection failed: to which server, why, and what to check.
//!
//! Clients pass on the `Debug` text of an error of the system or of the TLS library. This also corrects the kind of the
//! error: [`RedisErrorKind::Tls`](crate::RedisErrorKind::Tls), which is not transient, is only for what an operator has
//! to change.

use std::borrow::Cow;

use crate::store::redis::url::{Address, Servers, Target};
use crate::{RedisError, RedisErrorKind as ErrorKind};

/// The server, or the servers, at the other end.
pub(in super::super) struct Peer {
    address: String,
    has_password: bool,
    has_tls: bool,
    /// Removed from all texts, as a server may repeat them.
    secrets: Vec<String>,
}

impl Peer {
    pub(in super::super) fn of(target: &Target) -> Self {
        let mut secrets: Vec<String> = target.password.iter().cloned().collect();
        if let Servers::Sentinels { password, .. } = &target.servers {
            secrets.extend(password.clone());
        }
        let (address, has_password) = (target.to_string(), target.password.is_some());
        Self { address, has_password, has_tls: target.has_tls, secrets }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Returns why there is no connection. `server` is the one of several that the client has named, if it has.
    pub(in super::super) fn unreachable(&self, error: RedisError, server: Option<&Address>) -> RedisError {
        let at: Cow<'_, str> = match server {
            Some(server) if server.port != 0 => server.to_string().into(),
            _ => (&*self.address).into(),
        };
        let said = self.without_secrets(error.details());
        let has_secrets = matches!(said, Cow::Owned(_));
        let (kind, text) = self.explain(error.kind(), &said, &at);
        let mut error = error.with_text(text);
        error.change_kind(kind);
        // The client's error would show them.
        if has_secrets { error.without_source() } else { error }
    }

    /// Returns why a call has failed, unless the server has replied with an error.
    pub(in super::super) fn unanswered(&self, error: RedisError) -> RedisError {
        let at = &self.address;
        match error.kind() {
            ErrorKind::Timeout => self.silent(),
            ErrorKind::Io | ErrorKind::Tls => self.unreachable(error, None),
            ErrorKind::Parse | ErrorKind::Protocol => self.broken(),
            kind @ (ErrorKind::Canceled | ErrorKind::Routing) => {
                RedisError::new(kind, format!("{} ({at})", self.without_secrets(error.details())))
            }
            _ => error,
        }
    }

    /// Returns why there is no connection to a server that was reached before.
    pub(super) fn lost(&self, error: RedisError, server: Option<&Address>) -> RedisError {
        match error.kind() {
            ErrorKind::Parse | ErrorKind::Protocol => self.broken(),
            _ => self.unreachable(error, server),
        }
    }

    /// Returns the error for what replied before and now sends garbage: the connection is of no more use, and its
    /// client replaces it. The garbage may contain anything, and is not shown.
    fn broken(&self) -> RedisError {
        let at = &self.address;
        RedisError::new(ErrorKind::Io, format!("the connection to {at} broke: what it brought is no reply"))
    }

    /// Returns the error for a server that has not replied.
    pub(super) fn silent(&self) -> RedisError {
        RedisError::new(ErrorKind::Timeout, format!("{} did not answer in time", self.address))
    }

    /// Returns the error for a connection of fred's that nothing drives. If it is ours, the next call drives it again.
    #[cfg(feature = "fred")]
    pub(super) fn gone(&self, ours: bool) -> RedisError {
        let at = &self.address;
        match ours {
            true => {
                RedisError::new(ErrorKind::Canceled, format!("the runtime that drove the connection to {at} has ended"))
            }
            false => RedisError::new(
                ErrorKind::Config,
                format!(
                    "the client of {at} is not running: call `init`, on a runtime that lives as long as the locker"
                ),
            ),
        }
    }

    fn without_secrets<'a>(&self, said: &'a str) -> Cow<'a, str> {
        let mut said = Cow::Borrowed(said);
        for secret in &self.secrets {
            if !secret.is_empty() && said.contains(secret.as_str()) {
                said = said.replace(secret.as_str(), "***").into();
            }
        }
        said
    }

    fn explain(&self, kind: ErrorKind, said: &str, at: &str) -> (ErrorKind, String) {
        // The text of a refusal begins with its code, and must still do so.
        if let Some(hint) = self.refusal(said) {
            return (kind, format!("{said} ({at}: {hint})"));
        }
        match kind {
            ErrorKind::Timeout => {
                // A server without TLS waits for the rest of what it takes for a command.
                let tls = if self.has_tls { ", and whether it speaks TLS" } else { "" };
                let look = format!("look at the address, at firewalls, and whether the server hangs{tls}");
                (ErrorKind::Timeout, format!("no answer from {at} in time: {look}"))
            }
            ErrorKind::Io => explain_io(said, at),
            ErrorKind::Protocol | ErrorKind::Parse => {
                (kind, format!("what answers at {at} is no Redis or Valkey server: {said}"))
            }
            ErrorKind::Tls => explain_tls(said, at),
            kind => (kind, format!("{said} ({at})")),
        }
    }

    /// Returns what to check after a refusal of the server.
    fn refusal(&self, said: &str) -> Option<&'static str> {
        match said.split_ascii_whitespace().next()? {
            "NOAUTH" => Some("it wants a password in the URL, as in redis://:password@host"),
            "WRONGPASS" => Some("look at the user and the password in the URL"),
            "ERR" if said.contains("DB index") => Some("look at the database in the URL"),
            "ERR" if said.contains("AUTH") && self.has_password => Some("look at the user and the password in the URL"),
            "ERR" if said.contains("max number of clients") => Some("look at its maxclients"),
            "ERR" if said.contains("cluster support disabled") => Some("it is no cluster: use redis://"),
            _ => None,
        }
    }
}

fn explain_io(said: &str, at: &str) -> (ErrorKind, String) {
    let is = |kinds: &[&str]| kinds.iter().any(|kind| said.contains(kind));
    // `Os { code: 32, kind: BrokenPipe, .. }`, `Custom { kind: BrokenPipe, .. }`, or `Kind(BrokenPipe)`.
    let is_kind = |kinds: &[&str]| {
        let kind = said.split_once("kind: ").or_else(|| said.split_once("Kind("));
        let kind = kind.and_then(|(_, rest)| rest.split([',', ' ', ')']).next());
        kind.is_some_and(|kind| kinds.contains(&kind))
    };
    let text = match () {
        () if is_kind(&["ConnectionRefused"]) => {
            format!("connection refused by {at}: is a server running there, and is this its port?")
        }
        () if is(&["failed to lookup address", "Failed to resolve", "invalid socket address"]) => {
            format!("the host name of {at} does not resolve: look at the name and the DNS")
        }
        () if is_kind(&["NotFound"]) => {
            format!("there is no socket {at}: look at the path, and whether a server is running")
        }
        () if is_kind(&["PermissionDenied"]) => format!("no permission to connect to {at}"),
        () if is_kind(&["HostUnreachable", "NetworkUnreachable", "NetworkDown"]) => {
            format!("no way to {at}: look at the address, the routes and firewalls")
        }
        () if is_kind(&["TimedOut"]) => format!("no answer from {at} in time: look at the address and at firewalls"),
        () if is_kind(&["ConnectionReset", "BrokenPipe", "ConnectionAborted", "UnexpectedEof"])
            || said.starts_with("Connection closed")
            || said.starts_with("Connection Closed") =>
        {
            format!(
                "{at} closed the connection: has it been stopped, does it want TLS (rediss://), is it another service?"
            )
        }
        () if RUSTLS.iter().any(|error| said.contains(error)) || said.contains(OPENSSL) => {
            return explain_tls(said, at);
        }
        () => format!("{} ({at})", message_in(said)),
    };
    (ErrorKind::Io, text)
}

/// Signs of an error of rustls in the text of an I/O error.
const RUSTLS: [&str; 7] = [
    "InvalidCertificate(",
    "NoCertificatesPresented",
    "AlertReceived(",
    "PeerIncompatible(",
    "PeerMisbehaved(",
    "InvalidMessage(",
    "UnsupportedNameType",
];

/// The sign of an error of OpenSSL in the text of an I/O error, after the handshake.
const OPENSSL: &str = "SSL routines";

fn explain_tls(said: &str, at: &str) -> (ErrorKind, String) {
    let is = |signs: &[&str]| signs.iter().any(|sign| said.contains(sign));
    // The signs of a closed connection come last: they may also be part of other errors, such as an expired
    // certificate.
    let text = match () {
        () if is(&[
            "InvalidCertificate(",
            "NoCertificatesPresented",
            "certificate verify failed",
            "CertificateVerif",
        ]) =>
        {
            format!("the certificate of {at} is not accepted: {}", certificate_fault(said))
        }
        () if is(&["InvalidMessage(", "wrong version number", "packet length too long", "record layer failure"]) => {
            format!("{at} does not speak TLS: use redis://, or the port where it does")
        }
        () if is(&["AlertReceived(", " alert "]) => {
            format!("{at} refused the TLS handshake: {}", alert_in(said))
        }
        // The connection broke while the handshake was under way.
        () if is(&[
            "ErrorCode(5)",
            "unexpected eof",
            "UnexpectedEof",
            "Io(",
            "Os {",
            "ConnectionReset",
            "closed via error",
        ]) =>
        {
            return (ErrorKind::Io, format!("{at} closed the connection in the TLS handshake"));
        }
        () => format!("no TLS connection to {at}: {}", message_in(said)),
    };
    (ErrorKind::Tls, text)
}

/// Returns why a certificate is not accepted, as far as the texts of the libraries are known.
fn certificate_fault(said: &str) -> Cow<'_, str> {
    for (sign, fault) in [
        ("UnknownIssuer", "it is signed by an unknown issuer"),
        ("NotValidForName", "it is for another name"),
        ("NotValidYet", "it is not valid yet"),
        ("Expired", "it has expired"),
        ("Revoked", "it was revoked"),
        ("NoCertificatesPresented", "there is none"),
    ] {
        if said.contains(sign) {
            return fault.into();
        }
    }
    // OpenSSL: `X509VerifyResult { code: 10, error: "certificate has expired" }`.
    let verified = said.split_once("X509VerifyResult").and_then(|(_, result)| quoted(result, "error: "));
    verified.unwrap_or(said).into()
}

/// Returns the alert in `AlertReceived(HandshakeFailure)` or `reason: "sslv3 alert handshake failure"`.
fn alert_in(said: &str) -> &str {
    let rustls = said.split_once("AlertReceived(").and_then(|(_, rest)| rest.split_once(')')).map(|(alert, _)| alert);
    rustls.or_else(|| quoted(said, "reason: ")).unwrap_or(said)
}

/// Returns the readable part of the `Debug` text of an I/O error.
fn message_in(said: &str) -> &str {
    quoted(said, "message: ").or_else(|| quoted(said, "error: ")).unwrap_or(said)
}

fn quoted<'a>(said: &'a str, before: &str) -> Option<&'a str> {
    let (_, rest) = said.split_once(before)?;
    let (text, _) = rest.strip_prefix('"')?.split_once('"')?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::redis::url;

    fn peer(url: &str) -> Peer {
        Peer::of(&url::parse(url).unwrap())
    }

    fn explained(kind: ErrorKind, said: &'static str) -> crate::Error {
        peer("redis://:secret@10.0.0.1:6380").unreachable(RedisError::new(kind, said), None).into()
    }

    #[test]
    fn a_connection_error_names_the_server_and_what_to_look_at() {
        for (said, about) in [
            (r#"Os { code: 111, kind: ConnectionRefused, message: "Connection refused" }"#, "connection refused"),
            (
                r#"Custom { kind: Uncategorized, error: "failed to lookup address information: unknown" }"#,
                "does not resolve",
            ),
            (r#"Os { code: 113, kind: HostUnreachable, message: "No route to host" }"#, "routes"),
            (r#"Os { code: 104, kind: ConnectionReset, message: "Connection reset by peer" }"#, "TLS"),
            ("Connection closed.", "TLS"),
            ("Kind(BrokenPipe)", "closed the connection"),
            (r#"Os { code: 24, kind: Uncategorized, message: "Too many open files" }"#, "Too many open files (10."),
        ] {
            let error = explained(ErrorKind::Io, said);
            let text = error.to_string();
            assert!(text.contains("10.0.0.1:6380") && text.contains(about), "{text}");
            assert!(!text.contains("Os {") && !text.contains("kind:") && !text.contains("Kind("), "{text}");
            assert!(error.is_transient(), "{text}");
        }
    }

    #[test]
    fn a_refusal_of_the_server_keeps_its_name_and_says_what_to_look_at() {
        for (said, about) in [
            ("WRONGPASS invalid username-password pair or user is disabled.", "password in the URL"),
            ("NOAUTH Authentication required.", "redis://:password@host"),
            ("ERR DB index is out of range", "database in the URL"),
        ] {
            let error = explained(ErrorKind::Auth, said);
            assert_eq!(error.code(), said.split(' ').next());
            let text = error.to_string();
            assert!(text.contains("10.0.0.1:6380") && text.contains(about), "{text}");
            assert!(!error.is_transient());
        }
    }

    #[test]
    fn garbage_is_final_from_what_was_never_a_server_and_a_broken_connection_from_what_was() {
        assert!(!explained(ErrorKind::Parse, "Unexpected `72`").is_transient());
        for kind in [ErrorKind::Parse, ErrorKind::Protocol] {
            let garbled = RedisError::new(kind, "Unexpected `255`");
            let error = crate::Error::from(peer("redis://10.0.0.1:6380").unanswered(garbled));
            assert!(error.is_transient() && error.to_string().contains("10.0.0.1:6380"), "{error}");
        }
    }

    #[test]
    fn a_password_that_the_server_repeats_is_not_shown() {
        let error = explained(ErrorKind::Unknown, "ERR unknown command 'AUTH', with args beginning with: 'secret' ");
        assert!(!format!("{error:?} {error}").contains("secret"), "{error}");
    }

    #[test]
    fn of_several_servers_the_one_that_failed_is_named() {
        let cluster = peer("redis-cluster://a:1?node=b:2");
        let refused = RedisError::new(ErrorKind::Io, "kind: ConnectionRefused");
        let text = cluster.unreachable(refused.clone(), Some(&Address::new("b", 2))).to_string();
        assert!(text.contains("by b:2:"), "{text}");
        let text = cluster.unreachable(refused, None).to_string();
        assert!(text.contains("the cluster at b:2, a:1"), "{text}");
    }

    /// As rustls 0.23 says it, through an I/O error, and OpenSSL 3, through native-tls.
    #[test]
    fn a_certificate_that_is_not_accepted_is_not_waited_for() {
        let openssl = |code, error| {
            format!(
                "Ssl(Error {{ code: ErrorCode(1), cause: Some(Ssl(ErrorStack([Error {{ code: 167772294, library: \
                 \"SSL routines\", function: \"tls_post_process_server_certificate\", reason: \
                 \"certificate verify failed\", file: \"statem_clnt.c\", line: 1889 }}]))) }}, \
                 X509VerifyResult {{ code: {code}, error: \"{error}\" }})"
            )
        };
        for (kind, said, about) in [
            (
                ErrorKind::Io,
                "Custom { kind: InvalidData, error: InvalidCertificate(UnknownIssuer) }".to_owned(),
                "unknown issuer",
            ),
            (
                ErrorKind::Io,
                "Custom { kind: InvalidData, error: InvalidCertificate(NotValidForNameContext { expected: \
                 DnsName(\"redis.internal\"), presented: [\"DnsName(\\\"other\\\")\"] }) }"
                    .to_owned(),
                "another name",
            ),
            (
                ErrorKind::Io,
                "Custom { kind: InvalidData, error: InvalidCertificate(ExpiredContext { time: UnixTime(2), not_after: \
                 UnixTime(1) }) }"
                    .to_owned(),
                "expired",
            ),
            (ErrorKind::Tls, openssl(20, "unable to get local issuer certificate"), "unable to get local issuer"),
            (ErrorKind::Tls, openssl(62, "hostname mismatch"), "hostname mismatch"),
            (ErrorKind::Tls, openssl(10, "certificate has expired"), "certificate has expired"),
        ] {
            let error: crate::Error =
                peer("redis://10.0.0.1:6380").unreachable(RedisError::new(kind, said), None).into();
            let text = error.to_string();
            assert!(text.contains("certificate of 10.0.0.1:6380") && text.contains(about), "{text}");
            assert!(!error.is_transient(), "{text}");
            assert!(error.code().is_none());
        }
    }

    #[test]
    fn a_handshake_that_can_never_succeed_is_told_from_one_that_was_cut_off() {
        for (kind, said, about) in [
            (
                ErrorKind::Io,
                "Custom { kind: InvalidData, error: InvalidMessage(InvalidContentType) }",
                "does not speak TLS",
            ),
            (
                ErrorKind::Tls,
                r#"Ssl(.. ErrorStack([Error { library: "SSL routines", reason: "packet length too long" }])..)"#,
                "does not speak TLS",
            ),
            (
                ErrorKind::Io,
                "Custom { kind: InvalidData, error: AlertReceived(CertificateRequired) }",
                "CertificateRequired",
            ),
        ] {
            let error = explained(kind, said);
            assert!(!error.is_transient() && error.to_string().contains(about), "{error}");
        }
        for (kind, said) in [
            (ErrorKind::Io, r#"Custom { kind: UnexpectedEof, error: "tls handshake eof" }"#),
            (ErrorKind::Io, r#"Os { code: 104, kind: ConnectionReset, message: "Connection reset by peer" }"#),
            (
                ErrorKind::Tls,
                r#"Ssl(Error { code: ErrorCode(5), cause: None }, X509VerifyResult { code: 0, error: "ok" })"#,
            ),
            (
                ErrorKind::Tls,
                r#"Ssl(.. ErrorStack([Error { library: "SSL routines", reason: "unexpected eof while reading" }])..)"#,
            ),
        ] {
            let error = explained(kind, said);
            assert!(error.is_transient(), "{error}");
            assert!(error.to_string().contains("10.0.0.1:6380"), "{error}");
        }
    }
}
